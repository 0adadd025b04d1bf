// Network input for jobs on standard input, to standard output: what tests compare with Python's, byte for byte.
//
// One job a line, fields separated by a single space, the path last:
//   file|bytes HEIGHT WIDTH squash|center-crop CROP_FRACTION full|reduced MAX_PIXELS PATH
//   memory HEIGHT WIDTH squash|center-crop CROP_FRACTION full|reduced MAX_PIXELS SIZE, then so many bytes
//   frame HEIGHT WIDTH squash|center-crop CROP_FRACTION FORMAT FRAME_HEIGHT FRAME_WIDTH ROW_BYTES PATH
// One answer a job: "ok BYTES\n" and so many bytes of uint8 [HEIGHT, WIDTH, 3] BGR, or "error MESSAGE\n".
// All jobs with one MAX_PIXELS go through one Preparer, as a worker's images do.

#include <algorithm>
#include <array>
#include <edgedistill/error.hpp>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "preparer.hpp"

namespace {

using edgedistill::Decode;
using edgedistill::ImageView;
using edgedistill::InputSpec;
using edgedistill::PixelFormat;
using edgedistill::detail::Preparer;

constexpr long long usual_max_pixels = 100'000'000;

std::vector<std::uint8_t> contents(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

PixelFormat format_of(const std::string& name) {
    constexpr std::array<const char*, 7> names{"bgr", "rgb", "gray", "bgra", "rgba", "nv12", "i420"};
    const auto found = std::find(names.begin(), names.end(), name);
    return static_cast<PixelFormat>(found - names.begin());
}

std::string rest_of(std::istream& job) {
    std::string path;
    job.get();
    std::getline(job, path);
    return path;
}

void prepare_frame(std::istream& job, Preparer& preparer, const InputSpec& spec, std::uint8_t* out) {
    ImageView view;
    std::string format;
    job >> format >> view.height >> view.width >> view.row_bytes;
    // Memory of exactly the file's size: reading beyond it is seen by the sanitizers.
    const std::vector<std::uint8_t> pixels = contents(rest_of(job));
    view.format = format_of(format);
    view.data = pixels.data();
    preparer.prepare(view, "frame", spec, out);
}

// By their limits.
Preparer& preparer_for(long long max_pixels) {
    static std::map<long long, Preparer> preparers;
    return preparers.try_emplace(max_pixels, max_pixels).first->second;
}

std::vector<std::uint8_t> next_bytes(std::size_t count) {
    std::vector<std::uint8_t> data(count);
    std::cin.read(reinterpret_cast<char*>(data.data()), static_cast<std::streamsize>(count));
    return data;
}

void load_image(std::istream& job, const std::string& kind, const InputSpec& spec, std::uint8_t* out) {
    std::string decode;
    long long max_pixels = 0;
    job >> decode >> max_pixels;
    const std::string path = rest_of(job);
    const Decode mode = decode == "full" ? Decode::full : Decode::reduced;
    Preparer& preparer = preparer_for(max_pixels);
    if (kind == "file") {
        preparer.load_file(path, path, spec, mode, out);
        return;
    }
    const bool in_memory = kind == "memory";
    const std::vector<std::uint8_t> data = in_memory ? next_bytes(std::stoul(path)) : contents(path);
    preparer.load({data.data(), data.size()}, in_memory ? "<" + path + " bytes>" : path, spec, mode, out);
}

void answer(const std::string& line) {
    std::istringstream job(line);
    std::string kind;
    std::string resize;
    InputSpec spec;
    job >> kind >> spec.height >> spec.width >> resize >> spec.crop_fraction;
    spec.center_crop = resize == "center-crop";
    std::vector<std::uint8_t> out(static_cast<std::size_t>(spec.height) * static_cast<std::size_t>(spec.width) * 3);
    try {
        if (kind == "frame") {
            prepare_frame(job, preparer_for(usual_max_pixels), spec, out.data());
        } else {
            load_image(job, kind, spec, out.data());
        }
        std::cout << "ok " << out.size() << '\n';
        std::cout.write(reinterpret_cast<const char*>(out.data()), static_cast<std::streamsize>(out.size()));
    } catch (const edgedistill::Error& error) {
        std::cout << "error " << error.what() << '\n';
    }
    std::cout.flush();
}

}  // namespace

int main() {
    for (std::string line; std::getline(std::cin, line);) answer(line);
    return 0;
}
