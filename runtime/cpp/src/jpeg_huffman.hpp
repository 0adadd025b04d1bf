// A faster Huffman decoder for baseline JPEGs, put in the place of libjpeg's own.
//
// Half of the time and more of a JPEG, nine tenths of one that is scaled in the DCT, is Huffman decoding. This one
// looks up a code, its run and its length at once, and fills its 64 bits without a branch a byte. It decodes what is
// sound; at anything else (damage, markers in odd places, coefficients beyond the last) it gives up, and the caller
// lets libjpeg decode the image from its first byte, so that what is refused, and why, is libjpeg's own judgement.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstdio>

#include <jpeglib.h>

namespace edgedistill::detail {

class HuffmanDecoder {
public:
    // Whether this build can do it, and this image, whose decompression was just started, is for it.
    static bool can(const jpeg_decompress_struct& info) noexcept;

    // Takes over the decoding of the started image, whose bytes end with those of info.src. `info.client_data` points
    // at a pointer to this decoder. `give_up` does not return.
    void install(jpeg_decompress_struct& info, void (*give_up)(jpeg_decompress_struct&));

private:
    static constexpr int look_bits = 10;
    // One code with its additional bits: byte 0 the bits of both, byte 1 of the code, byte 2 of the number, byte 3 the
    // zeros before it. 0: a longer code.
    using Table = std::array<std::uint32_t, std::size_t{1} << look_bits>;

    struct Codes {
        Table table;
        std::array<std::int32_t, 18> largest;  // code of each length; -1: none
        std::array<std::int32_t, 18> offset;   // from a code to its place in `symbols`
        std::array<std::uint8_t, 256> symbols;
        void make(const JHUFF_TBL& source);
    };
    struct Bits {
        std::uint64_t buffer;  // the next bits, from the top
        int count;             // of them
        int padding;           // of those, zeros after the end of the data
        const std::uint8_t* at;
    };
    struct Block {
        const Codes* dc;
        const Codes* ac;
        int component;
        bool keep;  // its AC coefficients are looked at
    };

    static boolean decode_any(j_decompress_ptr info, JBLOCKROW* blocks);
    static boolean decode_bmi2(j_decompress_ptr info, JBLOCKROW* blocks);
    bool decode(JBLOCKROW* blocks) noexcept;
    void hand_back(jpeg_decompress_struct& info) const noexcept;  // after the last MCU: libjpeg goes on at the marker
    bool decode_block(Bits& bits, const Block& plan, JCOEF* block) noexcept;
    bool decode_dc(Bits& bits, const Block& plan, JCOEF* block) noexcept;
    template <bool keep>
    static bool decode_number(Bits& bits, std::uint32_t code, int& at, JCOEF* block) noexcept;
    template <bool keep>
    bool decode_ac(Bits& bits, const Codes& codes, JCOEF* block) noexcept;
    void fill(Bits& bits) const noexcept;
    // By value: bits whose address is known outside do not stay in registers.
    static Bits filled_slowly(Bits bits, const std::uint8_t* end) noexcept;
    static std::uint32_t long_code(std::uint64_t buffer, const Codes& codes) noexcept;
    bool begin_interval() noexcept;
    bool end_of_data(Bits bits, int marker) const noexcept;

    void (*give_up_)(jpeg_decompress_struct&) = nullptr;
    Bits bits_{};
    const std::uint8_t* end_ = nullptr;
    std::array<int, MAX_COMPS_IN_SCAN> last_dc_{};
    std::array<Block, D_MAX_BLOCKS_IN_MCU> plan_{};
    int blocks_ = 0;
    std::int64_t left_ = 0;  // MCUs
    unsigned interval_ = 0;  // MCUs between restart markers; 0: there are none
    unsigned interval_left_ = 0;
    int next_restart_ = 0;
    std::array<Codes, NUM_HUFF_TBLS> dc_codes_;
    std::array<Codes, NUM_HUFF_TBLS> ac_codes_;
};

}  // namespace edgedistill::detail
