#include "normalisation.hpp"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include <openvino/core/model.hpp>
#include <openvino/core/preprocess/pre_post_process.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/convert.hpp>
#include <openvino/op/fake_quantize.hpp>
#include <openvino/op/multiply.hpp>
#include <openvino/op/parameter.hpp>
#include <openvino/op/reshape.hpp>
#include <openvino/op/subtract.hpp>
#include <openvino/op/transpose.hpp>

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

bool is_one_number(const ov::Output<ov::Node>& limit) {
    const auto constant = ov::as_type_ptr<ov::op::v0::Constant>(limit.get_node_shared_ptr());
    return constant && ov::shape_size(constant->get_shape()) == 1;
}

// The only reader of the values, or of their transposition, if it quantises them all alike; else nothing.
std::shared_ptr<ov::op::v0::FakeQuantize> quantiser_of(const ov::Output<ov::Node>& values) {
    const auto readers = values.get_target_inputs();
    if (readers.size() != 1 || readers.begin()->get_index() != 0) return nullptr;
    const std::shared_ptr<ov::Node> reader = readers.begin()->get_node()->shared_from_this();
    if (ov::is_type<ov::op::v1::Transpose>(reader)) return quantiser_of(reader->output(0));
    const auto quantiser = ov::as_type_ptr<ov::op::v0::FakeQuantize>(reader);
    if (!quantiser) return nullptr;
    const ov::OutputVector inputs = quantiser->input_values();
    return std::all_of(inputs.begin() + 1, inputs.end(), is_one_number) ? quantiser : nullptr;
}

// The rows as the quantiser leaves them, which is taken out of its place.
std::shared_ptr<ov::Node> quantised(const std::shared_ptr<ov::Node>& rows,
                                    const std::shared_ptr<ov::op::v0::FakeQuantize>& quantiser) {
    if (!quantiser) return rows;
    ov::OutputVector inputs{rows};
    for (std::size_t number = 1; number < quantiser->get_input_size(); ++number) {
        const auto limit = ov::as_type_ptr<ov::op::v0::Constant>(quantiser->get_input_node_shared_ptr(number));
        inputs.push_back(std::make_shared<ov::op::v0::Constant>(*limit, ov::Shape{1, 1, 1}));
    }
    const std::shared_ptr<ov::Node> moved = quantiser->clone_with_new_inputs(inputs);
    moved->set_friendly_name(quantiser->get_friendly_name());
    for (auto reader : quantiser->output(0).get_target_inputs()) {
        reader.replace_source_output(quantiser->input_value(0));
    }
    return moved;
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
    const auto quantiser = quantiser_of(floats->output(0));
    const auto normalised = reshaped(quantised(scaled, quantiser), {batch, height, width, 3});
    for (auto reader : floats->output(0).get_target_inputs()) reader.replace_source_output(normalised);
    model->add_parameters({pixels});
    model->remove_parameter(floats);
    model->validate_nodes_and_infer_types();
}

}  // namespace edgedistill::detail
