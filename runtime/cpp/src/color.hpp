// Pixels from one form to another: CMYK, camera formats, EXIF orientations.
#pragma once

#include <cstdint>

#include "buffer.hpp"
#include "resize.hpp"

namespace edgedistill::detail {

// A decoded picture in memory, rows without gaps.
struct Picture {
    std::uint8_t* pixels = nullptr;
    Size size{};
    Layout layout = Layout::bgr;

    std::ptrdiff_t row_bytes() const noexcept { return static_cast<std::ptrdiff_t>(size.width) * channels(layout); }
};

// `count` pixels of CMYK as libjpeg gives it (Adobe's inverted form) to BGRX, with OpenCV's arithmetic. May work in
// place.
void cmyk_to_bgrx(const std::uint8_t* cmyk, std::int64_t count, std::uint8_t* bgrx) noexcept;

// Keeps the rows that come. `picture.pixels`: memory for all of them.
class Collector final : public RowSink {
public:
    void begin(const Picture& picture) noexcept;
    void restart() noexcept override;
    void rows(const std::uint8_t* first, std::ptrdiff_t stride, int count) noexcept override;

private:
    Picture picture_;
    std::int64_t seen_ = 0;
};

// The rows of a stored picture as they are upright, from the top down. `orientation`: EXIF, 1 to 8.
// Throws std::bad_alloc.
void send_upright(const Picture& picture, int orientation, Buffer& scratch, RowSink& sink);

}  // namespace edgedistill::detail
