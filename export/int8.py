"""INT8 by a ladder of ever dearer means, shipped only where it pays on this CPU.

Rungs: plain quantisation -> ranges by quantiles -> layers left in float by their measured effect -> NNCF's accuracy
control -> a short training with quantisation simulated. The first rung within the accuracy budget that is also faster
than FP32 ends the climb; every rung is measured on val and on record.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import openvino as ov

from edgedistill.console import note, warn
from edgedistill.errors import ModelError, UsageError
from edgedistill.export.inference import Logits, compile_ir, ir_logits, speed_ratio, sums_saturate
from edgedistill.export.int8_quantize import (
    RANKING_IMAGES,
    AccuracyMetrics,
    OutOfTime,
    WeightRange,
    control_accuracy,
    divergence_on,
    float_layer_count,
    kl,
    quantize,
    rank_groups,
)
from edgedistill.export.samples import Samples, load_pixels
from edgedistill.images import ImageU8, InputSpec
from edgedistill.tasks import Task, Values

Int8Mode = Literal["auto", "on", "force", "off"]
Int8Weights = Literal["auto", "full", "half"]
Rung = Literal["plain", "ranges", "float-layers", "accuracy-control", "qat"]
RUNGS: tuple[Rung, ...] = ("plain", "ranges", "float-layers", "accuracy-control", "qat")
FLOAT_GROUPS = (1, 2, 4, 8)
MIN_GAIN = 1.03


@dataclass(frozen=True)
class Int8Settings:
    """``mode``: 'auto' ships INT8 where it is faster and within ``max_drop``; 'on' and 'force', which mean the same,
    wherever it is within; 'off' makes none. ``max_drop``: accuracy on val that INT8 may cost. ``max_rung``: the last
    rung to try. ``minutes``: for the whole ladder. ``min_calibration``: fewer train images than this: no INT8.
    ``weights``: 'half' uses half of INT8's range for them, which keeps the sums of CPUs without 8-bit dot products (VNNI)
    from saturating; 'auto' does so where this CPU's do.

    Raises UsageError for a rung that does not exist or a time that is not above 0.
    """

    mode: Int8Mode = "auto"
    calibration_images: int = 300
    min_calibration: int = 8
    max_drop: float = 0.01
    min_gain: float = MIN_GAIN
    max_rung: Rung = "qat"
    minutes: float = 20.0
    weights: Int8Weights = "auto"
    timing_rounds: int = 45
    timing_seconds: float = 0.05
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "on", "force", "off"):
            raise UsageError(f"--int8 {self.mode}: expected auto, on, force or off")
        if self.max_rung not in RUNGS:
            raise UsageError(f"--int8-max-rung {self.max_rung}: expected one of {', '.join(RUNGS)}")
        if self.weights not in ("auto", "full", "half"):
            raise UsageError(f"--int8-weights {self.weights}: expected auto, full or half")
        if not 0 < self.minutes < float("inf"):
            raise UsageError(f"--int8-minutes {self.minutes:g}: expected a number above 0")
        if not 0 <= self.max_drop <= 1:
            raise UsageError(f"--int8-budget {self.max_drop:g}: expected a share of the images, 0 to 1")

    @property
    def regardless_of_speed(self) -> bool:
        return self.mode in ("on", "force")


@dataclass(frozen=True, eq=False)
class Int8Result:
    """``model``: the INT8 IR, or None where none is within the accuracy budget. ``shipped``: it is the choice.

    ``rungs``: one record per attempt in order, with 'skipped' and the reason where a rung could not be tried.
    """

    model: ov.Model | None
    shipped: bool
    reason: str
    rungs: tuple[dict[str, Any], ...] = ()
    chosen: str | None = None
    calibration_images: int = 0
    val_images: int = 0
    top1_f32: float | None = None
    weights: WeightRange = "full"
    seconds: float = 0.0
    settings: Int8Settings = field(default_factory=Int8Settings)

    def to_dict(self) -> dict[str, Any]:
        return {
            "decision": "shipped" if self.shipped else "refused",
            "reason": self.reason,
            "written": self.model is not None,
            "chosen": self.chosen,
            "mode": self.settings.mode,
            "calibration_images": self.calibration_images,
            "val_images": self.val_images,
            "top1_f32": self.top1_f32,
            "max_drop": self.settings.max_drop,
            "min_gain": self.settings.min_gain,
            "max_rung": self.settings.max_rung,
            "minutes": self.settings.minutes,
            "weights": self.weights,
            "seconds": self.seconds,
            "rungs": list(self.rungs),
        }


class Skip(Exception):
    """A rung that cannot be tried here, and why."""


# The network quantised so far, the seconds left -> the INT8 network after training. Raises Skip where it cannot be.
Trainer = Callable[[ov.Model, float], ov.Model]


@dataclass(frozen=True, eq=False)
class _Bench:
    """What every attempt is measured against: val pixels and what is true of them, the FP32 network and its answers."""

    model: ov.Model
    spec: InputSpec
    settings: Int8Settings
    calibration: ImageU8
    pixels: ImageU8
    values: Values
    reference: ov.CompiledModel
    reference_logits: Logits
    started: float
    trainer: Trainer | None
    task: Task
    temperature: float
    weights: WeightRange

    def accuracy(self, logits: Logits) -> float:
        """On val; of several heads the joint score."""
        return self.task.score(logits, self.values, self.temperature)

    @property
    def reference_accuracy(self) -> float:
        return self.accuracy(self.reference_logits)

    def disagreement(self, logits: Logits) -> float:
        """Share of val images with another answer than FP32's."""
        answers = [
            self.task.answers(self.task.probabilities(one, self.temperature)) for one in (logits, self.reference_logits)
        ]
        return float((answers[0] != answers[1]).any(axis=1).mean())

    @property
    def seconds_left(self) -> float:
        return self.started + 60 * self.settings.minutes - time.monotonic()

    def check(self) -> None:
        if self.seconds_left <= 0:
            raise OutOfTime


@dataclass(frozen=True, eq=False)
class _Attempt:
    """``whole``: every layer is quantised. ``quantile``: with the ranges of the second rung."""

    rung: Rung
    name: str
    model: ov.Model
    whole: bool = False
    quantile: bool = False
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def within(self) -> bool:
        return bool(self.record["within_budget"])

    @property
    def faster(self) -> bool:
        return bool(self.record["faster"])


def make_int8(
    model: ov.Model,
    spec: InputSpec,
    calibration: Samples,
    val: Samples,
    settings: Int8Settings,
    *,
    task: Task,
    temperature: float = 1.0,
    trainer: Trainer | None = None,
) -> Int8Result:
    """Quantise ``model`` (the FP32 IR), measure it on ``val``, and decide.

    Where the plain rung is no faster than FP32 the climb ends there: no later one makes a network faster. ``trainer``
    does the last rung. ``task``: what it answers, at its ``temperature``; several heads are judged by their joint score.
    Raises ModelError for a network that NNCF cannot quantise at all.
    """
    if settings.mode == "off":
        return Int8Result(None, False, "not wanted (--int8 off)", settings=settings)
    train = calibration.thinned(settings.calibration_images)
    if len(train) < settings.min_calibration or not len(val):
        reason = f"{len(train)} train images to calibrate on and {len(val)} to measure on are too few"
        return Int8Result(None, False, reason, settings=settings)
    if len(train) < settings.calibration_images:
        warn(f"INT8 calibrates on all {len(train)} train images; {settings.calibration_images} would be better")
    started = time.monotonic()
    reference = compile_ir(model, threads=settings.threads)
    pixels = load_pixels(val.paths, spec)
    bench = _Bench(
        model=model,
        spec=spec,
        settings=settings,
        calibration=load_pixels(train.paths, spec),
        pixels=pixels,
        values=val.truth,
        reference=reference,
        reference_logits=ir_logits(reference, pixels, spec),
        started=started,
        trainer=trainer,
        task=task,
        temperature=temperature,
        weights=_weight_range(settings),
    )
    if bench.weights == "half" and settings.weights == "auto":
        note("INT8: this CPU has no 8-bit dot products and its sums saturate, so weights use half of their range")
    attempts, records = _climb(bench)
    return _decide(bench, attempts, records)


def _weight_range(settings: Int8Settings) -> WeightRange:
    if settings.weights == "auto":
        return "half" if sums_saturate() else "full"
    return settings.weights


def _climb(bench: _Bench) -> tuple[list[_Attempt], list[dict[str, Any]]]:
    """(attempts, records of attempts and of rungs that could not be tried), up to the first attempt that will do."""
    attempts: list[_Attempt] = []
    records: list[dict[str, Any]] = []
    settings = bench.settings
    for rung in RUNGS[: RUNGS.index(settings.max_rung) + 1]:
        try:
            for unmeasured in MAKERS[rung](bench, attempts):
                attempt = _measure(bench, unmeasured)
                attempts.append(attempt)
                records.append(attempt.record)
                if attempt.within and (attempt.faster or settings.regardless_of_speed):
                    return attempts, records
        except OutOfTime:
            records.append({"rung": rung, "name": rung, "skipped": f"the {settings.minutes:g} minutes were over"})
            break
        except (Skip, ModelError) as error:
            if rung == "plain":
                raise
            note(f"INT8, {rung}: not tried: {error}")
            records.append({"rung": rung, "name": rung, "skipped": str(error)[:300]})
        if settings.mode == "auto" and not any(attempt.faster for attempt in attempts):
            break
    return attempts, records


def _plain(bench: _Bench, attempts: list[_Attempt]) -> Iterator[_Attempt]:
    model = quantize(bench.model, bench.spec, bench.calibration, weights=bench.weights, check=bench.check)
    yield _Attempt("plain", "all layers in INT8", model, whole=True)


def _ranges(bench: _Bench, attempts: list[_Attempt]) -> Iterator[_Attempt]:
    model = quantize(
        bench.model, bench.spec, bench.calibration, quantile=True, weights=bench.weights, check=bench.check
    )
    yield _Attempt("ranges", "ranges of activations by quantiles", model, whole=True, quantile=True)


def _float_layers(bench: _Bench, attempts: list[_Attempt]) -> Iterator[_Attempt]:
    """The 1, 2, 4, 8 groups of layers whose return to float brings the outputs closest to FP32, one attempt each."""
    quantile = _closest(attempts).quantile
    quantised = functools.partial(
        quantize, bench.model, bench.spec, quantile=quantile, weights=bench.weights, check=bench.check
    )
    quick = quantised(bench.calibration[:RANKING_IMAGES], correct_bias=False)
    divergence = divergence_on(
        bench.pixels[:RANKING_IMAGES],
        bench.reference_logits[:RANKING_IMAGES],
        bench.spec,
        threads=bench.settings.threads,
        task=bench.task,
    )
    ranked = [item for item in rank_groups(bench.model, quick, divergence, check=bench.check) if item[2] > 0]
    if not ranked:
        raise Skip("no layer brings the outputs closer to FP32 when it alone is in float")
    for count in sorted({min(count, len(ranked)) for count in FLOAT_GROUPS}):
        ignored = sorted({name for _, names, _ in ranked[:count] for name in names})
        model = quantised(bench.calibration, ignored=ignored)
        groups = ", ".join(group for group, _, _ in ranked[:count])
        yield _Attempt("float-layers", f"in float: {groups}", model, quantile=quantile)


def _accuracy_control(bench: _Bench, attempts: list[_Attempt]) -> Iterator[_Attempt]:
    quantile = _closest(attempts).quantile
    model = control_accuracy(
        bench.model,
        bench.spec,
        bench.calibration,
        val=bench.pixels,
        metrics=AccuracyMetrics(bench.task, bench.values, bench.reference_logits, bench.temperature),
        max_drop=bench.settings.max_drop,
        quantile=quantile,
        weights=bench.weights,
        check=bench.check,
    )
    yield _Attempt("accuracy-control", "NNCF accuracy control", model, quantile=quantile)


def _training(bench: _Bench, attempts: list[_Attempt]) -> Iterator[_Attempt]:
    if bench.trainer is None:
        raise Skip("the network's training is not at hand")
    start = _closest(attempts)
    model = bench.trainer(start.model, bench.seconds_left)
    yield _Attempt("qat", "short training with quantisation", model, whole=True, quantile=start.quantile)


MAKERS: dict[Rung, Callable[[_Bench, list[_Attempt]], Iterator[_Attempt]]] = {
    "plain": _plain,
    "ranges": _ranges,
    "float-layers": _float_layers,
    "accuracy-control": _accuracy_control,
    "qat": _training,
}


def _closest(attempts: list[_Attempt]) -> _Attempt:
    """Of the attempts with every layer in INT8, the one whose outputs are closest to FP32's."""
    return min((attempt for attempt in attempts if attempt.whole), key=lambda attempt: attempt.record["kl"])


def _measure(bench: _Bench, attempt: _Attempt) -> _Attempt:
    settings, started = bench.settings, time.monotonic()
    compiled = compile_ir(attempt.model, threads=settings.threads)
    logits = ir_logits(compiled, bench.pixels, bench.spec)
    speed = speed_ratio(compiled, bench.reference, rounds=settings.timing_rounds, seconds=settings.timing_seconds)
    top1, top1_f32 = bench.accuracy(logits), bench.reference_accuracy
    # A hair of slack: 3 of 300 images is 0.01 on paper and 0.010000000000000009 in binary.
    within = top1_f32 - top1 <= settings.max_drop + 1e-9
    record = {
        "rung": attempt.rung,
        "name": attempt.name,
        "float_layers": float_layer_count(attempt.model),
        "top1": top1,
        "drop": top1_f32 - top1,
        "disagreement": bench.disagreement(logits),
        "kl": kl(bench.reference_logits, logits, bench.task),
        "speed_ratio": speed["ratio"],
        "speed_ratio_ci95": [speed["ratio_low"], speed["ratio_high"]],
        "speed_ratio_range": [speed["ratio_min"], speed["ratio_max"]],
        "fps": speed["fps"],
        "fps_f32": speed["reference_fps"],
        "within_budget": within,
        # On a noisy machine the median alone says 'faster' every other time for networks of one speed.
        "faster": speed["ratio"] >= settings.min_gain and speed["ratio_low"] > 1,
        "at_seconds": round(started - bench.started, 1),
    }
    note(
        f"INT8, {attempt.name}: accuracy {top1:.4f} (FP32 {top1_f32:.4f}), KL {record['kl']:.4f}, {speed['fps']:.0f}"
        f" images/s (FP32 {speed['reference_fps']:.0f}, ratio {speed['ratio']:.2f})"
    )
    return replace(attempt, record=record)


def _decide(bench: _Bench, attempts: list[_Attempt], records: list[dict[str, Any]]) -> Int8Result:
    """The attempt that ended the climb where one did; else the fastest within the budget is written, not shipped."""
    settings = bench.settings
    candidates = [attempt for attempt in attempts if attempt.within]
    good = next((a for a in candidates if a.faster or settings.regardless_of_speed), None)
    kept = good or max(candidates, key=lambda attempt: attempt.record["speed_ratio"], default=None)
    return Int8Result(
        model=kept.model if kept else None,
        shipped=good is not None,
        reason=_reason(bench, attempts, kept) + _cut_short(records),
        rungs=tuple(records),
        chosen=kept.name if kept else None,
        calibration_images=len(bench.calibration),
        val_images=len(bench.values),
        top1_f32=bench.reference_accuracy,
        weights=bench.weights,
        seconds=round(time.monotonic() - bench.started, 1),
        settings=settings,
    )


def _reason(bench: _Bench, attempts: list[_Attempt], kept: _Attempt | None) -> str:
    settings = bench.settings
    if not attempts:
        return "nothing was measured"
    if kept is None:
        best = min(attempts, key=lambda attempt: attempt.record["drop"]).record
        reason = (
            f"accuracy falls by {best['drop']:.4f} on {len(bench.values)} val images at best ({best['name']}), "
            f"limit {settings.max_drop:g}"
        )
        if len(attempts) == 1 and not attempts[0].faster and not settings.regardless_of_speed:
            ratio = attempts[0].record["speed_ratio"]
            reason += f"; and it is not faster on this CPU ({ratio:.2f} times FP32), so no further rung was tried"
        return reason
    ratio = kept.record["speed_ratio"]
    if kept.faster:
        return f"{ratio:.2f} times the speed of FP32 on this CPU, accuracy falls by {kept.record['drop']:.4f} ({kept.name})"
    if settings.regardless_of_speed:
        return f"asked for (--int8 {settings.mode}), although {ratio:.2f} times the speed of FP32 on this CPU"
    low, high = kept.record["speed_ratio_ci95"]
    return (
        f"not faster on this CPU: {ratio:.2f} times the speed of FP32 (95% interval {low:.2f} to {high:.2f}),"
        f" expected {settings.min_gain:g} or more"
    )


def _cut_short(records: list[dict[str, Any]]) -> str:
    over = [record for record in records if "minutes were over" in record.get("skipped", "")]
    return f"; {over[0]['skipped']} in rung {over[0]['rung']} (--int8-minutes)" if over else ""


def table_rows(int8: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(column titles, rows) of the ladder of a certificate for a printed table."""
    titles = ["rung", "what", "float layers", "top-1", "drop", "KL, nats", "images/s", "x FP32"]
    rows = []
    for record in int8.get("rungs", ()):
        if "skipped" in record:
            rows.append([record["rung"], f"not tried: {record['skipped']}", *["-"] * 6])
            continue
        figures = [
            str(record["float_layers"]),
            f"{record['top1']:.4f}",
            f"{record['drop']:+.4f}",
            f"{record['kl']:.4f}",
            f"{record['fps']:.0f}",
            f"{record['speed_ratio']:.2f}",
        ]
        rows.append([record["rung"], record["name"], *figures])
    return titles, rows
