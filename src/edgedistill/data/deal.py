"""Who goes where: test and val are cut, then the rest is dealt to K folds, each class evenly and groups whole.

scikit-learn deals the folds where it is fast enough; the cuts, whose shares are unequal, and folds of very many groups are
dealt here.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from edgedistill.data import stratify
from edgedistill.data.manifest import ALWAYS_TRAINED
from edgedistill.data.stratify import Marks
from edgedistill.errors import DataError, UsageError

MIN_VAL_FRACTION, MAX_VAL_FRACTION, ENOUGH_VAL_IMAGES = 0.1, 0.2, 300
# StratifiedGroupKFold costs about 0.3 ms for each group and takes minutes where there are hundreds of thousands.
MAX_SKLEARN_GROUPS = 5_000

SMALL_CLASSES = ("refuse", "train-only", "drop")
Codes = npt.NDArray[np.int64]
TO_DEAL, VAL, TEST, TRAIN = range(4)
GIVEN = {"": TO_DEAL, "train": TO_DEAL, "val": VAL, "test": TEST}


@dataclass(frozen=True)
class SplitSettings:
    """``test_fraction`` and ``val_fraction`` count only where the data give no such split; ``val_fraction`` None:
    max(10%, min(300 images, 20%)) of what the test split left. ``small_classes``: what becomes of a class with fewer
    images, or groups, than there are folds and splits to cut: 'refuse' stops, 'train-only' trains every teacher and the
    student on its images and holds them out nowhere, 'drop' leaves the class out. Raises UsageError out of range."""

    folds: int = 5
    test_fraction: float = 0.2
    val_fraction: float | None = None
    seed: int = 0
    near_duplicates: bool = True
    small_classes: Literal["refuse", "train-only", "drop"] = "refuse"

    def __post_init__(self) -> None:
        problems = []
        if not 2 <= self.folds <= 100:
            problems.append(f"folds {self.folds}, expected 2 to 100")
        if not 0 < self.test_fraction <= 0.5:
            problems.append(f"test fraction {self.test_fraction}, expected above 0, at most 0.5")
        if self.val_fraction is not None and not 0 < self.val_fraction <= 0.5:
            problems.append(f"val fraction {self.val_fraction}, expected above 0, at most 0.5")
        if not 0 <= self.seed < 2**32:
            problems.append(f"seed {self.seed}, expected 0 to {2**32 - 1}")
        if self.small_classes not in SMALL_CLASSES:
            problems.append(f"small classes {self.small_classes!r}, expected one of {', '.join(SMALL_CLASSES)}")
        if problems:
            raise UsageError("splits: " + "; ".join(problems))


@dataclass(frozen=True)
class Table:
    """What the deal looks at, all int64 [N]: ``classes`` 0..C-1, ``strata`` 0..S-1, ``groups`` (rows of one number stay
    together), and ``given``: TO_DEAL, VAL or TEST of the data's own, TRAIN for rows that are dealt to folds and never cut.
    ``marks``: where images carry several labels, which then are balanced in the place of classes and strata."""

    classes: Codes
    strata: Codes
    groups: Codes
    given: Codes
    marks: Marks | None = None

    def take(self, rows: Codes) -> Table:
        marks = None if self.marks is None else self.marks.take(rows)
        return Table(self.classes[rows], self.strata[rows], self.groups[rows], self.given[rows], marks)

    @property
    def free(self) -> npt.NDArray[np.bool_]:
        """bool [N]: rows that may be cut."""
        return np.asarray(self.given == TO_DEAL)

    @property
    def dealt(self) -> npt.NDArray[np.bool_]:
        """bool [N]: rows that are cut or dealt to folds."""
        return self.free | (self.given == TRAIN)

    @property
    def cuts(self) -> tuple[str, ...]:
        """The splits that the data do not give; of the whole table only, not of rows taken from it."""
        return tuple(split for split in ("test", "val") if not (self.given == GIVEN[split]).any())


def deal_splits(
    table: Table, settings: SplitSettings, class_names: Sequence[str]
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int16]]:
    """(splits str [N], folds int16 [N]); the same for the same table and seed.

    Rows that ``settings.small_classes`` keeps in every training have fold ALWAYS_TRAINED. Raises DataError for a class
    with fewer images, or fewer groups, among the rows to deal than there are folds and splits to cut.
    """
    rng = np.random.default_rng(settings.seed)
    splits = np.choose(table.given, ["train", "val", "test", "train"])
    apart = np.zeros(len(splits), bool)
    if settings.small_classes == "train-only":
        apart = _always_trained(table, settings.folds, class_names)
    pool = np.flatnonzero(table.dealt & ~apart)
    if apart.any():
        table, class_names = _without_absent(table, pool, class_names)
    _check_class_sizes(table, pool, settings.folds, class_names)
    for number, split in enumerate(table.cuts, start=1):
        free = int(table.free[pool].sum())
        share = settings.test_fraction if split == "test" else val_fraction(free, settings)
        pool, cut = _cut(table, pool, share, settings.folds + len(table.cuts) - number, rng)
        splits[cut] = split
    folds = np.full(len(splits), -1, np.int16)
    folds[pool] = _deal_folds(table.take(pool), settings, rng, class_names)
    folds[apart] = ALWAYS_TRAINED
    return splits, folds


# ---- small classes ----


def names_of_classes(table: Table, class_names: Sequence[str]) -> tuple[str, ...]:
    """What errors call the classes that every fold needs: 'class NAME', with the head where there are several."""
    return table.marks.names if table.marks is not None else tuple(f"class {name!r}" for name in class_names)


def needs_of(folds: int, cuts: Sequence[str]) -> str:
    """'5 folds, test and val'."""
    return listed((f"{folds} folds", *cuts))


def listed(words: Sequence[str]) -> str:
    """'a', 'a and b', 'a, b and c'."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def small_classes(table: Table, pool: Codes, folds: int, count: int) -> npt.NDArray[np.bool_]:
    """bool [count]: classes with fewer images, or groups, among the rows ``pool`` than there are folds and splits to cut,
    or fewer that may be cut than splits."""
    groups, free = (class_sizes(table.take(rows), count)[1] for rows in (pool, pool[table.free[pool]]))
    return (groups < folds + len(table.cuts)) | (free < len(table.cuts))


def class_count(table: Table) -> int:
    """Classes that every split and fold must have."""
    return len(table.marks.names) if table.marks is not None else int(table.classes.max(initial=-1)) + 1


def carried(rows: Table, count: int) -> tuple[Codes, Codes]:
    """(rows, classes) int64 [M] each: every class that a row carries."""
    if rows.marks is not None:
        places, classes = np.nonzero(rows.marks.table[:, :count])
        return places, classes
    return np.arange(len(rows.classes)), rows.classes


def class_sizes(pool: Table, count: int) -> tuple[Codes, Codes]:
    """(images, groups) of each of ``count`` classes."""
    places, classes = carried(pool, count)
    images = np.bincount(classes, minlength=count)
    if not _is_grouped(pool):
        return images, images
    width = pool.groups.max() + 1
    pairs = np.unique(classes * width + pool.groups[places])
    return images, np.bincount(pairs // width, minlength=count)


def of_classes(table: Table, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """bool [N]: rows that carry one of the ``chosen`` classes."""
    if table.marks is not None:
        return np.asarray(table.marks.table[:, : len(chosen)][:, chosen].any(axis=1))
    return chosen[table.classes]


def _always_trained(table: Table, folds: int, class_names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """bool [N]: rows to deal of classes too small for the folds, and of their groups; repeated, since they may have been
    another class's last images. Raises DataError for a class without any, which nobody could learn."""
    apart, names = np.zeros(len(table.classes), bool), names_of_classes(table, class_names)
    while True:
        pool = table.dealt & ~apart
        images, _ = class_sizes(table.take(np.flatnonzero(pool)), len(names))
        if not apart.any() and not images.all():
            raise DataError(f"{names[int(np.argmin(images))]}: no image to train on; add images or remove the class")
        small = (images > 0) & small_classes(table, np.flatnonzero(pool), folds, len(names))
        if not small.any():
            break
        rows = pool & of_classes(table, small)
        apart |= pool & np.isin(table.groups, table.groups[rows])
    if not pool.any():
        raise DataError(
            f"every class has fewer images or groups than {needs_of(folds, table.cuts)} need, so that none is left for them; "
            "add images, or use fewer --folds"
        )
    return apart


def _without_absent(table: Table, pool: Codes, class_names: Sequence[str]) -> tuple[Table, Sequence[str]]:
    """The table with the classes of the rows ``pool`` alone, and their names: what the others lack is no one's fault."""
    present, codes = np.unique(table.classes[pool], return_inverse=True)
    classes = np.zeros_like(table.classes)
    classes[pool] = codes
    marks = table.marks
    if marks is not None:
        seen = np.asarray(marks.table[pool].any(axis=0))
        names = tuple(name for name, kept in zip(marks.names, seen, strict=False) if kept)
        marks = Marks(marks.table[:, seen], names)
    return replace(table, classes=classes, marks=marks), [class_names[number] for number in present]


def _cut(table: Table, pool: Codes, share: float, reserve: int, rng: np.random.Generator) -> tuple[Codes, Codes]:
    """(rows left, rows cut): ``share`` of each class's images that may be cut, at least one group, and leaving ``reserve``
    groups for what follows.

    Where few large groups are most of a class, its small ones alone would make up the share, and the folds lack groups:
    then the large ones stay, and the share is of the others.
    """
    rows, count = table.take(pool), class_count(table)
    least = np.stack([np.ones(count, np.int64), np.full(count, reserve)])
    bins = _cut_images(rows, rows.free, share, reserve, rng=rng)
    short = np.asarray((_group_counts(rows, bins, least.shape) < least).any(axis=0))
    if short.any():
        bins = _cut_images(rows, rows.free & ~_large_groups(rows, short, share), share, reserve, rng=rng)
        bins = _move_groups(rows, bins, least, rows.free)
    return pool[bins == 1], pool[bins == 0]


def _cut_images(
    rows: Table, free: npt.NDArray[np.bool_], share: float, reserve: int, *, rng: np.random.Generator
) -> npt.NDArray[np.int16]:
    """Bin int16 [N]: 0 for rows to cut, all of them ``free``; 1 for the rest. Groups are not counted."""
    some, width = rows.take(np.flatnonzero(free)), _width(rows)
    sizes = class_sizes(some, width)[0].astype(np.float64)
    needed = np.maximum(reserve - class_sizes(rows.take(np.flatnonzero(~free)), width)[0], 0)
    wanted = np.minimum(np.maximum(np.minimum(share * sizes, sizes - needed), 1.0), sizes)
    bins = np.ones(len(free), np.int16)
    bins[free] = _deal(some, np.stack([wanted, sizes - wanted]), np.array([share, 1 - share]), rng)
    return bins


def _large_groups(rows: Table, short: npt.NDArray[np.bool_], share: float) -> npt.NDArray[np.bool_]:
    """bool [N]: rows of groups that hold more than ``share`` of a class that is ``short``, not counting its larger groups."""
    _, unit = np.unique(rows.groups, return_inverse=True)
    places, classes = carried(rows, len(short))
    sizes = np.zeros((unit.max() + 1, len(short)))
    np.add.at(sizes, (unit[places], classes), rows.free[places])
    sizes = sizes[:, short]
    large = np.zeros(sizes.shape, bool)
    while (more := (sizes > share * np.where(large, 0, sizes).sum(axis=0)) & (sizes > 1) & ~large).any():
        large |= more
    return np.asarray(large.any(axis=1))[unit]


def _group_counts(rows: Table, bins: npt.NDArray[np.int16], shape: tuple[int, ...]) -> Codes:
    """int64 ``shape`` [bins, C]: groups of each class in each bin."""
    parts = [rows.take(np.flatnonzero(bins == number)) for number in range(shape[0])]
    return np.stack([class_sizes(part, shape[1])[1] for part in parts])


def _move_groups(
    rows: Table, bins: npt.NDArray[np.int16], least: Codes, movable: npt.NDArray[np.bool_]
) -> npt.NDArray[np.int16]:
    """``bins`` with ``least`` groups of each class in each bin, int64 [bins, C]: where one lacks some, the smallest groups
    move there that the others can spare. A lack that no single group can mend is left."""
    counts = _group_counts(rows, bins, least.shape)
    if (counts >= least).all():
        return bins
    _, unit = np.unique(rows.groups, return_inverse=True)
    places, classes = carried(rows, least.shape[1])
    has = np.zeros((unit.max() + 1, least.shape[1]), bool)
    has[unit[places], classes] = True
    bin_of, free, sizes = np.zeros(len(has), np.int16), np.zeros(len(has), bool), np.bincount(unit)
    bin_of[unit], free[unit] = bins, movable
    while True:
        spare = free & (~has | (counts > least)[bin_of]).all(axis=1)
        for number, lacked in np.argwhere(counts < least):
            groups = np.flatnonzero(spare & has[:, lacked] & (bin_of != number))
            if len(groups):
                break
        else:
            return bin_of[unit]
        group = groups[sizes[groups].argmin()]
        counts[bin_of[group]] -= has[group]
        counts[number] += has[group]
        bin_of[group] = number


def _width(table: Table) -> int:
    """Classes and joint labels."""
    return table.marks.table.shape[1] if table.marks is not None else class_count(table)


def _deal(
    rows: Table, quotas: npt.NDArray[np.float64], shares: npt.NDArray[np.float64], rng: np.random.Generator
) -> npt.NDArray[np.int16]:
    """Bin int16 [N]; ``quotas``: of each class and joint label, ``shares``: of all images."""
    if rows.marks is not None:
        return stratify.deal(rows.marks, rows.groups, quotas, shares, rng)
    return deal(rows, quotas, rng)


def val_fraction(count: int, settings: SplitSettings) -> float:
    """The share of ``count`` images that val takes."""
    if settings.val_fraction is not None:
        return settings.val_fraction
    return max(MIN_VAL_FRACTION, min(ENOUGH_VAL_IMAGES / max(count, 1), MAX_VAL_FRACTION))


def _check_class_sizes(table: Table, pool: Codes, folds: int, class_names: Sequence[str]) -> None:
    """Raises DataError for the smallest class of those too small."""
    names, cuts = names_of_classes(table, class_names), table.cuts
    if not small_classes(table, pool, folds, len(names)).any():
        return
    images, groups = class_sizes(table.take(pool), len(names))
    least, needs = folds + len(cuts), needs_of(folds, cuts)
    remedy = "add images, merge it with another class or remove it, use fewer --folds"
    if groups.min() >= least:
        images, groups = class_sizes(table.take(pool[table.free[pool]]), len(names))
        least, needs = len(cuts), f"{listed(cuts)} beside those that are train"
        remedy = "leave the split of more of its images empty"
    small = int(np.argmin(groups))
    what = f"{images[small]} images"
    if groups[small] < images[small]:
        what += f" in {groups[small]} groups (of one person, session or scene, or copies of one image)"
    raise DataError(
        f"{names[small]}: {what}, expected at least {least} for {needs}; {remedy}, or keep it in training alone with "
        "--small-classes train-only"
    )


def _is_grouped(table: Table) -> bool:
    return len(table.groups) > 0 and len(np.unique(table.groups)) < len(table.groups)


def _deal_folds(pool: Table, settings: SplitSettings, rng: np.random.Generator, names: Sequence[str]) -> npt.NDArray:
    """Fold int16 of each row; every class in every fold."""
    count = settings.folds
    folds = None if pool.marks is not None else _deal_by_sklearn(pool, settings)
    if folds is None or missing_class(folds, pool.classes, count) is not None:
        sizes = class_sizes(pool, _width(pool))[0]
        folds = _deal(pool, np.tile(sizes / count, (count, 1)), np.full(count, 1 / count), rng)
        folds = _move_groups(pool, folds, np.ones((count, class_count(pool)), np.int64), pool.dealt)
    if pool.marks is not None:
        stratify.prove(pool.marks, folds, range(count))
    elif missing := missing_class(folds, pool.classes, count):
        raise DataError(
            f"class {names[missing[1]]!r} is missing in fold {missing[0]}: its groups cannot be dealt to {count} "
            "folds; use fewer --folds or add groups that have it"
        )
    return folds


def _deal_by_sklearn(pool: Table, settings: SplitSettings) -> npt.NDArray[np.int16] | None:
    """None where it refuses or takes too long."""
    if not _is_grouped(pool):
        return _sklearn_folds(pool, settings, StratifiedKFold)
    groups, most = len(np.unique(pool.groups)), np.bincount(pool.classes).max()
    if min(groups, most) < settings.folds or groups > MAX_SKLEARN_GROUPS:
        return None
    return _sklearn_folds(pool, settings, StratifiedGroupKFold)


def _sklearn_folds(pool: Table, settings: SplitSettings, splitter: type) -> npt.NDArray[np.int16]:
    # Rows in order of class, then stratum: scikit-learn numbers strata as they appear and deals neighbours to different
    # folds, so a class that is spread thinly over strata still reaches every fold.
    order = np.lexsort((pool.strata, pool.classes))
    both = np.unique(pool.classes * (pool.strata.max() + 1) + pool.strata, return_inverse=True)[1]
    stratified = both if np.bincount(both).max() >= settings.folds else pool.classes
    folds = np.empty(len(order), np.int16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # strata smaller than the number of folds are fine here
        split = splitter(settings.folds, shuffle=True, random_state=settings.seed)
        for fold, (_, held_out) in enumerate(split.split(order, stratified[order], pool.groups[order])):
            folds[order[held_out]] = fold
    return folds


def missing_class(folds: npt.NDArray, classes: Codes, count: int) -> tuple[int, int] | None:
    """(fold, class) that do not meet, or None."""
    width = int(classes.max(initial=0)) + 1
    table = np.bincount(folds.astype(np.int64) * width + classes, minlength=count * width)
    absent = np.flatnonzero(table == 0)
    return (int(absent[0]) // width, int(absent[0]) % width) if len(absent) else None


def deal(table: Table, quotas: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.int16]:
    """Bin int16 [N] of each row so that bins get their quotas, float [bins, C] images, of each class and the same share
    of each of its strata; groups stay whole.

    Groups of several images are dealt first, the largest first, each to the bin that ends nearest to its target (least
    sum of (filled - target)^2 / target, which is Webster's rule and favours no size of bin); single images then fill
    every bin up.
    """
    strata = int(table.strata.max(initial=0)) + 1
    values, cells = np.unique(table.classes * strata + table.strata, return_inverse=True)
    class_of_cell = values // strata
    share_of_class = np.bincount(cells) / np.bincount(table.classes)[class_of_cell]
    targets = np.maximum(quotas[:, class_of_cell] * share_of_class, 1e-9)
    bins = np.full(len(cells), -1, np.int16)
    _, group = np.unique(table.groups, return_inverse=True)
    joined = np.bincount(group)[group] > 1
    _deal_groups(bins, np.flatnonzero(joined), group, cells, targets=targets, rng=rng)
    filled = np.zeros_like(targets)
    np.add.at(filled, (bins[joined], cells[joined]), 1)
    _deal_singles(bins, np.flatnonzero(~joined), cells, class_of_cell, room=targets - filled, rng=rng)
    return bins


def _deal_groups(
    bins: npt.NDArray[np.int16],
    rows: Codes,
    group: Codes,
    cells: Codes,
    *,
    targets: npt.NDArray[np.float64],
    rng: np.random.Generator,
) -> None:
    """Fills ``bins`` for the rows of groups with several images. Plain lists: a numpy call per group costs ten times more."""
    sizes = np.bincount(group)
    key = rng.permutation(len(sizes))
    rows = rows[np.lexsort((key[group[rows]], -sizes[group[rows]]))]
    bounds = np.flatnonzero(np.diff(group[rows], prepend=-1, append=-1)).tolist()
    ordered = cells[rows].tolist()
    weight = (1.0 / targets).T.tolist()
    room = targets.T.tolist()
    chosen = np.empty(len(rows), np.int16)
    for start, stop in itertools.pairwise(bounds):
        counts: dict[int, int] = {}
        for cell in ordered[start:stop]:
            counts[cell] = counts.get(cell, 0) + 1
        costs = [0.0] * len(targets)
        for cell, count in counts.items():
            for b, (left, w) in enumerate(zip(room[cell], weight[cell], strict=True)):
                costs[b] += count * (count - 2 * left) * w
        best = costs.index(min(costs))
        for cell, count in counts.items():
            room[cell][best] -= count
        chosen[start:stop] = best
    bins[rows] = chosen


def _deal_singles(
    bins: npt.NDArray[np.int16],
    rows: Codes,
    cells: Codes,
    class_of_cell: Codes,
    *,
    room: npt.NDArray[np.float64],
    rng: np.random.Generator,
) -> None:
    """Fills ``bins`` for images that stand alone: each class by quota, its strata as evenly as whole numbers allow."""
    rows = rows[np.lexsort((rng.random(len(rows)), cells[rows]))]
    counts = np.bincount(cells[rows], minlength=room.shape[1])
    stops = np.cumsum(counts)
    firsts = np.flatnonzero(np.diff(class_of_cell, prepend=-1, append=-2))
    for first, end in itertools.pairwise(firsts.tolist()):
        of_cell = np.stack([_quotas(room[:, cell], int(counts[cell])) for cell in range(first, end)], axis=1)
        of_class = _quotas(room[:, first:end].sum(axis=1), int(counts[first:end].sum()))
        _mend(of_cell, of_class, room[:, first:end])
        for cell in range(first, end):
            part = rows[stops[cell] - counts[cell] : stops[cell]]
            bins[part] = np.repeat(np.arange(len(of_cell)), of_cell[:, cell - first])


def _mend(of_cell: Codes, of_class: Codes, room: npt.NDArray[np.float64]) -> None:
    """Moves single images between bins, where it hurts the strata least, until the bins hold the class's quota: rounding
    each stratum by itself can take two images of a class of six for a test split of one."""
    while (excess := of_cell.sum(axis=1) - of_class).any():
        giver, taker = int(excess.argmax()), int(excess.argmin())
        surplus = np.where(of_cell[giver] > 0, of_cell[giver] - room[giver] + room[taker] - of_cell[taker], -np.inf)
        cell = int(surplus.argmax())
        of_cell[giver, cell] -= 1
        of_cell[taker, cell] += 1


def _quotas(room: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Whole numbers that add up to ``count``, in proportion to the room left (largest remainder)."""
    room = np.maximum(room, 0.0)
    exact = room * (count / room.sum()) if room.sum() > 0 else np.full(len(room), count / len(room))
    quota = np.floor(exact + 1e-9).astype(np.int64)
    rest = np.argsort(quota - exact, kind="stable")[: count - int(quota.sum())]
    quota[rest] += 1
    return quota
