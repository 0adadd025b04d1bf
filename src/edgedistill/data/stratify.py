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


def check_sizes(marks: Marks, groups: Codes, folds: int) -> None:
    """Raises DataError for a class with fewer images, or fewer groups, than folds + 2."""
    for name, column in zip(marks.names, marks.table.T, strict=False):
        rows = np.flatnonzero(column)
        count = len(np.unique(groups[rows]))
        if count < folds + 2:
            what = f"{len(rows)} images" + (f" in {count} groups" if count < len(rows) else "")
            raise DataError(
                f"{name}: {what}, expected at least {folds + 2} for {folds} folds, val and test; add images, merge it "
                "with another class or remove it, use fewer --folds, or keep it in training alone with --small-classes "
                "train-only"
            )


def cut(marks: Marks, groups: Codes, share: float, *, reserve: int, rng: np.random.Generator) -> npt.NDArray[np.bool_]:
    """bool [N], the rows cut: ``share`` of each class, at least one image, leaving ``reserve`` for what follows."""
    sizes = marks.table.sum(axis=0).astype(np.float64)
    wanted = np.minimum(np.maximum(np.minimum(share * sizes, sizes - reserve), 1.0), sizes)
    quotas = np.stack([wanted, sizes - wanted])
    return deal(marks, groups, quotas, np.array([share, 1 - share]), rng) == 0


def deal_folds(marks: Marks, groups: Codes, folds: int, rng: np.random.Generator) -> npt.NDArray[np.int16]:
    """Fold int16 [N], every class in every fold. Raises DataError where groups do not allow that."""
    sizes = marks.table.sum(axis=0).astype(np.float64)
    dealt = deal(marks, groups, np.tile(sizes / folds, (folds, 1)), np.full(folds, 1 / folds), rng)
    prove(marks, dealt, range(folds))
    return dealt


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
    least ``least`` images of it, else the rarest class that is true of the image; -1 where none is."""
    marks = task.marks(values)
    totals = marks.sum(axis=0)
    rarest = np.where(marks, totals, np.iinfo(np.int64).max).argmin(axis=1)
    codes = np.where(marks.any(axis=1), rarest, -1)
    if not any(head.kind == "sigmoid" for head in task.heads):
        often = np.bincount(joint)[joint] >= least
        codes = np.where(often, len(totals) + joint, codes)
    return codes.astype(np.int32)
