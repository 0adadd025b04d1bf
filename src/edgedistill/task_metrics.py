"""Metrics of a network with several heads, and how sure they are. Needs numpy only.

``probabilities`` and ``values`` are those of ``tasks``. The joint score, under the name ``accuracy``, is the share of
images on which every known label is right. Images without a known label count nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill import metrics
from edgedistill.errors import DataError
from edgedistill.tasks import Floats, Head, Task, Values, answers_of, probabilities_of

RESAMPLES = 1000
TINY = 1e-12
Rows = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class Scored:
    """One model's ``probabilities`` float [N, D] beside what is true, ``values`` float32 [N, V]; images without any
    known label of a class are left out. Raises DataError when the shapes do not fit or nothing is left."""

    task: Task
    probabilities: Floats
    values: Values

    def __post_init__(self) -> None:
        wanted = (len(self.values), self.task.width), (len(self.values), self.task.column_count)
        if (self.probabilities.shape, self.values.shape) != wanted:
            raise DataError(f"scores {self.probabilities.shape}, values {self.values.shape}, expected {wanted}")
        if not np.isfinite(self.probabilities).all():
            raise DataError("scores are not finite; the model that made them diverged")
        known = self.task.judged(self.values)
        if not known.any():
            raise DataError("no image has a known label")
        object.__setattr__(self, "probabilities", self.probabilities[known])
        object.__setattr__(self, "values", self.values[known])

    def __len__(self) -> int:
        return len(self.values)

    def take(self, rows: Rows) -> Scored:
        return replace(self, probabilities=self.probabilities[rows], values=self.values[rows])


def summary(scored: Scored) -> dict[str, Any]:
    """``accuracy`` (the joint score), ``macro_f1`` and ``ece`` (means over the heads of classes), ``log_loss`` (their
    sum, nats), ``joint_macro_f1`` where there are several attributes, and ``heads``: each head's own figures by name."""
    heads = {head.name: head_metrics(head, own, truth) for head, own, truth in _parts(scored)}
    of_classes = [heads[head.name] for head in scored.task.class_heads]
    calibrated = [head["ece"] for head in of_classes if "ece" in head]
    return {
        "n": len(scored),
        "accuracy": joint_accuracy(scored),
        **{name: statistic(scored) for name, statistic in statistics_of(scored.task).items() if name != "accuracy"},
        "log_loss": float(sum(head["log_loss"] for head in of_classes)),
        "ece": float(np.mean(calibrated)),
        "heads": heads,
    }


def _parts(scored: Scored) -> Any:
    return scored.task.parts(scored.probabilities, scored.values)


def joint_accuracy(scored: Scored) -> float:
    return float(scored.task.right(scored.probabilities, scored.values).mean())


def mean_f1(scored: Scored) -> float:
    """Mean over the heads of classes of their macro-F1; a head without a known label among the images is left out."""
    values = [
        _f1(head, own, truth)
        for head, own, truth in _parts(scored)
        if head.kind != "regression" and not np.isnan(truth).all()
    ]
    return float(np.mean(values))


def joint_macro_f1(scored: Scored) -> float:
    """Macro-F1 of the joint classes of all softmax heads, such as the 18 of mask x gender x age: the mean over those that
    occur among labels or answers, as ``sklearn.metrics.f1_score(average="macro")`` of the joined labels. Images that
    lack one of these labels are left out; 0 without any other."""
    parts = [(head, own, truth[:, 0]) for head, own, truth in _parts(scored) if head.kind == "softmax"]
    known = ~np.any([np.isnan(truth) for _, _, truth in parts], axis=0)
    count = int(known.sum())
    codes = np.zeros(2 * count, np.int64)
    for head, own, truth in parts:
        both = np.concatenate([own[known].argmax(axis=1), truth[known].astype(np.int64)])
        # Numbered anew after each head: the product of all numbers of classes may be beyond 64 bits.
        codes = np.unique(codes * head.width + both, return_inverse=True)[1].astype(np.int64)
    if not count:
        return 0.0
    hits = codes[:count] == codes[count:]
    found = np.bincount(codes[:count][hits], minlength=int(codes.max()) + 1)
    return float((2 * found / np.bincount(codes)).mean())


def head_metrics(head: Head, probabilities: Floats, values: Values) -> dict[str, Any]:
    """Figures of one head over the images whose label is known: accuracy, macro-F1, log-loss and ECE of a softmax head;
    exact match, macro-F1 at the threshold, mAP, log-loss (nats per label) of a sigmoid head; MAE in the head's own
    units of regression. ``kind`` and ``n`` everywhere; 0 images leave the figures away."""
    if head.kind == "sigmoid":
        return _sigmoid_metrics(head, probabilities, values)
    known = ~np.isnan(values[:, 0])
    own, truth = probabilities[known], values[known, 0]
    found: dict[str, Any] = {"kind": head.kind, "n": len(truth)}
    if head.kind == "regression":
        error = np.abs(own[:, 0] - truth)
        return found | ({"mae": float(error.mean()), "rmse": float(np.sqrt((error**2).mean()))} if len(truth) else {})
    if not len(truth):
        return found | {"accuracy": 0.0, "macro_f1": 0.0, "log_loss": 0.0}
    labels = truth.astype(np.int64)
    return found | {
        "accuracy": metrics.accuracy(own, labels),
        "macro_f1": metrics.macro_f1(own, labels),
        "log_loss": metrics.log_loss(own, labels),
        "ece": metrics.expected_calibration_error(own, labels),
        "classes": list(head.classes),
        "confusion": metrics.confusion_matrix(own, labels).tolist(),
    }


def _sigmoid_metrics(head: Head, probabilities: Floats, values: Values) -> dict[str, Any]:
    known = ~np.isnan(values)
    answers, truth = answers_of(head, probabilities), values >= 0.5
    counts = known.sum(axis=0)
    precisions = [
        average_precision(probabilities[known[:, n], n], truth[known[:, n], n]) for n in range(len(head.classes))
    ]
    right = (answers == truth) | ~known
    share = np.clip(probabilities.astype(np.float64), TINY, 1 - TINY)
    loss = -(values * np.log(share) + (1 - values) * np.log(1 - share))[known]
    found = [precision for precision in precisions if precision is not None]
    return {
        "kind": head.kind,
        "n": int(known.any(axis=1).sum()),
        "accuracy": float(right[known.any(axis=1)].all(axis=1).mean()) if known.any() else 0.0,
        "macro_f1": _f1(head, probabilities, values) if known.any() else 0.0,
        "map": float(np.mean(found)) if found else None,
        "log_loss": float(loss.mean()) if loss.size else 0.0,
        "ece": _label_calibration(probabilities[known], values[known]) if known.any() else 0.0,
        "classes": list(head.classes),
        "average_precision": precisions,
        "positives": (truth & known).sum(axis=0).tolist(),
        "known": counts.tolist(),
    }


def _label_calibration(probabilities: Floats, values: Values, *, bins: int = 15) -> float:
    """Mean gap between a label's probability and how often it applies, over equal-width bins."""
    shares = probabilities.astype(np.float64)
    bin_of = np.clip(np.ceil(shares * bins).astype(np.int64) - 1, 0, bins - 1)
    gaps = np.bincount(bin_of, weights=values.astype(np.float64) - shares, minlength=bins)
    return float(np.abs(gaps).sum() / len(shares))


def _f1(head: Head, probabilities: Floats, values: Values) -> float:
    """Macro-F1; of a sigmoid head the mean over labels that apply, or are answered, at least once."""
    if head.kind == "softmax":
        known = ~np.isnan(values[:, 0])
        return metrics.macro_f1(probabilities[known], values[known, 0].astype(np.int64))
    known, truth = ~np.isnan(values), values >= 0.5
    answers = answers_of(head, probabilities).astype(bool) & known
    hits, both = (answers & truth).sum(axis=0), answers.sum(axis=0) + (truth & known).sum(axis=0)
    return float((2 * hits / np.maximum(both, 1)).sum() / max(1, int((both > 0).sum())))


def average_precision(scores: Floats, truth: npt.NDArray[np.bool_]) -> float | None:
    """Mean of the precision at each image to which the label applies, images of equal score taken together, as
    ``sklearn.metrics.average_precision_score``; None where it applies to none."""
    if not truth.any():
        return None
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    last = np.flatnonzero(np.append(np.diff(scores[order]) != 0, True))
    precision, found = hits[last] / (last + 1), hits[last]
    return float((np.diff(found, prepend=0) * precision).sum() / truth.sum())


# ---- how sure ----


STATISTICS: dict[str, Callable[[Scored], float]] = {
    "accuracy": joint_accuracy,
    "macro_f1": mean_f1,
    "joint_macro_f1": joint_macro_f1,
}


def statistics_of(task: Task) -> dict[str, Callable[[Scored], float]]:
    """The STATISTICS of a task: one of several attributes has a score of their joint classes."""
    joint = sum(head.kind == "softmax" for head in task.heads) > 1
    return {name: statistic for name, statistic in STATISTICS.items() if joint or name != "joint_macro_f1"}


def bootstrap_interval(metric: str, scored: Scored, *, resamples: int = RESAMPLES, seed: int = 0) -> list[float]:
    """Percentile bootstrap interval (2.5% to 97.5%) over images; the same for the same seed."""
    return _interval(_resampled(metric, [scored], resamples, seed)[:, 0])


def paired_difference(
    metric: str, a: Scored, b: Scored, *, resamples: int = RESAMPLES, seed: int = 0
) -> dict[str, Any]:
    """How much better a is than b on the same resampled images: ``difference``, ``ci95``; ``p_value``: the exact McNemar
    test of the joint score, None for others."""
    values = _resampled(metric, [a, b], resamples, seed)
    p_value = None
    if metric == "accuracy":
        right_a, right_b = (one.task.right(one.probabilities, one.values) for one in (a, b))
        only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
        p_value = metrics.two_sided_binomial(min(only_a, only_b), only_a + only_b)
    difference = STATISTICS[metric](a) - STATISTICS[metric](b)
    return {"difference": difference, "ci95": _interval(values[:, 0] - values[:, 1]), "p_value": p_value}


def _resampled(metric: str, models: list[Scored], resamples: int, seed: int) -> npt.NDArray[np.float64]:
    """float64 [resamples, models], each row on one draw of the images."""
    rng, count = np.random.default_rng(seed), len(models[0])
    if metric == "accuracy":
        right = np.stack([one.task.right(one.probabilities, one.values) for one in models], axis=1)
        return np.stack([right[rng.integers(0, count, count)].mean(axis=0) for _ in range(resamples)])
    statistic = STATISTICS[metric]
    draws = (rng.integers(0, count, count) for _ in range(resamples))
    return np.array([[statistic(one.take(rows)) for one in models] for rows in draws])


def _interval(values: npt.NDArray[np.float64]) -> list[float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return [float(low), float(high)]


def fit_temperature(task: Task, logits: Floats, values: Values) -> float:
    """One temperature for all heads of classes together: it minimises the sum of their log-losses; 1 without labels."""
    known = [head.kind != "regression" and not np.isnan(values[:, part]).all() for head, part in task.columns()]
    if not any(known):
        return 1.0
    heads = [parts for parts, usable in zip(task.parts(logits, values), known, strict=True) if usable]

    def loss(scale: float) -> float:
        return sum(
            head_metrics(head, probabilities_of(head, own, 1 / scale), truth)["log_loss"] for head, own, truth in heads
        )

    return metrics.best_temperature(loss)
