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
// are used again: in the steady state frames, BMP, baseline JPEG and plain PNG allocate nothing. One thread at a time.
//
// `load` and `load_file` can prepare the same image for a second network; they say whether they did, which they do
// where one decoding serves both: not where a JPEG would be reduced unlike in the DCT.
//
// `out`: uint8 [spec.height, spec.width, 3] BGR, dense. Every function throws Error (ErrorKind::image) that names
// `name`.
class Preparer {
public:
    struct Second {
        const InputSpec* spec;
        std::uint8_t* out;
    };

    explicit Preparer(long long max_pixels);
    ~Preparer();
    Preparer(Preparer&&) noexcept;
    Preparer& operator=(Preparer&&) noexcept;

    bool load(Bytes encoded, std::string_view name, const InputSpec& spec, Decode decode, std::uint8_t* out,
              const Second* second = nullptr);
    bool load_file(const std::filesystem::path& path, std::string_view name, const InputSpec& spec, Decode decode,
                   std::uint8_t* out, const Second* second = nullptr);
    void prepare(const ImageView& pixels, std::string_view name, const InputSpec& spec, std::uint8_t* out);

private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace edgedistill::detail
