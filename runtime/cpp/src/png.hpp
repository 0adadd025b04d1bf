// PNG: the pixels of OpenCV's IMREAD_COLOR.
#pragma once

#include <memory>
#include <string_view>

#include "buffer.hpp"
#include "image_header.hpp"
#include "resize.hpp"

namespace edgedistill::detail {

// One thread at a time. Plain pictures (8 bits, grey, RGB or RGBA, not interlaced) are decompressed by libdeflate and
// unfiltered by png_filter.hpp; whatever these do not take, and everything else, is libpng's, and so is the judgement
// of what is damaged and why.
class PngDecoder {
public:
    PngDecoder();
    ~PngDecoder();
    PngDecoder(const PngDecoder&) = delete;
    PngDecoder& operator=(const PngDecoder&) = delete;

    // What rows decode() sends.
    static Layout layout(Bytes data) noexcept;

    // Sends the rows; 16-bit is shifted right by 8, alpha dropped. Throws Error (image) unless every chunk up to IEND
    // is there with its checksum, and for damaged pixels.
    void decode(Bytes data, const ImageHeader& header, std::string_view name, RowSink& sink);

    // Whether the image before was read without libpng, for tests.
    bool used_own_filters() const noexcept;

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace edgedistill::detail
