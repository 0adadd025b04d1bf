#include "png.hpp"

#include <png.h>
#include <zlib.h>

#include <array>
#include <csetjmp>
#include <cstring>
#include <new>
#include <string>

namespace edgedistill::detail {
namespace {

constexpr std::size_t color_type_at = 25;

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
    std::uint64_t at = 8;
    for (int chunk = 0; chunk < max_chunks && at + 12 <= data.size; ++chunk) {
        const std::uint64_t length = big_endian(data.data + at);
        const std::uint64_t end = at + 8 + length;
        if (end + 4 > data.size) break;
        const std::uint8_t* body = data.data + at + 4;
        const auto checksum = static_cast<std::uint32_t>(crc32_z(0, body, static_cast<z_size_t>(length + 4)));
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
    png_set_strip_alpha(png_);
    if (color_type == PNG_COLOR_TYPE_PALETTE) png_set_palette_to_rgb(png_);
    if ((color_type & PNG_COLOR_MASK_COLOR) == 0 && bit_depth < 8) png_set_expand_gray_1_2_4_to_8(png_);
    if ((color_type & PNG_COLOR_MASK_COLOR) != 0) png_set_bgr(png_);
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

}  // namespace

Layout png_layout(Bytes data) noexcept {
    const bool color = data.size > color_type_at && (data.data[color_type_at] & PNG_COLOR_MASK_COLOR) != 0;
    return color ? Layout::bgr : Layout::gray;
}

void decode_png(Bytes data, const ImageHeader& header, std::string_view name, Buffer& memory, RowSink& sink) {
    check_chunks(data, name);
    Decoder decoder(data);
    if (!decoder.start()) throw_damaged(name, decoder.message());
    const std::size_t expected = static_cast<std::size_t>(header.width * channels(png_layout(data)));
    if (decoder.width() != header.width || decoder.height() != header.height || decoder.row_bytes() != expected) {
        throw_damaged(name, "its pixels are not what its header says");
    }
    const std::size_t rows = decoder.interlaced() ? static_cast<std::size_t>(header.height) : 1;
    std::uint8_t* pixels = memory.take(expected * rows);
    if (!decoder.read(pixels, sink)) throw_damaged(name, decoder.message());
}

}  // namespace edgedistill::detail
