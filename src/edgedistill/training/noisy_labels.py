"""Which labels look wrong: where the held-out teacher is confidently of another opinion. Needs numpy only.

Confident learning (Northcutt et al., 1911.00068): class j's threshold is the mean probability of j over the images that
are labelled j; an image is a suspect if another class reaches its own threshold, or the most probable of several that
do. The teacher never saw the image, so it cannot merely have memorised the wrong label. With several heads each is asked by
itself, and each label of a sigmoid head as a choice between two: it applies or it does not.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.artifacts import atomic_path
from edgedistill.data.manifest import Dataset
from edgedistill.data.soft_label_store import HeldRows, LogProbs, SoftRows, row_blocks
from edgedistill.tasks import Task, Values

COLUMNS = ("id", "label", "suggested", "self_confidence", "suggested_probability", "margin", "suspect")
HEAD_COLUMNS = (COLUMNS[0], "head", *COLUMNS[1:])
FIELDS = ("rows", "question", "labels", "suggested", "self_confidence", "margin", "suspects")  # of NoisyLabels, [N]
LARGEST_CLASS_LOSS = 0.5  # of a class's training images: a class that the teachers never learnt must not vanish

Probabilities = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, eq=False)
class Question:
    """What is asked of an image: which of ``classes`` it is. ``head``: its name, '' where each image has one label.

    ``places``: int64 [n], the training images whose label is known; ``labels``: int32 [n]; ``probabilities``: of their
    held-out teachers, float64 [m, C] of those of the n that int64 [m] names: a million images of a thousand classes would
    take 8 GB together.
    """

    head: str
    classes: tuple[str, ...]
    places: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    probabilities: Callable[[npt.NDArray[np.int64]], Probabilities]


@dataclass(frozen=True, eq=False)
class NoisyLabels:
    """The labels of the training images, the most doubtful first: suspects, then the others, each by rising margin.

    ``rows``: int64 [N] of the data set, one label each (of several heads an image has several). ``question``: int64 [N],
    which of ``questions`` the label answers. ``labels``, ``suggested``: int32 [N], its class there and the one that the
    teacher prefers. ``self_confidence``: float [N], probability of the label. ``margin``: float [N], that minus the
    probability of ``suggested``, -1 to 1. ``suspects``: bool [N].
    """

    rows: npt.NDArray[np.int64]
    question: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    suggested: npt.NDArray[np.int32]
    self_confidence: npt.NDArray[np.float64]
    margin: npt.NDArray[np.float64]
    suspects: npt.NDArray[np.bool_]
    questions: tuple[Question, ...]

    def take(self, places: npt.NDArray[np.int64]) -> NoisyLabels:
        return replace(self, **{name: getattr(self, name)[places] for name in FIELDS})


def find_noisy_labels(dataset: Dataset, log_probs: LogProbs | SoftRows) -> NoisyLabels:
    """``log_probs``: what read_soft_labels returns, float32 [len(dataset), C] or the scores of several heads, or what
    soft_rows does. Images that every teacher trained on are left out: nobody's opinion of them is worth anything."""
    rows = dataset.held_out_rows
    soft = HeldRows(log_probs) if isinstance(log_probs, np.ndarray) else log_probs
    questions: tuple[Question, ...]
    if dataset.task is None or dataset.values is None:

        def probabilities(part: npt.NDArray[np.int64]) -> Probabilities:
            return np.exp(soft.rows(rows[part]).astype(np.float64))

        questions = (Question("", dataset.class_names, np.arange(len(rows)), dataset.labels[rows], probabilities),)
    else:
        shares = dataset.task.probabilities(soft.rows(rows))
        questions = tuple(_questions(dataset.task, shares, dataset.values[rows]))
    parts = [_compared(question) for question in questions]
    suggested, own, margin, suspects = (np.concatenate(column) for column in zip(*parts, strict=True))
    found = NoisyLabels(
        rows[np.concatenate([question.places for question in questions])],
        np.repeat(np.arange(len(questions)), [len(question.places) for question in questions]),
        np.concatenate([question.labels for question in questions]),
        suggested,
        own,
        margin,
        suspects,
        questions,
    )
    return found.take(np.lexsort((margin, ~suspects)))


def _questions(task: Task, shares: Probabilities, values: Values) -> Iterator[Question]:
    for head, own, truth in task.parts(shares, values):
        if head.kind == "softmax":
            places = np.flatnonzero(~np.isnan(truth[:, 0]))
            yield Question(head.name, head.classes, places, truth[places, 0].astype(np.int32), own[places].__getitem__)
        elif head.kind == "sigmoid":
            for number, name in enumerate(head.classes):
                places = np.flatnonzero(~np.isnan(truth[:, number]))
                applies = own[places, number]
                labels = (truth[places, number] >= 0.5).astype(np.int32)
                both = np.stack([1 - applies, applies], axis=1)
                yield Question(head.name, (f"not {name}", name), places, labels, both.__getitem__)


def _compared(
    question: Question,
) -> tuple[npt.NDArray[np.int32], Probabilities, Probabilities, npt.NDArray[np.bool_]]:
    """(suggested, self_confidence, margin, suspects) of NoisyLabels, in the order of the question's images.

    All is read twice, a block of images at a time, first for the thresholds.
    """
    labels, classes = question.labels, len(question.classes)
    parts = list(row_blocks(np.arange(len(labels)), classes))
    owns = [question.probabilities(part)[np.arange(len(part)), labels[part]] for part in parts]
    own = np.concatenate([np.zeros(0), *owns])
    counts = np.bincount(labels, minlength=classes)
    sums = np.bincount(labels, weights=own, minlength=classes)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)  # nobody is suspected of an empty class
    judged = [_judged(question.probabilities(part), labels[part], thresholds) for part in parts]
    suggested = np.concatenate([np.zeros(0, np.int32), *(found for found, _, _ in judged)])
    margin = own - np.concatenate([np.zeros(0), *(probability for _, probability, _ in judged)])
    suspects = np.concatenate([np.zeros(0, np.bool_), *(suspect for _, _, suspect in judged)])
    return suggested, own, margin, suspects


def _judged(
    probabilities: Probabilities, labels: npt.NDArray[np.int32], thresholds: Probabilities
) -> tuple[npt.NDArray[np.int32], Probabilities, npt.NDArray[np.bool_]]:
    """(suggested class, its probability, whether it makes the image a suspect) of some images, each [n]."""
    everyone = np.arange(len(labels))
    own, others = probabilities[everyone, labels], probabilities.copy()
    others[everyone, labels] = -1.0
    confident = np.where(others >= thresholds, others, -1.0)
    surest = confident.max(axis=1)
    suspects = (surest >= 0) & (surest > own)
    suggested = np.where(suspects, confident.argmax(axis=1), others.argmax(axis=1)).astype(np.int32)
    return suggested, probabilities[everyone, suggested], suspects


def rows_to_drop(noisy: NoisyLabels, dataset: Dataset, share: float) -> npt.NDArray[np.int64]:
    """The images of the most doubtful suspects: at most ``share`` (0 to 1) of the training images and half of any class
    of any head; ascending."""
    train = dataset.held_out_rows
    limit = int(share * len(train))
    classes, left = _classes_of_images(noisy.questions, len(train))
    place_of = np.full(len(dataset), -1, np.int64)
    place_of[train] = np.arange(len(train))
    dropped: set[int] = set()
    for row in noisy.rows[noisy.suspects].tolist():
        own = classes[place_of[row]]
        own = own[own >= 0]
        if len(dropped) < limit and row not in dropped and (left[own] >= 1).all():
            left[own] -= 1
            dropped.add(row)
    return np.array(sorted(dropped), np.int64)


def _classes_of_images(questions: tuple[Question, ...], count: int) -> tuple[npt.NDArray[np.int32], Probabilities]:
    """(int32 [count, questions], the number of each image's class among those of all questions, -1 where it is not known;
    how many images of each of them may be left out)."""
    classes = np.full((count, len(questions)), -1, np.int32)
    start = 0
    for number, question in enumerate(questions):
        classes[question.places, number] = start + question.labels
        start += len(question.classes)
    return classes, np.bincount(classes[classes >= 0], minlength=start) * LARGEST_CLASS_LOSS


def write_noisy_labels(path: Path, dataset: Dataset, log_probs: LogProbs | SoftRows) -> int:
    """noisy_labels.csv, a line per training image, the most doubtful first; returns the number of suspects.

    With several heads a column names the head, and the lines are all suspects and, of each other image, its most doubtful
    label.
    """
    noisy = find_noisy_labels(dataset, log_probs)
    if dataset.task is not None:
        first = np.zeros(len(noisy.rows), bool)
        first[np.unique(noisy.rows, return_index=True)[1]] = True
        noisy = noisy.take(np.flatnonzero(first | noisy.suspects))
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS if dataset.task is None else HEAD_COLUMNS)
        columns = [getattr(noisy, name).tolist() for name in FIELDS]
        for row, number, label, suggested, own, margin, suspect in zip(*columns, strict=True):
            question = noisy.questions[number]
            head = () if dataset.task is None else (question.head,)
            values = (f"{own:.6f}", f"{own - margin:.6f}", f"{margin:.6f}", int(suspect))
            writer.writerow((dataset.ids[row], *head, question.classes[label], question.classes[suggested], *values))
    return int(noisy.suspects.sum())
