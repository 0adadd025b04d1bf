#include "jpeg_huffman.hpp"

#include <algorithm>
#include <cstring>

#include "x86.hpp"

// libjpeg-turbo installs the header that says where its entropy decoder hangs.
#if __has_include(<jpegint.h>) && defined(LIBJPEG_TURBO_VERSION_NUMBER)
#define EDGEDISTILL_OWN_HUFFMAN 1
#include <jpegint.h>
#else
#define EDGEDISTILL_OWN_HUFFMAN 0
#endif

#if defined(__GNUC__) || defined(__clang__)
#define EDGEDISTILL_LIKELY(condition) __builtin_expect(static_cast<bool>(condition), 1)
#else
#define EDGEDISTILL_LIKELY(condition) (condition)
#endif

namespace edgedistill::detail {
namespace {

constexpr int longest_code = 16;

// Zigzag position -> row-major position. A block that goes beyond its last coefficient, by 15 at most, is noticed at
// its end: until then they all go to the last place.
constexpr std::array<std::uint8_t, 64 + 16> natural_order{
    0,  1,  8,  16, 9,  2,  3,  10, 17, 24, 32, 25, 18, 11, 4,  5,  12, 19, 26, 33, 40, 48, 41, 34, 27, 20, 13,
    6,  7,  14, 21, 28, 35, 42, 49, 56, 57, 50, 43, 36, 29, 22, 15, 23, 30, 37, 44, 51, 58, 59, 52, 45, 38, 31,
    39, 46, 53, 60, 61, 54, 47, 55, 62, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63, 63};

constexpr std::uint32_t entry(int code_bits, int symbol) {
    const int number_bits = symbol & 15;
    return static_cast<std::uint32_t>((code_bits + number_bits) | code_bits << 8 | number_bits << 16 |
                                      symbol >> 4 << 24);
}

constexpr int all_bits(std::uint32_t code) {
    return static_cast<int>(code & 0xFF);
}
constexpr int code_bits(std::uint32_t code) {
    return static_cast<int>(code >> 8 & 0xFF);
}
constexpr int number_bits(std::uint32_t code) {
    return static_cast<int>(code >> 16 & 0xFF);
}
constexpr int zeros(std::uint32_t code) {
    return static_cast<int>(code >> 24);
}

// The number after a code; its top bit says whether it is positive.
EDGEDISTILL_INLINE int number(std::uint64_t buffer, std::uint32_t code) {
    const int bits = number_bits(code);
    const std::uint64_t rest = buffer << code_bits(code);
    const auto value = static_cast<int>(rest >> 1 >> (63 - bits));
    const int negative = ~static_cast<int>(static_cast<std::int64_t>(rest) >> 63);
    return value + (negative & (1 - (1 << bits)));
}

std::uint64_t big_endian(const std::uint8_t* at) {
    std::uint64_t value = 0;
    std::memcpy(&value, at, sizeof(value));
#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ == __ORDER_BIG_ENDIAN__
    return value;
#else
    return __builtin_bswap64(value);
#endif
}

bool has_ff(std::uint64_t bytes) {
    return ((~bytes - 0x0101010101010101U) & bytes & 0x8080808080808080U) != 0;
}

}  // namespace

void HuffmanDecoder::Codes::make(const JHUFF_TBL& source) {
    table.fill(0);
    std::copy(std::begin(source.huffval), std::end(source.huffval), symbols.begin());
    largest.fill(-1);
    std::int32_t code = 0;
    std::int32_t place = 0;
    for (int length = 1; length <= longest_code; ++length, code <<= 1) {
        offset[static_cast<std::size_t>(length)] = place - code;
        for (int number = 0; number < source.bits[length]; ++number, ++code, ++place) {
            if (length > look_bits) continue;
            const std::size_t first = static_cast<std::size_t>(code) << (look_bits - length);
            const std::size_t count = std::size_t{1} << (look_bits - length);
            std::fill_n(table.begin() + static_cast<std::ptrdiff_t>(first), count,
                        entry(length, symbols[static_cast<std::size_t>(place)]));
        }
        if (source.bits[length] != 0) largest[static_cast<std::size_t>(length)] = code - 1;
    }
}

// 0: no such code.
std::uint32_t HuffmanDecoder::long_code(std::uint64_t buffer, const Codes& codes) noexcept {
    for (int length = look_bits + 1; length <= longest_code; ++length) {
        const auto code = static_cast<std::int32_t>(buffer >> (64 - length));
        const auto at = static_cast<std::size_t>(length);
        if (code <= codes.largest[at])
            return entry(length, codes.symbols[static_cast<std::size_t>(code + codes.offset[at]) & 255]);
    }
    return 0;
}

// 56 to 63 bits: enough for any code and its number, 31 at most. Zeros where the data has ended.
EDGEDISTILL_INLINE void HuffmanDecoder::fill(Bits& bits) const noexcept {
    if (EDGEDISTILL_LIKELY(end_ - bits.at >= 8)) {
        const std::uint64_t next = big_endian(bits.at);
        if (EDGEDISTILL_LIKELY(!has_ff(next))) {
            // The bits beyond `count` are those that will come next, so that they may be set twice.
            bits.buffer |= next >> bits.count;
            bits.at += (63 - bits.count) >> 3;
            bits.count |= 56;
            return;
        }
    }
    bits = filled_slowly(bits, end_);
}

HuffmanDecoder::Bits HuffmanDecoder::filled_slowly(Bits bits, const std::uint8_t* end) noexcept {
    while (bits.count < 56) {
        const bool here = bits.at < end;
        const bool stuffed = here && *bits.at == 0xFF;
        if (!here || (stuffed && (end - bits.at < 2 || bits.at[1] != 0))) {
            bits.padding += 8;
        } else {
            bits.buffer |= std::uint64_t{*bits.at} << (56 - bits.count);
            bits.at += stuffed ? 2 : 1;
        }
        bits.count += 8;
    }
    return bits;
}

EDGEDISTILL_INLINE bool HuffmanDecoder::decode_dc(Bits& bits, const Block& plan, JCOEF* block) noexcept {
    fill(bits);
    std::uint32_t code = plan.dc->table[bits.buffer >> (64 - look_bits)];
    if (code == 0 && (code = long_code(bits.buffer, *plan.dc)) == 0) return false;
    int& last = last_dc_[static_cast<std::size_t>(plan.component)];
    last += number(bits.buffer, code);
    bits.buffer <<= all_bits(code);
    bits.count -= all_bits(code);
    block[0] = static_cast<JCOEF>(last);
    return last >= -32768 && last <= 32767;
}

// One code and its number. False at the end of the block.
template <bool keep>
EDGEDISTILL_INLINE bool HuffmanDecoder::decode_number(Bits& bits, std::uint32_t code, int& at, JCOEF* block) noexcept {
    const std::uint64_t buffer = bits.buffer;
    bits.buffer <<= all_bits(code);
    bits.count -= all_bits(code);
    at += zeros(code);
    if (EDGEDISTILL_LIKELY(number_bits(code) != 0)) {
        if (keep) block[natural_order[static_cast<std::size_t>(at)]] = static_cast<JCOEF>(number(buffer, code));
    } else if (zeros(code) != 15) {
        return false;
    }
    ++at;
    return true;
}

template <bool keep>
EDGEDISTILL_INLINE bool HuffmanDecoder::decode_ac(Bits& bits, const Codes& codes, JCOEF* block) noexcept {
    int at = 1;
    while (at < DCTSIZE2) {
        fill(bits);
        std::uint32_t code = codes.table[bits.buffer >> (64 - look_bits)];
        if (!EDGEDISTILL_LIKELY(code != 0)) {
            if ((code = long_code(bits.buffer, codes)) == 0) return false;
            if (!decode_number<keep>(bits, code, at, block)) return true;
            continue;
        }
        if (!decode_number<keep>(bits, code, at, block)) return true;
        // Two short codes and their numbers have 50 bits at most: there are as many.
        if (at >= DCTSIZE2) break;
        code = codes.table[bits.buffer >> (64 - look_bits)];
        if (!EDGEDISTILL_LIKELY(code != 0)) continue;
        if (!decode_number<keep>(bits, code, at, block)) return true;
    }
    return at == DCTSIZE2;
}

EDGEDISTILL_INLINE bool HuffmanDecoder::decode_block(Bits& bits, const Block& plan, JCOEF* block) noexcept {
    if (!decode_dc(bits, plan, block)) return false;
    return plan.keep ? decode_ac<true>(bits, *plan.ac, block) : decode_ac<false>(bits, *plan.ac, block);
}

// Whether all whole bytes were used and that marker follows; 0: any.
bool HuffmanDecoder::end_of_data(Bits bits, int marker) const noexcept {
    const int unused = bits.count - bits.padding;
    if (unused < 0 || unused >= 8 || end_ - bits.at < 2 || bits.at[0] != 0xFF) return false;
    return marker == 0 ? bits.at[1] != 0 && bits.at[1] != 0xFF : bits.at[1] == marker;
}

bool HuffmanDecoder::begin_interval() noexcept {
    if (!end_of_data(bits_, 0xD0 + next_restart_)) return false;
    next_restart_ = (next_restart_ + 1) & 7;
    interval_left_ = interval_;
    bits_ = {0, 0, 0, bits_.at + 2};
    last_dc_.fill(0);
    return true;
}

EDGEDISTILL_INLINE bool HuffmanDecoder::decode(JBLOCKROW* blocks) noexcept {
    if (interval_ != 0 && interval_left_-- == 0) {
        if (!begin_interval()) return false;
        --interval_left_;
    }
    Bits bits = bits_;
    for (int block = 0; block < blocks_; ++block) {
        if (!decode_block(bits, plan_[static_cast<std::size_t>(block)], *blocks[block])) return false;
    }
    bits_ = bits;
    return bits.count >= bits.padding && (--left_ > 0 || end_of_data(bits, 0));
}

#if EDGEDISTILL_OWN_HUFFMAN

namespace {

// Scaled to one pixel a block, only the average is looked at.
bool keeps_ac(const jpeg_component_info& component) {
#if JPEG_LIB_VERSION >= 70
    return component.DCT_h_scaled_size > 1 || component.DCT_v_scaled_size > 1;
#else
    return component.DCT_scaled_size > 1;
#endif
}

}  // namespace

bool HuffmanDecoder::can(const jpeg_decompress_struct& info) noexcept {
    return info.progressive_mode == 0 && info.arith_code == 0 && info.comps_in_scan == info.num_components &&
           info.data_precision == 8 && info.Ss == 0 && info.Se == DCTSIZE2 - 1;
}

void HuffmanDecoder::hand_back(jpeg_decompress_struct& info) const noexcept {
    if (left_ > 0) return;
    info.src->next_input_byte = bits_.at;
    info.src->bytes_in_buffer = static_cast<std::size_t>(end_ - bits_.at);
}

boolean HuffmanDecoder::decode_any(j_decompress_ptr info, JBLOCKROW* blocks) {
    HuffmanDecoder& self = **static_cast<HuffmanDecoder**>(info->client_data);
    if (!self.decode(blocks)) self.give_up_(*info);
    self.hand_back(*info);
    return TRUE;
}

#if EDGEDISTILL_X86
EDGEDISTILL_BMI2 boolean HuffmanDecoder::decode_bmi2(j_decompress_ptr info, JBLOCKROW* blocks) {
    HuffmanDecoder& self = **static_cast<HuffmanDecoder**>(info->client_data);
    if (!self.decode(blocks)) self.give_up_(*info);
    self.hand_back(*info);
    return TRUE;
}
#endif

void HuffmanDecoder::install(jpeg_decompress_struct& info, void (*give_up)(jpeg_decompress_struct&)) {
    give_up_ = give_up;
    bits_ = {0, 0, 0, info.src->next_input_byte};
    end_ = info.src->next_input_byte + info.src->bytes_in_buffer;
    last_dc_.fill(0);
    left_ = std::int64_t{info.MCUs_per_row} * info.MCU_rows_in_scan;
    interval_ = interval_left_ = info.restart_interval;
    next_restart_ = 0;
    std::array<bool, NUM_HUFF_TBLS> dc_made{};
    std::array<bool, NUM_HUFF_TBLS> ac_made{};
    blocks_ = info.blocks_in_MCU;
    for (int block = 0; block < blocks_; ++block) {
        const int member = info.MCU_membership[block];
        const jpeg_component_info& component = *info.cur_comp_info[member];
        const auto dc = static_cast<std::size_t>(component.dc_tbl_no);
        const auto ac = static_cast<std::size_t>(component.ac_tbl_no);
        if (!dc_made[dc]) dc_codes_[dc].make(*info.dc_huff_tbl_ptrs[dc]);
        if (!ac_made[ac]) ac_codes_[ac].make(*info.ac_huff_tbl_ptrs[ac]);
        dc_made[dc] = ac_made[ac] = true;
        plan_[static_cast<std::size_t>(block)] = {&dc_codes_[dc], &ac_codes_[ac], member, keeps_ac(component)};
    }
    info.entropy->decode_mcu = decode_any;
#if EDGEDISTILL_X86
    if (__builtin_cpu_supports("bmi2") != 0 && __builtin_cpu_supports("bmi") != 0)
        info.entropy->decode_mcu = decode_bmi2;
#endif
}

#else

bool HuffmanDecoder::can(const jpeg_decompress_struct&) noexcept {
    return false;
}
void HuffmanDecoder::install(jpeg_decompress_struct&, void (*)(jpeg_decompress_struct&)) {}

#endif

}  // namespace edgedistill::detail
