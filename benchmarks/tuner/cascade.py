"""Two-stage deployments judged without running them: from the stored val logits of each stage and its measured time.

A fast stage answers when its calibrated confidence reaches a threshold, else the slow stage does. With cost c1 of the fast
stage, c2 of the slow one and r the share of images that are passed on, an image costs c1 + r * c2, which is less than c2
only while r < 1 - c1 / c2 (Wisdom of Committees, 2012.01988). With several heads an image leaves early when the least sure
of them clears the threshold; with several labels per image when the likeliest label does, so that images to which no label
applies are passed on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgedistill.benchmarks.tuner.truth import Answers, Truth, answers_of, confidences
from edgedistill.tasks import Floats, Task

# The curve is averaged over this share of the images before its best point is looked for: one image more or less is noise,
# and the best of hundreds of noisy points is too good to be true.
SMOOTHED_SHARE = 0.05
SEARCHED_POINTS = 64


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


def exit_curve(
    fast: Floats,
    slow: Floats,
    truth: Truth,
    *,
    temperatures: tuple[float, float],
    metric: str = "accuracy",
    tasks: Sequence[Task] = (),
) -> Curve:
    """Every threshold that splits the val images differently. ``fast``, ``slow``: logits float [N, D]; ``tasks``: of both,
    where labels have thresholds of their own in each (else that of ``truth``)."""
    both = tasks or (truth.task, truth.task)
    confidence = confidences(both[0], fast, temperatures[0])
    order = np.argsort(-confidence, kind="stable")
    ranked = confidence[order].astype(np.float64)
    quick, sure = map(answers_of, both, (fast, slow), temperatures)
    if metric == "accuracy":
        values = _accuracies(truth.right(quick)[order], truth.right(sure)[order])
    else:
        values = truth.take(order).macro_f1_curve(quick[order], sure[order])
    splits = np.flatnonzero(ranked[:-1] > ranked[1:]) + 1  # the first ``split`` images leave early
    width = max(3, round(SMOOTHED_SHARE * len(truth)))
    return Curve(
        threshold=(ranked[splits - 1] + ranked[splits]) / 2,
        passed_on=1 - splits / len(truth),
        metric=values[splits],
        smoothed=_smooth(values, width)[splits],
    )


def _accuracies(quick_hits: npt.NDArray[np.bool_], sure_hits: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """float64 [N + 1]: entry m is the accuracy when the m surest images are answered by the fast stage."""
    gained = np.concatenate([[0], np.cumsum(quick_hits.astype(np.int64) - sure_hits.astype(np.int64))])
    return (gained + sure_hits.sum()) / len(quick_hits)


def _smooth(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """The mean over ``width`` neighbours, fewer at the ends."""
    half = width // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    places = np.arange(len(values))
    low, high = np.maximum(places - half, 0), np.minimum(places + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def cascade_answers(
    fast: Floats, slow: Floats, tasks: Sequence[Task], *, temperatures: tuple[float, float], threshold: float
) -> tuple[Answers, npt.NDArray[np.int64]]:
    """(answers int64 [N, A], stage int64 [N]) as the runtimes give them; ``tasks``: of both networks."""
    early = confidences(tasks[0], fast, temperatures[0]) >= threshold
    quick, sure = map(answers_of, tasks, (fast, slow), temperatures)
    return np.where(early[:, None], quick, sure), np.where(early, 0, 1)
