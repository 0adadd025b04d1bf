"""Two-stage deployments judged without running them: from the stored val logits of each stage and its measured time.

A fast stage answers when its calibrated confidence reaches a threshold, else the slow stage does. With cost c1 of the fast
stage, c2 of the slow one and r the share of images that are passed on, an image costs c1 + r * c2, which is less than c2
only while r < 1 - c1 / c2 (Wisdom of Committees, 2012.01988).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.metrics import softmax

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
# The curve is averaged over this share of the images before its best point is looked for: one image more or less is noise,
# and the best of hundreds of noisy points is too good to be true.
SMOOTHED_SHARE = 0.05
SEARCHED_POINTS = 64


def metric_of(answers: Ints, labels: Ints, classes: int, metric: str) -> float:
    """'accuracy', or 'macro-f1' as ``edgedistill.metrics.macro_f1`` defines it, of answers int [N]."""
    hit = answers == labels
    if metric == "accuracy":
        return float(hit.mean())
    hits = np.bincount(labels[hit], minlength=classes)
    both = np.bincount(labels, minlength=classes) + np.bincount(answers, minlength=classes)
    return float((2.0 * hits / np.maximum(both, 1)).sum() / (both > 0).sum())


def confidences(logits: Floats, temperature: float) -> npt.NDArray[np.float32]:
    """float [N, C] -> float32 [N]: what the runtimes compare with the threshold."""
    return softmax(logits, temperature).astype(np.float32).max(axis=1)


@dataclass(frozen=True, eq=False)
class Curve:
    """One point per threshold, from few to many images answered by the fast stage; all arrays are float64 [M].

    ``passed_on``: the share r that the slow stage answers. ``metric`` is that of the val images, ``smoothed`` its mean
    over neighbouring points.
    """

    threshold: npt.NDArray[np.float64]
    passed_on: npt.NDArray[np.float64]
    metric: npt.NDArray[np.float64]
    smoothed: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.threshold)

    def thinned(self, points: int) -> Curve:
        if len(self) <= points:
            return self
        rows = np.unique(np.linspace(0, len(self) - 1, points).round().astype(np.int64))
        return Curve(self.threshold[rows], self.passed_on[rows], self.metric[rows], self.smoothed[rows])


def exit_curve(fast: Floats, slow: Floats, labels: Ints, *, temperature: float, metric: str = "accuracy") -> Curve:
    """Every threshold that splits the val images differently. ``fast``, ``slow``: logits float [N, C]."""
    confidence = confidences(fast, temperature)
    order = np.argsort(-confidence, kind="stable")
    ranked, truth = confidence[order].astype(np.float64), labels[order].astype(np.int64)
    quick, sure = fast.argmax(axis=1)[order], slow.argmax(axis=1)[order]
    if metric == "accuracy":
        values = _accuracies(quick == truth, sure == truth)
    else:
        values = _macro_f1s(quick, sure, truth, fast.shape[1])
    splits = np.flatnonzero(ranked[:-1] > ranked[1:]) + 1  # the first ``split`` images leave early
    width = max(3, round(SMOOTHED_SHARE * len(labels)))
    return Curve(
        threshold=(ranked[splits - 1] + ranked[splits]) / 2,
        passed_on=1 - splits / len(labels),
        metric=values[splits],
        smoothed=_smooth(values, width)[splits],
    )


def _accuracies(quick_hits: npt.NDArray[np.bool_], sure_hits: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """float64 [N + 1]: entry m is the accuracy when the m surest images are answered by the fast stage."""
    gained = np.concatenate([[0], np.cumsum(quick_hits.astype(np.int64) - sure_hits.astype(np.int64))])
    return (gained + sure_hits.sum()) / len(quick_hits)


def _macro_f1s(quick: Ints, sure: Ints, truth: Ints, classes: int) -> npt.NDArray[np.float64]:
    """The same for macro-F1: the counts of one class change with one image at a time."""
    hits = np.bincount(truth[sure == truth], minlength=classes).astype(np.float64)
    both = (np.bincount(truth, minlength=classes) + np.bincount(sure, minlength=classes)).astype(np.float64)
    values = np.empty(len(truth) + 1)
    values[0] = (2 * hits / np.maximum(both, 1)).sum() / (both > 0).sum()
    for row, (early, late, label) in enumerate(zip(quick.tolist(), sure.tolist(), truth.tolist(), strict=True)):
        both[late] -= 1
        both[early] += 1
        hits[label] += int(early == label) - int(late == label)
        values[row + 1] = (2 * hits / np.maximum(both, 1)).sum() / (both > 0).sum()
    return values


def _smooth(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """The mean over ``width`` neighbours, fewer at the ends."""
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def cascade_answers(
    fast: Floats, slow: Floats, *, temperature: float, threshold: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(answers int64 [N], stage int64 [N]) as the runtimes give them."""
    early = confidences(fast, temperature) >= threshold
    return np.where(early, fast.argmax(axis=1), slow.argmax(axis=1)), np.where(early, 0, 1)
