// Pixels and encoded bytes that belong to the caller.
#pragma once

#include <cstddef>
#include <cstdint>

namespace edgedistill {

// Memory of the caller's: `size` bytes at `data`.
struct Bytes {
    const std::uint8_t* data = nullptr;
    std::size_t size = 0;
};

// How pixels lie in memory, all uint8, 0-255.
enum class PixelFormat {
    bgr,   // 3 bytes a pixel
    rgb,   // 3 bytes a pixel
    gray,  // 1 byte a pixel
    bgra,  // 4 bytes a pixel, alpha is dropped
    rgba,  // 4 bytes a pixel, alpha is dropped
    nv12,  // height rows of Y, then height/2 rows of interleaved U and V; BT.601 limited range; even height and width
    i420,  // height rows of Y, then a quarter-size plane of U, then one of V; BT.601 limited range; even height, width
};

// A picture in the caller's memory. It is only read, and only until the call that takes it returns (Engine says when it
// differs).
struct ImageView {
    const std::uint8_t* data = nullptr;
    int height = 0;             // pixels
    int width = 0;              // pixels
    std::size_t row_bytes = 0;  // from one row (of Y) to the next; 0: rows follow each other without a gap
    PixelFormat format = PixelFormat::bgr;
};

}  // namespace edgedistill
