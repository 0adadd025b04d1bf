#include "png.hpp"

#include <libdeflate.h>
#include <png.h>

#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstring>
#include <new>
#include <string>

#include "kernels.hpp"
#include "png_filter.hpp"

namespace edgedistill::detail {
namespace {

constexpr std::size_t bit_depth_at = 24;
constexpr std::size_t color_type_at = 25;
constexpr std::size_t first_chunk_at = 8;
constexpr std::size_t second_chunk_at = 33;  // behind IHDR
// libpng refuses wider and higher pictures.
constexpr std::int64_t max_libpng_side = 1'000'000;
// Above this a picture is read row by row.
constexpr std::size_t max_whole_bytes = Buffer::kept_bytes / 2;
// DEFLATE makes no more of a byte.
constexpr std::size_t max_expansion = 1032;

std::uint32_t big_endian(const std::uint8_t* at) {
    return static_cast<std::uint32_t>(at[0]) << 24 | static_cast<std::uint32_t>(at[1]) << 16 |
           static_cast<std::uint32_t>(at[2]) << 8 | at[3];
}

std::string chunk_name(const std::uint8_t* at) {
    std::string name = "b'";
    for (int letter = 0; letter < 4; ++letter) {
        name += at[letter] >= 32 && at[letter] < 127 ? static_cast<char>(at[letter]) : '?';
    }
    return name + "'";
}

// libpng versions differ in what they forgive.
void check_chunks(Bytes data, std::string_view name) {
    std::uint64_t at = first_chunk_at;
    for (int chunk = 0; chunk < max_chunks && at + 12 <= data.size; ++chunk) {
        const std::uint64_t length = big_endian(data.data + at);
        const std::uint64_t end = at + 8 + length;
        if (end + 4 > data.size) break;
        const std::uint8_t* body = data.data + at + 4;
        const std::uint32_t checksum = libdeflate_crc32(0, body, static_cast<std::size_t>(length + 4));
        if (checksum != big_endian(data.data + end)) throw_damaged(name, "checksum of chunk " + chunk_name(body));
        if (std::memcmp(body, "IEND", 4) == 0) return;
        at = end + 4;
    }
    throw_damaged(name, "no end chunk");
}

struct Failure {
    std::jmp_buf jump;
    std::array<char, 128> message;
};

[[noreturn]] void fail(png_structp png, png_const_charp message) {
    auto* failure = static_cast<Failure*>(png_get_error_ptr(png));
    std::strncpy(failure->message.data(), message, failure->message.size() - 1);
    std::longjmp(failure->jump, 1);
}

void ignore_warning(png_structp, png_const_charp) {}

void read_bytes(png_structp png, png_bytep out, std::size_t count) {
    auto* rest = static_cast<Bytes*>(png_get_io_ptr(png));
    if (count > rest->size) png_error(png, "it ends too early");
    std::memcpy(out, rest->data, count);
    *rest = {rest->data + count, rest->size - count};
}

class Decoder {
public:
    explicit Decoder(Bytes data) : rest_(data) {
        failure_.message.fill('\0');
        png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, &failure_, fail, ignore_warning);
        if (png_ != nullptr) info_ = png_create_info_struct(png_);
        if (info_ == nullptr) {
            png_destroy_read_struct(&png_, nullptr, nullptr);
            throw std::bad_alloc();
        }
    }
    ~Decoder() { png_destroy_read_struct(&png_, &info_, nullptr); }
    Decoder(const Decoder&) = delete;
    Decoder& operator=(const Decoder&) = delete;

    // Each returns false where libpng fails, with message() set.
    bool start() noexcept {
        return guarded([this] { prepare(); });
    }
    bool read(std::uint8_t* memory, RowSink& sink) noexcept {
        return guarded([this, memory, &sink] { read_rows(memory, sink); });
    }

    bool interlaced() const noexcept { return passes_ > 1; }
    std::size_t row_bytes() const noexcept { return png_get_rowbytes(png_, info_); }
    std::int64_t height() const noexcept { return png_get_image_height(png_, info_); }
    std::int64_t width() const noexcept { return png_get_image_width(png_, info_); }
    const char* message() const noexcept { return failure_.message.data(); }

private:
    template <typename Body>
    bool guarded(const Body& body) noexcept {
        if (setjmp(failure_.jump) != 0) return false;
        body();
        return true;
    }

    void prepare();
    void read_rows(std::uint8_t* memory, RowSink& sink);

    Failure failure_{};
    Bytes rest_;
    png_structp png_ = nullptr;
    png_infop info_ = nullptr;
    int passes_ = 1;
};

void Decoder::prepare() {
    png_set_read_fn(png_, &rest_, read_bytes);
    // They were checked.
    png_set_crc_action(png_, PNG_CRC_QUIET_USE, PNG_CRC_QUIET_USE);
    png_read_info(png_, info_);
    const int color_type = png_get_color_type(png_, info_);
    const int bit_depth = png_get_bit_depth(png_, info_);
    if (bit_depth == 16) png_set_strip_16(png_);
    if (color_type != PNG_COLOR_TYPE_RGB_ALPHA) png_set_strip_alpha(png_);
    if (color_type == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png_);
    if (color_type == PNG_COLOR_TYPE_GRAY && bit_depth < 8) png_set_expand_gray_1_2_4_to_8(png_);
    passes_ = png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
}

void Decoder::read_rows(std::uint8_t* memory, RowSink& sink) {
    const auto rows = static_cast<png_uint_32>(height());
    const std::size_t bytes = row_bytes();
    for (int pass = 0; pass < passes_; ++pass) {
        for (png_uint_32 row = 0; row < rows; ++row) {
            png_read_row(png_, memory + (passes_ > 1 ? row * bytes : 0), nullptr);
            if (passes_ == 1) sink.rows(memory, 0, 1);
        }
    }
    png_read_end(png_, nullptr);
    if (passes_ > 1) sink.rows(memory, static_cast<std::ptrdiff_t>(bytes), static_cast<int>(rows));
}

// Whether libpng, too, passes over such a chunk: its name is four letters, the first of them small.
bool is_harmless(const std::uint8_t* kind) {
    const auto is_letter = [](std::uint8_t byte) { return (byte | 0x20) >= 'a' && (byte | 0x20) <= 'z'; };
    return (kind[0] & 0x20) != 0 && std::all_of(kind, kind + 4, is_letter);
}

// The compressed bytes of a picture whose chunks, checked before, are in order, and of which none changes the pixels;
// else nothing. `memory` holds them where they come in several chunks.
Bytes compressed_bytes(Bytes data, Buffer& memory) {
    std::size_t pieces = 0;
    std::size_t size = 0;
    std::size_t first = 0;
    bool ended = false;
    for (std::size_t at = second_chunk_at;;) {
        const std::size_t length = big_endian(data.data + at);
        const std::uint8_t* kind = data.data + at + 4;
        if (std::memcmp(kind, "IEND", 4) == 0) break;
        if (std::memcmp(kind, "IDAT", 4) == 0) {
            if (ended) return {};
            if (pieces++ == 0) first = at;
            size += length;
        } else if (is_harmless(kind)) {
            ended = pieces > 0;
        } else {
            return {};
        }
        at += length + 12;
    }
    if (pieces == 0) return {};
    if (pieces == 1) return {data.data + first + 8, size};
    std::uint8_t* to = memory.take(size);
    for (std::size_t at = first; pieces > 0; --pieces) {
        const std::size_t length = big_endian(data.data + at);
        std::memcpy(to, data.data + at + 8, length);
        to += length;
        at += length + 12;
    }
    return {to - size, size};
}

}  // namespace

struct PngDecoder::Impl {
    std::unique_ptr<libdeflate_decompressor, void (*)(libdeflate_decompressor*)> inflate{
        libdeflate_alloc_decompressor(), libdeflate_free_decompressor};
    Buffer compressed;
    Buffer filtered;
    Buffer pixels;
    bool own = false;

    Impl() {
        if (inflate == nullptr) throw std::bad_alloc();
    }

    bool decode_plain(Bytes data, const ImageHeader& header, RowSink& sink);
    void decode_any(Bytes data, const ImageHeader& header, std::string_view name, RowSink& sink);
    void trim() noexcept {
        compressed.trim();
        filtered.trim();
        pixels.trim();
    }

private:
    bool decompress(Bytes data, std::size_t size);
    void send_unfiltered(std::size_t row_bytes, int pixel_size, std::int64_t height, RowSink& sink);
};

// False, and nothing was sent: libpng shall see it.
bool PngDecoder::Impl::decode_plain(Bytes data, const ImageHeader& header, RowSink& sink) {
    const std::uint8_t color_type = data.data[color_type_at];
    const bool plain_color =
        color_type == PNG_COLOR_TYPE_GRAY || color_type == PNG_COLOR_TYPE_RGB || color_type == PNG_COLOR_TYPE_RGB_ALPHA;
    // Depth, then colour, compression, filters and interlacing.
    if (big_endian(data.data + first_chunk_at) != 13 || data.data[bit_depth_at] != 8 || !plain_color ||
        data.data[color_type_at + 1] != 0 || data.data[color_type_at + 2] != 0 || data.data[color_type_at + 3] != 0) {
        return false;
    }
    if (header.height > max_libpng_side || header.width > max_libpng_side) return false;
    const int pixel_size = channels(layout(data));
    const auto row_bytes = static_cast<std::size_t>(header.width * pixel_size);
    const std::size_t size = (row_bytes + 1) * static_cast<std::size_t>(header.height);
    if (size > max_whole_bytes || !decompress(data, size)) return false;
    const std::uint8_t* filter = filtered.data();
    for (std::int64_t row = 0; row < header.height; ++row, filter += row_bytes + 1) {
        if (*filter > 4) return false;
    }
    send_unfiltered(row_bytes, pixel_size, header.height, sink);
    return true;
}

// The rows with their filters, to the byte as many as there must be.
bool PngDecoder::Impl::decompress(Bytes data, std::size_t size) {
    const Bytes all = compressed_bytes(data, compressed);
    if (all.size < 2 || all.size < size / max_expansion) return false;
    // zlib refuses what reaches back further than the window that the first byte declares; libdeflate does not look.
    if (size > std::size_t{1} << (8 + (all.data[0] >> 4)) && all.data[0] >> 4 < 7) return false;
    std::uint8_t* out = filtered.take(size + FilteredRows::padding);
    std::size_t used = 0;
    const libdeflate_result result =
        libdeflate_zlib_decompress_ex(inflate.get(), all.data, all.size, out, size, &used, nullptr);
    return result == LIBDEFLATE_SUCCESS && used == all.size;
}

void PngDecoder::Impl::send_unfiltered(std::size_t row_bytes, int pixel_size, std::int64_t height, RowSink& sink) {
    constexpr int most = FilteredRows::most;
    const std::size_t stride = row_bytes + FilteredRows::padding;
    std::uint8_t* band = pixels.take(stride * most + 2 * FilteredRows::padding) + FilteredRows::padding;
    std::memset(band + stride * (most - 1), 0, row_bytes);
    const std::uint8_t* rows = filtered.data();
    for (std::int64_t top = 0; top < height; top += most) {
        const int count = static_cast<int>(std::min<std::int64_t>(most, height - top));
        kernels().unfilter({rows, row_bytes, count, pixel_size}, band, static_cast<std::ptrdiff_t>(stride));
        sink.rows(band, static_cast<std::ptrdiff_t>(stride), count);
        rows += (row_bytes + 1) * most;
    }
}

void PngDecoder::Impl::decode_any(Bytes data, const ImageHeader& header, std::string_view name, RowSink& sink) {
    Decoder decoder(data);
    if (!decoder.start()) throw_damaged(name, decoder.message());
    const auto expected = static_cast<std::size_t>(header.width * channels(layout(data)));
    if (decoder.width() != header.width || decoder.height() != header.height || decoder.row_bytes() != expected) {
        throw_damaged(name, "its pixels are not what its header says");
    }
    const std::size_t rows = decoder.interlaced() ? static_cast<std::size_t>(header.height) : 1;
    if (!decoder.read(pixels.take(expected * rows), sink)) throw_damaged(name, decoder.message());
}

PngDecoder::PngDecoder() : impl_(std::make_unique<Impl>()) {}
PngDecoder::~PngDecoder() = default;

Layout PngDecoder::layout(Bytes data) noexcept {
    const int color_type = data.size > color_type_at ? data.data[color_type_at] : PNG_COLOR_TYPE_GRAY;
    if ((color_type & PNG_COLOR_MASK_COLOR) == 0) return Layout::gray;
    return color_type == PNG_COLOR_TYPE_RGB_ALPHA ? Layout::rgbx : Layout::rgb;
}

void PngDecoder::decode(Bytes data, const ImageHeader& header, std::string_view name, RowSink& sink) {
    check_chunks(data, name);
    const Trimmed trimmed(*impl_);
    impl_->own = impl_->decode_plain(data, header, sink);
    if (!impl_->own) impl_->decode_any(data, header, name, sink);
}

bool PngDecoder::used_own_filters() const noexcept {
    return impl_->own;
}

}  // namespace edgedistill::detail
