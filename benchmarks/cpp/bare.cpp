// What Classifier could be at best: the same decoding and resizing around a plain OpenVINO request, without a class,
// lock or check in between. A candidate of bench-fps's protocol, scope `files`, mode latency.
#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <openvino/openvino.hpp>
#include <string>
#include <vector>

#include "../../runtime/cpp/src/preparer.hpp"
#include "serve.hpp"

namespace {

using edgedistill::Bytes;
using edgedistill::Decode;
using edgedistill::InputSpec;
using edgedistill::programs::Case;
using edgedistill::programs::Json;

InputSpec spec_of(const Json& values) {
    InputSpec spec;
    spec.height = values.at("height");
    spec.width = values.at("width");
    spec.center_crop = values.at("resize") == "center-crop";
    spec.crop_fraction = values.at("crop_fraction");
    spec.mean = values.at("mean").get<std::array<double, 3>>();
    spec.std = values.at("std").get<std::array<double, 3>>();
    return spec;
}

// OpenVINO's own PrePostProcessor, as its manual writes it.
std::shared_ptr<ov::Model> with_preprocessing(const std::shared_ptr<ov::Model>& model, const InputSpec& spec) {
    ov::preprocess::PrePostProcessor steps(model);
    steps.input()
        .tensor()
        .set_element_type(ov::element::u8)
        .set_layout("NHWC")
        .set_color_format(ov::preprocess::ColorFormat::BGR);
    steps.input().model().set_layout("NCHW");
    steps.input()
        .preprocess()
        .convert_color(ov::preprocess::ColorFormat::RGB)
        .convert_element_type(ov::element::f32)
        .mean({spec.mean.begin(), spec.mean.end()})
        .scale({spec.std.begin(), spec.std.end()});
    return steps.build();
}

class Bare {
public:
    explicit Bare(const Json& request) : spec_(spec_of(request.at("input_spec"))), preparer_(100'000'000) {
        ov::Core core;
        const std::string model = request.at("model");
        // INT8 keeps its float layers in f32, as ours does.
        const auto network = with_preprocessing(core.read_model(model), spec_);
        compiled_ = core.compile_model(network, "CPU", ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                                       ov::num_streams(1), ov::hint::inference_precision(ov::element::f32));
        request_ = compiled_.create_infer_request();
        for (const std::string path : request.at("images")) {
            std::ifstream file(path, std::ios::binary);
            images_.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        }
    }

    int classify() {
        const std::vector<std::uint8_t>& image = images_[next_++ % images_.size()];
        preparer_.load({image.data(), image.size()}, "", spec_, Decode::reduced,
                       request_.get_input_tensor().data<std::uint8_t>());
        request_.infer();
        const ov::Tensor logits = request_.get_output_tensor();
        const float* first = logits.data<float>();
        return static_cast<int>(std::max_element(first, first + logits.get_size()) - first);
    }

private:
    InputSpec spec_;
    edgedistill::detail::Preparer preparer_;
    ov::CompiledModel compiled_;
    ov::InferRequest request_;
    std::vector<std::vector<std::uint8_t>> images_;
    std::size_t next_ = 0;
};

}  // namespace

int main() {
    return edgedistill::programs::serve([](const Json& request) {
        if (request.at("scope") != "files" || request.at("mode") != "latency") {
            throw std::runtime_error("the bare loop is measured in scope files, mode latency");
        }
        auto bare = std::make_shared<Bare>(request);
        Case made;
        made.step = [bare] { bare->classify(); };
        return made;
    });
}
