"""Splits of images that carry several labels at once, by iterative stratification (Sechidis et al., ECML PKDD 2011).

The rarest label is dealt first, each image to the split that still lacks most of it; groups stay whole. Besides every
class of every head, joint labels that occur often enough are dealt as labels of their own, so that attributes are
balanced jointly where the data allow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgedistill.errors import DataError
from edgedistill.tasks import Task, Values

Codes = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Marks:
    """What is true of N images: ``table`` bool [N, L]. The first ``len(names)`` columns are classes, which every split
    and fold must have; the others are joint labels, dealt evenly where they can be."""

    table: npt.NDArray[np.bool_]
    names: tuple[str, ...]

    def take(self, rows: Codes) -> Marks:
        return Marks(self.table[rows], self.names)


def make_marks(task: Task, values: Values, joint: Codes) -> Marks:
    """``joint``: int64 [N], the number of each image's joint label."""
    columns = [task.marks(values)]
    if len(task.class_heads) > 1:
        numbers, counts = np.unique(joint, return_counts=True)
        columns.append(joint[:, None] == numbers[counts > 1])
    return Marks(np.concatenate(columns, axis=1), task.mark_names)


def prove(marks: Marks, folds: npt.NDArray[np.integer], numbers: Sequence[int]) -> None:
    """Raises DataError for the first class that a fold lacks: a teacher of the others would never have seen it, or its
    labels never be checked."""
    for fold in numbers:
        lacking = np.flatnonzero(~marks.table[folds == fold][:, : len(marks.names)].any(axis=0))
        if len(lacking):
            where = sorted(np.unique(folds[marks.table[:, lacking[0]]]).tolist())
            raise DataError(
                f"{marks.names[lacking[0]]} is missing in fold {fold} (it is in fold {', '.join(map(str, where))}): its "
                f"images or groups cannot be dealt to {len(numbers)} folds; use fewer --folds or add images that have it"
            )


def deal(
    marks: Marks,
    groups: Codes,
    quotas: npt.NDArray[np.float64],
    shares: npt.NDArray[np.float64],
    rng: np.random.Generator,
) -> npt.NDArray[np.int16]:
    """Bin int16 [N] of each row. ``quotas``: float [bins, L], the images wanted of each label; ``shares``: float [bins], of
    all images; rows of one number in ``groups`` stay together."""
    _, unit = np.unique(groups, return_inverse=True)
    sizes = np.bincount(unit).astype(np.float64)
    counts = np.zeros((len(sizes), marks.table.shape[1]))
    np.add.at(counts, unit, marks.table)
    room, space = quotas.copy(), shares * len(groups)
    order = np.lexsort((rng.random(len(sizes)), -sizes))
    bins = np.full(len(sizes), -1, np.int16)

    def put(number: int, wanted: npt.NDArray[np.float64]) -> None:
        best = np.flatnonzero(wanted == wanted.max())
        chosen = best[np.argmax(space[best])]
        bins[number] = chosen
        room[chosen] -= counts[number]
        space[chosen] -= sizes[number]

    while True:
        left = counts[bins < 0].astype(bool).sum(axis=0)
        if not left.any():
            break
        rarest = int(np.argmin(np.where(left > 0, left, np.iinfo(np.int64).max)))
        for number in order[(bins[order] < 0) & (counts[order, rarest] > 0)].tolist():
            put(number, room[:, rarest])
    for number in order[bins[order] < 0].tolist():
        put(number, space)
    return bins[unit]


def sampling_codes(task: Task, values: Values, joint: Codes, *, least: int) -> npt.NDArray[np.int32]:
    """int32 [N]: what balanced sampling draws equally often. The joint label where one head or several attributes have at
    least ``least`` images of it, else the rarest class that is true of the image; -1 where none is.

    What is unknown of an image makes no class of its own, which would be drawn as often as any other: the image counts to
    the largest one that it may belong to.
    """
    marks = task.marks(values)
    totals = marks.sum(axis=0)
    rarest = np.where(marks, totals, np.iinfo(np.int64).max).argmin(axis=1)
    codes = np.where(marks.any(axis=1), rarest, -1)
    given = np.concatenate([values[:, places] for head, places in task.columns() if head.kind != "regression"], axis=1)
    unknown = np.isnan(given)
    whole = ~unknown.any(axis=1)
    if any(head.kind == "sigmoid" for head in task.heads):
        lost = ~whole & (codes < 0)
        codes[lost] = _largest(codes[~lost], codes[lost])
        return codes.astype(np.int32)
    often = whole & (np.bincount(joint[whole], minlength=int(joint.max(initial=0)) + 1)[joint] >= least)
    codes = np.where(often, len(totals) + joint, codes)
    partial = np.flatnonzero(~whole)
    patterns, place = np.unique(np.where(unknown, -1, given)[partial], axis=0, return_inverse=True)
    for number, pattern in enumerate(patterns):
        rows = partial[place == number]
        alike = whole & ((pattern < 0) | (given == pattern)).all(axis=1)
        codes[rows] = _largest(codes[alike], codes[rows])
    return codes.astype(np.int32)


def _largest(codes: Codes, otherwise: Codes) -> Codes | np.int64:
    """The most frequent of ``codes``; ``otherwise`` where there are none."""
    if not len(codes):
        return otherwise
    found, counts = np.unique(codes, return_counts=True)
    return found[counts.argmax()]
