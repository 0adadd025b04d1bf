// PNGs that our own decompression and filters read are libpng's to the byte, and what they do not take is libpng's.
#include <doctest/doctest.h>
#include <libdeflate.h>
#include <malloc.h>
#include <png.h>

#include <cstring>
#include <edgedistill/error.hpp>
#include <random>
#include <string>
#include <vector>

#include "color.hpp"
#include "kernels.hpp"
#include "png.hpp"
#include "png_filter.hpp"

namespace {

using namespace edgedistill;
using namespace edgedistill::detail;

using Pixels = std::vector<std::uint8_t>;

struct PngOptions {
    int width = 61;
    int height = 53;
    int color_type = PNG_COLOR_TYPE_GRAY;
    int filters = PNG_ALL_FILTERS;  // libpng chooses for each row
    int bit_depth = 8;
    bool interlaced = false;
    std::size_t chunk_bytes = 8192;
};

void append(png_structp png, png_bytep bytes, std::size_t count) {
    auto* file = static_cast<Pixels*>(png_get_io_ptr(png));
    file->insert(file->end(), bytes, bytes + count);
}

Pixels encode(const PngOptions& options) {
    Pixels file;
    png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
    png_infop info = png_create_info_struct(png);
    png_set_write_fn(png, &file, append, nullptr);
    png_set_IHDR(png, info, static_cast<png_uint_32>(options.width), static_cast<png_uint_32>(options.height),
                 options.bit_depth, options.color_type, options.interlaced ? PNG_INTERLACE_ADAM7 : PNG_INTERLACE_NONE,
                 PNG_COMPRESSION_TYPE_DEFAULT, PNG_FILTER_TYPE_DEFAULT);
    png_set_filter(png, PNG_FILTER_TYPE_BASE, options.filters);
    png_set_compression_buffer_size(png, options.chunk_bytes);
    png_write_info(png, info);
    const int passes = png_set_interlace_handling(png);
    std::mt19937 random(3);
    Pixels image(png_get_rowbytes(png, info) * static_cast<std::size_t>(options.height));
    for (std::size_t at = 0; at < image.size(); ++at) {
        const bool smooth = at % 1024 < 700;
        image[at] = static_cast<std::uint8_t>(smooth ? at / 7 + random() % 5 : random());
    }
    for (int pass = 0; pass < passes; ++pass) {
        for (int row = 0; row < options.height; ++row) {
            png_write_row(png, image.data() + static_cast<std::size_t>(row) * png_get_rowbytes(png, info));
        }
    }
    png_write_end(png, info);
    png_destroy_write_struct(&png, &info);
    return file;
}

// libpng's simplest interface; its colours are BGR, RGB or grey as ours are.
Pixels plain_decode(const Pixels& file, Layout layout) {
    png_image image{};
    image.version = PNG_IMAGE_VERSION;
    REQUIRE(png_image_begin_read_from_memory(&image, file.data(), file.size()) != 0);
    image.format = layout == Layout::gray ? PNG_FORMAT_GRAY : layout == Layout::rgb ? PNG_FORMAT_RGB : PNG_FORMAT_RGBA;
    Pixels pixels(PNG_IMAGE_SIZE(image));
    REQUIRE(png_image_finish_read(&image, nullptr, pixels.data(), 0, nullptr) != 0);
    return pixels;
}

Pixels our_decode(PngDecoder& decoder, const Pixels& file) {
    const Bytes data{file.data(), file.size()};
    const ImageHeader header = read_header(data, "x", 1'000'000);
    Picture picture{nullptr, {header.height, header.width}, PngDecoder::layout(data)};
    Pixels pixels(static_cast<std::size_t>(picture.row_bytes() * picture.size.height));
    picture.pixels = pixels.data();
    Collector collector;
    collector.begin(picture);
    decoder.decode(data, header, "x", collector);
    return pixels;
}

std::string refusal(PngDecoder& decoder, const Pixels& file) {
    try {
        our_decode(decoder, file);
    } catch (const Error& error) {
        CHECK(error.kind() == ErrorKind::image);
        return error.what();
    }
    return "";
}

void append_chunk(Pixels& file, const char* kind, const Pixels& body) {
    const auto big_endian = [&](std::uint32_t value) {
        for (int shift = 24; shift >= 0; shift -= 8) file.push_back(static_cast<std::uint8_t>(value >> shift));
    };
    big_endian(static_cast<std::uint32_t>(body.size()));
    const std::size_t start = file.size();
    file.insert(file.end(), kind, kind + 4);
    file.insert(file.end(), body.begin(), body.end());
    big_endian(libdeflate_crc32(0, file.data() + start, file.size() - start));
}

Pixels compressed(const Pixels& bytes) {
    libdeflate_compressor* compressor = libdeflate_alloc_compressor(6);
    Pixels out(libdeflate_zlib_compress_bound(compressor, bytes.size()));
    out.resize(libdeflate_zlib_compress(compressor, bytes.data(), bytes.size(), out.data(), out.size()));
    libdeflate_free_compressor(compressor);
    return out;
}

Pixels with_header(const Pixels& header, const Pixels& idat) {
    Pixels file{0x89, 'P', 'N', 'G', '\r', '\n', 0x1A, '\n'};
    append_chunk(file, "IHDR", header);
    append_chunk(file, "IDAT", idat);
    append_chunk(file, "IEND", {});
    return file;
}

// A grey picture of 4x3 pixels with these compressed bytes.
Pixels tiny(const Pixels& idat) {
    return with_header({0, 0, 0, 4, 0, 0, 0, 3, 8, PNG_COLOR_TYPE_GRAY, 0, 0, 0}, idat);
}

}  // namespace

TEST_CASE("sixteen rows at once are unfiltered as one after the other") {
    std::mt19937 random(1);
    for (const int pixel_size : {1, 3, 4}) {
        for (const int width : {1, 2, 5, 15, 16, 17, 31, 33, 100}) {
            const auto bytes = static_cast<std::size_t>(width * pixel_size);
            for (int count = 1; count <= FilteredRows::most; ++count) {
                Pixels data(static_cast<std::size_t>(count) * (bytes + 1) + FilteredRows::padding);
                for (auto& byte : data) byte = static_cast<std::uint8_t>(random() % 4 == 0 ? random() : random() % 3);
                for (int row = 0; row < count; ++row) {
                    data[static_cast<std::size_t>(row) * (bytes + 1)] = static_cast<std::uint8_t>(random() % 5);
                }
                const std::size_t stride = bytes + FilteredRows::padding;
                Pixels start(stride * FilteredRows::most + 2 * FilteredRows::padding);
                for (auto& byte : start) byte = static_cast<std::uint8_t>(random());
                const FilteredRows rows{data.data(), bytes, count, pixel_size};
                Pixels expected = start;
                unfilter_portable(rows, expected.data() + FilteredRows::padding, static_cast<std::ptrdiff_t>(stride));
                for (const Kernels* one : runnable_kernels()) {
                    Pixels band = start;
                    one->unfilter(rows, band.data() + FilteredRows::padding, static_cast<std::ptrdiff_t>(stride));
                    for (int row = 0; row < count; ++row) {
                        const std::size_t at = FilteredRows::padding + static_cast<std::size_t>(row) * stride;
                        CAPTURE(pixel_size);
                        CAPTURE(width);
                        CAPTURE(count);
                        CAPTURE(row);
                        CHECK(std::memcmp(&band[at], &expected[at], bytes) == 0);
                    }
                }
            }
        }
    }
}

TEST_CASE("plain PNGs of every filter and shape have libpng's pixels") {
    PngDecoder decoder;
    for (const int color_type : {PNG_COLOR_TYPE_GRAY, PNG_COLOR_TYPE_RGB, PNG_COLOR_TYPE_RGB_ALPHA}) {
        for (const int filters :
             {PNG_FILTER_NONE, PNG_FILTER_SUB, PNG_FILTER_UP, PNG_FILTER_AVG, PNG_FILTER_PAETH, PNG_ALL_FILTERS}) {
            for (const auto& [width, height] : {std::pair{1, 1}, {1, 40}, {40, 1}, {16, 16}, {17, 33}, {301, 47}}) {
                const Pixels file = encode({width, height, color_type, filters, 8, false, 1000});
                CAPTURE(color_type);
                CAPTURE(filters);
                CAPTURE(width);
                CHECK(our_decode(decoder, file) == plain_decode(file, PngDecoder::layout({file.data(), file.size()})));
                CHECK(decoder.used_own_filters());
            }
        }
    }
}

TEST_CASE("other PNGs are libpng's") {
    PngDecoder decoder;
    PngOptions options;
    options.interlaced = true;
    const Pixels interlaced = encode(options);
    CHECK(our_decode(decoder, interlaced) == plain_decode(interlaced, Layout::gray));
    CHECK_FALSE(decoder.used_own_filters());
    options.interlaced = false;
    options.bit_depth = 16;
    our_decode(decoder, encode(options));
    CHECK_FALSE(decoder.used_own_filters());
    our_decode(decoder, encode({61, 53, PNG_COLOR_TYPE_GRAY_ALPHA}));
    CHECK_FALSE(decoder.used_own_filters());
}

TEST_CASE("a damaged picture leaves no more memory behind than a sound one") {
    PngDecoder decoder;
    // 8193x8193 pixels, interlaced: libpng is given room for all of it.
    const Pixels file = with_header({0, 0, 0x20, 1, 0, 0, 0x20, 1, 8, PNG_COLOR_TYPE_GRAY, 0, 0, 1}, compressed({}));
    const Bytes data{file.data(), file.size()};
    Collector sink;                                   // gets no row
    const std::size_t before = ::mallinfo2().hblkhd;  // bytes in large blocks
    CHECK_THROWS_AS(decoder.decode(data, read_header(data, "x", 100'000'000), "x", sink), Error);
    CHECK(::mallinfo2().hblkhd < before + Buffer::kept_bytes / 2);
}

TEST_CASE("damage beneath the checksums of the chunks is libpng's to judge") {
    PngDecoder decoder;
    const Pixels rows{4, 1, 2, 3, 4, 0, 5, 6, 7, 8, 1, 9, 1, 1, 1};
    const Pixels sound = tiny(compressed(rows));
    CHECK(our_decode(decoder, sound) == Pixels{1, 3, 6, 10, 5, 6, 7, 8, 9, 10, 11, 12});
    CHECK(decoder.used_own_filters());

    Pixels foreign_filter = rows;
    foreign_filter[5] = 5;
    CHECK(refusal(decoder, tiny(compressed(foreign_filter))).find("filter") != std::string::npos);

    const Pixels short_rows(rows.begin(), rows.end() - 3);
    CHECK_FALSE(refusal(decoder, tiny(compressed(short_rows))).empty());

    Pixels wrong_sum = compressed(rows);
    wrong_sum.back() ^= 1;
    CHECK(refusal(decoder, tiny(wrong_sum)).find("x: ") == 0);

    Pixels unknown_chunk{sound.begin(), sound.begin() + 33};
    append_chunk(unknown_chunk, "ABCD", {1, 2, 3});
    unknown_chunk.insert(unknown_chunk.end(), sound.begin() + 33, sound.end());
    CHECK_FALSE(refusal(decoder, unknown_chunk).empty());

    for (const char* name : {"eX\xb7\x99", "t\0Xt", "tEX@", "tEX{"}) {
        Pixels not_letters{sound.begin(), sound.begin() + 33};
        append_chunk(not_letters, name, {1, 2, 3});
        not_letters.insert(not_letters.end(), sound.begin() + 33, sound.end());
        CHECK_FALSE(refusal(decoder, not_letters).empty());
    }

    Pixels with_text{sound.begin(), sound.begin() + 33};
    append_chunk(with_text, "tEXt", {'a', 0, 'b'});
    with_text.insert(with_text.end(), sound.begin() + 33, sound.end());
    CHECK(our_decode(decoder, with_text) == our_decode(decoder, sound));
    CHECK(decoder.used_own_filters());
}
