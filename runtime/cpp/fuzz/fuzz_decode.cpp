// Arbitrary bytes as an image: pixels or an error of that image, in both ways to decode, and a label where there are
// pixels. Baseline JPEGs, whose Huffman decoder is our own, are decoded by libjpeg alone as well and compared, and
// PNGs, whose filters we undo ourselves, by libpng alone.

#include <algorithm>
#include <array>
#include <csetjmp>
#include <cstdint>
#include <cstring>
#include <optional>
#include <sstream>
#include <vector>

#include <jpeglib.h>
#include <png.h>
#include <zlib.h>

#include <edgedistill/classifier.hpp>
#include <openvino/pass/serialize.hpp>

#include "fuzz_options.hpp"
#include "image_header.hpp"
#include "preparer.hpp"
#include "tiny_model.hpp"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t max_size);

namespace edgedistill::fuzz {
namespace {

using detail::Preparer;
using Pixels = std::vector<std::uint8_t>;

constexpr long long max_pixels = 1 << 16;
constexpr const char* name = "input";

InputSpec squashed() {
    InputSpec spec;
    spec.height = spec.width = tiny_size;
    return spec;
}

InputSpec cropped() {
    InputSpec spec;
    spec.height = 24;
    spec.width = 40;
    spec.center_crop = true;
    spec.crop_fraction = 0.875;
    return spec;
}

// Nothing: an error of the image.
template <typename Load>
std::optional<Pixels> pixels_of(const InputSpec& spec, const Load& load) {
    Pixels out(static_cast<std::size_t>(spec.height) * static_cast<std::size_t>(spec.width) * 3);
    try {
        load(out.data());
        return out;
    } catch (const Error& error) {
        promise(error.kind() == ErrorKind::image, "an image's error is of kind image", error.what());
        check_message(error.what(), name);
        return std::nullopt;
    }
}

struct Strict {
    jpeg_error_mgr base;  // first: libjpeg knows this address
    std::jmp_buf jump;
};

// libjpeg as it comes, its warnings errors: BGR, or nothing.
bool decode_plainly(Bytes data, Pixels& bgr) {
    jpeg_decompress_struct info{};
    Strict strict{};
    info.err = jpeg_std_error(&strict.base);
    strict.base.error_exit = [](j_common_ptr any) { std::longjmp(reinterpret_cast<Strict*>(any->err)->jump, 1); };
    strict.base.emit_message = [](j_common_ptr any, int level) {
        if (level < 0) any->err->error_exit(any);
    };
    if (setjmp(strict.jump) != 0) {
        jpeg_destroy_decompress(&info);
        return false;
    }
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, data.data, data.size);
    jpeg_read_header(&info, TRUE);
    info.out_color_space = JCS_EXT_BGR;
    info.dct_method = JDCT_ISLOW;
    jpeg_start_decompress(&info);
    while (info.output_scanline < info.output_height) {
        std::uint8_t* row = bgr.data() + std::size_t{3} * info.output_width * info.output_scanline;
        jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
    jpeg_destroy_decompress(&info);
    return true;
}

void compare_with_libjpeg(Bytes data, const std::optional<Pixels>& full, Preparer& preparer) {
    detail::ImageHeader header;
    try {
        header = detail::read_header(data, name, max_pixels);
    } catch (const Error&) {
        return;
    }
    const bool comparable = header.kind == detail::ImageKind::jpeg && header.orientation == 1 &&
                            (header.jpeg_frame == 0xC0 || header.jpeg_frame == 0xC1) &&
                            (header.jpeg_components == 1 || header.jpeg_components == 3);
    if (!comparable) return;
    Pixels bgr(static_cast<std::size_t>(header.height * header.width) * 3);
    const bool whole = decode_plainly(data, bgr);
    promise(whole == full.has_value(), "libjpeg alone refuses the same JPEGs", whole ? "it does not" : "it does");
    if (!whole) return;
    const ImageView view{bgr.data(), static_cast<int>(header.height), static_cast<int>(header.width)};
    const auto expected =
        pixels_of(cropped(), [&](std::uint8_t* out) { preparer.prepare(view, name, cropped(), out); });
    promise(expected == full, "libjpeg alone gives the same pixels");
}

// libpng as it comes: BGR, or nothing.
bool decode_plain_png(Bytes data, Pixels& bgr) {
    std::jmp_buf jump;
    png_structp png = png_create_read_struct(
        PNG_LIBPNG_VER_STRING, &jump,
        [](png_structp state, png_const_charp) {
            std::longjmp(*static_cast<std::jmp_buf*>(png_get_error_ptr(state)), 1);
        },
        [](png_structp, png_const_charp) {});
    png_infop info = png_create_info_struct(png);
    if (setjmp(jump) != 0) {
        png_destroy_read_struct(&png, &info, nullptr);
        return false;
    }
    png_set_read_fn(png, &data, [](png_structp state, png_bytep out, std::size_t count) {
        auto* rest = static_cast<Bytes*>(png_get_io_ptr(state));
        if (count > rest->size) png_error(state, "it ends too early");
        std::memcpy(out, rest->data, count);
        *rest = {rest->data + count, rest->size - count};
    });
    png_read_info(png, info);
    png_set_strip_16(png);
    png_set_strip_alpha(png);
    png_set_palette_to_rgb(png);
    png_set_expand_gray_1_2_4_to_8(png);
    png_set_gray_to_rgb(png);
    png_set_bgr(png);
    const int passes = png_set_interlace_handling(png);
    png_read_update_info(png, info);
    const std::size_t bytes = png_get_rowbytes(png, info);
    promise(bytes * png_get_image_height(png, info) == bgr.size(), "libpng's size of a picture is its header's");
    for (int pass = 0; pass < passes; ++pass) {
        for (std::size_t row = 0; row * bytes < bgr.size(); ++row) png_read_row(png, &bgr[row * bytes], nullptr);
    }
    png_read_end(png, nullptr);
    png_destroy_read_struct(&png, &info, nullptr);
    return true;
}

// We refuse more: chunks that libpng does not look at have to be whole as well.
void compare_with_libpng(Bytes data, const std::optional<Pixels>& full, Preparer& preparer) {
    if (!full) return;
    const detail::ImageHeader header = detail::read_header(data, name, max_pixels);
    if (header.kind != detail::ImageKind::png || header.orientation != 1) return;
    Pixels bgr(static_cast<std::size_t>(header.height * header.width) * 3);
    promise(decode_plain_png(data, bgr), "libpng alone refuses no PNG that we read");
    const ImageView view{bgr.data(), static_cast<int>(header.height), static_cast<int>(header.width)};
    const auto expected =
        pixels_of(cropped(), [&](std::uint8_t* out) { preparer.prepare(view, name, cropped(), out); });
    promise(expected == full, "libpng alone gives the same pixels");
}

Classifier tiny_classifier() {
    const auto model = tiny_network();
    model->get_rt_info()["edgedistill"] = tiny_metadata();
    std::stringstream xml;
    std::stringstream weights;
    ov::pass::Serialize(xml, weights).run_on_model(model);
    const std::string text = xml.str();
    const std::string bin = weights.str();
    Options options;
    options.cache.enabled = false;
    options.threads = 1;
    options.max_pixels = max_pixels;
    const auto bytes = [](const std::string& s) {
        return Bytes{reinterpret_cast<const std::uint8_t*>(s.data()), s.size()};
    };
    return Classifier::from_memory(bytes(text), bytes(bin), options);
}

void classify(Bytes data) {
    static Classifier classifier = tiny_classifier();
    const Prediction answer = classifier.classify(data);
    promise(answer.ok() && answer.index >= 0 && answer.index < 3, "an image with pixels has a label", answer.label);
}

// Damage that a checksum would catch goes no further than the checksum.
void mend_png(std::uint8_t* data, std::size_t size) {
    const auto big_endian = [&](std::size_t at) {
        return static_cast<std::uint32_t>(data[at] << 24 | data[at + 1] << 16 | data[at + 2] << 8 | data[at + 3]);
    };
    for (std::size_t at = 8; at + 12 <= size;) {
        const std::size_t length = big_endian(at);
        if (length > size - at - 12) return;
        const auto sum = static_cast<std::uint32_t>(crc32_z(0, data + at + 4, length + 4));
        for (std::size_t byte = 0; byte < 4; ++byte) {
            data[at + 8 + length + byte] = static_cast<std::uint8_t>(sum >> (24 - 8 * byte));
        }
        at += 12 + length;
    }
}

void mend_webp(std::uint8_t* data, std::size_t size) {
    for (std::size_t byte = 0; byte < 4; ++byte) data[4 + byte] = static_cast<std::uint8_t>((size - 8) >> (8 * byte));
}

}  // namespace
}  // namespace edgedistill::fuzz

extern "C" int LLVMFuzzerInitialize(int*, char***) {
    // TBB loads a library of its own in a way that AddressSanitizer refuses, unless it is told.
    return setenv("TBB_ENABLE_SANITIZERS", "1", 0);
}

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t max_size,
                                               unsigned seed) {
    using namespace edgedistill::fuzz;
    size = LLVMFuzzerMutate(data, size, max_size);
    if (seed % 8 == 0) return size;
    if (size > 16 && std::memcmp(data, "\x89PNG", 4) == 0) mend_png(data, size);
    if (size > 16 && std::memcmp(data, "RIFF", 4) == 0) mend_webp(data, size);
    return size;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* bytes, std::size_t size) {
    using namespace edgedistill;
    using namespace edgedistill::fuzz;
    static detail::Preparer preparer(max_pixels);
    const Bytes data{bytes, size};
    const auto load = [&](const InputSpec& spec, Decode decode) {
        return pixels_of(spec, [&](std::uint8_t* out) { preparer.load(data, name, spec, decode, out); });
    };
    const auto reduced = load(squashed(), Decode::reduced);
    const auto full = load(cropped(), Decode::full);
    promise(reduced.has_value() == full.has_value(), "both ways to decode refuse the same images");
    promise(reduced == load(squashed(), Decode::reduced), "the same bytes give the same pixels");
    compare_with_libjpeg(data, full, preparer);
    compare_with_libpng(data, full, preparer);
    if (reduced) classify(data);
    return 0;
}
