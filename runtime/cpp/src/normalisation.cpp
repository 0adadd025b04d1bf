#include "normalisation.hpp"

#include <array>
#include <cstdint>
#include <vector>

#include <openvino/core/model.hpp>
#include <openvino/core/preprocess/pre_post_process.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/convert.hpp>
#include <openvino/op/multiply.hpp>
#include <openvino/op/parameter.hpp>
#include <openvino/op/reshape.hpp>
#include <openvino/op/subtract.hpp>

namespace edgedistill::detail {

namespace {

using Sizes = std::vector<std::int64_t>;

std::shared_ptr<ov::Node> reshaped(const ov::Output<ov::Node>& value, const Sizes& sizes) {
    const auto shape = ov::op::v0::Constant::create(ov::element::i64, {sizes.size()}, sizes);
    return std::make_shared<ov::op::v1::Reshape>(value, shape, false);
}

// RGB constants in the order of BGR pixels, repeated for a row: float32 [1, 1, width * 3].
std::shared_ptr<ov::Node> one_row(const std::array<float, 3>& rgb, std::size_t width) {
    std::vector<float> row;
    row.reserve(3 * width);
    for (std::size_t column = 0; column < width; ++column) row.insert(row.end(), {rgb[2], rgb[1], rgb[0]});
    return ov::op::v0::Constant::create(ov::element::f32, {1, 1, row.size()}, row);
}

void embed_colour_order(const std::shared_ptr<ov::Model>& model, bool bgr, bool nhwc) {
    ov::preprocess::PrePostProcessor processor(model);
    auto& input = processor.input();
    input.tensor().set_element_type(ov::element::f32).set_layout("NHWC");
    if (!bgr) {
        input.tensor().set_color_format(ov::preprocess::ColorFormat::BGR);
        input.preprocess().convert_color(ov::preprocess::ColorFormat::RGB);
    }
    input.model().set_layout(nhwc ? "NHWC" : "NCHW");
    processor.build();
}

}  // namespace

void embed_normalisation(const std::shared_ptr<ov::Model>& model, const InputSpec& spec, bool bgr, bool nhwc) {
    embed_colour_order(model, bgr, nhwc);
    const std::shared_ptr<ov::op::v0::Parameter> floats = model->get_parameters()[0];
    const ov::Shape shape = floats->get_output_shape(0);
    const auto batch = static_cast<std::int64_t>(shape[0]);
    const auto height = static_cast<std::int64_t>(shape[1]);
    const auto width = static_cast<std::int64_t>(shape[2]);
    const auto pixels = std::make_shared<ov::op::v0::Parameter>(ov::element::u8, shape);
    pixels->set_friendly_name(floats->get_friendly_name());
    pixels->output(0).set_names(floats->output(0).get_names());
    std::array<float, 3> mean{};
    std::array<float, 3> scale{};
    for (std::size_t channel = 0; channel < 3; ++channel) {
        mean[channel] = static_cast<float>(spec.mean[channel]);
        scale[channel] = 1.0F / static_cast<float>(spec.std[channel]);
    }
    const auto row =
        std::make_shared<ov::op::v0::Convert>(reshaped(pixels, {batch, height, width * 3}), ov::element::f32);
    const auto centred = std::make_shared<ov::op::v1::Subtract>(row, one_row(mean, shape[2]));
    const auto scaled = std::make_shared<ov::op::v1::Multiply>(centred, one_row(scale, shape[2]));
    const auto normalised = reshaped(scaled, {batch, height, width, 3});
    for (auto reader : floats->output(0).get_target_inputs()) reader.replace_source_output(normalised);
    model->add_parameters({pixels});
    model->remove_parameter(floats);
    model->validate_nodes_and_infer_types();
}

}  // namespace edgedistill::detail
