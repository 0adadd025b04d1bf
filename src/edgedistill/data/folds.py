"""The frozen split: test is cut first, then val, then K folds over what is left for training.

Stratified by class (and by the source's stratum); images of one group - the user's, byte-equal copies, near-duplicates -
never cross a split or a fold. scikit-learn deals the folds where it is fast enough; the cuts, whose shares are unequal,
and folds of very many groups are dealt here.
"""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from edgedistill import console
from edgedistill.data import duplicates, stratify
from edgedistill.data.manifest import ALWAYS_TRAINED, Dataset, hash_files
from edgedistill.data.sources import Source, without_classes
from edgedistill.data.stratify import Marks
from edgedistill.errors import DataError, UsageError

if TYPE_CHECKING:
    from edgedistill.data.checks import DataReport

MIN_VAL_FRACTION, MAX_VAL_FRACTION, ENOUGH_VAL_IMAGES = 0.1, 0.2, 300
# A chain longer than this share of its class is no burst of photographs: reported, not enforced. Ten images are always
# allowed, or in a class of less than 200 images a single pair would be 'longer than 1%'.
MAX_CHAIN_FRACTION, MIN_CHAIN_LIMIT = 0.01, 10
# StratifiedGroupKFold costs about 0.3 ms for each group and takes minutes where there are hundreds of thousands.
MAX_SKLEARN_GROUPS = 5_000

SMALL_CLASSES = ("refuse", "train-only", "drop")
Codes = npt.NDArray[np.int64]
GIVEN = {"": 0, "train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class SplitSettings:
    """``test_fraction`` and ``val_fraction`` count only where the data give no such split; ``val_fraction`` None:
    max(10%, min(300 images, 20%)) of what the test split left. ``small_classes``: what becomes of a class with fewer
    images, or groups, than folds + 2: 'refuse' stops, 'train-only' trains every teacher and the student on its images and
    holds them out nowhere, 'drop' leaves the class out. Raises UsageError out of range."""

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
    together), and ``given``: 0 for rows to deal, 1 for the data's own val, 2 for the data's own test. ``marks``: where
    images carry several labels, which then are balanced in the place of classes and strata."""

    classes: Codes
    strata: Codes
    groups: Codes
    given: Codes
    marks: Marks | None = None

    def take(self, rows: Codes) -> Table:
        marks = None if self.marks is None else self.marks.take(rows)
        return Table(self.classes[rows], self.strata[rows], self.groups[rows], self.given[rows], marks)


def freeze_dataset(source: Source, settings: SplitSettings, *, checks: DataReport | None = None) -> Dataset:
    """The manifest of ``source`` with its splits and folds, proven by ``verify_folds``.

    ``checks``: the report of ``check_data`` on the same source, so that nothing is hashed or decoded twice.
    Raises DataError (class too small, group or byte-equal copy across given splits, one image with two labels,
    unreadable file) and ImageError; each names the file or class and the remedy.
    """
    if checks is not None and checks.errors:
        raise DataError(f"{source.root}: {checks.summary()}; 'edgedistill check-data' lists them all with the remedy")
    paths = [item.path for item in source.items]
    digests = hash_files(paths) if checks is None else checks.sha256
    near = _near_pairs(source, digests, checks) if settings.near_duplicates else duplicates.NO_PAIRS
    source, plan, kept = plan_deal(source, digests, near, settings)
    paths, digests = [item.path for item in source.items], digests[kept]
    if checks is None:
        for _, message, _ in plan.remarks():
            console.warn(message)
    splits, folds = deal_splits(plan.table, settings, source.class_names)
    set_apart = small_class_remark(plan, folds, source.class_names)
    if checks is None and set_apart:
        console.warn(set_apart)
    absolute = np.asarray([os.path.abspath(path) for path in paths])  # noqa: PTH100 (symbolic links stay as they are)
    labels = plan.table.classes.astype(np.int32)
    dataset = Dataset(plan.ids, absolute, digests, labels, plan.groups, splits, folds, source.class_names)
    if source.task is not None:
        dataset = replace(dataset, task=source.task, values=source.values)
    verify_folds(dataset)
    return dataset


@dataclass(frozen=True)
class Plan:
    """What is known before the deal. ``groups``: str [N], '' where an image stands alone; ``across``: near-duplicate
    pairs that the data's own splits part; ``chains``: rows of near-duplicates too many to be kept together; ``unsaid``: rows
    without a split where others are said to be train; ``dropped``: which classes were left out, in words."""

    ids: npt.NDArray[np.str_]
    table: Table
    groups: npt.NDArray[np.str_]
    across: duplicates.Pairs
    chains: list[Codes]
    unsaid: Codes
    dropped: str = ""

    def remarks(self) -> list[tuple[str, str, str]]:
        """(kind, words, remedy) of what the deal does not enforce or takes for granted."""
        remarks = []
        if len(self.across):
            one, other = self.ids[self.across[0]]
            words = f"{len(self.across)} near-duplicate pairs lie across the data's own splits and stay there, "
            remarks.append(("near-duplicates", f"{words}first {one} and {other}", "look at them"))
        if self.chains:
            chains, are = ("chain", "is") if len(self.chains) == 1 else ("chains", "are")
            words = (
                f"{len(self.chains)} {chains} of near-duplicates {are} longer than 1% of the class and {are} not kept together: "
                f"{max(map(len, self.chains))} images in the longest, first {self.ids[self.chains[0][0]]}"
            )
            remarks.append(("near-duplicates", words, "look at them"))
        if len(self.unsaid):
            words = f"{len(self.unsaid)} images have no split, where others have one, and count as train, first "
            remarks.append(("splits", words + str(self.ids[self.unsaid[0]]), "fill in the column, or empty it"))
        return remarks


def plan_deal(
    source: Source, digests: npt.NDArray[np.bytes_], near: duplicates.Pairs, settings: SplitSettings
) -> tuple[Source, Plan, Codes]:
    """(source, its plan, the rows kept of the one given): without the classes that ``settings`` drop.

    Leaving a class out can leave too few images of another, where images carry several labels: it goes too.
    Raises what make_plan raises, and DataError where nothing is left to tell apart.
    """
    count, names = len(source.items), list[str]()
    plan, kept = make_plan(source, digests, near), np.arange(count)
    while settings.small_classes == "drop":
        own = names_of_classes(plan.table, source.class_names)
        small = _small_classes(plan.table, np.flatnonzero(plan.table.given == 0), settings.folds, len(own))
        if not small.any():
            break
        names += [own[number] for number in np.flatnonzero(small)]
        rows = np.flatnonzero(~_of_classes(plan.table, small))
        source = without_classes(source, rows, small)
        place = np.full(len(plan.ids), -1)
        place[rows] = np.arange(len(rows))
        kept, digests, near = kept[rows], digests[rows], place[near][(place[near] >= 0).all(axis=1)]
        plan = make_plan(source, digests, near)
    if names:
        plan = replace(plan, dropped=_dropped_remark(names, count - len(kept), settings.folds))
    return source, plan, kept


def make_plan(source: Source, digests: npt.NDArray[np.bytes_], near: duplicates.Pairs) -> Plan:
    """Codes and groups of the source's rows; ``near``: near-duplicate row pairs int64 [M, 2].

    Raises DataError for byte-equal files with different labels, and groups or copies across the data's own splits.
    """
    code = {name: number for number, name in enumerate(source.class_names)}
    ids = np.asarray([item.id for item in source.items])
    classes = np.fromiter((code[item.label] for item in source.items), np.int64, len(ids))
    given = np.fromiter((GIVEN[item.split] for item in source.items), np.int64, len(ids))
    strata = np.unique([item.stratum for item in source.items], return_inverse=True)[1].astype(np.int64)
    check_conflicts(ids, classes, digests, source.class_names)
    inside = given[near[:, 0]] == given[near[:, 1]]
    chains = long_chains(near[inside], classes)
    chained = np.isin(near[:, 0], np.concatenate(chains)) if chains else np.zeros(len(near), bool)
    user_groups = np.asarray([item.group for item in source.items])
    groups = _join_groups(ids, user_groups, digests, near=near[inside & ~chained], given=given)
    marks = None if source.task is None else stratify.make_marks(source.task, source.values, classes)
    table = Table(classes, strata, group_codes(groups), given, marks)
    said = np.asarray([item.split for item in source.items])
    unsaid = np.flatnonzero(said == "") if (said == "train").any() else np.zeros(0, np.int64)
    return Plan(ids, table, groups, near[~inside], chains, unsaid)


def group_codes(groups: npt.NDArray[np.str_]) -> Codes:
    """Group numbers int64 [N]; rows with the empty name get numbers of their own."""
    names, codes = np.unique(groups, return_inverse=True)
    codes = codes.astype(np.int64)
    empty = np.flatnonzero(groups == "")
    codes[empty] = len(names) + np.arange(len(empty))
    return codes


def check_conflicts(ids: npt.NDArray[np.str_], classes: Codes, digests: npt.NDArray[Any], names: Sequence[str]) -> None:
    """Raises DataError for the first two byte-equal files whose labels differ."""
    pairs = duplicates.same_value_pairs(digests)
    wrong = pairs[classes[pairs[:, 0]] != classes[pairs[:, 1]]]
    if len(wrong):
        one, other = wrong[0]
        raise DataError(
            f"{ids[one]} ({names[classes[one]]}) and {ids[other]} ({names[classes[other]]}): the same bytes with different "
            "labels; keep the right one and remove the other"
        )


# ---- groups ----


def _near_pairs(source: Source, digests: npt.NDArray[np.bytes_], checks: DataReport | None) -> duplicates.Pairs:
    """Near-duplicate row pairs; of byte-equal files only one is looked at."""
    if checks is not None and checks.near_pairs is not None:
        return checks.near_pairs
    if len(source.items) > duplicates.MAX_IMAGES:
        console.note(f"near-duplicates are not looked for among more than {duplicates.MAX_IMAGES} images")
        return duplicates.NO_PAIRS
    rows = np.sort(np.unique(digests, return_index=True)[1])
    pairs = duplicates.near_duplicate_pairs(*duplicates.fingerprint_files([source.items[row].path for row in rows]))
    if pairs is None:
        console.warn(duplicates.TOO_MANY_PAIRS)
        return duplicates.NO_PAIRS
    return rows[pairs]


def long_chains(pairs: duplicates.Pairs, classes: Codes) -> list[Codes]:
    """Rows of each chain of near-duplicates that is longer than max(10, 1% of its smallest class)."""
    if not len(pairs):
        return []
    rows = np.unique(pairs)
    chain = duplicates.components(len(classes), pairs)[rows]
    limits = np.maximum(MIN_CHAIN_LIMIT, np.bincount(classes) * MAX_CHAIN_FRACTION)
    order = np.argsort(chain, kind="stable")
    parts = np.split(rows[order], np.flatnonzero(np.diff(chain[order])) + 1)
    return [part for part in parts if len(part) > limits[classes[part]].min()]


def _join_groups(
    ids: npt.NDArray[np.str_],
    user_groups: npt.NDArray[np.str_],
    digests: npt.NDArray[np.bytes_],
    *,
    near: duplicates.Pairs,
    given: Codes,
) -> npt.NDArray[np.str_]:
    """One group name per row, '' where the image stands alone: user's groups, copies and near-duplicates joined."""
    named = np.flatnonzero(user_groups != "")
    by_user = named[duplicates.same_value_pairs(user_groups[named])]
    copies = duplicates.same_value_pairs(digests)
    for pairs, what in ((by_user, "one group"), (copies, "the same bytes")):
        across = pairs[given[pairs[:, 0]] != given[pairs[:, 1]]]
        if len(across):
            one, other = across[0]
            raise DataError(
                f"{ids[one]} and {ids[other]}: {what}, but in different splits of the data, so one would be learned and the "
                "other tested; move or remove one of them"
            )
    component = duplicates.components(len(ids), np.concatenate([by_user, copies, near]))
    rows = np.flatnonzero((np.bincount(component)[component] > 1) | (user_groups != ""))
    rows = rows[np.argsort(component[rows], kind="stable")]
    names = [""] * len(ids)
    for part in np.split(rows, np.flatnonzero(np.diff(component[rows])) + 1):
        name = _group_name(user_groups[part], ids[part]) if len(part) else ""
        for row in part:
            names[row] = name
    return np.asarray(names)


def _group_name(user_groups: npt.NDArray[np.str_], ids: npt.NDArray[np.str_]) -> str:
    """The user's own name; where copies joined several, all of them up to three; else the first image's id."""
    users = sorted(set(user_groups.tolist()) - {""})
    if not users:
        return f"like {min(ids.tolist())}"
    return "+".join(users) if len(users) <= 3 else f"{users[0]}+{len(users) - 1} more"


# ---- the deal ----


def deal_splits(
    table: Table, settings: SplitSettings, class_names: Sequence[str]
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.int16]]:
    """(splits str [N], folds int16 [N]); the same for the same table and seed.

    Rows that ``settings.small_classes`` keeps in every training have fold ALWAYS_TRAINED. Raises DataError for a class
    with fewer images, or fewer groups, than folds + 2 among the rows to deal.
    """
    rng = np.random.default_rng(settings.seed)
    splits = np.choose(table.given, ["train", "val", "test"])
    cut_val, cut_test = not (table.given == 1).any(), not (table.given == 2).any()
    apart = np.zeros(len(splits), bool)
    if settings.small_classes == "train-only":
        apart = _always_trained(table, settings.folds, class_names)
    pool = np.flatnonzero((table.given == 0) & ~apart)
    if apart.any():
        table, class_names = _without_absent(table, pool, class_names)
    _check_class_sizes(table.take(pool), settings.folds, class_names)
    if cut_test:
        pool, test = _cut(table, pool, settings.test_fraction, settings.folds + cut_val, rng)
        splits[test] = "test"
    if cut_val:
        pool, val = _cut(table, pool, val_fraction(len(pool), settings), settings.folds, rng)
        splits[val] = "val"
    folds = np.full(len(splits), -1, np.int16)
    folds[pool] = _deal_folds(table.take(pool), settings, rng, class_names)
    folds[apart] = ALWAYS_TRAINED
    return splits, folds


# ---- small classes ----


def names_of_classes(table: Table, class_names: Sequence[str]) -> tuple[str, ...]:
    """What errors call the classes that every fold needs: 'class NAME', with the head where there are several."""
    return table.marks.names if table.marks is not None else tuple(f"class {name!r}" for name in class_names)


def _small_classes(table: Table, pool: Codes, folds: int, count: int) -> npt.NDArray[np.bool_]:
    """bool [count]: classes with fewer images, or groups, than folds + 2 among the rows ``pool``."""
    return _class_sizes(table.take(pool), count)[1] < folds + 2


def _class_sizes(pool: Table, count: int) -> tuple[Codes, Codes]:
    """(images, groups) of each of ``count`` classes."""
    if pool.marks is not None:
        columns = pool.marks.table[:, :count]
        groups = [len(np.unique(pool.groups[column])) for column in columns.T]
        return columns.sum(axis=0), np.array(groups, np.int64)
    images = np.bincount(pool.classes, minlength=count)
    if not _is_grouped(pool):
        return images, images
    pairs = np.unique(np.stack([pool.classes, pool.groups]), axis=1)
    return images, np.bincount(pairs[0], minlength=count)


def _of_classes(table: Table, chosen: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """bool [N]: rows that carry one of the ``chosen`` classes."""
    if table.marks is not None:
        return np.asarray(table.marks.table[:, : len(chosen)][:, chosen].any(axis=1))
    return chosen[table.classes]


def _always_trained(table: Table, folds: int, class_names: Sequence[str]) -> npt.NDArray[np.bool_]:
    """bool [N]: rows to deal of classes too small for the folds, and of their groups; repeated, since they may have been
    another class's last images. Raises DataError for a class without any, which nobody could learn."""
    apart, names = np.zeros(len(table.classes), bool), names_of_classes(table, class_names)
    while True:
        pool = (table.given == 0) & ~apart
        images, groups = _class_sizes(table.take(np.flatnonzero(pool)), len(names))
        if not apart.any() and not images.all():
            raise DataError(f"{names[int(np.argmin(images))]}: no image to train on; add images or remove the class")
        small = (images > 0) & (groups < folds + 2)
        if not small.any():
            break
        rows = pool & _of_classes(table, small)
        apart |= pool & np.isin(table.groups, table.groups[rows])
    if not pool.any():
        raise DataError(
            f"every class has fewer than {folds + 2} images or groups, so that none is left for test, val and folds; "
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


def _dropped_remark(names: Sequence[str], images: int, folds: int) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"--small-classes drop: {images} images are left out, of {shown}: fewer than {folds + 2} images or groups"


def small_class_remark(plan: Plan, folds: npt.NDArray[np.int16], class_names: Sequence[str]) -> str:
    """What became of the classes too small to be dealt, in words; '' where there were none."""
    if not (folds == ALWAYS_TRAINED).any():
        return plan.dropped
    table = plan.table
    names, apart = names_of_classes(table, class_names), folds == ALWAYS_TRAINED
    dealt, _ = _class_sizes(table.take(np.flatnonzero(~apart)), len(names))
    kept, _ = _class_sizes(table.take(np.flatnonzero(apart)), len(names))
    whole = [name for name, there, here in zip(names, dealt, kept, strict=True) if here and not there]
    shown = ", ".join(whole[:5]) + (f" and {len(whole) - 5} more" if len(whole) > 5 else "")
    return (
        f"--small-classes train-only: {apart.sum()} images are in every teacher's training and in no test, val or fold; "
        f"no figure says how well the student knows {shown or 'their classes'}"
    )


def _cut(table: Table, pool: Codes, share: float, reserve: int, rng: np.random.Generator) -> tuple[Codes, Codes]:
    """(rows left, rows cut): ``share`` of each class, at least one image, and leaving ``reserve`` for what follows."""
    rows = table.take(pool)
    if rows.marks is not None:
        taken = stratify.cut(rows.marks, rows.groups, share, reserve=reserve, rng=rng)
        return pool[~taken], pool[taken]
    sizes = np.bincount(rows.classes).astype(np.float64)
    wanted = np.minimum(np.maximum(np.minimum(share * sizes, sizes - reserve), 1.0), sizes)
    taken = deal(rows, np.stack([wanted, sizes - wanted]), rng) == 0
    return pool[~taken], pool[taken]


def val_fraction(count: int, settings: SplitSettings) -> float:
    """The share of ``count`` images that val takes."""
    if settings.val_fraction is not None:
        return settings.val_fraction
    return max(MIN_VAL_FRACTION, min(ENOUGH_VAL_IMAGES / max(count, 1), MAX_VAL_FRACTION))


def _check_class_sizes(pool: Table, folds: int, class_names: Sequence[str]) -> None:
    if pool.marks is not None:
        stratify.check_sizes(pool.marks, pool.groups, folds)
        return
    images, groups = _class_sizes(pool, len(class_names))
    small = int(np.argmin(groups))
    if groups[small] < folds + 2:
        what = f"{images[small]} images"
        if groups[small] < images[small]:
            what += f" in {groups[small]} groups (of one person, session or scene, or copies of one image)"
        raise DataError(
            f"class {class_names[small]!r}: {what}, expected at least {folds + 2} for {folds} folds, val and test; "
            "add images, merge it with another class or remove it, use fewer --folds, or keep it in training alone with "
            "--small-classes train-only"
        )


def _is_grouped(table: Table) -> bool:
    return len(table.groups) > 0 and len(np.unique(table.groups)) < len(table.groups)


def _deal_folds(pool: Table, settings: SplitSettings, rng: np.random.Generator, names: Sequence[str]) -> npt.NDArray:
    """Fold int16 of each row; every class in every fold."""
    if pool.marks is not None:
        return stratify.deal_folds(pool.marks, pool.groups, settings.folds, rng)
    sizes = np.bincount(pool.classes)
    quotas = np.tile(sizes / settings.folds, (settings.folds, 1))
    if not _is_grouped(pool):
        folds = _sklearn_folds(pool, settings, StratifiedKFold)
    elif len(np.unique(pool.groups)) <= MAX_SKLEARN_GROUPS and sizes.max() >= settings.folds:
        folds = _sklearn_folds(pool, settings, StratifiedGroupKFold)
        if _missing(folds, pool.classes, settings.folds) is not None:
            folds = deal(pool, quotas, rng)
    else:
        folds = deal(pool, quotas, rng)
    missing = _missing(folds, pool.classes, settings.folds)
    if missing is not None:
        raise DataError(
            f"class {names[missing[1]]!r} is missing in fold {missing[0]}: its groups cannot be dealt to {settings.folds} "
            "folds; use fewer --folds or add groups that have it"
        )
    return folds


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


def _missing(folds: npt.NDArray, classes: Codes, count: int) -> tuple[int, int] | None:
    """(fold, class) that do not meet, or None."""
    class_count = int(classes.max(initial=0)) + 1
    table = np.bincount(folds.astype(np.int64) * class_count + classes, minlength=count * class_count)
    absent = np.flatnonzero(table == 0)
    return (int(absent[0]) // class_count, int(absent[0]) % class_count) if len(absent) else None


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


# ---- the proof ----


def verify_folds(dataset: Dataset) -> None:
    """Proof, from the manifest alone, that nothing leaks: each training image is held out in exactly one fold or always
    trained on, no other image is in a fold, every fold lacks no class that is held out at all, no group and no byte-equal
    copy crosses a split or a fold.

    Called when the data set is frozen and again before soft labels are written. Raises DataError that names the image.
    """
    train = dataset.splits == "train"
    wrong = np.flatnonzero(train != ((dataset.folds >= 0) | (dataset.folds == ALWAYS_TRAINED)))
    if len(wrong):
        row = wrong[0]
        raise DataError(
            f"{dataset.ids[row]}: split {dataset.splits[row]} and fold {dataset.folds[row]}; train images have a fold, others none"
        )
    dealt = dataset.held_out_rows
    if not len(dealt):
        raise DataError("no image is in split train; freeze the data set again")
    order = np.sort(dataset.ids)
    if (order[1:] == order[:-1]).any():
        raise DataError(f"{order[:-1][order[1:] == order[:-1]][0]}: the id stands twice; freeze the data set again")
    _prove_classes(dataset, dealt)
    places = np.unique(dataset.splits, return_inverse=True)[1] * 1000 + dataset.folds
    grouped = np.flatnonzero(dataset.groups != "")
    _prove_together(dataset, places, grouped[duplicates.same_value_pairs(dataset.groups[grouped])], "the same group")
    _prove_together(dataset, places, duplicates.same_value_pairs(dataset.sha256), "the same bytes")


def _prove_classes(dataset: Dataset, dealt: Codes) -> None:
    """Every class is in every fold, but for those whose images are all always trained on."""
    apart = np.flatnonzero(dataset.folds == ALWAYS_TRAINED)
    if dataset.task is not None and dataset.values is not None:
        table = dataset.task.marks(dataset.values)
        needed = np.asarray(table[dealt].any(axis=0) | ~table[apart].any(axis=0))
        names = tuple(name for name, wanted in zip(dataset.task.mark_names, needed, strict=True) if wanted)
        stratify.prove(Marks(table[dealt][:, needed], names), dataset.folds[dealt], range(dataset.fold_count))
        return
    labels = dataset.labels.astype(np.int64)
    needed = np.setdiff1d(
        np.arange(labels[dataset.rows("train")].max() + 1), np.setdiff1d(labels[apart], labels[dealt])
    )
    codes = np.searchsorted(needed, labels[dealt])
    folds = dataset.folds[dealt]
    absent = np.flatnonzero(np.bincount(codes, minlength=len(needed)) == 0)
    missing = (0, int(absent[0])) if len(absent) else _missing(folds, codes, dataset.fold_count)
    if missing is not None:
        name = dataset.class_names[needed[missing[1]]]
        raise DataError(f"class {name!r} is missing in fold {missing[0]}; use fewer --folds")


def _prove_together(dataset: Dataset, places: Codes, pairs: duplicates.Pairs, what: str) -> None:
    apart = pairs[places[pairs[:, 0]] != places[pairs[:, 1]]]
    if len(apart):
        one, other = apart[0]
        where = [f"{dataset.ids[row]} ({dataset.splits[row]}, fold {dataset.folds[row]})" for row in (one, other)]
        raise DataError(f"{where[0]} and {where[1]}: {what} in different splits or folds; freeze the data set again")
