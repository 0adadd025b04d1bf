#include "bmp.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <edgedistill/error.hpp>
#include <string>

namespace edgedistill::detail {
namespace {

struct Color {
    std::uint8_t blue = 0;
    std::uint8_t green = 0;
    std::uint8_t red = 0;
};

// A channel of a 32-bit pixel.
struct Field {
    std::uint32_t mask = 0;
    int shift = -1;
    float scale = 0;

    void set(std::uint32_t bits) {
        mask = bits;
        if (bits == 0) return;
        for (shift = 0; (bits >> shift & 1) == 0;) ++shift;
        scale = 255.0F / static_cast<float>(bits >> shift);
    }
    std::uint8_t of(std::uint32_t pixel) const {
        return static_cast<std::uint8_t>(static_cast<float>((pixel & mask) >> shift) * scale);
    }
};

enum class Form { plain, rle8, rle4, fields };

class Decoder {
public:
    Decoder(Bytes data, const ImageHeader& header, std::string_view name, std::uint8_t* out)
        : data_(data), name_(name), height_(header.height), width_(header.width), out_(out) {}

    void decode();

private:
    [[noreturn]] void refuse(const char* why) const { throw_damaged(name_, why); }
    const std::uint8_t* bytes(std::uint64_t count);
    std::uint32_t u8() { return *bytes(1); }
    std::uint32_t u16();
    std::uint32_t u32();
    void skip(std::uint64_t count) { at_ += count; }

    void read_os2_header();
    void read_header(std::uint32_t size);
    void read_fields(std::uint32_t size);
    void read_palette(std::uint32_t colors, std::uint64_t entry_bytes);
    void check_sixteen_bits();

    std::uint8_t* row(std::int64_t y) const { return out_ + (top_down_ ? y : height_ - 1 - y) * width_ * 3; }
    void put(std::int64_t y, std::int64_t x, const Color& color) const;
    void decode_row(const std::uint8_t* source, std::uint8_t* target) const;
    void decode_plain();
    void decode_rle();
    void rle_run(std::int64_t length, std::uint32_t value);
    void rle_literal(std::int64_t length);
    bool rle_escape(std::uint32_t code);
    void fill(std::int64_t count, const Color& color);

    Bytes data_;
    std::string_view name_;
    std::uint64_t at_ = 0;
    std::int64_t height_;
    std::int64_t width_;
    std::uint8_t* out_;
    bool top_down_ = false;
    std::uint32_t bits_ = 0;  // 15 for 5-5-5
    Form form_ = Form::plain;
    std::array<Color, 256> palette_{};
    std::array<Field, 3> fields_{};  // red, green, blue
    // Where the run-length decoder writes, and whether its last code ended a row.
    std::int64_t x_ = 0;
    std::int64_t y_ = 0;
    bool row_ended_ = false;
};

const std::uint8_t* Decoder::bytes(std::uint64_t count) {
    if (at_ > data_.size || count > data_.size - at_) refuse("it ends too early");
    const std::uint8_t* found = data_.data + at_;
    at_ += count;
    return found;
}

std::uint32_t Decoder::u16() {
    const std::uint8_t* p = bytes(2);
    return static_cast<std::uint32_t>(p[0] | p[1] << 8);
}

std::uint32_t Decoder::u32() {
    const std::uint32_t low = u16();
    return low | u16() << 16;
}

void Decoder::decode() {
    skip(10);
    const std::uint32_t offset = u32();
    const std::uint32_t size = u32();
    if (size > 0x7FFFFFFF || offset > 0x7FFFFFFF) refuse("a header of more than 2 GiB");
    if (size == 12) {
        read_os2_header();
    } else if (size >= 36) {
        read_header(size);
    } else {
        refuse("an unknown header");
    }
    at_ = offset;
    if (form_ == Form::rle4 || form_ == Form::rle8) {
        decode_rle();
    } else {
        decode_plain();
    }
}

void Decoder::read_os2_header() {
    skip(4);
    bits_ = u32() >> 16;
    if (bits_ != 1 && bits_ != 4 && bits_ != 8 && bits_ != 24 && bits_ != 32) refuse("an unknown number of bits");
    if (bits_ <= 8) read_palette(1U << bits_, 3);
}

void Decoder::read_header(std::uint32_t size) {
    skip(4);
    top_down_ = (u32() & 0x80000000) != 0;
    bits_ = u32() >> 16;
    const std::uint32_t form = u32();
    skip(12);
    const std::uint32_t used = u32();
    const bool plain_bits = bits_ == 1 || bits_ == 4 || bits_ == 8 || bits_ == 16 || bits_ == 24 || bits_ == 32;
    const bool known = (form == 0 && plain_bits) || (form == 3 && (bits_ == 16 || bits_ == 32)) ||
                       (form == 2 && bits_ == 4) || (form == 1 && bits_ == 8);
    if (!known) refuse("an unknown number of bits or kind of compression");
    form_ = form == 0 ? Form::plain : form == 1 ? Form::rle8 : form == 2 ? Form::rle4 : Form::fields;
    read_fields(size);
    if (bits_ <= 8) {
        if (used > 256) refuse("more than 256 colours");
        read_palette(used == 0 ? 1U << bits_ : used, 4);
    } else if (bits_ == 16) {
        check_sixteen_bits();
    }
}

// The rest of the header, with the masks of a version 3 header and later.
void Decoder::read_fields(std::uint32_t size) {
    if (bits_ != 32 || form_ != Form::fields || size < 56) return skip(size - 36);
    skip(4);
    for (Field& field : fields_) field.set(u32());
    skip(size - 52);
}

void Decoder::check_sixteen_bits() {
    if (form_ == Form::plain) {
        bits_ = 15;
        return;
    }
    const std::uint32_t red = u32();
    const std::uint32_t green = u32();
    const std::uint32_t blue = u32();
    if (red == 0x7C00 && green == 0x3E0 && blue == 0x1F) {
        bits_ = 15;
    } else if (red != 0xF800 || green != 0x7E0 || blue != 0x1F) {
        refuse("unknown masks of its 16 bits");
    }
}

void Decoder::read_palette(std::uint32_t colors, std::uint64_t entry_bytes) {
    const std::uint8_t* entry = bytes(colors * entry_bytes);
    for (std::uint32_t number = 0; number < colors; ++number, entry += entry_bytes) {
        palette_[number] = {entry[0], entry[1], entry[2]};
    }
}

void Decoder::put(std::int64_t y, std::int64_t x, const Color& color) const {
    std::uint8_t* pixel = row(y) + 3 * x;
    pixel[0] = color.blue;
    pixel[1] = color.green;
    pixel[2] = color.red;
}

void Decoder::decode_plain() {
    const std::uint64_t row_bits = static_cast<std::uint64_t>(width_) * (bits_ == 15 ? 16 : bits_);
    const std::uint64_t row_bytes = ((row_bits + 7) / 8 + 3) & ~std::uint64_t{3};
    for (std::int64_t y = 0; y < height_; ++y) decode_row(bytes(row_bytes), row(y));
}

void Decoder::decode_row(const std::uint8_t* source, std::uint8_t* target) const {
    if (bits_ == 24) {
        std::memcpy(target, source, static_cast<std::size_t>(width_) * 3);
        return;
    }
    const bool masked =
        bits_ == 32 && std::all_of(fields_.begin(), fields_.end(), [](const Field& f) { return f.mask != 0; });
    for (std::int64_t x = 0; x < width_; ++x, target += 3) {
        Color color;
        if (bits_ <= 8) {
            const auto position = static_cast<std::uint64_t>(x) * bits_;
            color = palette_[source[position / 8] >> (8 - bits_ - position % 8) & ((1U << bits_) - 1)];
        } else if (bits_ == 32) {
            const std::uint8_t* p = source + 4 * x;
            const std::uint32_t pixel = static_cast<std::uint32_t>(p[0] | p[1] << 8 | p[2] << 16) | std::uint32_t{p[3]}
                                                                                                        << 24;
            color = masked ? Color{fields_[2].of(pixel), fields_[1].of(pixel), fields_[0].of(pixel)}
                           : Color{p[0], p[1], p[2]};
        } else {
            const int pixel = source[2 * x] | source[2 * x + 1] << 8;
            const int green = bits_ == 15 ? pixel >> 2 & 0xF8 : pixel >> 3 & 0xFC;
            const int red = bits_ == 15 ? pixel >> 7 & 0xF8 : pixel >> 8 & 0xF8;
            color = {static_cast<std::uint8_t>(pixel << 3 & 0xF8), static_cast<std::uint8_t>(green),
                     static_cast<std::uint8_t>(red)};
        }
        target[0] = color.blue;
        target[1] = color.green;
        target[2] = color.red;
    }
}

// The codes mean what OpenCV makes of them, odd ends included: files from the wild were seen through it.
void Decoder::decode_rle() {
    while (y_ < height_) {
        const std::uint32_t length = u8();
        const std::uint32_t value = u8();
        if (length != 0) {
            rle_run(length, value);
        } else if (value > 2) {
            rle_literal(value);
        } else if (!rle_escape(value)) {
            return;
        }
    }
}

void Decoder::rle_run(std::int64_t length, std::uint32_t value) {
    if (x_ + length > width_) refuse("a run of pixels beyond its row");
    if (form_ == Form::rle8) {
        const std::int64_t before = y_;
        fill(length, palette_[value]);
        row_ended_ = y_ != before;
        return;
    }
    for (std::int64_t n = 0; n < length; ++n) put(y_, x_++, palette_[n % 2 == 0 ? value >> 4 : value & 15]);
}

void Decoder::rle_literal(std::int64_t length) {
    if (x_ + length > width_) refuse("a run of pixels beyond its row");
    const bool wide = form_ == Form::rle8;
    const auto count = static_cast<std::uint64_t>(length);
    const std::uint8_t* source =
        bytes(wide ? (count + 1) & ~std::uint64_t{1} : ((count + 1) / 2 + 1) & ~std::uint64_t{1});
    for (std::int64_t n = 0; n < length; ++n) {
        const std::uint32_t value = wide ? source[n] : n % 2 == 0 ? source[n / 2] >> 4 : source[n / 2] & 15U;
        put(y_, x_++, palette_[value]);
    }
    row_ended_ = false;
}

// End of row (0), of the picture (1), or a jump (2), over pixels of colour 0. False: the picture is whole.
bool Decoder::rle_escape(std::uint32_t code) {
    std::int64_t across = width_ - x_;
    std::int64_t down = height_ - y_;
    if (form_ == Form::rle8 && code == 0 && row_ended_ && across == width_) {
        row_ended_ = false;
        return true;
    }
    if (code == 2) {
        across = u8();
        down = u8();
    }
    if (form_ == Form::rle8 && code != 0) across += down * width_;
    fill(across, palette_[0]);
    row_ended_ = false;
    return y_ < height_;
}

void Decoder::fill(std::int64_t count, const Color& color) {
    do {
        const std::int64_t end = std::min(x_ + count, width_);
        count -= end - x_;
        for (; x_ < end; ++x_) put(y_, x_, color);
        if (x_ >= width_) {
            x_ = 0;
            if (++y_ >= height_) return;
        }
    } while (count > 0);
}

}  // namespace

Picture decode_bmp(Bytes data, const ImageHeader& header, std::string_view name, Buffer& memory) {
    Picture picture{nullptr, {header.height, header.width}, Layout::bgr};
    picture.pixels =
        memory.take(static_cast<std::size_t>(picture.row_bytes()) * static_cast<std::size_t>(header.height));
    Decoder(data, header, name, picture.pixels).decode();
    return picture;
}

}  // namespace edgedistill::detail
