"""The frozen split: test is cut first, then val, then K folds over what is left for training.

Stratified by class (and by the source's stratum); images of one group - the user's, byte-equal copies, near-duplicates -
never cross a split or a fold (data.deal deals them; here is what must stay together, and the proof).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.data import duplicates, stratify
from edgedistill.data.deal import (
    GIVEN,
    TRAIN,
    Codes,
    SplitSettings,
    Table,
    carried,
    class_count,
    class_sizes,
    deal_splits,
    listed,
    missing_class,
    names_of_classes,
    needs_of,
    of_classes,
    small_classes,
)
from edgedistill.data.manifest import ALWAYS_TRAINED, Dataset, hash_files
from edgedistill.data.sources import Source, without_classes
from edgedistill.data.stratify import Marks
from edgedistill.errors import DataError

if TYPE_CHECKING:
    from edgedistill.data.checks import DataReport

# A chain longer than this share of its class may drift from image to image to what is unlike: only the bursts in it are
# kept together, more than ten images that are like one. Ten images are always allowed, or in a class of less than 200
# images a single pair would be 'longer than 1%'.
MAX_CHAIN_FRACTION, MIN_CHAIN_LIMIT = 0.01, 10
MAX_BURST_FRACTION = 1 / 3  # of a class; a longer burst makes several groups, or nothing would be left to deal


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
    pairs that the data's own splits part; ``parted``: those of too long a chain, in different groups; ``unsaid``: rows
    without a split where others are said to be train; ``dropped``: which classes were left out, in words."""

    ids: npt.NDArray[np.str_]
    table: Table
    groups: npt.NDArray[np.str_]
    across: duplicates.Pairs
    parted: duplicates.Pairs
    unsaid: Codes
    dropped: str = ""

    def remarks(self) -> list[tuple[str, str, str]]:
        """(kind, words, remedy) of what the deal does not enforce or takes for granted."""
        remarks = []
        if len(self.across):
            one, other = self.ids[self.across[0]]
            words = f"{len(self.across)} near-duplicate pairs lie across the data's own splits and stay there, "
            remarks.append(("near-duplicates", f"{words}first {one} and {other}", "look at them"))
        if len(self.parted):
            one, other = self.ids[self.parted[0]]
            words = f"{len(self.parted)} near-duplicate pairs are not kept together, since they chain unlike images or more than "
            remedy = "give what belongs together a group in a CSV file"
            remarks.append(("near-duplicates", f"{words}a third of a class, first {one} and {other}", remedy))
        if len(self.unsaid):
            what = "where others have one, and count as train"
            if cuts := self.table.cuts:
                what = f"where others are train; {listed(cuts)} {'are' if len(cuts) > 1 else 'is'} cut from them alone"
            words = f"{len(self.unsaid)} images have no split, {what}, first {self.ids[self.unsaid[0]]}"
            remarks.append(("splits", words, "fill in the column, or empty it"))
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
        small = small_classes(plan.table, np.flatnonzero(plan.table.dealt), settings.folds, len(own))
        if not small.any():
            break
        needs = needs_of(settings.folds, plan.table.cuts)
        names += [own[number] for number in np.flatnonzero(small)]
        rows = np.flatnonzero(~of_classes(plan.table, small))
        source = without_classes(source, rows, small)
        place = np.full(len(plan.ids), -1)
        place[rows] = np.arange(len(rows))
        kept, digests, near = kept[rows], digests[rows], place[near][(place[near] >= 0).all(axis=1)]
        plan = make_plan(source, digests, near)
    if names:
        plan = replace(plan, dropped=_dropped_remark(names, count - len(kept), needs))
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
    check_conflicts(source, digests)
    marks = None if source.task is None else stratify.make_marks(source.task, source.values, classes)
    alone = Table(classes, strata, np.arange(len(ids)), given, marks)
    inside = given[near[:, 0]] == given[near[:, 1]]
    near, across = near[inside], near[~inside]
    user_groups = np.asarray([item.group for item in source.items])
    groups = _join_groups(ids, user_groups, digests, near=pairs_to_keep(near, alone), given=given)
    table = replace(alone, groups=group_codes(groups))
    parted = near[table.groups[near[:, 0]] != table.groups[near[:, 1]]]
    said = np.asarray([item.split for item in source.items])
    unsaid = np.flatnonzero(said == "") if (said == "train").any() else np.zeros(0, np.int64)
    if len(unsaid):
        trained = np.isin(table.groups, table.groups[said == "train"])
        table = replace(table, given=np.where(trained, TRAIN, given))
    return Plan(ids, table, groups, across, parted, unsaid)


def group_codes(groups: npt.NDArray[np.str_]) -> Codes:
    """Group numbers int64 [N]; rows with the empty name get numbers of their own."""
    names, codes = np.unique(groups, return_inverse=True)
    codes = codes.astype(np.int64)
    empty = np.flatnonzero(groups == "")
    codes[empty] = len(names) + np.arange(len(empty))
    return codes


def check_conflicts(source: Source, digests: npt.NDArray[Any]) -> None:
    """Raises DataError for the first two byte-equal files whose labels, as far as both are known, differ."""
    _, pairs = duplicates.contradictions(digests, source.truth)
    if len(pairs):
        one, other = (source.items[row] for row in pairs[0])
        said = [f"{item.id} ({label})" for item, label in zip((one, other), source.difference(one, other), strict=True)]
        raise DataError(
            f"{said[0]} and {said[1]}: the same bytes with different labels; keep the right one and remove the other"
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


def pairs_to_keep(pairs: duplicates.Pairs, table: Table) -> duplicates.Pairs:
    """The near-duplicate ``pairs`` that groups are made of: all, but of a chain too long those of its bursts."""
    chains = [chain for chain in long_chains(pairs, table.classes) if table.dealt[chain[0]]]
    if not chains:
        return pairs
    chained = np.isin(pairs[:, 0], np.concatenate(chains))
    return np.concatenate([pairs[~chained], _bursts(pairs[chained], table)])


def _bursts(pairs: duplicates.Pairs, table: Table) -> duplicates.Pairs:
    """Pairs that join the images of each burst. The image that most are like makes one of all that are like it, then the
    next of those that are left; at most max(10, a third) of a class's images to deal are joined."""
    to_deal = table.take(np.flatnonzero(table.dealt))
    room = np.maximum(MIN_CHAIN_LIMIT, MAX_BURST_FRACTION * class_sizes(to_deal, class_count(table))[0])
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.lexsort((both[:, 1], both[:, 0]))]
    rows, starts, degrees = np.unique(both[:, 0], return_index=True, return_counts=True)
    free, joined = np.ones(len(table.classes), bool), [duplicates.NO_PAIRS]
    for place in np.argsort(-degrees, kind="stable").tolist():
        alike = both[starts[place] : starts[place] + degrees[place], 1]
        burst = np.append(rows[place], alike[free[alike]])
        if not free[rows[place]] or len(burst) <= MIN_CHAIN_LIMIT:
            continue
        free[burst] = False
        while len(burst):
            own = np.zeros((len(burst), len(room)), bool)
            own[carried(table.take(burst), len(room))] = True
            fits = (~own | (np.cumsum(own, axis=0) <= room)).all(axis=1)
            first, *others = burst[fits].tolist()
            joined.append(np.array([(first, other) for other in others], np.int64).reshape(-1, 2))
            burst = burst[~fits]
    return np.concatenate(joined)


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


def _dropped_remark(names: Sequence[str], images: int, needs: str) -> str:
    shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
    return f"--small-classes drop: {images} images are left out, of {shown}: fewer images or groups than {needs} need"


def small_class_remark(plan: Plan, folds: npt.NDArray[np.int16], class_names: Sequence[str]) -> str:
    """What became of the classes too small to be dealt, in words; '' where there were none."""
    if not (folds == ALWAYS_TRAINED).any():
        return plan.dropped
    table = plan.table
    names, apart = names_of_classes(table, class_names), folds == ALWAYS_TRAINED
    dealt, _ = class_sizes(table.take(np.flatnonzero(~apart)), len(names))
    kept, _ = class_sizes(table.take(np.flatnonzero(apart)), len(names))
    whole = [name for name, there, here in zip(names, dealt, kept, strict=True) if here and not there]
    shown = ", ".join(whole[:5]) + (f" and {len(whole) - 5} more" if len(whole) > 5 else "")
    return (
        f"--small-classes train-only: {apart.sum()} images are in every teacher's training and in no test, val or fold; "
        f"no figure says how well the student knows {shown or 'their classes'}"
    )


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
    missing = (0, int(absent[0])) if len(absent) else missing_class(folds, codes, dataset.fold_count)
    if missing is not None:
        name = dataset.class_names[needed[missing[1]]]
        raise DataError(f"class {name!r} is missing in fold {missing[0]}; use fewer --folds")


def _prove_together(dataset: Dataset, places: Codes, pairs: duplicates.Pairs, what: str) -> None:
    apart = pairs[places[pairs[:, 0]] != places[pairs[:, 1]]]
    if len(apart):
        one, other = apart[0]
        where = [f"{dataset.ids[row]} ({dataset.splits[row]}, fold {dataset.folds[row]})" for row in (one, other)]
        raise DataError(f"{where[0]} and {where[1]}: {what} in different splits or folds; freeze the data set again")
