"""export/int8.py: INT8 is the choice only where it is faster and accurate enough, the ladder is climbed no further than
needed, and every rung is on record."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import openvino as ov
import pytest
import torch
from openvino import opset8
from torch import nn

from edgedistill.errors import ModelError, UsageError
from edgedistill.export import int8, ir
from edgedistill.export.export import ExportSettings
from edgedistill.export.fusion import fuse
from edgedistill.export.inference import compile_ir, ir_logits, speed_ratio
from edgedistill.export.int8 import RUNGS, Int8Result, Int8Settings, Skip, make_int8, table_rows
from edgedistill.export.int8_quantize import (
    GATES,
    AccuracyMetrics,
    control_accuracy,
    divergence_on,
    float_layer_count,
    kl,
    layer_groups,
    quantize,
    rank_groups,
    suspects,
    with_float,
)
from edgedistill.export.network import random_images
from edgedistill.export.samples import Samples, load_pixels
from edgedistill.images import InputSpec
from edgedistill.tasks import Head, Task, sigmoid
from edgedistill.training.models import create_model

SPEC = InputSpec(32, 32)
TASK = Task.single(("a", "b", "c", "d"))
# The same four outputs as two classes, a label that may apply and a value beside them.
HEADS = Task(
    (
        Head("shade", "softmax", ("dark", "light")),
        Head("labels", "sigmoid", ("spot",)),
        Head("size", "regression", mean=5.0, std=2.0),
    )
)
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


@dataclasses.dataclass
class Stage:
    """A ladder whose rungs are staged. ``calls``: what was quantised, as 'plain', 'quantile', float layers or a name.

    ``cured_by``: the call from which on the answers are right; None: all are wrong.
    """

    cured_by: str | None
    ratio: float
    interval: tuple[float, float]
    calls: list[str] = dataclasses.field(default_factory=list)

    def make(self, model: ov.Model, call: str) -> ov.Model:
        self.calls.append(call)
        return model.clone() if call == self.cured_by else negated(model)

    def quantize(self, model: ov.Model, spec: Any, pixels: Any, **options: Any) -> ov.Model:
        if not options.get("correct_bias", True):
            return model.clone()
        if options.get("ignored"):
            return self.make(model, " ".join(options["ignored"]))
        return self.make(model, "quantile" if options.get("quantile") else "plain")

    def trainer(self, pattern: ov.Model, seconds: float) -> ov.Model:
        assert 0 < seconds <= 60 * SETTINGS.minutes
        return self.make(negated(pattern), "qat")


def staged(
    monkeypatch: pytest.MonkeyPatch,
    *,
    cured_by: str | None = "plain",
    ratio: float = 1.5,
    interval: tuple[float, float] | None = None,
) -> Stage:
    stage = Stage(cured_by, ratio, interval or (ratio, ratio))
    speed = {
        "ratio": ratio,
        "ratio_low": stage.interval[0],
        "ratio_high": stage.interval[1],
        "ratio_min": stage.interval[0],
        "ratio_max": stage.interval[1],
        "fps": 100.0 * ratio,
        "reference_fps": 100.0,
    }
    ranked = [(name, [name], gain) for name, gain in (("a", 3.0), ("b", 2.0), ("c", 1.0), ("useless", -1.0))]
    monkeypatch.setattr(int8, "quantize", stage.quantize)
    monkeypatch.setattr(int8, "rank_groups", lambda *args, **kwargs: ranked)
    monkeypatch.setattr(int8, "control_accuracy", lambda model, *args, **kwargs: stage.make(model, "control"))
    monkeypatch.setattr(int8, "speed_ratio", lambda *args, **kwargs: speed)
    return stage


def run(model: ov.Model, samples: Samples, *, trainer: Any = None, **changes: Any) -> Int8Result:
    return make_int8(
        model, SPEC, samples, samples, dataclasses.replace(SETTINGS, **changes), task=TASK, trainer=trainer
    )


def test_fast_and_accurate_is_shipped_at_once(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = staged(monkeypatch)
    result = run(model, samples)
    assert result.shipped and result.model is not None and stage.calls == ["plain"]
    assert result.to_dict()["decision"] == "shipped" and "1.50 times" in result.reason
    assert result.rungs[0]["top1"] == 1.0 and result.rungs[0]["drop"] == 0.0 and result.rungs[0]["kl"] == 0.0


def test_accurate_but_slow_is_written_and_not_the_choice(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = staged(monkeypatch, ratio=1.01)
    result = run(model, samples)
    assert not result.shipped and result.model is not None and "not faster" in result.reason
    assert stage.calls == ["plain"], "no rung makes a network faster"
    assert run(model, samples, mode="on").shipped and run(model, samples, mode="force").shipped


def test_faster_by_chance_is_not_faster(model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(monkeypatch, ratio=1.2, interval=(0.8, 1.9))
    result = run(model, samples)
    assert not result.shipped and "0.80 to 1.90" in result.reason


def test_the_interval_of_a_speed_ratio_holds_its_median(model: ov.Model) -> None:
    compiled = compile_ir(model, threads=1)
    for rounds in (1, 2, 15, 45):
        speed = speed_ratio(compiled, compiled, rounds=rounds, seconds=0.0005)
        assert speed["ratio_min"] <= speed["ratio_low"] <= speed["ratio"] <= speed["ratio_high"] <= speed["ratio_max"]
    assert speed["ratio_min"] < speed["ratio_low"] and speed["ratio_high"] < speed["ratio_max"]


CLIMB = ["plain", "quantile", "a", "a b", "a b c", "control", "qat"]


@pytest.mark.parametrize("cured_by", CLIMB)
def test_the_ladder_stops_at_the_first_rung_that_will_do(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch, cured_by: str
) -> None:
    stage = staged(monkeypatch, cured_by=cured_by)
    result = run(model, samples, trainer=stage.trainer)
    assert result.shipped and stage.calls == CLIMB[: CLIMB.index(cured_by) + 1]
    assert [rung["drop"] for rung in result.rungs] == [1.0] * CLIMB.index(cured_by) + [0.0]
    assert result.chosen == result.rungs[-1]["name"] and {rung["rung"] for rung in result.rungs} <= set(RUNGS)
    assert all({"top1", "kl", "speed_ratio", "fps", "fps_f32"} <= set(rung) for rung in result.rungs)
    titles, rows = table_rows(result.to_dict())
    assert len(rows) == len(result.rungs) and {len(row) for row in rows} == {len(titles)}


def test_what_nothing_cures_is_refused_with_the_reason(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = staged(monkeypatch, cured_by=None)
    result = run(model, samples, trainer=stage.trainer)
    assert not result.shipped and result.model is None and stage.calls == CLIMB
    assert "accuracy falls by 1.0000 on 24 val images" in result.reason and "limit 0.01" in result.reason


def test_no_rung_is_tried_where_int8_is_slow_anyway(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = staged(monkeypatch, ratio=0.8, cured_by=None)
    result = run(model, samples)
    assert stage.calls == ["plain"] and result.model is None and "no further rung was tried" in result.reason
    stage = staged(monkeypatch, ratio=0.8, cured_by="quantile")
    assert run(model, samples, mode="on").shipped and stage.calls == ["plain", "quantile"]


@pytest.mark.parametrize("rung", RUNGS)
def test_no_rung_above_the_last_wanted_one_is_tried(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch, rung: Any
) -> None:
    stage = staged(monkeypatch, cured_by=None)
    result = run(model, samples, trainer=stage.trainer, max_rung=rung)
    assert {record["rung"] for record in result.rungs} == set(RUNGS[: RUNGS.index(rung) + 1])


def test_a_rung_that_cannot_be_tried_is_on_record_and_costs_nothing_else(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = staged(monkeypatch, cured_by="qat")

    def broken(*args: Any, **kwargs: Any) -> ov.Model:
        raise ModelError("accuracy control broke")

    monkeypatch.setattr(int8, "control_accuracy", broken)
    result = run(model, samples, trainer=stage.trainer)
    assert result.shipped and result.rungs[-2]["skipped"] == "accuracy control broke"

    def untrained(pattern: ov.Model, seconds: float) -> ov.Model:
        raise Skip("no soft labels")

    result = run(model, samples, trainer=untrained)
    assert not result.shipped and result.rungs[-1]["skipped"] == "no soft labels"
    assert "not tried: no soft labels" in str(table_rows(result.to_dict()))


def test_the_time_limit_ends_the_ladder_and_keeps_what_there_is(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run(model, samples, minutes=1e-6)
    assert real.model is None and not real.shipped and "minutes were over in rung plain" in real.reason
    stage = staged(monkeypatch, cured_by=None)
    plain = stage.quantize

    def slow(*args: Any, **options: Any) -> ov.Model:
        if options.get("quantile"):
            monkeypatch.setattr(int8.time, "monotonic", lambda: 1e12)
            options["check"]()
        return plain(*args, **options)

    monkeypatch.setattr(int8, "quantize", slow)
    result = run(model, samples)
    assert stage.calls == ["plain"] and "skipped" in result.rungs[-1] and result.rungs[-1]["rung"] == "ranges"
    assert "accuracy falls by 1.0000" in result.reason and "rung ranges (--int8-minutes)" in result.reason


def test_a_budget_that_is_just_met_is_met(model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    staged(monkeypatch, cured_by=None)
    assert run(model, samples, max_drop=1.0).shipped


@pytest.mark.parametrize(
    "wrong", [{"int8": "maybe"}, {"int8_max_rung": "top"}, {"int8_minutes": 0.0}, {"int8_max_drop": 2.0}]
)
def test_wrong_settings_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        ExportSettings(model=Path("model.pt"), **wrong)


@pytest.mark.parametrize(("mode", "count"), [("off", 24), ("auto", 0), ("on", 3)])
def test_without_images_there_is_no_int8(model: ov.Model, samples: Samples, mode: Any, count: int) -> None:
    few = Samples("train", samples.ids[:count], samples.paths[:count], samples.labels[:count])
    result = make_int8(model, SPEC, few, samples, dataclasses.replace(SETTINGS, mode=mode), task=TASK)
    assert result.model is None and not result.shipped and not result.rungs and result.reason


def test_real_quantisation_leaves_the_named_layers_in_float(model: ov.Model, samples: Samples) -> None:
    pixels = load_pixels(samples.paths, SPEC)
    ready = sorted(name for names in suspects(model).values() for name in names)
    counts = []
    for options in ({}, {"ignored": ready}, {"quantile": True}):
        quantised = quantize(model, SPEC, pixels, **options)  # type: ignore[arg-type]
        counts.append(sum(op.get_type_name() == "FakeQuantize" for op in quantised.get_ordered_ops()))
        logits = ir_logits(compile_ir(quantised, threads=1), pixels, SPEC)
        assert np.isfinite(logits).all()
        assert float_layer_count(quantised) == (2 if "ignored" in options else 0)
    assert counts[0] == counts[2] > counts[1] > 0
    assert float_layer_count(model) == 6 and not any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())


def test_a_layer_put_back_by_hand_computes_in_float(model: ov.Model, samples: Samples) -> None:
    pixels = load_pixels(samples.paths, SPEC)
    quick = quantize(model, SPEC, pixels, correct_bias=False)
    everything = [op.get_friendly_name() for op in model.get_ops()]
    float_again = with_float(quick, model, everything)
    expected = ir_logits(compile_ir(model, threads=1), pixels, SPEC)
    assert np.allclose(ir_logits(compile_ir(float_again, threads=1), pixels, SPEC), expected, atol=1e-5)
    one = layer_groups(model)["blocks.1"]
    assert float_layer_count(with_float(quick, model, one)) == 1 and float_layer_count(quick) == 0


def test_the_layer_that_quantisation_ruins_is_ranked_first(model: ov.Model, samples: Samples) -> None:
    """One block's weights in the quantised network are replaced by others: that block must give back the most."""
    pixels = load_pixels(samples.paths, SPEC)
    ruined = quantize(model, SPEC, pixels, correct_bias=False)
    name = layer_groups(model)["blocks.2"][0]
    layer = next(op for op in ruined.get_ops() if op.get_friendly_name() == name)
    layer.input(1).replace_source_output(opset8.negative(layer.input_value(1)).output(0))
    reference = ir_logits(compile_ir(model, threads=1), pixels, SPEC)
    divergence = divergence_on(pixels, reference, SPEC, task=TASK, threads=1)
    ranked = rank_groups(model, ruined, divergence)
    assert ranked[0][0] == "blocks.2" and ranked[0][2] > 10 * abs(ranked[1][2])
    assert {group for group, _, _ in ranked} >= {GATES, "first convolution", "classifier", "blocks.0", "blocks.1"}
    assert "stem" not in {group for group, _, _ in ranked}, "the first convolution is listed under two names"


def test_accuracy_control_is_told_accuracy_and_ranks_by_kl(model: ov.Model, samples: Samples) -> None:
    pixels = load_pixels(samples.paths, SPEC)
    reference = ir_logits(compile_ir(model, threads=1), pixels, SPEC)
    metrics = AccuracyMetrics(TASK, samples.truth, reference)
    rows = np.arange(len(reference))
    wrong = -reference
    assert metrics.of(rows, reference)[0] == 1.0 and metrics.of(rows, wrong)[0] < 1.0
    part, values = metrics.of(rows[:5], wrong[:5])
    assert part == pytest.approx(-kl(reference[:5], wrong[:5], TASK)) and len(values) == 5
    many = AccuracyMetrics(TASK, np.tile(samples.truth, (50, 1)), np.tile(reference, (50, 1)))
    assert many.of(rows[:5], reference[:5])[0] == 1.0, "a large val ranks by accuracy itself"


def test_accuracy_control_ends_within_the_budget(model: ov.Model, samples: Samples) -> None:
    """NNCF's own loop, for real: FP32's own answers are the labels, so no drop at all is allowed."""
    pixels = load_pixels(samples.paths, SPEC)
    reference = ir_logits(compile_ir(model, threads=1), pixels, SPEC)
    metrics = AccuracyMetrics(TASK, samples.truth, reference)
    found = control_accuracy(model, SPEC, pixels, val=pixels, metrics=metrics, max_drop=0.0, quantile=False)
    assert (ir_logits(compile_ir(found, threads=1), pixels, SPEC).argmax(1) == samples.labels).all()


def test_accuracy_control_of_several_heads_is_told_their_joint_score(model: ov.Model, samples: Samples) -> None:
    """What a head gets wrong counts, what is not known does not; layers are ranked by the heads' KL added up."""
    pixels = load_pixels(samples.paths, SPEC)
    reference = ir_logits(compile_ir(model, threads=1), pixels, SPEC)
    truth = np.concatenate([HEADS.answers(HEADS.probabilities(reference)), reference[:, 3:]], axis=1)
    truth = truth.astype(np.float32)
    wrong, rows = reference.copy(), np.arange(len(reference))
    wrong[:6, 2] *= -1
    assert AccuracyMetrics(HEADS, truth, reference).of(rows, wrong)[0] == pytest.approx(1 - 6 / len(rows))
    unknown = truth.copy()
    unknown[:2, 1] = np.nan
    metrics = AccuracyMetrics(HEADS, unknown, reference)
    assert metrics.of(rows, wrong)[0] == pytest.approx(1 - 4 / len(rows))
    part, values = metrics.of(rows[:8], wrong[:8])
    p, q = sigmoid(reference[:6, 2]), sigmoid(wrong[:6, 2])
    expected = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    np.testing.assert_allclose(values, [*-expected, 0, 0], atol=1e-6)
    assert part == pytest.approx(np.mean(values)) and part < 0


def test_the_ladder_ends_within_the_joint_budget_of_several_heads(
    model: ov.Model, samples: Samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FP32's own answers are the truth, at its temperature and threshold. The first rungs turn them round, so NNCF's own loop
    has to answer, for real."""
    pixels, temperature = load_pixels(samples.paths, SPEC), 2.5
    reference = ir_logits(compile_ir(model, threads=1), pixels, SPEC)
    threshold = float(sigmoid(np.quantile(reference[:, 2], 0.4), temperature))
    shade, labels, size = HEADS.heads
    heads = Task((shade, dataclasses.replace(labels, threshold=threshold), size))
    answers = heads.answers(heads.probabilities(reference, temperature))
    truth = np.concatenate([answers, reference[:, 3:]], axis=1)
    assert heads.score(reference, truth, temperature) == 1.0 > heads.score(reference, truth)
    told = dataclasses.replace(samples, values=truth.astype(np.float32))
    staged(monkeypatch, cured_by="nothing")
    monkeypatch.setattr(int8, "control_accuracy", control_accuracy)
    settings = dataclasses.replace(SETTINGS, max_drop=0.0, max_rung="accuracy-control")
    found = make_int8(model, SPEC, told, told, settings, task=heads, temperature=temperature)
    assert found.rungs[-1]["rung"] == "accuracy-control"
    assert found.chosen == "NNCF accuracy control" and found.top1_f32 == 1.0 and found.rungs[-1]["drop"] == 0.0
    assert found.model is not None
    answers = ir_logits(compile_ir(found.model, threads=1), pixels, SPEC)
    assert heads.score(answers, told.truth, temperature) == 1.0


def test_suspects_of_a_mobilenet_are_stem_gates_and_classifier() -> None:
    network = create_model("mobilenetv3_small_050", class_count=3).eval()
    fused, _ = fuse(network, random_images(SPEC, 1), image_kind="random")
    converted, _ = ir.convert(fused, SPEC, onnx_file=Path("unused"))
    found = suspects(converted)
    assert len(found[GATES]) == 9 and all("se/aten::mul" in name for name in found[GATES])
    assert "conv_stem" in found["first convolution"][0] and "classifier" in found["classifier"][0]
    groups = layer_groups(converted)
    assert next(iter(groups)) == "conv_stem" and list(groups)[-1] == "classifier"
    assert {f"blocks.{number}" for number in range(6)} < set(groups)
    assert sum(len(layers) for layers in groups.values()) == 54
