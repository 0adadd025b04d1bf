// Settings that Classifier and Engine share.
#pragma once

#include <array>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

namespace edgedistill {

enum class LogLevel { info, warning };
// Called from whichever thread has something to say, never from two threads of one object at once. It must not throw.
using LogCallback = std::function<void(LogLevel, std::string_view)>;

enum class Decode {
    full,     // every format is decoded whole, then averaged down exactly: the pixels that a camera frame would give
    reduced,  // JPEG is shrunk while it is decoded: the fastest
};

// Where compiled models are kept between runs, so that a second start is fast.
struct ModelCache {
    bool enabled = true;
    std::string folder;  // empty: $EDGEDISTILL_CACHE/openvino, else ~/.cache/edgedistill/openvino
};

// What the network sees.
struct InputSpec {
    int height = 224;              // pixels
    int width = 224;               // pixels
    bool center_crop = false;      // false: the whole image is squeezed to height x width
    double crop_fraction = 1.0;    // share of the image's (or crop's) height and width that is kept
    std::array<double, 3> mean{};  // RGB, 0-255
    std::array<double, 3> std{};   // RGB, 0-255
};

struct Options {
    std::string precision;         // "f32", "bf16" or "int8", of every stage; empty: what deploy.json says
    std::optional<int> threads;    // OpenVINO's inference threads in all; unset: by deploy.json, else by the machine
    std::optional<Decode> decode;  // unset: what deploy.json says
    ModelCache cache;
    LogCallback log;                     // empty: warnings go to standard error
    long long max_pixels = 100'000'000;  // images that declare more are refused before they are decoded
};

}  // namespace edgedistill
