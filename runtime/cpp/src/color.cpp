#include "color.hpp"

#include <algorithm>
#include <cstring>

namespace edgedistill::detail {
namespace {

// Rows turned at once: as many as pixels of 4 bytes share a cache line.
constexpr int turned_rows = 16;

template <int C>
void copy_pixel(const std::uint8_t* from, std::uint8_t* to) {
    for (int c = 0; c < C; ++c) to[c] = from[c];
}

template <int C>
void send_mirrored(const Picture& picture, bool upside_down, std::uint8_t* row, RowSink& sink) {
    for (std::int64_t y = 0; y < picture.size.height; ++y) {
        const std::int64_t from_row = upside_down ? picture.size.height - 1 - y : y;
        const std::uint8_t* from = picture.pixels + from_row * picture.row_bytes();
        std::uint8_t* to = row + picture.row_bytes() - C;
        for (std::int64_t x = 0; x < picture.size.width; ++x, from += C, to -= C) copy_pixel<C>(from, to);
        sink.rows(row, 0, 1);
    }
}

// Upright row y is the stored picture's column y, or width - 1 - y for `columns_backwards`, read from the bottom up for
// `rows_backwards`.
template <int C>
void send_transposed(const Picture& picture, bool columns_backwards, bool rows_backwards, std::uint8_t* rows,
                     RowSink& sink) {
    const std::ptrdiff_t turned_bytes = static_cast<std::ptrdiff_t>(picture.size.height) * C;
    for (std::int64_t top = 0; top < picture.size.width; top += turned_rows) {
        const auto count = static_cast<int>(std::min<std::int64_t>(turned_rows, picture.size.width - top));
        for (std::int64_t x = 0; x < picture.size.height; ++x) {
            const std::int64_t from_row = rows_backwards ? picture.size.height - 1 - x : x;
            const std::uint8_t* from = picture.pixels + from_row * picture.row_bytes() +
                                       (columns_backwards ? picture.size.width - 1 - top : top) * C;
            std::uint8_t* to = rows + x * C;
            for (int y = 0; y < count; ++y, from += columns_backwards ? -C : C, to += turned_bytes) {
                copy_pixel<C>(from, to);
            }
        }
        sink.rows(rows, turned_bytes, count);
    }
}

template <int C>
void send_turned(const Picture& picture, int orientation, Buffer& scratch, RowSink& sink) {
    const auto side = static_cast<std::size_t>(orientation >= 5 ? picture.size.height : picture.size.width);
    std::uint8_t* memory = scratch.take(side * C * (orientation >= 5 ? turned_rows : 1) + 16);
    if (orientation < 5) return send_mirrored<C>(picture, orientation == 3, memory, sink);
    send_transposed<C>(picture, orientation == 7 || orientation == 8, orientation == 6 || orientation == 7, memory,
                       sink);
}

}  // namespace

void cmyk_to_bgrx(const std::uint8_t* cmyk, std::int64_t count, std::uint8_t* bgrx) noexcept {
    for (std::int64_t x = 0; x < count; ++x, cmyk += 4, bgrx += 4) {
        const int black = cmyk[3];
        const int red = black - ((255 - cmyk[0]) * black >> 8);
        const int green = black - ((255 - cmyk[1]) * black >> 8);
        const int blue = black - ((255 - cmyk[2]) * black >> 8);
        bgrx[0] = static_cast<std::uint8_t>(blue);
        bgrx[1] = static_cast<std::uint8_t>(green);
        bgrx[2] = static_cast<std::uint8_t>(red);
        bgrx[3] = 0;
    }
}

void Collector::begin(const Picture& picture) noexcept {
    picture_ = picture;
    seen_ = 0;
}

void Collector::restart() noexcept {
    seen_ = 0;
}

void Collector::rows(const std::uint8_t* first, std::ptrdiff_t stride, int count) noexcept {
    const std::ptrdiff_t bytes = picture_.row_bytes();
    for (; count > 0 && seen_ < picture_.size.height; --count, ++seen_, first += stride) {
        std::memcpy(picture_.pixels + seen_ * bytes, first, static_cast<std::size_t>(bytes));
    }
}

void send_upright(const Picture& picture, int orientation, Buffer& scratch, RowSink& sink) {
    const std::ptrdiff_t bytes = picture.row_bytes();
    const auto height = static_cast<int>(picture.size.height);
    if (orientation == 1) return sink.rows(picture.pixels, bytes, height);
    if (orientation == 4) return sink.rows(picture.pixels + (height - 1) * bytes, -bytes, height);
    switch (channels(picture.layout)) {
        case 1:
            return send_turned<1>(picture, orientation, scratch, sink);
        case 3:
            return send_turned<3>(picture, orientation, scratch, sink);
        default:
            return send_turned<4>(picture, orientation, scratch, sink);
    }
}

}  // namespace edgedistill::detail
