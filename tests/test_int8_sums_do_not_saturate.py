"""CPUs without 8-bit dot products add pairs of INT8 products in 16 bits: they are found out, and weights kept small there."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import openvino as ov
import pytest
import torch
from torch import nn

from edgedistill.benchmarks.tuner.space import DOT_PRODUCTS
from edgedistill.errors import UsageError
from edgedistill.export import int8, ir
from edgedistill.export.inference import compile_ir, ir_logits, sums_saturate
from edgedistill.export.int8 import Int8Settings, make_int8
from edgedistill.export.int8_quantize import QUANTIZABLE, quantize
from edgedistill.export.samples import Samples
from edgedistill.images import InputSpec
from edgedistill.runtime.processor import cpu_info
from edgedistill.tasks import Task
from edgedistill.training.seeds import generator

SPEC = InputSpec(32, 32)
SETTINGS = Int8Settings(threads=1, timing_rounds=1, timing_seconds=0.001, max_rung="plain", mode="on", max_drop=1.0)
needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the limit on instructions is x86's")


@pytest.fixture(scope="module")
def model() -> ov.Model:
    """Large weights of one sign, whose sums are as large as they can be."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.Conv2d(32, 64, 1), nn.ReLU(), nn.Conv2d(64, 4, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    ).eval()  # fmt: skip
    with torch.no_grad():
        net[2].weight.abs_()
        net[2].weight.clamp_(min=0.1)
    return ir.convert(net, SPEC, onnx_file=Path("unused"))[0]


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return generator(0).integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)


def levels(model: ov.Model) -> list[int]:
    """The largest level of each layer's weights."""
    found = []
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in QUANTIZABLE:
            node = operation.input_value(1).get_node()
            while node.get_type_name() != "Constant":
                node = node.input_value(0).get_node()
            found.append(int(np.abs(node.data.astype(np.int64)).max()))
    return found


def test_weights_keep_to_half_of_the_range_where_asked(model: ov.Model, pixels: np.ndarray) -> None:
    assert levels(quantize(model, SPEC, pixels, correct_bias=False)) == [127, 127, 127]
    assert max(levels(quantize(model, SPEC, pixels, correct_bias=False, weights="half"))) <= 64


@pytest.mark.parametrize(
    ("weights", "saturates", "half"),
    [("auto", True, True), ("auto", False, False), ("full", True, False), ("half", False, True)],
)
def test_this_cpu_decides_unless_told(
    photos: Path, model: ov.Model, monkeypatch, capsys, weights: str, saturates: bool, half: bool
) -> None:
    paths = tuple(sorted(photos.rglob("*.*")))[:12]
    assert len(paths) == 12
    samples = Samples("val", tuple(path.name for path in paths), paths, np.zeros(12, np.int32))
    monkeypatch.setattr(int8, "sums_saturate", lambda: saturates)
    settings = dataclasses.replace(SETTINGS, weights=weights, min_calibration=4)  # type: ignore[arg-type]
    result = make_int8(model, SPEC, samples, samples, settings, task=Task.single(("a", "b", "c", "d")))
    assert result.model is not None and (max(levels(result.model)) <= 64) == half
    assert result.to_dict()["weights"] == ("half" if half else "full")
    told = "its sums saturate, so weights use half of their range" in " ".join(capsys.readouterr().err.split())
    assert told == (weights == "auto" and saturates)


def test_an_unknown_range_is_refused() -> None:
    with pytest.raises(UsageError, match="--int8-weights small: expected auto, full or half"):
        Int8Settings(weights="small")  # type: ignore[arg-type]


def test_the_probe_agrees_with_the_cpus_flags() -> None:
    if platform.machine() == "x86_64":
        assert sums_saturate() == (not DOT_PRODUCTS & cpu_info()[1])


LIMITED = """
import sys
import numpy as np
from edgedistill.export.inference import compile_ir, ir_logits, sums_saturate
from edgedistill.images import InputSpec
import openvino as ov

assert sums_saturate()
pixels = np.load(sys.argv[1])
for path in sys.argv[2:]:
    np.save(path + ".npy", ir_logits(compile_ir(ov.Core().read_model(path), threads=1), pixels, InputSpec(32, 32)))
"""


@needs_x86
@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_on_a_cpu_without_dot_products_half_range_is_exact(
    model: ov.Model, pixels: np.ndarray, tmp_path: Path, instructions: str
) -> None:
    """The same networks as they are written, in float, and as such a CPU adds: oneDNN is held to its instructions."""
    if instructions == "AVX512_CORE" and "avx512bw" not in cpu_info()[1]:
        pytest.skip("no AVX-512 here")
    np.save(tmp_path / "pixels.npy", pixels)
    exact = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1, "LP_TRANSFORMS_MODE": False}
    written, names = {}, ("full", "half")
    for name in names:
        quantised = quantize(model, SPEC, pixels, correct_bias=False, weights=name)
        ov.save_model(quantised, tmp_path / f"{name}.xml", compress_to_fp16=False)
        written[name] = ir_logits(ov.Core().compile_model(quantised, "CPU", exact), pixels, SPEC)
    command = [
        sys.executable,
        "-c",
        LIMITED,
        str(tmp_path / "pixels.npy"),
        *(str(tmp_path / f"{n}.xml") for n in names),
    ]
    limited = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    subprocess.run(command, env=limited, check=True, timeout=120)
    float32 = ir_logits(compile_ir(model, threads=1), pixels, SPEC)
    off = {name: np.abs(np.load(tmp_path / f"{name}.xml.npy") - written[name]).max() for name in names}
    assert off["half"] < 0.02 * np.abs(float32).max() and off["full"] > 5 * off["half"]
