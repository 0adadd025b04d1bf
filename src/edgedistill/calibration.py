"""How far a network's probabilities can be believed: reliability curves, and thresholds of labels. Needs numpy only.

``logits``, ``probabilities`` and ``values`` are those of ``tasks``. What is fitted or drawn here on val is stored beside
the network: its temperature, the curve before and after it, and for labels of which several may apply the threshold
of each.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill import metrics, task_metrics
from edgedistill.errors import ArtifactError
from edgedistill.tasks import Floats, Head, Task, Values, probabilities_of

BIN_COUNT = 10
# Of fewer images to which a label applies, the best threshold is chance.
MIN_POSITIVES = 10
DECIMALS = 4
MAX_COUNT = 2**53


@dataclass(frozen=True)
class Bins:
    """Answers by how sure they were: BIN_COUNT bins of equal width over 0 to 1. ``confidence`` and ``accuracy``: means of
    each bin, 0 where it is empty; ``count``: answers in it. Raises ArtifactError for what cannot be."""

    confidence: tuple[float, ...]
    accuracy: tuple[float, ...]
    count: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.confidence) == len(self.accuracy) == len(self.count) == BIN_COUNT:
            raise ArtifactError(f"reliability curve: {len(self.count)} bins, expected {BIN_COUNT} of each figure")
        shares = (*self.confidence, *self.accuracy)
        if not all(math.isfinite(share) and 0 <= share <= 1 for share in shares):
            raise ArtifactError("reliability curve: a confidence or an accuracy is outside 0 to 1")
        if not all(0 <= number <= MAX_COUNT for number in self.count):
            raise ArtifactError("reliability curve: a count is negative or too large")

    @property
    def error(self) -> float:
        """The expected calibration error of these bins: the mean gap between confidence and accuracy."""
        gaps = zip(self.confidence, self.accuracy, self.count, strict=True)
        return sum(abs(sure - right) * count for sure, right, count in gaps) / max(1, sum(self.count))


@dataclass(frozen=True)
class Curve:
    """Of one head: its bins at temperature 1 and at the network's own."""

    head: str
    before: Bins
    after: Bins


@dataclass(frozen=True)
class Calibration:
    """``temperature``, fitted on ``images`` images of ``split``, and what it did to each head of classes."""

    split: str
    images: int
    temperature: float
    curves: tuple[Curve, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, a few hundred bytes for each head."""
        return {
            "split": self.split,
            "images": self.images,
            "temperature": self.temperature,
            "heads": [
                {"name": curve.head, "before": _listed(curve.before), "after": _listed(curve.after)}
                for curve in self.curves
            ],
        }

    @classmethod
    def from_dict(cls, values: Any) -> Calibration:
        """Raises ArtifactError for anything that ``to_dict`` does not write."""
        try:
            curves = tuple(
                Curve(str(head["name"]), _bins(head["before"]), _bins(head["after"])) for head in values["heads"]
            )
            found = cls(str(values["split"]), int(values["images"]), float(values["temperature"]), curves)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(
                f"calibration: not as edgedistill writes it ({type(error).__name__}: {error})"
            ) from error
        if not (found.images >= 0 and 0 < found.temperature < math.inf):
            raise ArtifactError(f"calibration: {found.images} images, temperature {found.temperature}")
        return found


def _listed(bins: Bins) -> dict[str, list[float] | list[int]]:
    shares = {name: [round(share, DECIMALS) for share in getattr(bins, name)] for name in ("confidence", "accuracy")}
    return {**shares, "count": list(bins.count)}


def _bins(values: Mapping[str, Any]) -> Bins:
    confidence, accuracy = (tuple(float(share) for share in values[name]) for name in ("confidence", "accuracy"))
    return Bins(confidence, accuracy, tuple(int(number) for number in values["count"]))


# ---- curves ----


def bins_of(confidence: Floats, right: npt.NDArray[np.bool_]) -> Bins:
    """``confidence`` float [M] of M answers, ``right`` [M]: which of them held."""
    place = np.clip((confidence * BIN_COUNT).astype(np.int64), 0, BIN_COUNT - 1)
    count = np.bincount(place, minlength=BIN_COUNT)
    sure, held = (
        np.bincount(place, weights=weights.astype(np.float64), minlength=BIN_COUNT) / np.maximum(1, count)
        for weights in (confidence, right)
    )
    return Bins(tuple(np.clip(sure, 0, 1).tolist()), tuple(held.tolist()), tuple(count.tolist()))


def confidences(head: Head, probabilities: Floats, values: Values) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """(confidence [M], right [M]) of a head of classes over what is known: of softmax each image's answer; of sigmoid
    each label of each image, its probability and whether it applies."""
    if head.kind == "sigmoid":
        known = ~np.isnan(values)
        return probabilities[known], values[known] >= 0.5
    known = ~np.isnan(values[:, 0])
    own = probabilities[known]
    return own.max(axis=1, initial=0.0), own.argmax(axis=1) == values[known, 0]


def calibration_of(task: Task, logits: Floats, values: Values, *, temperature: float, split: str) -> Calibration:
    """The curves of every head of classes at temperature 1 and at ``temperature``."""
    curves = []
    for head, own, truth in task.parts(logits, values):
        if head.kind != "regression":
            before, after = (
                bins_of(*confidences(head, probabilities_of(head, own, each), truth)) for each in (1.0, temperature)
            )
            curves.append(Curve(head.name, before, after))
    return Calibration(split, len(values), temperature, tuple(curves))


# ---- thresholds ----


def best_threshold(probabilities: Floats, applies: npt.NDArray[np.bool_], *, otherwise: float) -> float:
    """The threshold with the best F1 of one label, float [M] and bool [M]: midway between two images, of equal ones the
    nearest to 0.5. ``otherwise`` where the label applies to fewer than MIN_POSITIVES images or to all."""
    positives = int(applies.sum())
    if positives < MIN_POSITIVES or positives == len(applies):
        return otherwise
    order = np.argsort(-probabilities, kind="stable")
    shares = np.append(probabilities[order].astype(np.float64), 0.0)
    f1 = 2 * np.cumsum(applies[order]) / (np.arange(1, len(order) + 1) + positives)
    middles = (shares[:-1] + shares[1:]) / 2
    f1[shares[:-1] == shares[1:]] = -1.0  # no threshold parts equal probabilities
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    return float(middles[best[np.argmin(np.abs(middles[best] - 0.5))]])


def with_thresholds(task: Task, probabilities: Floats, values: Values) -> Task:
    """The task whose sigmoid heads have the threshold of the best F1 for each label. ``probabilities`` float [N, D], as
    the deployed network gives them."""
    heads = []
    for head, own, truth in task.parts(probabilities, values):
        if head.kind != "sigmoid":
            heads.append(head)
            continue
        known = ~np.isnan(truth)
        found = tuple(
            best_threshold(own[rows, label], truth[rows, label] >= 0.5, otherwise=head.thresholds[label])
            for label, rows in enumerate(known.T)
        )
        heads.append(dataclasses.replace(head, threshold=found))
    return Task(tuple(heads))


# ---- both ----


@dataclass(frozen=True)
class Fitted:
    """What a network's outputs on val say: ``task`` with its thresholds. ``calibration`` None: there was no val."""

    task: Task
    temperature: float = 1.0
    calibration: Calibration | None = None


def fit(task: Task, logits: Floats, values: Values, *, split: str = "val") -> Fitted:
    """Temperature, curves and thresholds from ``logits`` float [N, D] of images that the network has not seen."""
    if task.is_single:
        temperature = metrics.fit_temperature(logits, values[:, 0].astype(np.int64))
    else:
        temperature = task_metrics.fit_temperature(task, logits, values)
    calibration = calibration_of(task, logits, values, temperature=temperature, split=split)
    return Fitted(with_thresholds(task, task.probabilities(logits, temperature), values), temperature, calibration)
