"""NNCF's post-training quantisation, and which layers are better left in float.

``fast_bias_correction=False``: NNCF's default loses 16 points on a small MobileNetV3 (its own test references: 57.9 ->
41.9, and 56.6 without it).

Weights in 'half' of INT8's range keep pairs of products from overflowing 16 bits. CPUs with 8-bit dot products (VNNI) need
none of it; NNCF's default, the 'first-layer' alone, is too little for the others and costs these accuracy
(export/int8_saturation.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
import openvino as ov

from edgedistill.errors import ModelError
from edgedistill.export.inference import Logits, compile_ir, ir_logits
from edgedistill.export.quiet import quiet_nncf
from edgedistill.images import ImageU8, InputSpec, normalize
from edgedistill.tasks import Task, Values

os.environ.setdefault("NNCF_CI", "1")  # or it sends usage statistics; read once, when it is imported
import nncf
from nncf.quantization.range_estimator import RangeEstimatorParametersSet

QUANTIZABLE = ("Convolution", "GroupConvolution", "MatMul")
RANKING_IMAGES = 64
GATES = "squeeze-excite products"
SMALL_VAL = 1000  # below, one image is more than 0.1 points: too coarse a step to rank layers by
WeightRange = Literal["full", "first-layer", "half"]
OVERFLOW_FIX: dict[WeightRange, nncf.OverflowFix] = {
    "full": nncf.OverflowFix.DISABLE,
    "first-layer": nncf.OverflowFix.FIRST_LAYER,
    "half": nncf.OverflowFix.ENABLE,
}
Check = Callable[[], None]


class OutOfTime(Exception):
    """The ladder's time limit passed in the middle of a rung."""


def no_limit() -> None:
    """The ``check`` of a quantisation that may take as long as it takes."""


def quantize(
    model: ov.Model,
    spec: InputSpec,
    pixels: ImageU8,
    *,
    ignored: Iterable[str] = (),
    correct_bias: bool = True,
    quantile: bool = False,
    weights: WeightRange = "full",
    check: Check = no_limit,
) -> ov.Model:
    """A quantised copy; metadata stay. ``pixels``: uint8 [N, H, W, 3] BGR. ``ignored``: layers left in float, by name.

    ``quantile``: activations are clipped at the quantiles of each image (averaged), not at its extremes. ``weights``: their
    range. ``check`` is called for each image and may raise to give up. Raises ModelError for a network that NNCF cannot quantise.
    """
    names = list(ignored)
    try:
        with quiet_nncf():
            return nncf.quantize(
                model,
                _dataset(pixels, spec, check),
                preset=nncf.QuantizationPreset.MIXED,
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(pixels),
                fast_bias_correction=not correct_bias,
                ignored_scope=nncf.IgnoredScope(names=names, validate=False) if names else None,
                advanced_parameters=_advanced(correct_bias=correct_bias, quantile=quantile, weights=weights),
            )
    except (RuntimeError, nncf.ValidationError, nncf.InternalError, nncf.UnsupportedModelError) as error:
        raise ModelError(f"NNCF cannot quantise the network: {error}; export with --int8 off") from error


def control_accuracy(
    model: ov.Model,
    spec: InputSpec,
    pixels: ImageU8,
    *,
    val: ImageU8,
    metrics: AccuracyMetrics,
    max_drop: float,
    quantile: bool,
    weights: WeightRange = "full",
    check: Check = no_limit,
) -> ov.Model:
    """NNCF's own loop: quantise, rank the operations, and return them to float one by one until ``max_drop`` is met.

    ``pixels``: calibration images; ``val``: uint8 [N, H, W, 3] BGR, which ``metrics`` judges. NNCF validates in
    OpenVINO's default precision (bfloat16 where the CPU has it), so its result is to be measured again.
    """

    def validate(compiled: ov.CompiledModel, rows: Iterable[int]) -> tuple[float, list[float]]:
        check()
        chosen = np.fromiter(rows, np.int64)
        return metrics.of(chosen, ir_logits(compiled, val[chosen], spec))

    ranked = min(RANKING_IMAGES, len(val) - 1) or 1
    try:
        with quiet_nncf():
            return nncf.quantize_with_accuracy_control(
                model,
                calibration_dataset=_dataset(pixels, spec, check),
                validation_dataset=_dataset(val, spec, check),
                validation_fn=validate,
                max_drop=max_drop + 1e-9,
                drop_type=nncf.DropType.ABSOLUTE,
                preset=nncf.QuantizationPreset.MIXED,
                target_device=nncf.TargetDevice.CPU,
                subset_size=len(pixels),
                fast_bias_correction=False,
                advanced_quantization_parameters=_advanced(correct_bias=True, quantile=quantile, weights=weights),
                # One worker: it starts as many as it likes otherwise, each with all cores.
                advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                    ranking_subset_size=ranked, num_ranking_workers=1
                ),
            )
    except (RuntimeError, IndexError, nncf.ValidationError, nncf.InternalError) as error:
        raise ModelError(f"NNCF's accuracy control failed: {error}") from error


class AccuracyMetrics:
    """What accuracy control is told: accuracy on all of val (of several heads the joint score), and on a part of it what
    ranks layers.

    Where val is small a layer changes the answers for a handful of images or for none, so layers are ranked by how close
    the probabilities stay to FP32's: minus KL, in nats. ``values``: float32 [N, V], what is true; ``reference``: FP32's
    logits [N, C]; ``temperature``: at which the network answers.
    """

    def __init__(self, task: Task, values: Values, reference: Logits, temperature: float = 1.0) -> None:
        self.task, self.values, self.reference, self.temperature = task, values, reference, temperature
        self.by_kl = len(values) < SMALL_VAL

    def of(self, rows: np.ndarray[Any, Any], logits: Logits) -> tuple[float, list[float]]:
        """(the metric, its value for each image); higher is better. ``logits``: of the images ``rows``."""
        right = self.task.right(self.task.probabilities(logits, self.temperature), self.values[rows]).astype(np.float64)
        values = -self.task.divergence(self.reference[rows], logits) if self.by_kl else right
        metric = right.mean() if len(rows) == len(self.values) else values.mean()
        return float(metric), values.tolist()


def _dataset(pixels: ImageU8, spec: InputSpec, check: Check) -> Any:
    def item(row: int) -> Any:
        check()
        return normalize(pixels[row : row + 1], spec)

    return nncf.Dataset(range(len(pixels)), item)


def _advanced(*, correct_bias: bool, quantile: bool, weights: WeightRange) -> Any:
    parameters = nncf.AdvancedQuantizationParameters(
        disable_bias_correction=not correct_bias,
        overflow_fix=OVERFLOW_FIX[weights],
    )
    if quantile:
        parameters.activations_range_estimator_params = RangeEstimatorParametersSet.MEAN_QUANTILE
    return parameters


def kl(reference: Logits, logits: Logits, task: Task) -> float:
    """Mean over images of KL(reference || other) in nats; with several heads their sum."""
    return float(np.mean(task.divergence(reference, logits)))


def float_layer_count(quantised: ov.Model) -> int:
    """Convolutions and products with weights that still compute in float."""
    layers = [op for op in quantised.get_ordered_ops() if op.get_type_name() in QUANTIZABLE]
    return sum(op.input_value(0).get_node().get_type_name() != "FakeQuantize" for op in layers)


def suspects(model: ov.Model) -> dict[str, list[str]]:
    """The layers that most often cost accuracy, by name of the group: first convolution, gates, classifier."""
    operations = [op for op in model.get_ordered_ops() if op.get_type_name() in (*QUANTIZABLE, "Multiply")]
    convolutions = [op for op in operations if op.get_type_name() in ("Convolution", "GroupConvolution")]
    products = [op for op in operations if op.get_type_name() == "MatMul"]
    found = {
        GATES: [op for op in operations if op.get_type_name() == "Multiply" and _is_gate(op)],
        "first convolution": convolutions[:1],
        "classifier": (products or convolutions)[-1:],
    }
    return {group: [op.get_friendly_name() for op in ops] for group, ops in found.items() if ops}


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


def rank_groups(
    model: ov.Model, quick: ov.Model, divergence: Callable[[ov.Model], float], *, check: Check = no_limit
) -> list[tuple[str, list[str], float]]:
    """(group, its layers, gain), the largest gain first: how much closer to FP32 (KL, in nats) with that group in float.

    ``quick``: ``model`` quantised without bias correction. One group after the other is put back into it by hand, which
    takes a compilation instead of a quantisation (under a second against half a minute for MobileNetV3-small).
    The usual suspects come first, so they win ties; a block that is exactly one of them is not listed twice.
    """
    groups = suspects(model)
    known = [sorted(names) for names in groups.values()]
    groups |= {group: names for group, names in layer_groups(model).items() if sorted(names) not in known}
    base = divergence(quick)
    ranked = []
    for group, names in groups.items():
        check()
        ranked.append((group, names, base - divergence(with_float(quick, model, names))))
    return sorted(ranked, key=lambda item: -item[2])


def with_float(quantised: ov.Model, original: ov.Model, names: Sequence[str]) -> ov.Model:
    """A copy of ``quantised`` in which the named layers read what they read in ``original``: float weights, and
    activations from before their FakeQuantize."""
    copy = quantised.clone()
    sources = {op.get_friendly_name(): op for op in original.get_ops()}
    for operation in copy.get_ops():
        name = operation.get_friendly_name()
        if name not in names or name not in sources:
            continue
        for port in range(operation.get_input_size()):
            producer = operation.input_value(port).get_node()
            source = sources[name].input_value(port)
            if producer.get_type_name() == "FakeQuantize":
                operation.input(port).replace_source_output(producer.input_value(0))
            elif source.get_node().get_type_name() == "Constant":
                operation.input(port).replace_source_output(source)
    copy.validate_nodes_and_infer_types()
    return copy


def divergence_on(pixels: ImageU8, reference: Logits, spec: InputSpec, *, task: Task, threads: int | None) -> Any:
    """A function from a network to its mean KL from ``reference`` on these images."""

    def of(model: ov.Model) -> float:
        return kl(reference, ir_logits(compile_ir(model, threads=threads), pixels, spec), task)

    return of
