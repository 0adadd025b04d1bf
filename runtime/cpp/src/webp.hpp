// WebP through libwebp: the pixels of OpenCV's IMREAD_COLOR.
#pragma once

#include <string_view>

#include "buffer.hpp"
#include "color.hpp"
#include "image_header.hpp"

namespace edgedistill::detail {

// The whole picture, or the first frame of an animation, in `memory`; alpha is dropped. Throws Error (image).
Picture decode_webp(Bytes data, const ImageHeader& header, std::string_view name, Buffer& memory);

}  // namespace edgedistill::detail
