// From image bytes or pixels to network input: the C++ form of src/edgedistill/images.py, equal to it to the pixel.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string_view>

#include <edgedistill/image.hpp>
#include <edgedistill/options.hpp>

namespace edgedistill::detail {

// Decodes, turns upright, reduces, crops and resizes with buffers of its own, which grow to the largest image seen and
// are used again: in the steady state nothing is allocated. One thread at a time.
//
// `out`: uint8 [spec.height, spec.width, 3] BGR, dense. Every function throws Error (ErrorKind::image) that names
// `name`.
class Preparer {
public:
    explicit Preparer(long long max_pixels);
    ~Preparer();
    Preparer(Preparer&&) noexcept;
    Preparer& operator=(Preparer&&) noexcept;

    void load(Bytes encoded, std::string_view name, const InputSpec& spec, Decode decode, std::uint8_t* out);
    void load_file(const std::filesystem::path& path, std::string_view name, const InputSpec& spec, Decode decode,
                   std::uint8_t* out);
    void prepare(const ImageView& pixels, std::string_view name, const InputSpec& spec, std::uint8_t* out);

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace edgedistill::detail
