"""What is true of the val images, and how answers are judged by it: of one label per image, of several heads alike.

Everywhere ``answers``: int64 [N, A], a column for each softmax head (its class) and for each label of a sigmoid head (0 or
1), -1 where the runtime answered 'unknown'; one column where every image has one label. Regression heads answer nothing
that is right or wrong.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill import metrics, task_metrics
from edgedistill.errors import DataError
from edgedistill.runtime import Prediction
from edgedistill.task_metrics import Scored
from edgedistill.tasks import Floats, Head, Task, Values, probabilities_of
from edgedistill.tasks import answers_of as answers_of_head

Ints = npt.NDArray[np.integer[Any]]
Answers = npt.NDArray[np.int64]
FIGURES = ("accuracy", "macro_f1", "map", "mae")
# Rows whose counts of every class are held at once.
BLOCK = 1024


@dataclass(frozen=True, eq=False)
class Truth:
    """``values``: float32 [N, V], what is true of N images, as ``tasks`` has it. Raises DataError where nothing is known
    of an image: it can be answered neither rightly nor wrongly."""

    task: Task
    values: Values

    def __post_init__(self) -> None:
        nothing = int((self.codes < 0).all(axis=1).sum())
        if nothing:
            raise DataError(f"{nothing} of {len(self)} images have no known label; leave them out")

    @classmethod
    def single(cls, labels: Ints, classes: Sequence[str]) -> Truth:
        """Of one label per image, int [N]."""
        return cls(Task.single(classes), labels[:, None].astype(np.float32))

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def codes(self) -> Answers:
        """int64 [N, A]: the right answers, -1 where a label is not known."""
        parts = []
        for head, columns in self._heads():
            own = self.values[:, columns]
            right = own if head.kind == "softmax" else (own >= 0.5).astype(np.float32)
            parts.append(np.where(np.isnan(own), -1, right))
        return np.concatenate(parts, axis=1).astype(np.int64)

    def take(self, rows: Ints) -> Truth:
        return Truth(self.task, self.values[rows])

    def fit_temperature(self, logits: Floats) -> float:
        if self.task.is_single:
            return metrics.fit_temperature(logits, self.codes[:, 0])
        return task_metrics.fit_temperature(self.task, logits, self.values)

    def right(self, answers: Answers) -> npt.NDArray[np.bool_]:
        """bool [N]: every known label of the image is answered rightly."""
        return ((answers == self.codes) | (self.codes < 0)).all(axis=1)

    def metric(self, answers: Answers, metric: str) -> float:
        """'accuracy', the share of images that are ``right``; or 'macro-f1', of several heads their mean, as
        ``task_metrics`` defines both."""
        return self.scorer(answers, metric)(np.arange(len(self)))

    def scorer(self, answers: Answers, metric: str) -> Callable[[Ints], float]:
        """The metric of those answers as a function of the images that count, rows which may repeat."""
        if metric == "accuracy":
            right = self.right(answers)
            return lambda rows: float(right[rows].mean())
        return lambda rows: self._macro_f1(answers[rows], self.codes[rows])

    def head_figures(self, probabilities: Floats, answers: Answers) -> dict[str, dict[str, float]]:
        """Each head's own figures by name, of ``probabilities`` float [N, D] and the ``answers`` that were made of them: what
        a figure for all heads does not show."""
        found = task_metrics.summary(Scored(self.task, probabilities, self.values))["heads"]
        for head, columns in self._heads():
            own, truth = answers[:, columns], self.codes[:, columns]
            known = truth >= 0
            if known.any():
                right = ((own == truth) | ~known).all(axis=1)[known.any(axis=1)]
                found[head.name] |= {"accuracy": right.mean(), "macro_f1": _f1(*_counts(head, own, truth))}
        return {
            name: {figure: float(row[figure]) for figure in FIGURES if row.get(figure) is not None}
            for name, row in found.items()
        }

    def _macro_f1(self, answers: Answers, codes: Answers) -> float:
        found = []
        for head, columns in self._heads():
            own, truth = answers[:, columns], codes[:, columns]
            if (truth >= 0).any():
                found.append(float(_f1(*_counts(head, own, truth))))
        return float(np.mean(found))

    def macro_f1_curve(self, quick: Answers, sure: Answers) -> npt.NDArray[np.float64]:
        """float64 [N + 1]: entry m is macro-F1 when the first m images are answered by ``quick``, the rest by ``sure``."""
        curves = [
            _f1_curve(*(_marks(head, one[:, columns]) & known for one in (quick, sure, self.codes)))
            for head, columns in self._heads()
            if (known := _known(head, self.codes[:, columns])).any()
        ]
        return np.mean(curves, axis=0)

    def _heads(self) -> Iterator[tuple[Head, slice]]:
        """Heads of classes with their columns of answers: the regression heads, which have none, stand behind them."""
        return ((head, columns) for head, columns in self.task.columns() if head.kind != "regression")


def _counts(head: Head, answers: Answers, codes: Answers) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """(how often each class was hit, how often it is true or answered), int64 [C], over what is known."""
    known = codes >= 0
    if head.kind == "sigmoid":
        said, true = (answers == 1) & known, codes == 1
        return (said & true).sum(axis=0), said.sum(axis=0) + true.sum(axis=0)
    own, truth = answers[known], codes[known]
    hits = np.bincount(truth[own == truth], minlength=head.width)
    return hits, np.bincount(truth, minlength=head.width) + np.bincount(own[own >= 0], minlength=head.width)


def _f1(hits: npt.NDArray[np.int64], both: npt.NDArray[np.int64]) -> Any:
    """The mean over classes that are true or answered at least once; counts [..., C]."""
    return (2.0 * hits / np.maximum(both, 1)).sum(axis=-1) / np.maximum((both > 0).sum(axis=-1), 1)


def _marks(head: Head, codes: Answers) -> npt.NDArray[np.bool_]:
    """bool [N, C]: which classes are true or answered."""
    return codes == (np.arange(head.width) if head.kind == "softmax" else 1)


def _known(head: Head, codes: Answers) -> npt.NDArray[np.bool_]:
    """bool [N, C] of a head's codes."""
    return np.broadcast_to(codes >= 0, (len(codes), head.width))


def _f1_curve(
    quick: npt.NDArray[np.bool_], sure: npt.NDArray[np.bool_], true: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """The curve of one head from ``_marks`` of known labels: each image changes its classes' counts by one or none."""
    gained_hits = (quick & true).astype(np.int8) - (sure & true).astype(np.int8)
    gained_both = quick.astype(np.int8) - sure.astype(np.int8)
    hits, both = (sure & true).sum(axis=0)[None], (sure.sum(axis=0) + true.sum(axis=0))[None]
    parts = [_f1(hits, both)]
    for start in range(0, len(true), BLOCK):
        rows = slice(start, start + BLOCK)
        hits = hits[-1] + np.cumsum(gained_hits[rows], axis=0, dtype=np.int64)
        both = both[-1] + np.cumsum(gained_both[rows], axis=0, dtype=np.int64)
        parts.append(_f1(hits, both))
    return np.concatenate(parts)


# ---- answers of networks ----


def answers_of(task: Task, logits: Floats, temperature: float) -> Answers:
    """int64 [N, A] of logits float [N, D], as the runtimes answer."""
    parts = []
    for head, part in task.slices():
        own = logits[:, part]
        if head.kind == "softmax":  # from the logits: probabilities may round to the same number
            parts.append(own.argmax(axis=1)[:, None].astype(np.int64))
        elif head.kind == "sigmoid":
            parts.append(answers_of_head(head, probabilities_of(head, own, temperature)))
    return np.concatenate(parts, axis=1)


def confidences(task: Task, logits: Floats, temperature: float) -> npt.NDArray[np.float32]:
    """float [N, D] -> float32 [N]: what the runtimes compare with a cascade's threshold. The probability of the likeliest
    class or label; with several heads the smallest over those of classes."""
    likeliest = [
        probabilities_of(head, logits[:, part], temperature).astype(np.float32).max(axis=1)
        for head, part in task.slices()
        if head.kind != "regression"
    ]
    return np.min(likeliest, axis=0)


def predicted_answers(task: Task, predictions: Sequence[Prediction]) -> Answers:
    """int64 [N, A] of what the runtime said."""
    width = sum(head.column_count for head in task.class_heads)
    answers = np.full((len(predictions), width), -1, np.int64)
    for row, one in enumerate(predictions):
        if one.index >= 0:
            answers[row] = _predicted(task, one)
    return answers


def _predicted(task: Task, prediction: Prediction) -> list[int]:
    if task.is_single:
        return [prediction.index]
    found: list[int] = []
    # Where there are labels alone, the runtime has them without the head.
    said = {answer.name: answer for answer in prediction.heads}
    for head in task.class_heads:
        if head.kind == "softmax":
            found.append(said[head.name].index)
        else:
            accepted = said[head.name].accepted if said else prediction.accepted
            found += [int(number in accepted) for number in range(head.width)]
    return found


def predicted_logits(task: Task, predictions: Sequence[Prediction]) -> npt.NDArray[np.float32]:
    """float32 [N, D] of answers at temperature 1: logits of softmax heads up to a constant.

    In float32 two probabilities may round to the same number: the runtime's answer decides. It may round to 1, too: then a
    logit was at least that of the smallest float64 whose nearest float32 is 1.
    """
    found = np.stack([one.probabilities for one in predictions]).astype(np.float64)
    shares, logits = np.maximum(found, np.finfo(np.float32).tiny), np.empty(found.shape, np.float32)
    answers, column = predicted_answers(task, predictions), 0
    for head, part in task.slices():
        if head.kind == "regression":
            logits[:, part] = (found[:, part] - head.mean) / head.std
        elif head.kind == "sigmoid":
            capped = np.minimum(shares[:, part], 1 - 2.0**-25)
            logits[:, part] = np.log(capped) - np.log1p(-capped)
        else:
            own = np.log(shares[:, part]).astype(np.float32)
            said = answers[:, column]
            for row in np.flatnonzero(own.argmax(axis=1) != said).tolist():
                own[row, said[row]] = np.nextafter(own[row].max(), np.float32(np.inf))
            logits[:, part] = own
        column += head.column_count
    return logits
