// JPEG through libjpeg, with its warnings as errors and without its allocations.
#pragma once

#include <cstdint>
#include <memory>
#include <string_view>

#include "image_header.hpp"
#include "resize.hpp"

namespace edgedistill::detail {

// One libjpeg decoder that is used for every image. One thread at a time.
class JpegDecoder {
public:
    JpegDecoder();
    ~JpegDecoder();
    JpegDecoder(const JpegDecoder&) = delete;
    JpegDecoder& operator=(const JpegDecoder&) = delete;

    // What rows decode() sends.
    static Layout layout(const ImageHeader& header) noexcept {
        return header.jpeg_components == 1 ? Layout::gray : Layout::bgrx;
    }

    // Sends ceil(height / k) rows of ceil(width / k) pixels; `k` in {1, 2, 4, 8} scales in the DCT. Throws Error
    // (image) when the file is damaged in any way, and then the rows that were sent are worth nothing.
    void decode(Bytes data, const ImageHeader& header, std::string_view name, int k, RowSink& sink);

    // Whether the image before was decoded by our own Huffman decoder, for tests.
    bool used_own_huffman() const noexcept;

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace edgedistill::detail
