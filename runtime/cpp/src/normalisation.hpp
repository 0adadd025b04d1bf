// uint8 pixels in: colour order, mean and scale compiled into a network.
#pragma once

#include <memory>

#include <edgedistill/options.hpp>

namespace ov {
class Model;
}

namespace edgedistill::detail {

// `model` (float32) changed in place to take uint8 [N, H, W, 3] BGR. `bgr`: the network itself wants BGR; `nhwc`: its
// layout.
//
// OpenVINO's PrePostProcessor turns the pixels into planes before it normalises them, and the first convolution turns
// them back: at 224 px, f32, one thread of a Xeon that costs a Transpose, a Subgraph and a Reorder of 76 + 94 + 231
// microseconds beside 197 for the convolution itself. Normalising interleaved pixels as one long row (where the vector
// unit runs over W x 3 values instead of 3) costs 106 and leaves nothing to turn. The answers are the same, bit for
// bit. Only the colour order is PrePostProcessor's: it goes into the weights of the first convolution.
//
// Of an INT8 network the input is quantised in the same pass: the FakeQuantize of the planes comes before the pixels
// are anything but a row, so that no float is written. That saves 4% of a MobileNetV3-small, bit for bit the same
// again.
void embed_normalisation(const std::shared_ptr<ov::Model>& model, const InputSpec& spec, bool bgr, bool nhwc);

}  // namespace edgedistill::detail
