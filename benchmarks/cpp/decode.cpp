// CPU time from the bytes of a JPEG or PNG to the pixels that the network sees, by every way at hand, in turns:
//
//   edgedistill-decode FILE SIZE ROUNDS
//
// prints one JSON object: name -> milliseconds of each round. "-only" ends at the decoded picture.
#include <time.h>

#include <cstdio>  // jpeglib.h needs FILE
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <iostream>
#include <iterator>
#include <map>
#include <nlohmann/json.hpp>
#include <opencv2/core.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include <jpeglib.h>
#include <png.h>

#include "../../runtime/cpp/src/preparer.hpp"

namespace {

using edgedistill::Decode;

double cpu_ms() {
    timespec now{};
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) / 1e6;
}

// libjpeg-turbo as its manual has it; `reduction`: 1, 2, 4 or 8, scaled in the
// DCT.
cv::Mat turbo(const std::vector<uchar>& data, unsigned reduction) {
    jpeg_decompress_struct state{};
    jpeg_error_mgr errors{};
    state.err = jpeg_std_error(&errors);
    jpeg_create_decompress(&state);
    jpeg_mem_src(&state, data.data(), data.size());
    jpeg_read_header(&state, TRUE);
    state.out_color_space = JCS_EXT_BGR;
    state.scale_denom = reduction;
    jpeg_start_decompress(&state);
    cv::Mat image(static_cast<int>(state.output_height), static_cast<int>(state.output_width), CV_8UC3);
    while (state.output_scanline < state.output_height) {
        JSAMPROW row = image.ptr(static_cast<int>(state.output_scanline));
        jpeg_read_scanlines(&state, &row, 1);
    }
    jpeg_finish_decompress(&state);
    jpeg_destroy_decompress(&state);
    return image;
}

// libpng as its manual has it, row by row; grey stays grey.
cv::Mat plain_png(const std::vector<uchar>& data) {
    struct Rest {
        const uchar* at;
    } rest{data.data()};
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
    png_infop info = png_create_info_struct(png);
    if (setjmp(png_jmpbuf(png)) != 0) throw std::runtime_error("libpng cannot read it");
    png_set_read_fn(png, &rest, [](png_structp state, png_bytep out, std::size_t count) {
        auto* from = static_cast<Rest*>(png_get_io_ptr(state));
        std::memcpy(out, from->at, count);
        from->at += count;
    });
    png_read_info(png, info);
    png_set_strip_alpha(png);
    png_set_bgr(png);
    png_read_update_info(png, info);
    cv::Mat image(static_cast<int>(png_get_image_height(png, info)), static_cast<int>(png_get_image_width(png, info)),
                  png_get_channels(png, info) == 1 ? CV_8UC1 : CV_8UC3);
    for (int row = 0; row < image.rows; ++row) png_read_row(png, image.ptr(row), nullptr);
    png_read_end(png, nullptr);
    png_destroy_read_struct(&png, &info, nullptr);
    return image;
}

// The largest whose picture is no smaller than the network's input.
unsigned reduction_of(cv::Size picture, int size) {
    for (const int k : {8, 4, 2}) {
        if (picture.height / k >= size && picture.width / k >= size) return static_cast<unsigned>(k);
    }
    return 1;
}

cv::Mat resized(const cv::Mat& image, int size) {
    cv::Mat small;
    cv::resize(image, small, {size, size}, 0, 0, cv::INTER_LINEAR);
    return small;
}

int run(const std::string& path, int size, int rounds) {
    std::ifstream file(path, std::ios::binary);
    const std::vector<uchar> data{std::istreambuf_iterator<char>(file), {}};
    if (data.empty()) throw std::runtime_error(path + ": cannot be read");
    cv::setNumThreads(1);
    edgedistill::InputSpec spec;
    spec.height = spec.width = size;
    edgedistill::detail::Preparer preparer(1 << 28);
    std::vector<std::uint8_t> pixels(static_cast<std::size_t>(size * size * 3));
    const auto ours = [&](Decode decode) {
        preparer.load({data.data(), data.size()}, path, spec, decode, pixels.data());
    };
    const unsigned reduction = reduction_of(cv::imdecode(data, cv::IMREAD_COLOR).size(), size);
    using Ways = std::vector<std::pair<std::string, std::function<void()>>>;
    Ways ways{
        {"edgedistill", [&] { ours(Decode::reduced); }},
        {"opencv", [&] { resized(cv::imdecode(data, cv::IMREAD_COLOR), size); }},
    };
    const Ways of_jpeg{
        {"edgedistill-full", [&] { ours(Decode::full); }},
        {"libjpeg-turbo", [&] { resized(turbo(data, 1), size); }},
        {"libjpeg-turbo-only", [&] { turbo(data, 1); }},
        {"libjpeg-turbo-scaled", [&] { resized(turbo(data, reduction), size); }},
        {"libjpeg-turbo-scaled-only", [&] { turbo(data, reduction); }},
    };
    const Ways of_png{
        {"libpng", [&] { resized(plain_png(data), size); }},
        {"libpng-only", [&] { plain_png(data); }},
    };
    const Ways& others = data[0] == 0x89 ? of_png : of_jpeg;
    ways.insert(ways.end(), others.begin(), others.end());
    std::map<std::string, std::vector<double>> milliseconds;
    for (int round = 0; round < rounds + 3; ++round) {
        for (const auto& [name, way] : ways) {
            const double start = cpu_ms();
            for (int again = 0; again < 4; ++again) way();
            if (round >= 3) milliseconds[name].push_back((cpu_ms() - start) / 4);
        }
    }
    std::cout << nlohmann::json{{"reduction", reduction}, {"milliseconds", milliseconds}} << '\n';
    return EXIT_SUCCESS;
}

}  // namespace

int main(int count, char** arguments) {
    try {
        if (count != 4) throw std::runtime_error("expected FILE SIZE ROUNDS");
        return run(arguments[1], std::stoi(arguments[2]), std::stoi(arguments[3]));
    } catch (const std::exception& error) {
        std::cerr << "edgedistill-decode: " << error.what() << '\n';
        return EXIT_FAILURE;
    }
}
