// The smallest network that passes for an image classifier of ours: [1, 3, 16, 16] -> the mean of each plane.
#pragma once

#include <memory>
#include <string>

#include <openvino/core/model.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/parameter.hpp>
#include <openvino/op/reduce_mean.hpp>
#include <openvino/op/result.hpp>

namespace edgedistill::fuzz {

inline constexpr int tiny_size = 16;

inline std::shared_ptr<ov::Model> tiny_network() {
    const auto image = std::make_shared<ov::op::v0::Parameter>(ov::element::f32, ov::Shape{1, 3, tiny_size, tiny_size});
    const auto axes = ov::op::v0::Constant::create(ov::element::i64, {2}, {2, 3});
    const auto means = std::make_shared<ov::op::v1::ReduceMean>(image, axes, false);
    const auto result = std::make_shared<ov::op::v0::Result>(means);
    return std::make_shared<ov::Model>(ov::ResultVector{result}, ov::ParameterVector{image}, "tiny");
}

// What export writes, section "edgedistill".
inline ov::AnyMap tiny_metadata() {
    return {
        {"format_version", std::string("1")},
        {"task", std::string("single-label")},
        {"labels", std::string(R"(["red", "green", "very blue"])")},
        {"temperature", std::string("1.5")},
        {"input_spec", std::string(R"({"height": 16, "width": 16, "resize": "squash", "crop_fraction": 1.0,)"
                                   R"( "color_order": "RGB", "mean": [123.675, 116.28, 103.53],)"
                                   R"( "std": [58.395, 57.12, 57.375]})")},
        {"architecture", std::string("tiny")},
        {"dataset_hash", std::string("d")},
        {"weights_hash", std::string("w")},
    };
}

}  // namespace edgedistill::fuzz
