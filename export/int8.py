"""INT8 by NNCF, layer by layer back to float where accuracy asks for it, shipped only where it pays on this CPU.

``fast_bias_correction=False``: NNCF's default loses 16 points on a small MobileNetV3 (its own test references: 57.9 ->
41.9, and 56.6 without it).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import openvino as ov

from edgedistill.console import note, warn
from edgedistill.errors import ModelError
from edgedistill.export.inference import Logits, compile_ir, ir_logits, speed_ratio
from edgedistill.export.quiet import quiet_nncf
from edgedistill.export.samples import Samples, load_pixels
from edgedistill.images import ImageU8, InputSpec, normalize
from edgedistill.metrics import accuracy, softmax

os.environ.setdefault("NNCF_CI", "1")  # or it sends usage statistics; read once, when it is imported
import nncf

Int8Mode = Literal["auto", "on", "off"]
QUANTIZABLE = ("Convolution", "GroupConvolution", "MatMul")
RANKING_IMAGES = 64
EXTRA_GROUPS = (1, 2, 4)
MIN_GAIN = 1.03


@dataclass(frozen=True)
class Int8Settings:
    """``max_drop``: accuracy on val that INT8 may cost. ``min_calibration``: fewer train images than this: no INT8."""

    mode: Int8Mode = "auto"
    calibration_images: int = 300
    min_calibration: int = 8
    max_drop: float = 0.01
    min_gain: float = MIN_GAIN
    timing_rounds: int = 15
    timing_seconds: float = 0.15
    threads: int | None = None


@dataclass(frozen=True, eq=False)
class Int8Result:
    """``model``: the INT8 IR, or None where none is within the accuracy budget. ``shipped``: it is the choice.

    ``rungs``: one record per attempt, in order.
    """

    model: ov.Model | None
    shipped: bool
    reason: str
    rungs: tuple[dict[str, Any], ...] = ()
    calibration_images: int = 0
    settings: Int8Settings = field(default_factory=Int8Settings)

    def to_dict(self) -> dict[str, Any]:
        return {
            "decision": "shipped" if self.shipped else "refused",
            "reason": self.reason,
            "written": self.model is not None,
            "mode": self.settings.mode,
            "calibration_images": self.calibration_images,
            "max_drop": self.settings.max_drop,
            "min_gain": self.settings.min_gain,
            "rungs": list(self.rungs),
        }


@dataclass(frozen=True, eq=False)
class _Bench:
    """What every attempt is measured against: val pixels and labels, the FP32 network and its answers."""

    model: ov.Model
    spec: InputSpec
    settings: Int8Settings
    calibration: ImageU8
    pixels: ImageU8
    labels: npt.NDArray[np.int32]
    reference: ov.CompiledModel
    reference_logits: Logits

    @property
    def reference_accuracy(self) -> float:
        return accuracy(softmax(self.reference_logits), self.labels)


@dataclass(frozen=True, eq=False)
class _Attempt:
    model: ov.Model
    record: dict[str, Any]


def make_int8(
    model: ov.Model, spec: InputSpec, calibration: Samples, val: Samples, settings: Int8Settings
) -> Int8Result:
    """Quantise ``model`` (the FP32 IR), measure it on ``val``, and decide.

    Attempts: everything in INT8; then first convolution, squeeze-and-excite products and classifier in float; then also
    the groups of layers whose return to float brings the outputs closest to FP32 (by KL). The first within the budget
    is kept; where the plain attempt is no faster than FP32, float layers would only slow it down and none is tried.
    """
    if settings.mode == "off":
        return Int8Result(None, False, "not wanted (--int8 off)", settings=settings)
    train = calibration.thinned(settings.calibration_images)
    if len(train) < settings.min_calibration or not len(val):
        reason = f"{len(train)} train images to calibrate on and {len(val)} to measure on are too few"
        return Int8Result(None, False, reason, settings=settings)
    if len(train) < settings.calibration_images:
        warn(f"INT8 calibrates on all {len(train)} train images; {settings.calibration_images} would be better")
    reference = compile_ir(model, threads=settings.threads)
    pixels = load_pixels(val.paths, spec)
    bench = _Bench(
        model=model,
        spec=spec,
        settings=settings,
        calibration=load_pixels(train.paths, spec),
        pixels=pixels,
        labels=val.labels,
        reference=reference,
        reference_logits=ir_logits(reference, pixels, spec),
    )
    attempts = _attempts(bench)
    return _decide(bench, attempts)


def _attempts(bench: _Bench) -> list[_Attempt]:
    """Every attempt up to the first within the budget."""
    first = _attempt(bench, "all layers in INT8", [])
    attempts = [first]
    too_slow = bench.settings.mode == "auto" and first.record["speed_ratio"] < bench.settings.min_gain
    if _within(first, bench) or too_slow:
        return attempts
    ready = ready_candidates(bench.model)
    attempts.append(_attempt(bench, "first convolution, squeeze-excite products and classifier in float", ready))
    if _within(attempts[-1], bench):
        return attempts
    ranked = rank_groups(bench)
    for count in EXTRA_GROUPS:
        if count > len(ranked):
            break
        names = sorted({*ready, *(name for group, _ in ranked[:count] for name in layer_groups(bench.model)[group])})
        extra = ", ".join(group for group, _ in ranked[:count])
        attempts.append(_attempt(bench, f"also {extra} in float", names))
        if _within(attempts[-1], bench):
            break
    return attempts


def _attempt(bench: _Bench, name: str, ignored: list[str]) -> _Attempt:
    model = quantize(bench.model, bench.spec, bench.calibration, ignored=ignored)
    compiled = compile_ir(model, threads=bench.settings.threads)
    logits = ir_logits(compiled, bench.pixels, bench.spec)
    speed = speed_ratio(
        compiled, bench.reference, rounds=bench.settings.timing_rounds, seconds=bench.settings.timing_seconds
    )
    top1 = accuracy(softmax(logits), bench.labels)
    record = {
        "name": name,
        "float_layers": len(ignored),
        "top1": top1,
        "drop": bench.reference_accuracy - top1,
        "disagreement": float(np.mean(logits.argmax(1) != bench.reference_logits.argmax(1))),
        "kl": _kl(bench.reference_logits, logits),
        "speed_ratio": speed["ratio"],
        "speed_ratio_range": [speed["ratio_min"], speed["ratio_max"]],
        "fps": speed["fps"],
        "fps_f32": speed["reference_fps"],
    }
    note(
        f"INT8, {name}: accuracy {top1:.4f} (FP32 {bench.reference_accuracy:.4f}), "
        f"{speed['fps']:.0f} images/s (FP32 {speed['reference_fps']:.0f}, ratio {speed['ratio']:.2f})"
    )
    return _Attempt(model, record)


def _within(attempt: _Attempt, bench: _Bench) -> bool:
    # A hair of slack: 3 of 300 images is 0.01 on paper and 0.010000000000000009 in binary.
    return attempt.record["drop"] <= bench.settings.max_drop + 1e-9


def _decide(bench: _Bench, attempts: list[_Attempt]) -> Int8Result:
    last, settings = attempts[-1], bench.settings
    within, ratio = _within(last, bench), last.record["speed_ratio"]
    fast = ratio >= settings.min_gain
    best = min(attempts, key=lambda attempt: attempt.record["drop"]).record
    if not within:
        reason = (
            f"accuracy falls by {best['drop']:.4f} on {len(bench.labels)} val images at best ({best['name']}), "
            f"limit {settings.max_drop:g}"
        )
        if not fast and len(attempts) == 1:
            reason += f"; and it is not faster on this CPU ({ratio:.2f} times FP32), so no layer was put back to float"
    elif fast:
        reason = f"{ratio:.2f} times the speed of FP32 on this CPU, accuracy falls by {last.record['drop']:.4f}"
    elif settings.mode == "on":
        reason = f"asked for (--int8 on), although {ratio:.2f} times the speed of FP32 on this CPU"
    else:
        reason = f"not faster on this CPU: {ratio:.2f} times the speed of FP32, expected {settings.min_gain:g} or more"
    return Int8Result(
        model=last.model if within else None,
        shipped=within and (fast or settings.mode == "on"),
        reason=reason,
        rungs=tuple(attempt.record for attempt in attempts),
        calibration_images=len(bench.calibration),
        settings=settings,
    )


def quantize(
    model: ov.Model, spec: InputSpec, pixels: ImageU8, *, ignored: Iterable[str] = (), correct_bias: bool = True
) -> ov.Model:
    """A quantised copy; metadata stay. ``pixels``: uint8 [N, H, W, 3] BGR. ``ignored``: layers left in float, by name."""
    names = list(ignored)
    dataset = nncf.Dataset(range(len(pixels)), lambda row: normalize(pixels[row : row + 1], spec))
    try:
        with quiet_nncf():
            return nncf.quantize(
                model,
                dataset,
                preset=nncf.QuantizationPreset.MIXED,
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(pixels),
                fast_bias_correction=not correct_bias,
                ignored_scope=nncf.IgnoredScope(names=names, validate=False) if names else None,
                advanced_parameters=nncf.AdvancedQuantizationParameters(disable_bias_correction=not correct_bias),
            )
    except (RuntimeError, nncf.ValidationError, nncf.InternalError, nncf.UnsupportedModelError) as error:
        raise ModelError(f"NNCF cannot quantise the network: {error}; export with --int8 off") from error


def ready_candidates(model: ov.Model) -> list[str]:
    """The layers that most often cost accuracy: first convolution, squeeze-and-excite products, classifier."""
    operations = [op for op in model.get_ordered_ops() if op.get_type_name() in (*QUANTIZABLE, "Multiply")]
    convolutions = [op for op in operations if op.get_type_name() in ("Convolution", "GroupConvolution")]
    products = [op for op in operations if op.get_type_name() == "MatMul"]
    chosen = convolutions[:1] + (products or convolutions)[-1:]
    chosen += [op for op in operations if op.get_type_name() == "Multiply" and _is_gate(op)]
    return sorted({op.get_friendly_name() for op in chosen})


def _is_gate(operation: ov.Node) -> bool:
    """A product of a feature map and one factor for each channel, neither of them constant."""
    shapes = [operation.input(port).get_partial_shape() for port in (0, 1)]
    constant = any(operation.input_value(port).get_node().get_type_name() == "Constant" for port in (0, 1))
    if constant or any(shape.is_dynamic or len(shape) != 4 for shape in shapes):
        return False
    areas = sorted(shape[2].get_length() * shape[3].get_length() for shape in shapes)
    return areas[0] == 1


def layer_groups(model: ov.Model) -> dict[str, list[str]]:
    """Quantisable layers by the block that they belong to, in the order of the network: 'blocks.3', 'conv_stem', ..."""
    groups: dict[str, list[str]] = {}
    for operation in model.get_ordered_ops():
        if operation.get_type_name() in QUANTIZABLE:
            name = operation.get_friendly_name()
            groups.setdefault(_block(name), []).append(name)
    return groups


def _block(name: str) -> str:
    """'__module.blocks.3.1.conv_pw/aten::_convolution/Convolution' -> 'blocks.3'; ONNX: '/blocks/blocks.3/...'."""
    module = name.removeprefix("__module.").split("/aten::")[0].strip("/").split("/")
    dotted = max(module, key=lambda part: part.count("."))
    match = re.match(r"[^.]+(\.\d+)?", dotted)
    return match.group(0) if match else dotted


def rank_groups(bench: _Bench) -> list[tuple[str, float]]:
    """(group, gain) with the largest gain first: how much closer to FP32 the outputs come (KL, in nats) when that group
    alone is in float. Quick quantisations on few images, without bias correction, rank well enough."""
    calibration, pixels = bench.calibration[:RANKING_IMAGES], bench.pixels[:RANKING_IMAGES]
    reference = bench.reference_logits[:RANKING_IMAGES]

    def divergence(ignored: list[str]) -> float:
        model = quantize(bench.model, bench.spec, calibration, ignored=ignored, correct_bias=False)
        return _kl(reference, ir_logits(compile_ir(model, threads=bench.settings.threads), pixels, bench.spec))

    base = divergence([])
    gains = [(group, base - divergence(names)) for group, names in layer_groups(bench.model).items()]
    return sorted(gains, key=lambda pair: -pair[1])


def _kl(reference: Logits, logits: Logits) -> float:
    """Mean over images of KL(reference || other) in nats."""
    p, q = (np.clip(softmax(values), 1e-12, 1.0) for values in (reference, logits))
    return float(np.mean(np.sum(p * (np.log(p) - np.log(q)), axis=1)))
