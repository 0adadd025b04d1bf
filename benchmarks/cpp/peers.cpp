// The programs that a C++ user writes instead, as candidates of bench-fps's protocol (see programs/serve.hpp).
//
//   naive-cpp: decode everything, resize once, float32, normalise, NCHW, one synchronous request, OpenVINO's latency
//   mode tuned-cpp: the same in a thread per core, each with a request of its own, on one network with as many streams
//
// "precision" in a request: "f32", or "default", which leaves OpenVINO everything that it chooses itself.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <memory>
#include <opencv2/core.hpp>
#include <opencv2/imgcodecs.hpp>
#include <opencv2/imgproc.hpp>
#include <openvino/openvino.hpp>
#include <string>
#include <vector>

#include "serve.hpp"

namespace {

using edgedistill::programs::Case;
using edgedistill::programs::Json;

using Encoded = std::vector<std::vector<uchar>>;

// What the network sees, as a user reads it from the training script.
struct Input {
    cv::Size size;
    cv::Scalar mean, std;
};

Input input_of(const Json& spec) {
    if (spec.at("resize") != "squash" || spec.at("crop_fraction") != 1.0) {
        throw std::runtime_error("this peer squashes whole images; the network's input is cropped");
    }
    const auto mean = spec.at("mean").get<std::vector<double>>();
    const auto std = spec.at("std").get<std::vector<double>>();
    return {{spec.at("width").get<int>(), spec.at("height").get<int>()},
            {mean.at(0), mean.at(1), mean.at(2)},
            {std.at(0), std.at(1), std.at(2)}};
}

std::vector<uchar> read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<uchar> data{std::istreambuf_iterator<char>(file), {}};
    if (data.empty()) {
        throw std::runtime_error(path + ": cannot be read");
    }
    return data;
}

// One caller: an infer request with the preparation around it, as almost every example on the web has it.
class Caller {
public:
    Caller(ov::CompiledModel& compiled, const Input& input)
        : request_(compiled.create_infer_request()), input_(input) {}

    std::vector<float> classify(const std::vector<uchar>& encoded) {
        return classify(cv::imdecode(encoded, cv::IMREAD_COLOR));
    }

    std::vector<float> classify(const cv::Mat& image) {
        cv::Mat resized, rgb, scaled;
        cv::resize(image, resized, input_.size, 0, 0, cv::INTER_LINEAR);
        cv::cvtColor(resized, rgb, cv::COLOR_BGR2RGB);
        rgb.convertTo(scaled, CV_32FC3);
        cv::subtract(scaled, input_.mean, scaled);
        cv::divide(scaled, input_.std, scaled);
        float* plane = request_.get_input_tensor().data<float>();
        std::vector<cv::Mat> planes;
        for (int channel = 0; channel < 3; ++channel, plane += input_.size.area()) {
            planes.emplace_back(input_.size, CV_32F, plane);
        }
        cv::split(scaled, planes);
        request_.infer();
        return probabilities();
    }

private:
    std::vector<float> probabilities() {
        const ov::Tensor logits = request_.get_output_tensor();
        std::vector<float> weights(logits.data<float>(), logits.data<float>() + logits.get_size());
        const float largest = *std::max_element(weights.begin(), weights.end());
        float sum = 0;
        for (float& weight : weights) {
            weight = std::exp(weight - largest);
            sum += weight;
        }
        for (float& weight : weights) {
            weight /= sum;
        }
        return weights;
    }

    ov::InferRequest request_;
    Input input_;
};

// The images of a case: encoded for scope `files`, pixels for `frames`.
struct Images {
    Encoded encoded;
    std::vector<cv::Mat> frames;
    bool files = true;

    std::vector<float> classify(Caller& caller, std::size_t number) const {
        return files ? caller.classify(encoded[number % encoded.size()])
                     : caller.classify(frames[number % frames.size()]);
    }
};

class Peer {
public:
    explicit Peer(const Json& request)
        : tuned_(request.at("candidate") == "tuned-cpp"),
          threads_(request.at("threads")),
          input_(input_of(request.at("input_spec"))) {
        // The threads are the tuned program's parallelism; OpenCV's own would only get in their way.
        cv::setNumThreads(tuned_ ? 1 : -1);
        ov::AnyMap hints;
        if (request.at("precision") == "f32") {
            hints[ov::hint::inference_precision.name()] = ov::element::f32;
            if (!tuned_) {
                hints[ov::hint::performance_mode.name()] = ov::hint::PerformanceMode::LATENCY;
            }
        }
        if (tuned_) {
            hints[ov::hint::performance_mode.name()] = ov::hint::PerformanceMode::THROUGHPUT;
            hints[ov::num_streams.name()] = ov::streams::Num(threads_);
            hints[ov::inference_num_threads.name()] = threads_;
        }
        compiled_ = ov::Core().compile_model(request.at("model").get<std::string>(), "CPU", hints);
    }

    Case prepare(const Json& request) {
        auto images = std::make_shared<Images>();
        images->files = request.at("scope") == "files";
        for (const std::string path : request.at("images")) {
            images->encoded.push_back(read_file(path));
            images->frames.push_back(cv::imdecode(images->encoded.back(), cv::IMREAD_COLOR));
        }
        std::vector<std::function<void()>> steps;
        Case made;
        for (int number = 0; number < (tuned_ ? threads_ : 1); ++number) {
            auto caller = std::make_shared<Caller>(compiled_, input_);
            made.answer = caller->classify(images->encoded.front());
            steps.push_back([caller, images, next = std::size_t{0}]() mutable { images->classify(*caller, next++); });
        }
        if (tuned_) {
            made.run = edgedistill::programs::side_by_side(steps);
        } else {
            made.step = steps.front();
        }
        made.precision = compiled_.get_property(ov::hint::inference_precision).to_string();
        made.settings = {{"threads", compiled_.get_property(ov::inference_num_threads)},
                         {"streams", compiled_.get_property(ov::num_streams).num},
                         {"opencv_threads", cv::getNumThreads()},
                         {"opencv", CV_VERSION}};
        return made;
    }

private:
    bool tuned_;
    int threads_;
    Input input_;
    ov::CompiledModel compiled_;
};

}  // namespace

int main() {
    std::map<std::string, Peer> peers;
    return edgedistill::programs::serve([&](const Json& request) {
        const std::string key = request.at("candidate").get<std::string>() + request.at("precision").get<std::string>();
        return peers.try_emplace(key, request).first->second.prepare(request);
    });
}
