"""Metrics of a classifier and how sure they are. Needs numpy only.

Everywhere: ``probabilities`` float [N, C], rows that add up to 1; ``labels`` int [N] in 0..C-1; the answer is the class of
the largest probability, the first of equal ones. All functions raise DataError when the shapes or ranges do not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgedistill.errors import DataError
from edgedistill.tasks import softmax as softmax

Floats = npt.NDArray[np.floating[Any]]
Ints = npt.NDArray[np.integer[Any]]
MetricName = Literal["accuracy", "macro_f1", "log_loss"]
CONFIDENCE = 0.95
RESAMPLES = 2000
# Numbers drawn at once by the bootstrap: 32 MB.
BLOCK = 4_000_000
TEMPERATURE_BOUNDS = (0.05, 20.0)


@dataclass(frozen=True, eq=False)
class Judged:
    """All that the metrics need of probabilities, a few numbers an image: of blocks of rows, which need not lie in memory
    together, ``join`` makes the whole.

    ``answers``, ``labels``: int64 [N]; ``confidence``: float64 [N], the largest probability; ``losses``: float64 [N].
    """

    answers: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    confidence: npt.NDArray[np.float64]
    losses: npt.NDArray[np.float64]
    classes: int

    @classmethod
    def of(cls, probabilities: Floats, labels: Ints) -> Judged:
        _check(probabilities, labels)
        return cls(
            answers=probabilities.argmax(axis=1),
            labels=labels.astype(np.int64),
            confidence=probabilities.max(axis=1).astype(np.float64),
            losses=_row_log_loss(probabilities, labels),
            classes=probabilities.shape[1],
        )

    @classmethod
    def join(cls, parts: Sequence[Judged]) -> Judged:
        """One after the other."""
        columns = ("answers", "labels", "confidence", "losses")
        together = {name: np.concatenate([getattr(part, name) for part in parts]) for name in columns}
        return cls(**together, classes=parts[0].classes)

    @property
    def accuracy(self) -> float:
        """Share of images whose answer is the label (top-1)."""
        return float((self.answers == self.labels).mean())

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the classes that occur among labels or answers, 0 where a class is never hit.

        Equals ``sklearn.metrics.f1_score(labels, answers, average="macro", zero_division=0)``.
        """
        return float(_macro_f1(self.answers[None], self.labels[None], self.classes)[0])

    @property
    def log_loss(self) -> float:
        """Mean of -log p(label), in nats; p is clipped at the dtype's smallest step as scikit-learn does."""
        return float(self.losses.mean())

    def calibration_error(self, *, bins: int = 15) -> float:
        """Mean gap between confidence and accuracy over equal-width bins of confidence (Guo et al., 1706.04599)."""
        hit = (self.answers == self.labels).astype(np.float64)
        bin_of = np.clip(np.ceil(self.confidence * bins).astype(np.int64) - 1, 0, bins - 1)
        gaps = np.bincount(bin_of, weights=hit - self.confidence, minlength=bins)
        return float(np.abs(gaps).sum() / len(self.labels))


def accuracy(probabilities: Floats, labels: Ints) -> float:
    """See ``Judged``, as of the three below."""
    return Judged.of(probabilities, labels).accuracy


def macro_f1(probabilities: Floats, labels: Ints) -> float:
    return Judged.of(probabilities, labels).macro_f1


def log_loss(probabilities: Floats, labels: Ints) -> float:
    return Judged.of(probabilities, labels).log_loss


def expected_calibration_error(probabilities: Floats, labels: Ints, *, bins: int = 15) -> float:
    return Judged.of(probabilities, labels).calibration_error(bins=bins)


def confusion_matrix(probabilities: Floats, labels: Ints) -> npt.NDArray[np.int64]:
    """Counts int64 [C, C]: row = label, column = answer."""
    _check(probabilities, labels)
    classes = probabilities.shape[1]
    cells = labels.astype(np.int64) * classes + probabilities.argmax(axis=1)
    return np.bincount(cells, minlength=classes * classes).reshape(classes, classes)


# ---- how sure ----


def bootstrap_interval(
    metric: MetricName, probabilities: Floats, labels: Ints, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval (2.5% to 97.5%) of a metric over images; the same for the same seed."""
    _check(probabilities, labels)
    values = _resampled(_statistic(metric, probabilities, labels), len(labels), resamples, seed)
    return _interval(values)


@dataclass(frozen=True)
class PairedDifference:
    """Metric of a minus metric of b on the same images. ``p_value``: exact McNemar, for accuracy only."""

    difference: float
    ci95: tuple[float, float]
    p_value: float | None


def paired_bootstrap_difference(
    metric: MetricName, a: Floats, b: Floats, labels: Ints, *, resamples: int = RESAMPLES, seed: int = 0
) -> PairedDifference:
    """How much better a is than b, both judged on the same resampled images. ``a``, ``b``: float [N, C] probabilities."""
    _check(a, labels)
    _check(b, labels)
    of_a, of_b = _statistic(metric, a, labels), _statistic(metric, b, labels)
    values = _resampled(lambda rows: of_a(rows) - of_b(rows), len(labels), resamples, seed)
    everything = np.arange(len(labels))[None]
    p_value = mcnemar_exact(a, b, labels) if metric == "accuracy" else None
    return PairedDifference(float((of_a(everything) - of_b(everything))[0]), _interval(values), p_value)


def hierarchical_difference(
    metric: MetricName,
    a: Sequence[Ints],
    b: Sequence[Ints],
    labels: Sequence[Ints],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> PairedDifference:
    """metric(a) - metric(b), mean over the seeds of an experiment, with the interval over seeds and images.

    ``a``, ``b``: answers (class indices, int [N]) of both models in each seed; ``labels``: the truth of each seed's test
    images. Seeds are drawn with replacement, then in each the images, the same for a and b; if all seeds have the same
    labels the test set is one and its images are drawn once for all. No p-value. Raises DataError for unequal lengths.
    """
    if (
        not labels
        or not len(a) == len(b) == len(labels)
        or any(not x.shape == y.shape == z.shape or not len(z) for x, y, z in zip(a, b, labels, strict=True))
    ):
        raise DataError("answers and labels of each seed must be of one length, above 0; run the missing arms")
    classes = 1 + max(int(max(x.max(), y.max(), z.max())) for x, y, z in zip(a, b, labels, strict=True))
    one_test_set = all(np.array_equal(labels[0], other) for other in labels[1:])

    def difference(number: int, rows: Ints) -> float:
        truth = labels[number][rows]
        first, second = (_answers_statistic(metric, x[number][rows], truth, classes) for x in (a, b))
        return first - second

    everything = [difference(number, np.arange(len(truth))) for number, truth in enumerate(labels)]
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        shared = rng.integers(0, len(labels[0]), len(labels[0])) if one_test_set else None
        numbers = rng.integers(0, len(labels), len(labels))
        rows = [rng.integers(0, len(labels[n]), len(labels[n])) if shared is None else shared for n in numbers]
        drawn.append(np.mean([difference(n, r) for n, r in zip(numbers.tolist(), rows, strict=True)]))
    return PairedDifference(float(np.mean(everything)), _interval(np.array(drawn)), None)


def _answers_statistic(metric: MetricName, answers: Ints, truth: Ints, classes: int) -> float:
    if metric == "accuracy":
        return float((answers == truth).mean())
    if metric == "macro_f1":
        return float(_macro_f1(answers[None].astype(np.int64), truth[None].astype(np.int64), classes)[0])
    raise DataError(f"metric {metric!r} needs more than answers; expected accuracy or macro_f1")


def mcnemar_exact(a: Floats, b: Floats, labels: Ints) -> float:
    """Two-sided exact McNemar p-value that a and b are right equally often (binomial test on the images where exactly one
    of them is right); 1 where they never differ."""
    _check(a, labels)
    _check(b, labels)
    right_a, right_b = a.argmax(axis=1) == labels, b.argmax(axis=1) == labels
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return two_sided_binomial(min(only_a, only_b), only_a + only_b)


def two_sided_binomial(k: int, n: int) -> float:
    """min(1, 2 P(X <= k)) for X ~ Binomial(n, 1/2), k <= n/2; summed in log space, where 2^-n would underflow."""
    if 2 * k >= n:
        return 1.0
    terms = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    largest = max(terms)
    total = largest + math.log(math.fsum(math.exp(term - largest) for term in terms))
    return min(1.0, math.exp(math.log(2.0) + total - n * math.log(2.0)))


def _statistic(metric: MetricName, probabilities: Floats, labels: Ints) -> Callable[[Ints], npt.NDArray[np.float64]]:
    """A function from row numbers [R, N] to the metric of each resample, float64 [R]."""
    answers, truth = probabilities.argmax(axis=1), labels.astype(np.int64)
    classes = probabilities.shape[1]
    if metric == "accuracy":
        hit = (answers == truth).astype(np.float64)
        return lambda rows: hit[rows].mean(axis=1)
    if metric == "log_loss":
        loss = _row_log_loss(probabilities, labels)
        return lambda rows: loss[rows].mean(axis=1)
    if metric == "macro_f1":
        return lambda rows: _macro_f1(answers[rows], truth[rows], classes)
    raise DataError(f"metric {metric!r}, expected accuracy, macro_f1 or log_loss")


def _resampled(
    statistic: Callable[[Ints], npt.NDArray[np.float64]], count: int, resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    rng = np.random.default_rng(seed)
    block = max(1, BLOCK // count)
    sizes = [min(block, resamples - start) for start in range(0, resamples, block)]
    return np.concatenate([statistic(rng.integers(0, count, size=(size, count))) for size in sizes])


def _interval(values: npt.NDArray[np.float64]) -> tuple[float, float]:
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _macro_f1(answers: Ints, labels: Ints, classes: int) -> npt.NDArray[np.float64]:
    """answers, labels: int [R, N] -> float64 [R]. F1 of a class = 2 hits / (labels + answers)."""
    rows = len(labels)
    offset = np.arange(rows)[:, None] * classes

    def count(values: Ints, keep: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.int64]:
        cells = values + offset
        cells = cells.ravel() if keep is None else cells[keep]
        return np.bincount(cells, minlength=rows * classes).reshape(rows, classes)

    hits, both = count(labels, labels == answers), count(labels) + count(answers)
    f1 = 2.0 * hits / np.maximum(both, 1)
    return f1.sum(axis=1) / (both > 0).sum(axis=1)


def _row_log_loss(probabilities: Floats, labels: Ints) -> npt.NDArray[np.float64]:
    chosen = probabilities[np.arange(len(labels)), labels]
    step = np.finfo(chosen.dtype).eps
    return -np.log(np.clip(chosen, step, 1 - step).astype(np.float64))


# ---- temperature ----


def fit_temperature(logits: Floats, labels: Ints) -> float:
    """The temperature in [0.05, 20] that minimises the log-loss of softmax(logits / T) (Guo et al., 1706.04599).

    ``logits``: float [N, C]. Golden-section search over log T: the loss is convex in 1/T, so it has one minimum.
    """
    _check(logits, labels)
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    chosen = shifted[np.arange(len(labels)), labels]

    def loss(scale: float) -> float:
        return float((np.log(np.exp(shifted * scale).sum(axis=1)) - chosen * scale).mean())

    return best_temperature(loss)


def best_temperature(loss: Callable[[float], float]) -> float:
    """The temperature T in [0.05, 20] at which ``loss`` of 1/T is least: golden-section search over log T."""

    def at(log_t: float) -> float:
        return loss(math.exp(-log_t))

    low, high = (math.log(bound) for bound in TEMPERATURE_BOUNDS)
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    loss_left, loss_right = at(left), at(right)
    while high - low > 1e-6:
        if loss_left <= loss_right:
            high, right, loss_right = right, left, loss_left
            left = high - ratio * (high - low)
            loss_left = at(left)
        else:
            low, left, loss_left = left, right, loss_right
            right = low + ratio * (high - low)
            loss_right = at(right)
    return math.exp((low + high) / 2)


def _check(scores: Floats, labels: Ints) -> None:
    if scores.ndim != 2 or labels.shape != scores.shape[:1] or not len(labels):
        raise DataError(f"scores {scores.shape} and labels {labels.shape}, expected [N, C] and [N] with N above 0")
    if not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0 or labels.max() >= scores.shape[1]:
        raise DataError(
            f"labels {labels.dtype} {labels.min()}..{labels.max()}, expected integers 0..{scores.shape[1] - 1}"
        )
    if not np.isfinite(scores).all():
        bad = int(np.argmax(~np.isfinite(scores).all(axis=1)))
        raise DataError(f"scores of row {bad} are not finite; the model that made them diverged")
