#include "jpeg.hpp"

#include <array>
#include <csetjmp>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <edgedistill/error.hpp>
#include <string>
#include <vector>

#include <jerror.h>
#include <jpeglib.h>

#include "buffer.hpp"
#include "color.hpp"
#include "jpeg_huffman.hpp"

namespace edgedistill::detail {
namespace {

constexpr int batch_rows = 16;
constexpr std::size_t alignment = 64;

std::size_t aligned(std::size_t size) {
    return (size + alignment - 1) & ~(alignment - 1);
}

// Memory for one image at a time, given out in slices and taken back all at once. After the first images of the largest
// size it is one block, and libjpeg allocates nothing any more.
class Arena {
public:
    Arena() = default;
    ~Arena() { release(); }
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;

    // nullptr when there is no memory.
    void* take(std::size_t size) noexcept {
        size = aligned(size);
        used_ += size;
        if (head_ == nullptr || size > head_->size - at_) {
            if (!add_block(size)) return nullptr;
        }
        void* slice = reinterpret_cast<std::uint8_t*>(head_) + aligned(sizeof(Block)) + at_;
        at_ += size;
        return slice;
    }

    void reset() noexcept {
        const bool several = head_ != nullptr && head_->next != nullptr;
        if (several || used_ > Buffer::kept_bytes) {
            release();
            if (used_ <= Buffer::kept_bytes) add_block(used_);
        }
        at_ = used_ = 0;
    }

private:
    struct Block {
        Block* next;
        std::size_t size;
    };

    bool add_block(std::size_t size) noexcept {
        constexpr std::size_t least = std::size_t{64} << 10;
        const std::size_t bytes = size > least ? size : least;
        auto* block = static_cast<Block*>(std::aligned_alloc(alignment, aligned(sizeof(Block)) + bytes));
        if (block == nullptr) return false;
        *block = {head_, bytes};
        head_ = block;
        at_ = 0;
        return true;
    }

    void release() noexcept {
        while (head_ != nullptr) {
            Block* next = head_->next;
            std::free(head_);
            head_ = next;
        }
    }

    Block* head_ = nullptr;
    std::size_t at_ = 0;
    std::size_t used_ = 0;
};

struct Errors {
    jpeg_error_mgr base;  // first: libjpeg knows this address
    std::jmp_buf jump;
    std::array<char, JMSG_LENGTH_MAX> message;
};

[[noreturn]] void fail(j_common_ptr info) {
    auto* errors = reinterpret_cast<Errors*>(info->err);
    info->err->format_message(info, errors->message.data());
    std::longjmp(errors->jump, 1);
}

// Python's decoder refuses what libjpeg only warns of.
void fail_on_warning(j_common_ptr info, int level) {
    if (level < 0) fail(info);
}

void no_output(j_common_ptr) {}
void no_step(j_decompress_ptr) {}

boolean no_more_input(j_decompress_ptr info) {
    WARNMS(info, JWRN_JPEG_EOF);
    return TRUE;
}

void skip_input(j_decompress_ptr info, long count) {
    if (count <= 0) return;
    if (static_cast<std::size_t>(count) > info->src->bytes_in_buffer) WARNMS(info, JWRN_JPEG_EOF);
    info->src->next_input_byte += count;
    info->src->bytes_in_buffer -= static_cast<std::size_t>(count);
}

// libjpeg calls back through client_data.
struct Memory {
    HuffmanDecoder* huffman = nullptr;  // first: it looks for itself here
    Arena arena;
    jpeg_memory_mgr theirs{};  // libjpeg's own calls
};

void* take(j_common_ptr info, std::size_t size) {
    void* slice = static_cast<Memory*>(info->client_data)->arena.take(size);
    if (slice == nullptr) ERREXIT1(info, JERR_OUT_OF_MEMORY, 0);
    return slice;
}

void* allocate(j_common_ptr info, int, std::size_t size) {
    return take(info, size);
}

// `count` rows and the array of pointers to them. The vector instructions of libjpeg-turbo read and write up to the
// next multiple of 64 bytes.
template <typename Row>
Row* allocate_rows(j_common_ptr info, std::size_t row_bytes, JDIMENSION count) {
    auto* rows = static_cast<Row*>(take(info, count * sizeof(Row)));
    auto* memory = static_cast<std::uint8_t*>(take(info, aligned(row_bytes) * count));
    for (JDIMENSION row = 0; row < count; ++row) rows[row] = reinterpret_cast<Row>(memory + aligned(row_bytes) * row);
    return rows;
}

JSAMPARRAY allocate_samples(j_common_ptr info, int, JDIMENSION width, JDIMENSION count) {
    return allocate_rows<JSAMPROW>(info, std::size_t{width} * sizeof(JSAMPLE), count);
}

JBLOCKARRAY allocate_blocks(j_common_ptr info, int, JDIMENSION width, JDIMENSION count) {
    return allocate_rows<JBLOCKROW>(info, std::size_t{width} * sizeof(JBLOCK), count);
}

void free_memory(j_common_ptr info, int pool) {
    auto* memory = static_cast<Memory*>(info->client_data);
    // Progressive images keep their coefficients in libjpeg's own memory.
    memory->theirs.free_pool(info, pool);
    if (pool == JPOOL_IMAGE) memory->arena.reset();
}

[[noreturn]] void refuse(jpeg_decompress_struct& info, const char* why) {
    auto* errors = reinterpret_cast<Errors*>(info.err);
    std::strncpy(errors->message.data(), why, errors->message.size() - 1);
    std::longjmp(errors->jump, 1);
}

// Whether the scans of a progressive image do not say all of it. libjpeg then smooths over the gaps, and its versions
// do so differently.
bool incomplete(const jpeg_decompress_struct& info) {
    constexpr int smoothed_coefficients = 10;
    if (info.progressive_mode == 0 || info.coef_bits == nullptr) return false;
    for (int component = 0; component < info.num_components; ++component) {
        for (int number = 0; number < smoothed_coefficients; ++number) {
            if (info.coef_bits[component][number] != 0) return true;
        }
    }
    return false;
}

// What this decoder could not make sense of, libjpeg decodes, or refuses, from the first byte.
[[noreturn]] void give_up(jpeg_decompress_struct& info) {
    std::longjmp(reinterpret_cast<Errors*>(info.err)->jump, 1);
}

// libjpeg's calls to `body` that fail end here, with errors.message set.
template <typename Body>
bool guarded(Errors& errors, const Body& body) {
    if (setjmp(errors.jump) != 0) return false;
    body();
    return true;
}

}  // namespace

struct JpegDecoder::Impl {
    jpeg_decompress_struct info{};
    Errors errors{};
    jpeg_source_mgr source{};
    Memory memory;
    HuffmanDecoder huffman;
    bool libjpeg_alone = false;  // our Huffman decoder is not to be used
    bool own_huffman = false;    // it was, in this attempt
    Buffer row_memory;
    std::array<JSAMPROW, batch_rows> rows{};

    Impl();
    ~Impl() { jpeg_destroy_decompress(&info); }
    Impl(const Impl&) = delete;
    Impl& operator=(const Impl&) = delete;

    bool attempt(Bytes data, Size size, int k, RowSink& sink);
    void start(Bytes data, Size size, int k);
    void read(RowSink& sink);
};

JpegDecoder::Impl::Impl() {
    info.err = jpeg_std_error(&errors.base);
    errors.base.error_exit = fail;
    errors.base.emit_message = fail_on_warning;
    errors.base.output_message = no_output;
    info.client_data = &memory;
    memory.huffman = &huffman;
    if (!guarded(errors, [this] { jpeg_create_decompress(&info); })) {
        throw Error(ErrorKind::image, std::string("libjpeg cannot start (") + errors.message.data() + ")");
    }
    memory.theirs = *info.mem;
    info.mem->alloc_small = allocate;
    info.mem->alloc_large = allocate;
    info.mem->alloc_sarray = allocate_samples;
    info.mem->alloc_barray = allocate_blocks;
    info.mem->free_pool = free_memory;
    source.init_source = no_step;
    source.fill_input_buffer = no_more_input;
    source.skip_input_data = skip_input;
    source.resync_to_restart = jpeg_resync_to_restart;
    source.term_source = no_step;
    info.src = &source;
}

// `size`: of the result. Fails into `guarded`.
void JpegDecoder::Impl::start(Bytes data, Size size, int k) {
    // Tables of the image before would be used by one that lacks its own; their memory is gone anyway.
    for (JQUANT_TBL*& table : info.quant_tbl_ptrs) table = nullptr;
    for (JHUFF_TBL*& table : info.dc_huff_tbl_ptrs) table = nullptr;
    for (JHUFF_TBL*& table : info.ac_huff_tbl_ptrs) table = nullptr;
    source.next_input_byte = data.data;
    source.bytes_in_buffer = data.size;
    jpeg_read_header(&info, TRUE);
    info.scale_num = 1;
    info.scale_denom = static_cast<unsigned>(k);
    info.dct_method = JDCT_ISLOW;
    info.do_fancy_upsampling = TRUE;
    info.out_color_space = info.num_components == 1   ? JCS_GRAYSCALE
                           : info.num_components == 4 ? JCS_CMYK
                                                      : JCS_EXT_BGRX;
    jpeg_calc_output_dimensions(&info);
    if (info.output_width != size.width || info.output_height != size.height) {
        refuse(info, "its pixels are not what its header says");
    }
    jpeg_start_decompress(&info);
    if (incomplete(info)) refuse(info, "scans are missing");
    own_huffman = !libjpeg_alone && HuffmanDecoder::can(info);
    if (own_huffman) huffman.install(info, give_up);
}

// Fails into `guarded`.
void JpegDecoder::Impl::read(RowSink& sink) {
    const std::ptrdiff_t stride = rows[1] - rows[0];
    while (info.output_scanline < info.output_height) {
        const JDIMENSION count = jpeg_read_scanlines(&info, rows.data(), batch_rows);
        if (info.out_color_space == JCS_CMYK) {
            for (JDIMENSION row = 0; row < count; ++row) cmyk_to_bgrx(rows[row], info.output_width, rows[row]);
        }
        sink.rows(rows[0], stride, static_cast<int>(count));
    }
    jpeg_finish_decompress(&info);
}

bool JpegDecoder::Impl::attempt(Bytes data, Size size, int k, RowSink& sink) {
    own_huffman = false;
    const bool done = guarded(errors, [this, data, size, k, &sink] {
        start(data, size, k);
        read(sink);
    });
    jpeg_abort_decompress(&info);
    return done;
}

JpegDecoder::JpegDecoder() : impl_(std::make_unique<Impl>()) {}

JpegDecoder::~JpegDecoder() = default;

bool JpegDecoder::used_own_huffman() const noexcept {
    return impl_->own_huffman;
}

void JpegDecoder::decode(Bytes data, const ImageHeader& header, std::string_view name, int k, RowSink& sink) {
    Impl& impl = *impl_;
    const Size size{(header.height + k - 1) / k, (header.width + k - 1) / k};
    const std::size_t stride = aligned(static_cast<std::size_t>(size.width * channels(layout(header))));
    std::uint8_t* memory = impl.row_memory.take(stride * batch_rows);
    for (std::size_t row = 0; row < batch_rows; ++row) impl.rows[row] = memory + stride * row;
    impl.libjpeg_alone = false;
    bool done = impl.attempt(data, size, k, sink);
    if (!done && impl.own_huffman) {
        impl.libjpeg_alone = true;
        sink.restart();
        done = impl.attempt(data, size, k, sink);
    }
    if (!done) throw_damaged(name, impl.errors.message.data());
}

}  // namespace edgedistill::detail
