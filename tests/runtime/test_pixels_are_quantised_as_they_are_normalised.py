"""The input of an INT8 network is quantised in the pass that normalises it, and nothing else is: the answers stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import pytest
from openvino import opset8

from edgedistill.images import InputSpec
from edgedistill.runtime.normalisation import embed_normalisation

BATCH, HEIGHT, WIDTH = 2, 12, 20
SPEC = InputSpec(height=HEIGHT, width=WIDTH)
ALIKE, BY_CHANNEL = (1, 1, 1, 1), (1, 3, 1, 1)


def network(limits: tuple[int, ...], *, layout: str = "NCHW", readers: int = 1) -> ov.Model:
    """Float pixels, quantised within ±2.3 (a little more for each further limit), then a convolution; two readers: and
    the sum of what was not quantised."""
    planes = [BATCH, 3, HEIGHT, WIDTH]
    shape = planes if layout == "NCHW" else [BATCH, HEIGHT, WIDTH, 3]
    pixels = opset8.parameter(shape, np.float32, name="input")
    pixels.output(0).set_names({"input"})
    values = pixels if layout == "NCHW" else opset8.transpose(pixels, np.array([0, 3, 1, 2]))
    high = np.linspace(2.3, 2.4, int(np.prod(limits)), dtype=np.float32).reshape(limits)
    low, top = opset8.constant(-high), opset8.constant(high)
    quantised = opset8.fake_quantize(values, low, top, low, top, levels=256)
    weights = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(np.float32)
    found = opset8.convolution(quantised, weights, [2, 2], [1, 1], [1, 1], [1, 1])
    result = opset8.reduce_mean(found, np.array([2, 3]), False)
    if readers == 2:
        result = opset8.add(result, opset8.reduce_sum(values, np.array([1, 2, 3]), True).output(0))
        result = opset8.reduce_mean(result, np.array([2, 3]), False)
    return ov.Model([result], [pixels], "tiny")


def answer(model: ov.Model, pixels: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    compiled = ov.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1})
    return np.array(compiled([pixels])[0])


def quantiser(model: ov.Model) -> ov.Node:
    (found,) = [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    return found


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("bgr", [False, True])
@pytest.mark.parametrize(
    ("limits", "readers", "in_one_pass"),
    [(ALIKE, 1, True), ((), 1, True), (BY_CHANNEL, 1, False), (ALIKE, 2, False)],
    ids=["alike", "number", "by-channel", "two-readers"],
)
def test_only_a_quantiser_of_all_alike_is_moved_and_answers_stay(
    layout: str, bgr: bool, limits: tuple[int, ...], readers: int, in_one_pass: bool
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (BATCH, HEIGHT, WIDTH, 3), dtype=np.uint8)
    mean, scale = np.float32(SPEC.mean), np.float32(1) / np.float32(SPEC.std)
    floats = (pixels[..., ::-1].astype(np.float32) - mean) * scale
    floats = floats[..., ::-1] if bgr else floats
    floats = floats.transpose(0, 3, 1, 2) if layout == "NCHW" else floats
    expected = answer(network(limits, layout=layout, readers=readers), np.ascontiguousarray(floats))
    model = network(limits, layout=layout, readers=readers)

    embed_normalisation(model, SPEC, bgr=bgr, layout=layout)

    rows = [BATCH, HEIGHT, WIDTH * 3]
    assert (list(quantiser(model).get_output_shape(0)) == rows) == in_one_pass
    # One step of the quantiser would show: 4.6 / 255 of a weight.
    np.testing.assert_allclose(answer(model, pixels), expected, atol=2e-5, rtol=2e-5)
