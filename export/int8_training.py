"""The last rung: a few epochs in which torch computes as the INT8 network does, on the student's own soft labels.

NNCF 3.4's torch backend is not used. Tried with torch 2.13: its fake quantisation compiles a C++ extension when it first
runs (minutes, a compiler on the user's machine, nvcc on a GPU; its own limit of 60 s was too short on two cores),
collecting ranges took a second for each image, and ``nncf.strip`` ends in an import of torchao, which NNCF does not
install. Instead the network that NNCF quantised from the IR is the pattern: its FakeQuantize ranges, as they are, become
torch's own fake quantisation on the modules of the same names, and the trained weights go back into that very graph. So
what was trained is what runs; that both compute the same is proven on images before any time is spent.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov
import torch
from openvino import opset8
from torch import nn
from torch.nn.utils import parametrize

from edgedistill.artifacts import RunDir
from edgedistill.console import note
from edgedistill.data.manifest import Dataset, read_dataset
from edgedistill.data.soft_label_store import HeldRows, SoftRows
from edgedistill.errors import EdgedistillError
from edgedistill.export import ir
from edgedistill.export.inference import compile_ir, ir_logits, torch_logits
from edgedistill.export.int8 import Skip
from edgedistill.export.int8_quantize import QUANTIZABLE, kl
from edgedistill.export.network import Network
from edgedistill.export.samples import Samples, load_pixels
from edgedistill.images import InputSpec
from edgedistill.tasks import Task
from edgedistill.training.depthwise import quick_depthwise
from edgedistill.training.heads import make_task_targets
from edgedistill.training.loader import Draw, open_store, prepared_spec
from edgedistill.training.loop import Job, train
from edgedistill.training.losses import HardLoss, LossSettings, TargetSource, targets_of
from edgedistill.training.optimizers import Phase
from edgedistill.training.seeds import derive, generator
from edgedistill.training.settings import TrainSettings, choose_device
from edgedistill.training.soft_labels import check_soft_labels, open_soft_labels, read_soft_labels

RATE = 0.05  # of the student's learning rate: the weights are to move within their neighbourhood
BATCH = 64
TIME_SHARE = 0.8  # of what is left of the ladder's time; the rest is for reading images and measuring
MIN_STEPS = 20
TRIAL_STEPS = 2
PROOF_IMAGES = 32
PROOF_SHARE = 0.25
MODULE = "__module."
FULL, HALF = 127, 63  # levels of weights on either side of zero


@dataclass(frozen=True, eq=False)
class Lesson:
    """What the student learned from. ``task``: its heads. ``soft``: log-probabilities at T=1 of the N samples, with several
    heads their scores (see heads.scores_of); None for a student of labels alone. ``drawn``: int32 [N], what
    balanced sampling draws equally often; of one label per image an index into ``class_names``."""

    samples: Samples
    task: Task
    soft: SoftRows | None
    settings: TrainSettings
    loss: LossSettings
    drawn: npt.NDArray[np.int32]
    class_names: tuple[str, ...]

    @property
    def heads(self) -> Task | None:
        """None where every image has one label."""
        return None if self.task.is_single else self.task

    def targets(self, rows: npt.NDArray[np.int64]) -> TargetSource:
        """Of the samples ``rows``, int64 [n]."""
        temperature, smoothing = self.loss.temperature, self.settings.label_smoothing
        if self.heads is not None:
            scores = None if self.soft is None else self.soft.rows(rows)
            values = self.samples.truth[rows]
            return make_task_targets(
                self.heads, values, soft_scores=scores, temperature=temperature, label_smoothing=smoothing
            )
        return targets_of(
            self.samples.labels[rows],
            self.task.width,
            soft=self.soft,
            soft_rows=rows,
            temperature=temperature,
            label_smoothing=smoothing,
        )


def find_lesson(network: Network, manifest: Path, train: Samples) -> Lesson:
    """The training of the run that ``manifest`` (its dataset.csv) belongs to.

    ``train``: the train images as they lie on this machine. Raises Skip where settings or soft labels are not at hand.
    """
    saved = dict(network.settings)
    if not saved:
        raise Skip("the network was not trained here, so there are neither its settings nor its soft labels")
    if not manifest.is_file():
        raise Skip(f"there is no {manifest.name} beside the model")
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    try:
        settings = TrainSettings(**{key: value for key, value in saved.items() if key in names})
        dataset = read_dataset(manifest)
        rows = dataset.rows("train")
        if tuple(dataset.ids[rows].tolist()) != train.ids:
            raise Skip("the images are not those that the network was trained on")
        distilled = bool(saved.get("distillation", False))
        soft = _soft_labels(_soft_labels_folder(manifest.parent), dataset) if distilled else None
        loss = LossSettings(
            saved.get("loss", "ce"),
            float(saved.get("soft_weight", 0.0)) if distilled else 0.0,
            float(saved.get("soft_temperature", 1.0)),
            _hard_loss(settings, network, train),
        )
    except (EdgedistillError, TypeError, ValueError) as error:
        raise Skip(f"the training cannot be taken up: {error}") from error
    drawn = (dataset.labels if settings.weighs_draws else dataset.sampling_labels)[rows]
    return Lesson(train, network.task, soft, settings, loss, drawn, dataset.class_names)


def _hard_loss(settings: TrainSettings, network: Network, train: Samples) -> HardLoss:
    if network.heads is not None:
        return settings.loss_against_heads(network.heads, train.truth)
    return settings.loss_against(train.labels, len(network.classes))


def _soft_labels(folder: Path, dataset: Dataset) -> SoftRows:
    """Of the train images; damaged ones are refused now, not in the middle of the training."""
    rows = dataset.rows("train")
    if dataset.task is not None:
        return HeldRows(read_soft_labels(folder, dataset)[rows])
    check_soft_labels(folder, dataset)
    return open_soft_labels(folder, dataset).take(rows)


def _soft_labels_folder(run: Path) -> Path:
    """The run's own, or the one that it was given with --soft-labels."""
    own = RunDir(run).soft_labels
    given = None if own.is_dir() else RunDir(run).settings().get("soft_labels")
    return Path(given) if isinstance(given, str) else own


@dataclass(frozen=True, eq=False)
class Int8Training:
    """A ``Trainer`` of the ladder. ``module``: the fused network, which stays as it is. ``folder``: for scratch files."""

    module: nn.Module
    network: Network
    lesson: Lesson
    epochs: int
    folder: Path
    threads: int | None = None

    def __call__(self, pattern: ov.Model, seconds: float) -> ov.Model:
        """``pattern``, a network with every layer in INT8, with trained weights.

        Raises Skip where it cannot be simulated or the time is too short.
        """
        simulation = simulate(self.module, pattern)
        prove(simulation, self.module, pattern, self._convert(self.module), self)
        started = time.monotonic()
        rows, epochs = self._plan(simulation.model, seconds)
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="int8-training-") as scratch:
            job = _job(self, Path(scratch), rows, epochs=epochs)
            trained = train(job, simulation.model, resume=False)
        note(f"INT8 training: {epochs} epochs of {len(rows)} images in {time.monotonic() - started:.0f} s")
        return with_weights(pattern, self._convert(plain_copy(simulation, trained)))

    def _convert(self, module: nn.Module) -> ov.Model:
        converted, source = ir.convert(module, self.network.spec, onnx_file=self.folder / "model.onnx")
        if source != "torch":
            raise Skip("the network converts through ONNX only, whose layers have other names than torch's")
        return converted

    def _plan(self, model: nn.Module, seconds: float) -> tuple[npt.NDArray[np.int64], int]:
        """(train rows, epochs): all of them ``epochs`` times, or as much of that as fits into the time."""
        count = len(self.lesson.samples)
        batch = min(BATCH, count)
        fit = int(
            TIME_SHARE * seconds / seconds_per_image(model, self.network.spec, batch, self.lesson.settings.device)
        )
        if fit < min(MIN_STEPS * batch, count):
            raise Skip(f"{max(0.0, seconds) / 60:.1f} minutes are left, too little to train in (--int8-minutes)")
        if fit >= count:
            return np.arange(count), min(self.epochs, fit // count)
        return np.sort(generator(self.lesson.settings.seed, "int8 training").choice(count, fit, replace=False)), 1


def _job(training: Int8Training, folder: Path, rows: npt.NDArray[np.int64], *, epochs: int) -> Job:
    """The student's own settings, but for what quantised training needs: float32, a small rate, no weight decay."""
    lesson, spec = training.lesson, training.network.spec
    settings = dataclasses.replace(
        lesson.settings,
        epochs=epochs,
        batch_size=max(2, min(BATCH, len(rows))),
        lr=RATE * lesson.settings.lr,
        weight_decay=0.0,
        warmup_epochs=0.0,
        extra_epochs=0,
        swa_start=0.0,
        ema_decay=0.0,
        plain_epochs=min(lesson.settings.plain_epochs, epochs),
        precision="f32",
        compile=False,
        workers=0,  # OpenVINO's threads are running: this process must not fork any more
        checkpoint_minutes=1e6,
        tensorboard=False,
    )
    labels = lesson.drawn[rows]
    draw = Draw(
        rows=np.arange(len(rows)),
        labels=labels,
        batch_size=settings.batch_size,
        balanced=settings.balanced_sampling,
        seed=derive(settings.seed, "int8 training"),
        weights=settings.sampling_weights(labels, lesson.class_names),
    )
    paths = np.array([str(lesson.samples.paths[row]) for row in rows])
    return Job(
        title="INT8 training",
        folder=folder,
        settings=settings,
        identity={},
        store=open_store(paths, prepared_spec(spec), cache_gib=settings.cache_gib),
        targets=lesson.targets(rows),
        phases=(Phase("int8", epochs, draw, settings.lr, 0.01 * settings.lr),),
        loss=lesson.loss,
        spec=spec,
        augment=settings.augmentation(spec),
        task=lesson.heads,
    )


def seconds_per_image(model: nn.Module, spec: InputSpec, batch: int, device: str) -> float:
    """Of one training step, from a few on noise; the first is left out. Moves ``model`` there; its weights stay."""
    place = choose_device(device)
    images = torch.randn(batch, 3, spec.height, spec.width, device=place).to(memory_format=torch.channels_last)
    model.to(place).eval()  # in training mode, norms that fusion left would count the noise
    started = 0.0
    for step in range(TRIAL_STEPS + 1):
        if step == 1:
            started = time.perf_counter()
        with quick_depthwise(place):
            loss = model(images).square().mean()
        loss.backward()
        loss.item()  # a GPU is waited for
    model.zero_grad(set_to_none=True)
    return (time.perf_counter() - started) / TRIAL_STEPS / batch


def prove(
    simulation: Simulation, module: nn.Module, pattern: ov.Model, converted: ov.Model, training: Int8Training
) -> None:
    """The simulation must answer as the INT8 network with the same weights does. Raises Skip where it does not.

    ``pattern`` itself may have corrected biases, so it is compared with the FP32 weights put in. Measured on
    MobileNetV3-small: 1e-9 nats apart, where FP32 is 0.02 from INT8.
    """
    spec = training.network.spec
    pixels = load_pixels(training.lesson.samples.thinned(PROOF_IMAGES).paths, spec)
    expected = ir_logits(compile_ir(with_weights(pattern, converted), threads=training.threads), pixels, spec)
    apart = kl(expected, torch_logits(simulation.model.eval(), pixels, spec), training.network.task)
    quantisation = kl(expected, torch_logits(module, pixels, spec), training.network.task)
    if not apart <= max(PROOF_SHARE * quantisation, 1e-5):
        unknown = f"; not found in torch: {', '.join(simulation.unknown[:3])}" if simulation.unknown else ""
        raise Skip(
            f"torch does not compute as the INT8 network does: KL {apart:.2g} nats apart, and FP32 is"
            f" {quantisation:.2g}{unknown}"
        )


@dataclass(frozen=True, eq=False)
class Simulation:
    """``model``: a trainable copy that computes as INT8 does; ``original``: what it was made from.

    ``unknown``: places in the INT8 network whose module was not found; they stay in float here.
    """

    model: nn.Module
    original: nn.Module
    unknown: tuple[str, ...]


class ActivationQuantizer(nn.Module):
    """One FakeQuantize of 256 levels; gradients pass where nothing was clipped. ``scale``: one, or one per channel."""

    scale: torch.Tensor
    zero_point: torch.Tensor

    def __init__(self, low: npt.NDArray[np.float32], high: npt.NDArray[np.float32]) -> None:
        super().__init__()
        scale = (high.reshape(-1) - low.reshape(-1)) / 255.0
        self.register_buffer("scale", torch.from_numpy(scale.astype(np.float32)))
        zero_point = np.clip(np.round(-low.reshape(-1) / scale), 0, 255)
        self.register_buffer("zero_point", torch.from_numpy(zero_point.astype(np.int32)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.scale) == 1:
            return torch.fake_quantize_per_tensor_affine(x, self.scale[0], self.zero_point[0], 0, 255)
        return torch.fake_quantize_per_channel_affine(x, self.scale, self.zero_point, 1, 0, 255)


class WeightQuantizer(nn.Module):
    """Symmetric, levels from -``top`` to ``top``, one scale for each output channel, which follows the largest weight."""

    def __init__(self, top: int) -> None:
        super().__init__()
        self.top = top

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        largest = weight.detach().abs().flatten(1).amax(1).clamp_min(1e-12)
        zero_point = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        return torch.fake_quantize_per_channel_affine(weight, largest / self.top, zero_point, 0, -self.top, self.top)


def simulate(module: nn.Module, pattern: ov.Model) -> Simulation:
    """Torch's fake quantisation wherever ``pattern`` has a FakeQuantize or INT8 weights, found by the modules' names."""
    model = copy.deepcopy(module)
    modules = dict(model.named_modules())
    unknown = []
    for number, (place, low, high) in enumerate(_activations(pattern)):
        quantizer = ActivationQuantizer(low, high)
        if place == "":
            model.register_forward_pre_hook(lambda _, args, q=quantizer: (q(args[0]), *args[1:]))
        elif place in modules:
            modules[place].register_forward_hook(lambda _, args, output, q=quantizer: q(output))
        else:
            unknown.append(place)
            continue
        model.add_module(f"quantizer_{number}", quantizer)  # so that it moves to the device with the rest
    for place, top in _int8_layers(pattern):
        if isinstance(modules.get(place), nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(modules[place], "weight", WeightQuantizer(top))
        else:
            unknown.append(place)
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # fusion freezes what it folds
    return Simulation(model, module, tuple(unknown))


def plain_copy(simulation: Simulation, trained: nn.Module) -> nn.Module:
    """The original network with the trained weights, on the CPU in eval mode, without any quantisation."""
    plain = copy.deepcopy(simulation.original)
    state = {
        name.replace("parametrizations.weight.original", "weight"): value.detach().cpu()
        for name, value in trained.state_dict().items()
        if not name.startswith("quantizer_")
    }
    plain.load_state_dict(state)
    return plain.eval()


def _activations(pattern: ov.Model) -> Iterable[tuple[str, npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """(module whose output it is, '' for the network's input; low; high) of every FakeQuantize."""
    for operation in pattern.get_ordered_ops():
        if operation.get_type_name() != "FakeQuantize":
            continue
        producer = operation.input_value(0).get_node()
        place = "" if producer.get_type_name() == "Parameter" else _module(producer)
        low, high = (_constant(operation.input_value(port).get_node()).astype(np.float32) for port in (1, 2))
        yield place, low, high


def _int8_layers(pattern: ov.Model) -> Iterable[tuple[str, int]]:
    """(module, the largest of its weights' levels) of every layer with INT8 weights."""
    for operation in pattern.get_ordered_ops():
        if operation.get_type_name() in QUANTIZABLE:
            weights = operation.input_value(1).get_node()
            if _int8_weights(weights) is not None:
                yield _module(operation), _top_level(weights)


def _top_level(weights: ov.Node) -> int:
    """FULL, or HALF where NNCF kept them to half of the range: each channel's largest weight lies at the end of it."""
    levels = _constant(weights.input_value(0).get_node()).astype(np.int64)
    return HALF if np.abs(levels).max() <= HALF + 1 else FULL


def _module(operation: ov.Node) -> str:
    """'__module.blocks.0.0.conv_pw/aten::_convolution/Add' -> 'blocks.0.0.conv_pw'."""
    return str(operation.get_friendly_name()).removeprefix(MODULE).split("/aten::")[0]


def _constant(node: ov.Node) -> npt.NDArray[Any]:
    if node.get_type_name() == "Convert":
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        raise Skip(f"{node.get_friendly_name()} is {node.get_type_name()}, expected a constant")
    return np.array(node.data)


def _int8_weights(node: ov.Node) -> ov.Node | None:
    """The scale of symmetric INT8 weights, ``Convert(int8) * scale``; None for weights in float."""
    if node.get_type_name() != "Multiply":
        return None
    inner, scale = (node.input_value(port).get_node() for port in (0, 1))
    if inner.get_type_name() != "Convert" or inner.input_value(0).get_node().get_type_name() != "Constant":
        return None
    return scale


def with_weights(pattern: ov.Model, converted: ov.Model) -> ov.Model:
    """A copy of the INT8 network with the constants of a float one of the same graph: weights are quantised with scales
    of their own, biases and whatever else is constant are taken over; the ranges of activations stay.

    Raises Skip where the graphs differ.
    """
    sources = {op.get_friendly_name(): op for op in converted.get_ops()}
    result = pattern.clone()
    changed = 0
    for operation in result.get_ordered_ops():
        source = sources.get(operation.get_friendly_name())
        if source is None or source.get_type_name() != operation.get_type_name():
            continue
        for port in range(operation.get_input_size()):
            constant = source.input_value(port).get_node()
            if constant.get_type_name() == "Constant" and constant.get_element_type().is_real():
                _replace_constant(operation, port, np.array(constant.data))
                changed += operation.get_type_name() in QUANTIZABLE
    if not changed:
        raise Skip("the trained network has no layer of the quantised one's names")
    result.validate_nodes_and_infer_types()
    return result


def _replace_constant(operation: ov.Node, port: int, values: npt.NDArray[Any]) -> None:
    producer = operation.input_value(port).get_node()
    scale = _int8_weights(producer)
    if scale is None:
        if producer.get_type_name() != "Constant" or producer.data.shape != values.shape:
            raise Skip(f"{operation.get_friendly_name()}: input {port} is no constant of shape {list(values.shape)}")
        operation.input(port).replace_source_output(opset8.constant(values).output(0))
        return
    shape = tuple(scale.get_output_shape(0))
    axes = tuple(axis for axis, size in enumerate(shape) if size == 1)
    top = _top_level(producer)
    largest = np.maximum(np.abs(values).max(axis=axes, keepdims=True), 1e-12)
    steps = (largest / top).astype(np.float32)
    levels = np.clip(np.round(values / steps), -top, top).astype(np.int8)
    inner = producer.input_value(0).get_node()
    inner.input(0).replace_source_output(opset8.constant(levels).output(0))
    producer.input(1).replace_source_output(opset8.constant(steps.reshape(shape)).output(0))
