// BMP: the pixels of OpenCV's IMREAD_COLOR.
#pragma once

#include <string_view>

#include "buffer.hpp"
#include "color.hpp"
#include "image_header.hpp"

namespace edgedistill::detail {

// The whole picture in `memory`, BGR. 1, 4, 8, 16, 24 and 32 bits a pixel, RLE4, RLE8, bit fields, OS/2 headers, either
// direction. Throws Error (image).
Picture decode_bmp(Bytes data, const ImageHeader& header, std::string_view name, Buffer& memory);

}  // namespace edgedistill::detail
