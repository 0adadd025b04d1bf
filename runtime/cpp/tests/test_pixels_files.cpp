// Files are read whole or refused with one error that names them: no crash, no hang, no memory for what they only say.
#include <doctest/doctest.h>
#include <malloc.h>
#include <sys/stat.h>

#include <cstdio>
#include <edgedistill/error.hpp>
#include <filesystem>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include <jpeglib.h>

#include "buffer.hpp"
#include "color.hpp"
#include "jpeg.hpp"
#include "preparer.hpp"

namespace {

namespace fs = std::filesystem;
using namespace edgedistill;
using namespace edgedistill::detail;

using Pixels = std::vector<std::uint8_t>;

struct JpegOptions {
    int width = 97;
    int height = 61;
    int components = 3;
    int across = 2;  // sampling of luma
    int down = 2;
    int restart = 0;
    bool progressive = false;
    int quality = 85;
};

Pixels encode(const JpegOptions& options) {
    jpeg_compress_struct info;
    jpeg_error_mgr errors;
    info.err = jpeg_std_error(&errors);
    jpeg_create_compress(&info);
    unsigned char* memory = nullptr;
    unsigned long size = 0;
    jpeg_mem_dest(&info, &memory, &size);
    info.image_width = static_cast<JDIMENSION>(options.width);
    info.image_height = static_cast<JDIMENSION>(options.height);
    info.input_components = options.components;
    info.in_color_space = options.components == 1 ? JCS_GRAYSCALE : JCS_RGB;
    jpeg_set_defaults(&info);
    jpeg_set_quality(&info, options.quality, TRUE);
    if (options.components == 3) {
        info.comp_info[0].h_samp_factor = options.across;
        info.comp_info[0].v_samp_factor = options.down;
    }
    info.restart_interval = static_cast<unsigned>(options.restart);
    if (options.progressive) jpeg_simple_progression(&info);
    jpeg_start_compress(&info, TRUE);
    std::mt19937 random(7);
    Pixels row(static_cast<std::size_t>(options.width * options.components));
    for (int y = 0; y < options.height; ++y) {
        for (std::size_t x = 0; x < row.size(); ++x) {
            row[x] = static_cast<std::uint8_t>(x * 3 + static_cast<std::size_t>(y) * 5 + random() % 32);
        }
        JSAMPROW pointer = row.data();
        jpeg_write_scanlines(&info, &pointer, 1);
    }
    jpeg_finish_compress(&info);
    Pixels data(memory, memory + size);
    jpeg_destroy_compress(&info);
    std::free(memory);
    return data;
}

// libjpeg itself, as its manual says.
Pixels plain_decode(const Pixels& data, int k) {
    jpeg_decompress_struct info;
    jpeg_error_mgr errors;
    info.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&info);
    jpeg_mem_src(&info, data.data(), static_cast<unsigned long>(data.size()));
    jpeg_read_header(&info, TRUE);
    info.scale_num = 1;
    info.scale_denom = static_cast<unsigned>(k);
    if (info.num_components == 3) info.out_color_space = JCS_EXT_BGR;
    jpeg_start_decompress(&info);
    const std::size_t stride =
        static_cast<std::size_t>(info.output_width) * static_cast<std::size_t>(info.output_components);
    Pixels pixels(stride * info.output_height);
    while (info.output_scanline < info.output_height) {
        JSAMPROW row = pixels.data() + stride * info.output_scanline;
        jpeg_read_scanlines(&info, &row, 1);
    }
    jpeg_finish_decompress(&info);
    jpeg_destroy_decompress(&info);
    return pixels;
}

Pixels our_decode(JpegDecoder& decoder, const Pixels& data, int k) {
    const ImageHeader header = read_header({data.data(), data.size()}, "x", 1'000'000);
    Picture picture{nullptr, {(header.height + k - 1) / k, (header.width + k - 1) / k}, JpegDecoder::layout(header)};
    Pixels memory(static_cast<std::size_t>(picture.row_bytes() * picture.size.height));
    picture.pixels = memory.data();
    Collector collector;
    collector.begin(picture);
    decoder.decode({data.data(), data.size()}, header, "x", k, collector);
    if (picture.layout == Layout::gray) return memory;
    Pixels dense;
    for (std::size_t at = 0; at < memory.size(); at += 4) dense.insert(dense.end(), &memory[at], &memory[at] + 3);
    return dense;
}

// How often an image came once more from its first row.
struct Restarts final : RowSink {
    int count = 0;
    void restart() noexcept override { ++count; }
    void rows(const std::uint8_t*, std::ptrdiff_t, int) noexcept override {}
};

void append_segment(Pixels& data, std::uint8_t marker, const Pixels& body) {
    data.insert(data.end(), {0xFF, marker, 0, static_cast<std::uint8_t>(body.size() + 2)});
    data.insert(data.end(), body.begin(), body.end());
}

// 64x64 pixels in scans of one component each, of 12 bytes, which arithmetic coding (SOF9) fills with what it assumes.
Pixels many_scans(std::uint8_t frame, int count) {
    Pixels data{0xFF, 0xD8};
    Pixels table(65, 1);
    table[0] = 0;
    append_segment(data, 0xDB, table);
    append_segment(data, frame, {8, 0, 64, 0, 64, 3, 1, 0x11, 0, 2, 0x11, 0, 3, 0x11, 0});
    for (int scan = 0; scan < count; ++scan) {
        append_segment(data, 0xDA, {1, static_cast<std::uint8_t>(scan % 3 + 1), 0, 0, 63, 0});
        data.insert(data.end(), {0x91, 0xD8});
    }
    data.insert(data.end(), {0xFF, 0xD9});
    return data;
}

bool refused(const std::function<void()>& body, const std::string& part) {
    try {
        body();
    } catch (const Error& error) {
        return error.kind() == ErrorKind::image && std::string(error.what()).find(part) != std::string::npos;
    }
    return false;
}

class Folder {
public:
    Folder() : path_(fs::temp_directory_path() / ("edgedistill-pixels-" + std::to_string(std::random_device{}()))) {
        fs::create_directory(path_);
    }
    ~Folder() { fs::remove_all(path_); }
    Folder(const Folder&) = delete;
    Folder& operator=(const Folder&) = delete;
    fs::path operator/(const std::string& name) const { return path_ / name; }

private:
    fs::path path_;
};

struct Loader {
    Preparer preparer{1'000'000};
    InputSpec spec;
    Pixels out = Pixels(224 * 224 * 3);

    void operator()(const Pixels& data) {
        preparer.load({data.data(), data.size()}, "x.img", spec, Decode::reduced, out.data());
    }
    void file(const fs::path& path) { preparer.load_file(path, path.string(), spec, Decode::reduced, out.data()); }
};

}  // namespace

TEST_CASE("baseline JPEGs go through our Huffman decoder and come out as libjpeg's pixels") {
    JpegDecoder decoder;
    int ours = 0;
    for (const int components : {1, 3}) {
        for (const auto& [across, down] : {std::pair{1, 1}, {2, 1}, {1, 2}, {2, 2}, {4, 1}, {4, 2}}) {
            for (const int restart : {0, 1, 5}) {
                for (const int quality : {5, 85, 100}) {
                    const Pixels data = encode({97, 61, components, across, down, restart, false, quality});
                    for (const int k : {1, 2, 4, 8}) {
                        REQUIRE(our_decode(decoder, data, k) == plain_decode(data, k));
                        ours += decoder.used_own_huffman() ? 1 : 0;
                    }
                }
            }
        }
    }
#if defined(LIBJPEG_TURBO_VERSION_NUMBER) && __has_include(<jpegint.h>)
    CHECK(ours == 2 * 6 * 3 * 3 * 4);
#endif
}

TEST_CASE("progressive JPEGs come out as libjpeg's pixels, and incomplete ones are refused") {
    JpegDecoder decoder;
    JpegOptions options;
    options.progressive = true;
    const Pixels data = encode(options);
    for (const int k : {1, 2, 4, 8}) REQUIRE(our_decode(decoder, data, k) == plain_decode(data, k));
    CHECK_FALSE(decoder.used_own_huffman());
    std::vector<std::size_t> scans;
    for (std::size_t at = 0; at + 1 < data.size(); ++at) {
        if (data[at] == 0xFF && data[at + 1] == 0xDA) scans.push_back(at);
    }
    REQUIRE(scans.size() > 2);
    for (std::size_t scan = 1; scan < scans.size(); ++scan) {
        Pixels part(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(scans[scan]));
        part.insert(part.end(), {0xFF, 0xD9});
        CHECK(refused([&] { our_decode(decoder, part, 1); }, "scans are missing"));
    }
}

TEST_CASE("a damaged JPEG that is libjpeg's alone is decoded once") {
    JpegDecoder decoder;
    JpegOptions options;
    options.progressive = true;
    Pixels data = encode(options);
    data.resize(data.size() / 2);
    const Bytes bytes{data.data(), data.size()};
    Restarts sink;
    CHECK(refused([&] { decoder.decode(bytes, read_header(bytes, "x", 1'000'000), "x", 1, sink); }, "damaged"));
    CHECK(sink.count == 0);
}

TEST_CASE("endless JPEGs are refused, of whatever kind") {
    Loader load;
    load(many_scans(0xC9, max_jpeg_scans));
    for (const std::uint8_t frame : Pixels{0xC0, 0xC1, 0xC2, 0xC9, 0xCA}) {
        CHECK(refused([&] { load(many_scans(frame, max_jpeg_scans + 1)); }, "more than 500 scans"));
    }
}

TEST_CASE("a damaged file leaves no more memory behind than a sound one") {
    const Folder folder;
    Loader load;
    std::ofstream(folder / "large.jpg").flush();
    fs::resize_file(folder / "large.jpg", Buffer::kept_bytes);
    const std::size_t before = ::mallinfo2().hblkhd;  // bytes in large blocks
    CHECK(refused([&] { load.file(folder / "large.jpg"); }, "zero bytes"));
    CHECK(::mallinfo2().hblkhd < before + Buffer::kept_bytes / 2);
}

TEST_CASE("a truncated JPEG is refused wherever it was cut, and the next one is whole") {
    Loader load;
    for (const int restart : {0, 2}) {
        JpegOptions options;
        options.restart = restart;
        const Pixels data = encode(options);
        load(data);
        const Pixels expected = load.out;
        for (std::size_t size = data.size() - 1; size > 0; size -= std::min<std::size_t>(size, 7)) {
            const Pixels part(data.begin(), data.begin() + static_cast<std::ptrdiff_t>(size));
            REQUIRE(refused([&] { load(part); }, "x.img: "));
        }
        load(data);
        CHECK(load.out == expected);
    }
}

TEST_CASE("a JPEG without tables does not get those of the image before") {
    JpegDecoder used;
    our_decode(used, encode({}), 1);
    Pixels data = encode({});
    for (std::size_t at = 2; at + 4 < data.size() && data[at + 1] != 0xDA;) {
        const std::size_t length = 2 + (std::size_t{data[at + 2]} << 8 | data[at + 3]);
        if (data[at + 1] == 0xDB) {
            data.erase(data.begin() + static_cast<std::ptrdiff_t>(at),
                       data.begin() + static_cast<std::ptrdiff_t>(at + length));
        } else {
            at += length;
        }
    }
    CHECK(refused([&] { our_decode(used, data, 1); }, "uantization table"));
}

TEST_CASE("declared sizes above the limit are refused before anything is allocated") {
    Loader load;
    Pixels jpeg = encode({});
    for (std::size_t at = 0; at + 9 < jpeg.size(); ++at) {
        if (jpeg[at] == 0xFF && jpeg[at + 1] == 0xC0) jpeg[at + 5] = jpeg[at + 7] = 0xFF;
    }
    CHECK(refused([&] { load(jpeg); }, "pixels, the limit is 1000000"));
    Pixels bmp(60);
    const std::array<std::uint8_t, 2> magic{'B', 'M'};
    std::copy(magic.begin(), magic.end(), bmp.begin());
    bmp[14] = 40;
    for (std::size_t at = 18; at < 26; ++at) bmp[at] = at == 21 || at == 25 ? 0x7F : 0xFF;
    CHECK(refused([&] { load(bmp); }, "2147483647x2147483647 pixels"));
}

TEST_CASE("other formats are named") {
    Loader load;
    const auto text = [](const std::string& bytes) { return Pixels(bytes.begin(), bytes.end()); };
    CHECK(refused([&] { load(text("GIF89a..............")); }, "a GIF"));
    CHECK(refused([&] { load(text("II*\0........")); }, "TIFF"));
    CHECK(refused([&] { load(text("hello there")); }, "a text file"));
    CHECK(refused([&] { load(text("  <!DOCTYPE html>")); }, "an HTML page"));
    CHECK(refused([&] { load(Pixels(100)); }, "zero bytes"));
    CHECK(refused([&] { load(Pixels()); }, "empty"));
}

TEST_CASE("paths that are no image files are errors, and none is waited for") {
    const Folder folder;
    Loader load;
    std::ofstream(folder / "empty.jpg").flush();
    REQUIRE(::mkfifo((folder / "pipe.jpg").c_str(), 0600) == 0);
    CHECK(
        refused([&] { load.file(folder / "missing.jpg"); }, "missing.jpg: cannot be read (No such file or directory)"));
    CHECK(refused([&] { load.file(folder / "empty.jpg"); }, "empty.jpg: the file is empty"));
    CHECK(refused([&] { load.file(folder / "pipe.jpg"); }, "pipe.jpg: not a file; name an image file"));
    CHECK(refused([&] { load.file(folder / "."); }, "not a file"));
    CHECK(refused([&] { load.file("/dev/zero"); }, "not a file"));
    CHECK(refused([&] { load.file(fs::path(std::string("a\0b.jpg", 7))); }, "null"));
    const Pixels data = encode({});
    std::ofstream(folder / "bild\xC3\xA9.jpg", std::ios::binary)
        .write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
    load.file(folder / "bild\xC3\xA9.jpg");
    const Pixels from_file = load.out;
    load(data);
    CHECK(load.out == from_file);
    fs::resize_file(folder / "empty.jpg", std::uintmax_t{1} << 33);
    CHECK(refused([&] { load.file(folder / "empty.jpg"); }, "8589934592 bytes"));
}

TEST_CASE("damaged bytes give an error or pixels, never more") {
    Loader load;
    std::mt19937 random(11);
    int errors = 0;
    for (const bool progressive : {false, true}) {
        JpegOptions options;
        options.progressive = progressive;
        options.restart = progressive ? 0 : 3;
        const Pixels data = encode(options);
        for (int round = 0; round < 400; ++round) {
            Pixels damaged = data;
            for (unsigned flips = 1 + random() % 4; flips > 0; --flips) {
                damaged[2 + random() % (damaged.size() - 2)] ^= static_cast<std::uint8_t>(1U << random() % 8);
            }
            try {
                load(damaged);
            } catch (const Error& error) {
                REQUIRE(error.kind() == ErrorKind::image);
                ++errors;
            }
        }
    }
    CHECK(errors > 100);
}
