// What an image file says about itself, read without decoding it: the C++ form of src/edgedistill/image_headers.py.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include <edgedistill/image.hpp>

namespace edgedistill::detail {

enum class ImageKind { jpeg, png, webp, bmp };

// Numbers that an encoder never reaches and a hostile file would.
inline constexpr int max_chunks = 100'000;
inline constexpr int max_jpeg_scans = 500;

// `height` and `width` are as stored in the file, before `orientation` (EXIF, 1 to 8) is applied.
struct ImageHeader {
    ImageKind kind = ImageKind::jpeg;
    std::int64_t height = 0;
    std::int64_t width = 0;
    int orientation = 1;
    int jpeg_components = 0;  // 1 grey, 3 colour, 4 CMYK
    int jpeg_frame = 0;       // the frame's marker, 0xC0 to 0xCF

    bool turned() const noexcept { return orientation >= 5; }
    std::int64_t upright_height() const noexcept { return turned() ? width : height; }
    std::int64_t upright_width() const noexcept { return turned() ? height : width; }
};

// Throws Error (image) that names `name` for a foreign format, a header that does not hold together, or more than
// `max_pixels`.
ImageHeader read_header(Bytes data, std::string_view name, long long max_pixels);

// 1 to 8 from an EXIF block that starts at its TIFF header; 1 where there is none or it makes no sense.
int exif_orientation(Bytes block);

// The one sentence for files that do not hold together.
[[noreturn]] void throw_damaged(std::string_view name, std::string_view why);

}  // namespace edgedistill::detail
