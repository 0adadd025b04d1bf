"""uint8 pixels in: colour order, mean and scale compiled into a network."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import openvino as ov
from openvino import opset8
from openvino.preprocess import ColorFormat, PrePostProcessor

from edgedistill.images import InputSpec


def embed_normalisation(model: ov.Model, spec: InputSpec, *, bgr: bool = False, layout: str = "NCHW") -> ov.Model:
    """``model`` (float32, of that layout) changed in place to take uint8 [N, H, W, 3] BGR.

    ``bgr``: the network itself wants BGR.

    OpenVINO's PrePostProcessor turns the pixels into planes before it normalises them, and the first convolution turns
    them back: at 224 px, f32, one thread of a Xeon that costs a Transpose, a Subgraph and a Reorder of 76 + 94 + 231
    microseconds beside 197 for the convolution itself. Normalising interleaved pixels as one long row (where the vector
    unit runs over W x 3 values instead of 3) costs 106 and leaves nothing to turn. The answers are the same, bit for bit.
    Only the colour order is PrePostProcessor's: it goes into the weights of the first convolution.
    """
    processor = PrePostProcessor(model)
    tensor = processor.input().tensor()
    tensor.set_element_type(ov.Type.f32).set_layout(ov.Layout("NHWC"))
    if not bgr:
        tensor.set_color_format(ColorFormat.BGR)
        processor.input().preprocess().convert_color(ColorFormat.RGB)
    processor.input().model().set_layout(ov.Layout(layout))
    processor.build()
    floats = model.inputs[0].get_node()
    batch, height, width, channels = floats.get_output_shape(0)
    pixels = opset8.parameter([batch, height, width, channels], np.uint8, name=floats.get_friendly_name())
    pixels.output(0).set_names(floats.output(0).get_names())
    row = opset8.convert(opset8.reshape(pixels, _shape(batch, height, width * channels), False), np.float32)
    centred = opset8.subtract(row, _one_row(spec.mean, width))
    scaled = opset8.multiply(centred, np.float32(1) / _one_row(spec.std, width))
    normalised = opset8.reshape(scaled, _shape(batch, height, width, channels), False)
    for reader in floats.output(0).get_target_inputs():
        reader.replace_source_output(normalised.output(0))
    model.add_parameters([pixels])
    model.remove_parameter(floats)
    model.validate_nodes_and_infer_types()
    return model


def _one_row(values: Sequence[float], width: int) -> npt.NDArray[np.float32]:
    """RGB constants in the order of BGR pixels, repeated for a row: float32 [1, 1, width * 3]."""
    return np.tile(np.asarray(values[::-1], np.float32), width).reshape(1, 1, -1)


def _shape(*sizes: int) -> npt.NDArray[np.int64]:
    return np.array(sizes, np.int64)
