// PNG through libpng: the pixels of OpenCV's IMREAD_COLOR.
#pragma once

#include <string_view>

#include "buffer.hpp"
#include "image_header.hpp"
#include "resize.hpp"

namespace edgedistill::detail {

// What rows decode_png() sends: grey, or BGR.
Layout png_layout(Bytes data) noexcept;

// Sends the rows; `memory` holds a row, or all of an interlaced picture. 16-bit is shifted right by 8, alpha dropped.
// Throws Error (image) unless every chunk up to IEND is there with its checksum, and for damaged pixels.
void decode_png(Bytes data, const ImageHeader& header, std::string_view name, Buffer& memory, RowSink& sink);

}  // namespace edgedistill::detail
