#include "webp.hpp"

#include <webp/decode.h>
#include <webp/demux.h>

#include <cstring>
#include <memory>

namespace edgedistill::detail {
namespace {

struct DeleteAnimation {
    void operator()(WebPAnimDecoder* decoder) const noexcept { WebPAnimDecoderDelete(decoder); }
};

Picture first_frame(Bytes data, const ImageHeader& header, std::string_view name, Buffer& memory) {
    WebPAnimDecoderOptions options;
    WebPAnimDecoderOptionsInit(&options);
    options.color_mode = MODE_BGRA;
    const WebPData file{data.data, data.size};
    const std::unique_ptr<WebPAnimDecoder, DeleteAnimation> decoder(WebPAnimDecoderNew(&file, &options));
    WebPAnimInfo info;
    if (decoder == nullptr || WebPAnimDecoderGetInfo(decoder.get(), &info) == 0) {
        throw_damaged(name, "an animation whose frames do not hold together");
    }
    std::uint8_t* canvas = nullptr;
    int timestamp = 0;
    if (info.canvas_width != header.width || info.canvas_height != header.height ||
        WebPAnimDecoderGetNext(decoder.get(), &canvas, &timestamp) == 0) {
        throw_damaged(name, "an animation whose first frame cannot be decoded");
    }
    Picture picture{nullptr, {header.height, header.width}, Layout::bgrx};
    const std::size_t size = static_cast<std::size_t>(picture.row_bytes()) * static_cast<std::size_t>(header.height);
    picture.pixels = memory.take(size);
    std::memcpy(picture.pixels, canvas, size);
    return picture;
}

}  // namespace

Picture decode_webp(Bytes data, const ImageHeader& header, std::string_view name, Buffer& memory) {
    WebPBitstreamFeatures features;
    if (WebPGetFeatures(data.data, data.size, &features) != VP8_STATUS_OK) throw_damaged(name, "no WebP bitstream");
    if (features.width != header.width || features.height != header.height) {
        throw_damaged(name, "its pixels are not what its header says");
    }
    if (features.has_animation != 0) return first_frame(data, header, name, memory);
    Picture picture{nullptr, {header.height, header.width}, Layout::bgr};
    const std::size_t size = static_cast<std::size_t>(picture.row_bytes()) * static_cast<std::size_t>(header.height);
    picture.pixels = memory.take(size);
    const auto stride = static_cast<int>(picture.row_bytes());
    if (WebPDecodeBGRInto(data.data, data.size, picture.pixels, size, stride) == nullptr) {
        throw_damaged(name, "libwebp cannot decode it");
    }
    return picture;
}

}  // namespace edgedistill::detail
