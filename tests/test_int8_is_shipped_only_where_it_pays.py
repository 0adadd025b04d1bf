"""export/int8.py: INT8 is the choice only where it is faster and accurate enough, and every attempt is on record."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset8
from torch import nn

from edgedistill.export import int8, ir
from edgedistill.export.fusion import fuse
from edgedistill.export.inference import compile_ir, ir_logits
from edgedistill.export.int8 import Int8Result, Int8Settings, layer_groups, make_int8, quantize, ready_candidates
from edgedistill.export.network import random_images
from edgedistill.export.samples import Samples, load_pixels
from edgedistill.images import InputSpec
from edgedistill.training.models import create_model

SPEC = InputSpec(32, 32)
SETTINGS = Int8Settings(threads=1, timing_rounds=1, timing_seconds=0.001)


class Net(nn.Module):
    """Three blocks, a squeeze-and-excite gate and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3))
        self.gate = nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = block(x).relu()
        x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid()
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def model() -> ov.Model:
    torch.manual_seed(0)
    converted, _ = ir.convert(Net().eval(), SPEC, onnx_file=Path("unused"))
    return converted


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory, model: ov.Model) -> Samples:
    """Labelled with FP32's own answers: its accuracy is 1, and every other answer is a loss."""
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    paths = tuple(folder / f"{number}.png" for number in range(24))
    for path in paths:
        colour = random.integers(0, 256, 3)
        pixels = np.clip(colour + random.normal(0, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
        path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
    answers = ir_logits(compile_ir(model, threads=1), load_pixels(paths, SPEC), SPEC).argmax(1)
    return Samples("val", tuple(path.name for path in paths), paths, answers.astype(np.int32))


def negated(model: ov.Model) -> ov.Model:
    wrong = model.clone()
    result = wrong.get_results()[0]
    result.input(0).replace_source_output(opset8.negative(result.input_value(0)).output(0))
    return wrong


def staged(monkeypatch: pytest.MonkeyPatch, *, ratio: float, cured_by: Iterable[str] | None = ()) -> list[list[str]]:
    """INT8 that runs at ``ratio`` and is wrong until all of ``cured_by`` are in float (None: always). Returns the list to
    which each full attempt's float layers are added."""
    attempts: list[list[str]] = []

    def fake_quantize(
        model: ov.Model, spec: InputSpec, pixels: Any, *, ignored: Any = (), correct_bias: bool = True
    ) -> ov.Model:
        if correct_bias:
            attempts.append(sorted(ignored))
        return model.clone() if cured_by is not None and set(cured_by) <= set(ignored) else negated(model)

    speed = {"ratio": ratio, "ratio_min": ratio, "ratio_max": ratio, "fps": 100.0 * ratio, "reference_fps": 100.0}
    monkeypatch.setattr(int8, "quantize", fake_quantize)
    monkeypatch.setattr(int8, "speed_ratio", lambda *args, **kwargs: speed)
    return attempts


def run(model: ov.Model, samples: Samples, **changes: Any) -> Int8Result:
    return make_int8(model, SPEC, samples, samples, dataclasses.replace(SETTINGS, **changes))


def test_fast_and_accurate_is_shipped(model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = staged(monkeypatch, ratio=1.5)
    result = run(model, samples)
    assert result.shipped and result.model is not None and attempts == [[]]
    assert result.to_dict()["decision"] == "shipped" and "1.50 times" in result.reason
    assert result.rungs[0]["top1"] == 1.0 and result.rungs[0]["drop"] == 0.0


def test_accurate_but_slow_is_written_and_not_the_choice(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged(monkeypatch, ratio=1.01)
    result = run(model, samples)
    assert not result.shipped and result.model is not None and "not faster" in result.reason
    assert run(model, samples, mode="on").shipped


def test_layers_go_back_to_float_until_accuracy_holds(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    ready = ready_candidates(model)
    attempts = staged(monkeypatch, ratio=1.5, cured_by=ready)
    assert run(model, samples).shipped and attempts == [[], ready]

    culprit = layer_groups(model)["blocks.1"]
    monkeypatch.setattr(int8, "rank_groups", lambda bench: [("blocks.1", 2.0), ("blocks.0", 1.0)])
    attempts = staged(monkeypatch, ratio=1.5, cured_by=culprit)
    result = run(model, samples)
    assert result.shipped and attempts == [[], ready, sorted({*ready, *culprit})]
    assert [rung["drop"] for rung in result.rungs] == [1.0, 1.0, 0.0]


def test_groups_are_ranked_by_what_they_give_back(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    culprit = layer_groups(model)["blocks.2"]
    attempts = staged(monkeypatch, ratio=1.5, cured_by=culprit)
    result = run(model, samples)
    assert result.shipped and set(culprit) <= set(attempts[-1]) and len(attempts) == 3


def test_what_nothing_cures_is_refused_with_the_reason(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    staged(monkeypatch, ratio=1.5, cured_by=None)
    result = run(model, samples)
    assert not result.shipped and result.model is None and len(result.rungs) == 5
    assert "accuracy falls by 1.0000 on 24 val images" in result.reason and "limit 0.01" in result.reason


def test_no_layer_is_put_back_where_int8_is_slow_anyway(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = staged(monkeypatch, ratio=0.8, cured_by=None)
    result = run(model, samples)
    assert attempts == [[]] and result.model is None and "no layer was put back" in result.reason


def test_a_budget_that_is_just_met_is_met(model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(monkeypatch, ratio=1.5, cured_by=None)
    assert run(model, samples, max_drop=1.0).shipped


@pytest.mark.parametrize(("mode", "count"), [("off", 24), ("auto", 0), ("on", 3)])
def test_without_images_there_is_no_int8(model: ov.Model, samples: Samples, mode: Any, count: int) -> None:
    few = Samples("train", samples.ids[:count], samples.paths[:count], samples.labels[:count])
    result = make_int8(model, SPEC, few, samples, dataclasses.replace(SETTINGS, mode=mode))
    assert result.model is None and not result.shipped and not result.rungs and result.reason


def test_real_quantisation_leaves_the_named_layers_in_float(model: ov.Model, samples: Samples) -> None:
    pixels = load_pixels(samples.paths, SPEC)
    ready = ready_candidates(model)
    counts = []
    for ignored in ([], ready):
        quantised = quantize(model, SPEC, pixels, ignored=ignored)
        counts.append(sum(op.get_type_name() == "FakeQuantize" for op in quantised.get_ordered_ops()))
        logits = ir_logits(compile_ir(quantised, threads=1), pixels, SPEC)
        assert np.isfinite(logits).all()
    assert counts[0] > counts[1] > 0
    assert not any(op.get_type_name() == "FakeQuantize" for op in model.get_ordered_ops()), "the FP32 model changed"


def test_candidates_of_a_mobilenet_are_stem_gates_and_classifier() -> None:
    network = create_model("mobilenetv3_small_050", class_count=3).eval()
    fused, _ = fuse(network, random_images(SPEC, 1), image_kind="random")
    converted, _ = ir.convert(fused, SPEC, onnx_file=Path("unused"))
    names = ready_candidates(converted)
    assert sum("se/aten::mul" in name for name in names) == 9 and len(names) == 11
    assert any("conv_stem" in name for name in names) and any("classifier" in name for name in names)
    groups = layer_groups(converted)
    assert next(iter(groups)) == "conv_stem" and list(groups)[-1] == "classifier"
    assert {f"blocks.{number}" for number in range(6)} < set(groups)
    assert sum(len(layers) for layers in groups.values()) == 54
