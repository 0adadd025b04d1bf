// The photographs that a benchmark decodes, in memory.
#pragma once

#include <cstdint>
#include <edgedistill/error.hpp>
#include <edgedistill/image.hpp>
#include <edgedistill/options.hpp>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "image_header.hpp"
#include "preparer.hpp"

namespace edgedistill::programs {

// Encoded bytes, or pixels uint8 [height, width, 3] BGR.
struct Photo {
    std::string name;
    std::vector<std::uint8_t> data;
    int height = 0;    // upright
    int width = 0;     // upright
    std::string kind;  // "JPEG", "PNG", "WEBP" or "BMP"

    Bytes bytes() const { return {data.data(), data.size()}; }
    ImageView view() const { return {data.data(), height, width, 0, PixelFormat::bgr}; }
};

using Photos = std::shared_ptr<const std::vector<Photo>>;

inline std::vector<std::uint8_t> read_file(const std::filesystem::path& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<std::uint8_t> data{std::istreambuf_iterator<char>(file), {}};
    if (!file || data.empty()) {
        throw Error(ErrorKind::image, path.string() + ": cannot be read, or empty");
    }
    return data;
}

// An encoded file. Throws Error (image) where it cannot be read.
inline Photo opened(const std::string& path) {
    static const char* const kinds[] = {"JPEG", "PNG", "WEBP", "BMP"};
    Photo photo{path, read_file(path), 0, 0, ""};
    const detail::ImageHeader header = detail::read_header(photo.bytes(), path, Options().max_pixels);
    photo.height = static_cast<int>(header.upright_height());
    photo.width = static_cast<int>(header.upright_width());
    photo.kind = kinds[static_cast<int>(header.kind)];
    return photo;
}

// Pixels of that size: whole and exactly averaged, or as `decode` says.
inline Photo prepared(const Photo& encoded, const InputSpec& spec, Decode decode) {
    Photo photo{encoded.name, {}, spec.height, spec.width, ""};
    photo.data.resize(static_cast<std::size_t>(spec.height) * static_cast<std::size_t>(spec.width) * 3);
    detail::Preparer(Options().max_pixels).load(encoded.bytes(), encoded.name, spec, decode, photo.data.data());
    return photo;
}

// All pixels of an encoded image, upright: what a camera would have given.
inline Photo decoded(const Photo& encoded) {
    InputSpec whole;
    whole.height = encoded.height;
    whole.width = encoded.width;
    return prepared(encoded, whole, Decode::full);
}

inline Photos load_photos(const std::vector<std::string>& paths) {
    auto photos = std::make_shared<std::vector<Photo>>();
    for (const std::string& path : paths) {
        photos->push_back(opened(path));
    }
    return photos;
}

// What is measured from: encoded bytes (files), pixels (frames), or the network's own pixels of the first image
// (model).
inline Photos sources_for(const std::string& scope, const Photos& encoded, const InputSpec& spec) {
    if (scope == "files") {
        return encoded;
    }
    auto photos = std::make_shared<std::vector<Photo>>();
    for (const Photo& photo : *encoded) {
        photos->push_back(scope == "frames" ? decoded(photo) : prepared(photo, spec, Decode::reduced));
        if (scope == "model") {
            break;
        }
    }
    return photos;
}

}  // namespace edgedistill::programs
