"""A compiled deployable, and the workers that answer with it: what `Classifier` and `Engine` share.

Colour order, mean and scale are compiled into the network (uint8 [N, H, W, 3] BGR goes in). Resizing before it and
temperature and softmax after it are host code, the same arithmetic as in C++.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import openvino as ov

from edgedistill import console
from edgedistill.errors import ImageError, ModelError
from edgedistill.images import DecodeBuffer, DecodeMode, EncodedImage, ImageU8, InputSpec, no_image, prepare
from edgedistill.runtime.bundle import (
    Bundle,
    ModelMetadata,
    RunSettings,
    Stage,
    last_line,
    precision_name,
    reshape_model,
    stage_precisions,
)
from edgedistill.runtime.normalisation import embed_normalisation
from edgedistill.tasks import Head, Task

UNKNOWN = "unknown"
_NO_PROBABILITIES: npt.NDArray[np.float32] = np.empty(0, np.float32)
_NO_PROBABILITIES.flags.writeable = False


@dataclass(frozen=True, slots=True, eq=False)
class HeadPrediction:
    """What one head of several says of an image.

    Softmax: ``label``, its ``index`` among the head's classes, ``probability``. Sigmoid: ``accepted``, the labels that
    apply, ascending; ``label`` 'a|b' or 'none', ``index`` and ``probability`` of the likeliest. Regression: ``value`` in
    the head's units, ``index`` -1.
    """

    name: str
    label: str
    index: int
    probability: float
    accepted: tuple[int, ...] = ()
    value: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Prediction:
    """The answer for one image. ``probability`` is the confidence, the largest of ``probabilities`` (float32 [C]).

    ``index`` is -1 and ``label`` 'unknown' below the deployable's ``reject_below``. Where ``error`` is set the image
    could not be read: it says why, ``label`` is '' and ``probabilities`` empty. ``name``: path or given name.
    ``stage``: which network of a cascade answered.

    Multi-label: ``probabilities`` are independent, ``index`` is the likeliest class, and ``accepted`` holds those at or
    above their thresholds, in ascending order (none for 'unknown').

    Several heads: ``heads`` has the answer of each; ``label`` holds theirs with commas between, ``index`` is the first
    head's place among all outputs, ``probability`` the smallest over the heads of classes, and ``probabilities`` lie side
    by side, a regression head's value in its units among them.
    """

    label: str
    index: int
    probability: float
    probabilities: npt.NDArray[np.float32]
    name: str = ""
    stage: int = 0
    error: str | None = None
    accepted: tuple[int, ...] = ()
    heads: tuple[HeadPrediction, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """One image with a name: a path, encoded bytes, or pixels as `images.prepare` takes them."""

    name: str
    data: str | Path | bytes | npt.NDArray[Any]


Source = str | Path | bytes | npt.NDArray[Any] | Frame
CacheDir = str | Path | Literal[False] | None


def as_frame(source: Source) -> Frame:
    """Raises ImageError for what is neither a path, bytes, an array nor a Frame."""
    if isinstance(source, Frame):
        return source
    if isinstance(source, str | Path):
        return Frame(str(source), source)
    if isinstance(source, bytes | bytearray | memoryview | np.ndarray):
        return Frame("", source)  # type: ignore[arg-type]
    raise no_image(source)


def failed(name: str, error: Exception | str) -> Prediction:
    return Prediction("", -1, 0.0, _NO_PROBABILITIES, name=name, error=str(error))


def softmax(logits: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float32]:
    """float32 [C] -> float32 [C]: softmax(logits / temperature), computed in float64 as the C++ runtime does."""
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    return (weights / weights.sum()).astype(np.float32)


def sigmoid(logits: npt.NDArray[np.float32], temperature: float) -> npt.NDArray[np.float32]:
    """float32 [C] -> float32 [C]: sigmoid(logits / temperature), computed in float64 as the C++ runtime does."""
    scaled = logits.astype(np.float64) / temperature
    small = np.exp(-np.abs(scaled))
    return (np.where(scaled >= 0, 1.0, small) / (1.0 + small)).astype(np.float32)


def _logits(probabilities: npt.NDArray[np.float32], *, multi_label: bool) -> npt.NDArray[np.float32]:
    """What a network's last layer, a softmax or sigmoid, was given (a softmax: up to a constant)."""
    shares = np.maximum(probabilities, np.finfo(np.float32).tiny)
    if not multi_label:
        return np.log(shares)
    # The smallest float64 whose nearest float32 is 1: a sigmoid that came out as 1 in float32 was at least that.
    capped = np.minimum(shares.astype(np.float64), 1 - 2.0**-25)
    return (np.log(capped) - np.log1p(-capped)).astype(np.float32)


def usable_cores() -> int:
    """CPUs that this process may use: its affinity, or fewer under a container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return cores


def cache_folder(cache_dir: CacheDir) -> Path | None:
    """Where OpenVINO keeps compiled models, or None: switched off with False, or nowhere to write.

    By default $EDGEDISTILL_CACHE/openvino, else ~/.cache/edgedistill/openvino. A cache is a convenience: a folder that
    cannot be written never fails anything.
    """
    if cache_dir is False:
        return None
    try:
        if cache_dir is not None:
            folder = Path(cache_dir)
        elif base := os.environ.get("EDGEDISTILL_CACHE"):
            folder = Path(base) / "openvino"
        else:
            folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgedistill" / "openvino"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def resolve_precisions(bundle: Bundle, asked: str | None, tuned: RunSettings) -> tuple[str, ...]:
    """One for each stage: ``asked`` for all where given, else what ``tuned`` says, in which bf16 gives way to f32 on a
    CPU that cannot do it (with a warning)."""
    stages = len(bundle.config.stages)
    precisions = (asked,) * stages if asked else stage_precisions(tuned, stages)
    if "bf16" in precisions and "BF16" not in ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        if asked is not None:
            raise ModelError("precision 'bf16': this CPU has no bfloat16; use 'f32' or 'int8'")
        console.warn(f"{bundle.source} is tuned for bf16, which this CPU does not have: running at f32")
        return tuple("f32" if precision == "bf16" else precision for precision in precisions)
    return precisions


@dataclass(frozen=True)
class CompiledStage:
    """``alone``: a later stage with a ``batch`` above 1 has the same network for one image too, for when few are left."""

    settings: Stage
    metadata: ModelMetadata
    compiled: ov.CompiledModel
    batch: int
    alone: ov.CompiledModel | None = None


class Network:
    """All stages of a bundle, compiled. Shared by any number of workers in any threads; immutable after construction.

    ``precisions``: one for each stage. ``batch``: images per inference of the first stage, ``later_batch`` of the stages
    that see what it passes on. ``properties``: OpenVINO's; the inference precision is always set explicitly. Raises ModelError.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        precisions: Sequence[str],
        decode: DecodeMode | None = None,
        batch: int = 1,
        later_batch: int = 1,
        properties: Mapping[str, Any],
        cache_dir: CacheDir = None,
    ) -> None:
        self.bundle = bundle
        self.precisions = tuple(precisions)
        self.decode: DecodeMode = decode or bundle.config.decode
        if self.decode not in ("full", "reduced"):
            raise ModelError(f"decode {decode!r}, expected 'full' or 'reduced'")
        folder = cache_folder(cache_dir)
        self.stages = tuple(
            _compiled_stage(bundle, number, precision, batch if number == 0 else later_batch, properties, folder)
            for number, precision in enumerate(self.precisions)
        )

    @property
    def spec(self) -> InputSpec:
        return self.stages[0].settings.input_spec

    @property
    def precision(self) -> str:
        """'int8', or 'int8+f32' where the stages differ."""
        return precision_name(self.precisions)

    def answer(self, logits: npt.NDArray[np.float32], stage: int, name: str) -> Prediction | None:
        """float32 [C] -> the answer, or None when a later stage has to be asked."""
        settings, metadata = self.stages[stage].settings, self.stages[stage].metadata
        if metadata.gives_probabilities:
            logits = _logits(logits, multi_label=metadata.multi_label)
        if not np.isfinite(logits).all():
            where = name or "image"
            return failed(name, f"{where}: the network's output is not finite (precision {self.precisions[stage]})")
        if metadata.heads is not None:
            return self._answer_heads(metadata.heads, logits, stage, name)
        probabilities = (sigmoid if metadata.multi_label else softmax)(logits, settings.temperature)
        # From the logits: after rounding two probabilities may be equal.
        index = int(logits.argmax())
        confidence = float(probabilities[index])
        last = stage == len(self.stages) - 1
        if not last and confidence < (settings.exit_threshold or 0.0):
            return None
        reject_below = self.bundle.config.reject_below
        if reject_below is not None and confidence < reject_below:
            return Prediction(UNKNOWN, -1, confidence, probabilities, name, stage)
        accepted: tuple[int, ...] = ()
        if metadata.multi_label:
            accepted = tuple(np.flatnonzero(probabilities >= np.array(metadata.threshold, np.float32)).tolist())
        return Prediction(metadata.labels[index], index, confidence, probabilities, name, stage, accepted=accepted)

    def _answer_heads(self, task: Task, logits: npt.NDArray[np.float32], stage: int, name: str) -> Prediction | None:
        settings = self.stages[stage].settings
        exact = task.probabilities(logits[None], settings.temperature)[0]
        heads = tuple(_head_prediction(head, exact[part], logits[part]) for head, part in task.slices())
        of_classes = [answer for answer in heads if answer.value is None]
        confidence = min(answer.probability for answer in of_classes)
        probabilities = exact.astype(np.float32)
        last, reject_below = stage == len(self.stages) - 1, self.bundle.config.reject_below
        if not last and confidence < (settings.exit_threshold or 0.0):
            return None
        if reject_below is not None and confidence < reject_below:
            return Prediction(UNKNOWN, -1, confidence, probabilities, name, stage, heads=heads)
        label = ", ".join(answer.label for answer in of_classes)
        return Prediction(label, of_classes[0].index, confidence, probabilities, name, stage, heads=heads)


def _head_prediction(head: Head, exact: npt.NDArray[np.float64], logits: npt.NDArray[np.float32]) -> HeadPrediction:
    """``exact``: the head's probabilities, as ``tasks`` has them, of its ``logits``."""
    probabilities = exact.astype(np.float32)
    if head.kind == "regression":
        return HeadPrediction(head.name, "", -1, 0.0, value=float(probabilities[0]))
    index = int(logits.argmax())  # two probabilities may be equal, and are so as soon as both round to 1
    share = float(probabilities[index])
    if head.kind == "softmax":
        return HeadPrediction(head.name, head.classes[index], index, share)
    accepted = tuple(np.flatnonzero(probabilities >= np.array(head.thresholds, np.float32)).tolist())
    label = "|".join(head.classes[number] for number in accepted) or "none"
    return HeadPrediction(head.name, label, index, share, accepted)


def _compiled_stage(
    bundle: Bundle, number: int, precision: str, batch: int, properties: Mapping[str, Any], folder: Path | None
) -> CompiledStage:
    settings, metadata = bundle.config.stages[number], bundle.metadata[number]
    hints = {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bf16" else "f32", **properties}
    compiled = _compile(bundle, number, precision, batch, hints, folder)
    alone = _compile(bundle, number, precision, 1, hints, folder) if number > 0 and batch > 1 else None
    return CompiledStage(settings, metadata, compiled, batch, alone)


def _compile(
    bundle: Bundle, number: int, precision: str, batch: int, hints: Mapping[str, Any], folder: Path | None
) -> ov.CompiledModel:
    settings, metadata = bundle.config.stages[number], bundle.metadata[number]
    model = bundle.read_model(number, precision)
    if batch > 1:
        reshape_model(model, metadata.layout, settings.input_spec, batch=batch, name=bundle.source)
    embed_normalisation(model, settings.input_spec, bgr=metadata.bgr, layout=metadata.layout)
    try:
        return ov.Core().compile_model(model, "CPU", dict(hints) | ({"CACHE_DIR": str(folder)} if folder else {}))
    except RuntimeError as error:
        raise ModelError(
            f"{bundle.source}: OpenVINO cannot compile it with {dict(hints)} ({last_line(error)})"
        ) from error


class _StageRunner:
    """One infer request whose input and output memory are ours: images are resized straight into it."""

    def __init__(self, stage: CompiledStage, compiled: ov.CompiledModel, batch: int) -> None:
        spec = stage.settings.input_spec
        self.pixels: ImageU8 = np.zeros((batch, spec.height, spec.width, 3), np.uint8)
        self._request = compiled.create_infer_request()
        self._request.set_input_tensor(ov.Tensor(self.pixels, shared_memory=True))
        self._logits: npt.NDArray[np.float32] = np.zeros((batch, len(stage.metadata.labels)), np.float32)
        self._request.set_output_tensor(ov.Tensor(self._logits, shared_memory=True))

    def run(self) -> npt.NDArray[np.float32]:
        """``pixels`` -> logits float32 [batch, C], overwritten by the next run."""
        self._request.infer(share_outputs=True, share_inputs=True)
        return self._logits


@dataclass(frozen=True, slots=True, eq=False)
class PassedOn:
    """An image that ``stage`` has to be asked about. ``pixels``: what it sees, uint8 [H, W, 3] BGR."""

    frame: Frame
    stage: int
    pixels: ImageU8


Outcome = Prediction | PassedOn


class Worker:
    """Answers with its own infer requests and buffers: one thread at a time.

    The stages of a cascade share each image's bytes and, where they reduce it alike, its decoded pixels.
    """

    def __init__(self, network: Network) -> None:
        self._network = network
        self._runners = tuple(_StageRunner(stage, stage.compiled, stage.batch) for stage in network.stages)
        self._alone = tuple(
            None if stage.alone is None else _StageRunner(stage, stage.alone, 1) for stage in network.stages
        )
        # A later stage may want the pixels of any image of the batch again; a single network never does.
        self._buffers = [DecodeBuffer() for _ in range(len(self._runners[0].pixels) if len(self._runners) > 1 else 1)]

    @property
    def batches(self) -> tuple[int, ...]:
        """Images per inference of each stage."""
        return tuple(len(runner.pixels) for runner in self._runners)

    def answer(self, frames: Sequence[Frame]) -> list[Prediction]:
        """Up to ``batches[0]`` frames, in order, by as many stages as each needs.

        An image that cannot be read gets a Prediction whose ``error`` is set.
        """
        outcomes = self.begin(frames)
        for stage in range(1, len(self._runners)):
            passed = [(place, outcome) for place, outcome in enumerate(outcomes) if isinstance(outcome, PassedOn)]
            for start in range(0, len(passed), self.batches[stage]):
                part = passed[start : start + self.batches[stage]]
                found = self.go_on([outcome for _, outcome in part])
                for (place, _), outcome in zip(part, found, strict=True):
                    outcomes[place] = outcome
        return [outcome for outcome in outcomes if isinstance(outcome, Prediction)]

    def begin(self, frames: Sequence[Frame]) -> list[Outcome]:
        """What the first stage says of up to ``batches[0]`` frames, in order."""
        outcomes: list[Outcome | None] = [None] * len(frames)
        images: list[EncodedImage | None] = [None] * len(frames)
        pixels = self._runners[0].pixels
        for number, frame in enumerate(frames):
            try:
                images[number] = self._open(frame, number)
                _fill(frame, images[number], self._network.spec, pixels[number])
            except ImageError as error:
                outcomes[number] = failed(frame.name, error)
        if any(outcome is None for outcome in outcomes):
            logits = self._runners[0].run()
            for number, frame in enumerate(frames):
                if outcomes[number] is None:
                    outcomes[number] = self._outcome(logits[number], 0, frame, images[number], pixels[number])
        return [outcome for outcome in outcomes if outcome is not None]

    def go_on(self, passed: Sequence[PassedOn]) -> list[Outcome]:
        """What a later stage says of up to ``batches[stage]`` images that were passed on to it, in order."""
        stage, outcomes = passed[0].stage, list[Outcome]()
        runner = self._later_runner(stage, len(passed))
        batch = len(runner.pixels)
        for start in range(0, len(passed), batch):
            part = passed[start : start + batch]
            for place, one in enumerate(part):
                np.copyto(runner.pixels[place], one.pixels)
            logits = runner.run()
            for place, one in enumerate(part):
                outcomes.append(self._outcome(logits[place], stage, one.frame, None, one.pixels))
        return outcomes

    def _later_runner(self, stage: int, count: int) -> _StageRunner:
        """A batch costs the same however few images are in it."""
        alone = self._alone[stage]
        return self._runners[stage] if alone is None or 4 * count >= 3 * self.batches[stage] else alone

    def _outcome(
        self, logits: npt.NDArray[np.float32], stage: int, frame: Frame, image: EncodedImage | None, pixels: ImageU8
    ) -> Outcome:
        """``pixels``: what the stage saw; ``image``: where its bytes or decoded pixels are still at hand."""
        answer = self._network.answer(logits, stage, frame.name)
        if answer is not None:
            return answer
        seen, wanted = (self._network.stages[number].settings.input_spec for number in (stage, stage + 1))
        if wanted.same_pixels(seen):
            return PassedOn(frame, stage + 1, pixels.copy())
        out = np.empty((wanted.height, wanted.width, 3), np.uint8)
        try:
            _fill(frame, image or self._open(frame, 0), wanted, out)
        except ImageError as error:  # damage that shows at another scale only
            return failed(frame.name, error)
        return PassedOn(frame, stage + 1, out)

    def _open(self, frame: Frame, slot: int) -> EncodedImage | None:
        """None for pixels that are decoded already."""
        if isinstance(frame.data, np.ndarray):
            return None
        return EncodedImage(frame.data, decode=self._network.decode, buffer=self._buffers[slot % len(self._buffers)])


def _fill(frame: Frame, image: EncodedImage | None, spec: InputSpec, out: ImageU8) -> None:
    if image is not None:
        image.pixels(spec, out=out)
    elif isinstance(frame.data, np.ndarray):
        prepare(frame.data, spec, out=out)
