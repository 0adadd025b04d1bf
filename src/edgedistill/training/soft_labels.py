"""soft_labels/: what each image's held-out teacher said of it, proven out-of-fold before it is written.

Log-probabilities at T=1 equal logits up to a constant per image, so any temperature stays exact. Images find their
labels by id, never by row position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.artifacts import read_array, read_json, write_array, write_json
from edgedistill.data.manifest import ALWAYS_TRAINED, Dataset
from edgedistill.data.soft_label_store import (
    BLOCK_ROWS,
    HeldRows,
    SoftLabelStore,
    SoftRows,
    open_store,
    parse_store,
    row_blocks,
    write_store,
)
from edgedistill.errors import ArtifactError, DataError
from edgedistill.training.heads import read_scores, write_scores

SOFT_LABELS_FORMAT = "edgedistill-soft-labels"
HEAD = "label"


class ScoreTable(Protocol):
    """float32 [n, C], of which only the rows that are asked for need lie in memory: an array, a mapped file, or what is
    computed when it is read."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, rows: Any, /) -> npt.NDArray[np.float32]: ...


@dataclass(frozen=True, eq=False)
class StoredTable:
    """ScoreTable of an .npy file, float32 [n, C]: mapped anew for each read, so that pages that were read go with the map.

    Raises ArtifactError for a file that is missing or damaged.
    """

    path: Path
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", read_array(self.path, mmap=True).shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> npt.NDArray[np.float32]:
        return np.array(read_array(self.path, mmap=True)[rows], np.float32)


@dataclass(frozen=True, eq=False)
class Ordered:
    """ScoreTable of another one's rows in an order of their own: ``order``, int64 [n]."""

    table: ScoreTable
    order: npt.NDArray[np.int64]

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.order), *self.table.shape[1:])

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, rows: Any) -> npt.NDArray[np.float32]:
        return self.table[self.order[rows]]


@dataclass(frozen=True, eq=False)
class FoldResult:
    """What one teacher leaves behind: ids of its held-out images and their log-probabilities, float32 [n, C], T=1 (with
    several heads: the scores [n, D] of heads.scores_of).

    ``trained_on``: ids_hash of the images that it trained on. ``epochs``: planned and done, which must agree.
    """

    fold: int
    ids: npt.NDArray[np.str_]
    log_probs: ScoreTable
    trained_on: str
    epochs_planned: int
    epochs_done: int
    architecture: str
    model_sha256: str

    def teacher(self) -> dict[str, Any]:
        return {
            "fold": self.fold,
            "architecture": self.architecture,
            "sha256": self.model_sha256,
            "trained_on": self.trained_on,
            "epochs_planned": self.epochs_planned,
            "epochs_done": self.epochs_done,
            "selection": "fixed number of epochs",
        }


def ids_hash(ids: Iterable[str]) -> str:
    """sha256 over the sorted ids: which images a teacher saw."""
    return hashlib.sha256("\n".join(sorted(str(i) for i in ids)).encode()).hexdigest()


def prove_out_of_fold(dataset: Dataset, results: Iterable[FoldResult]) -> None:
    """Raises DataError unless every training image is labelled exactly once, by a teacher that never saw it.

    Held-out folds partition the training ids, but for those that are always trained on, of which no teacher is asked; no
    group crosses folds; each teacher trained on exactly the training images of the other folds and those, for a number of
    epochs fixed beforehand.
    """
    results = list(results)
    train, dealt = dataset.rows("train"), dataset.held_out_rows
    folds_by_id = dict(zip(dataset.ids[dealt].tolist(), dataset.folds[dealt].tolist(), strict=True))
    always = dataset.ids[dataset.folds == ALWAYS_TRAINED].tolist()
    labelled = [str(i) for result in results for i in result.ids]
    if len(labelled) != len(set(labelled)):
        raise DataError("soft labels: an image was labelled by two teachers; train the teachers again")
    if set(labelled) != set(folds_by_id):
        stray, lacking = set(labelled) - set(folds_by_id), set(folds_by_id) - set(labelled)
        example = sorted(stray or lacking)[0]
        raise DataError(
            f"soft labels: {len(lacking)} training images have none and {len(stray)} belong to no training image "
            f"(such as {example!r}); train the missing folds"
        )
    _prove_groups(dataset, train)
    for result in results:
        own = [i for i, fold in folds_by_id.items() if fold == result.fold]
        others = [*always, *(i for i, fold in folds_by_id.items() if fold != result.fold)]
        if set(own) != {str(i) for i in result.ids}:
            raise DataError(f"soft labels: teacher {result.fold} labelled images of other folds; train it again")
        if result.trained_on != ids_hash(others):
            raise DataError(
                f"soft labels: teacher {result.fold} did not train on exactly the other folds; train it again"
            )
        if result.epochs_planned != result.epochs_done:
            raise DataError(
                f"soft labels: teacher {result.fold} stopped after {result.epochs_done} of "
                f"{result.epochs_planned} epochs; go on with --resume"
            )


def _prove_groups(dataset: Dataset, train: npt.NDArray[np.int64]) -> None:
    fold_of: dict[str, int] = {}
    for row in train:
        group = str(dataset.groups[row])
        if group and fold_of.setdefault(group, int(dataset.folds[row])) != dataset.folds[row]:
            raise DataError(f"soft labels: group {group!r} lies in two folds; freeze the data set again")


def write_soft_labels(
    folder: Path,
    dataset: Dataset,
    results: Iterable[FoldResult],
    *,
    teachers: Sequence[Mapping[str, Any]] | None = None,
    blend: Mapping[str, Any] | None = None,
    store: str = "float32",
) -> Path:
    """Prove, then write meta.json, ids.npy, fold.npy and label.log_probs.npy [N, C], of several heads each one's own
    array; meta.json comes last.

    ``teachers``: what meta.json says of them, where ``results`` combine several (by ``blend``). ``store``: 'float32',
    'float16' or 'top-k:N' (see data.soft_label_store); what the smaller ones lose is measured, noted in meta.json and
    said. Labels are written in blocks: where the results' log_probs are mapped files, memory stays bounded.
    """
    results = sorted(results, key=lambda result: result.fold)
    prove_out_of_fold(dataset, results)
    ids = np.concatenate([result.ids for result in results])
    folds = np.concatenate([np.full(len(result.ids), result.fold, np.int16) for result in results])
    order = np.argsort(ids, kind="stable")
    parts, kind = [result.log_probs for result in results], parse_store(store)
    write_array(folder / "ids.npy", ids[order].astype(str))
    write_array(folder / "fold.npy", folds[order])
    if dataset.task is None:
        shape = (len(ids), len(dataset.class_names))
        heads = {HEAD: write_store(folder, HEAD, _gathered(parts, order), shape=shape, kind=kind)}
    else:
        heads = write_scores(folder, dataset.task, lambda: _gathered(parts, order), count=len(ids), kind=kind)
    for name, entry in heads.items():
        _say_what_is_lost(entry, "" if dataset.task is None else f" of {name}", len(ids))
    write_json(
        folder / "meta.json",
        {
            "dataset_hash": dataset.hash,
            "classes": list(dataset.outputs),
            "n": len(ids),
            "heads": heads,
            "teachers": [result.teacher() for result in results] if teachers is None else list(teachers),
        }
        | ({} if blend is None else {"blend": dict(blend)})
        | _always_trained(dataset),
        format=SOFT_LABELS_FORMAT,
    )
    return folder


def _always_trained(dataset: Dataset) -> dict[str, Any]:
    """meta.json's entry on images that no teacher may be asked about: they have no row here."""
    count = int((dataset.folds == ALWAYS_TRAINED).sum())
    return {"always_trained": {"n": count, "soft_label": "the hard label, without smoothing"}} if count else {}


def _say_what_is_lost(entry: Mapping[str, Any], whose: str, count: int) -> None:
    if "loss" in entry:
        loss = entry["loss"]
        console.note(
            f"soft labels{whose} stored as {entry['store']}: {loss['kl_mean']:.2g} nats lost on average (at most "
            f"{loss['kl_max']:.2g}), another first choice for {loss['top1_changed']} of {count} images"
        )


def _gathered(parts: Sequence[ScoreTable], order: npt.NDArray[np.int64]) -> Iterator[npt.NDArray[np.float32]]:
    """The rows of the parts laid end to end, in ``order``, block by block: float32 [n, C]."""
    ends = np.cumsum([len(part) for part in parts])
    for start in range(0, len(order), BLOCK_ROWS):
        rows = order[start : start + BLOCK_ROWS]
        owner = np.searchsorted(ends, rows, side="right")
        block = np.empty((len(rows), parts[0].shape[1]), np.float32)
        for number in np.unique(owner):
            mine = owner == number
            block[mine] = parts[number][rows[mine] - (ends[number] - len(parts[number]))]
        yield block


@dataclass(frozen=True, eq=False)
class SoftLabels:
    """A folder of soft labels joined to a data set; the labels themselves stay on the disk.

    ``row_of``: int64 [len(dataset)], each image's row in the store, -1 for those that no fold holds out.
    """

    store: SoftLabelStore
    row_of: npt.NDArray[np.int64]

    def rows(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        """float32 [n, C] log-probabilities at T=1 of rows of the data set; NaN outside train."""
        stored = self.row_of[rows]
        answer = np.full((len(stored), self.store.class_count), np.nan, np.float32)
        answer[stored >= 0] = self.store.rows(stored[stored >= 0])
        return answer

    def take(self, rows: npt.NDArray[np.int64]) -> SoftLabels:
        """The labels of those rows of the data set, which are rows 0, 1, ... of the answer."""
        return SoftLabels(self.store, self.row_of[rows])

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
        """(rows of the data set, their labels float32 [n, C]) of all training images, ``size`` at a time."""
        train = np.flatnonzero(self.row_of >= 0)
        for start in range(0, len(train), size):
            yield train[start : start + size], self.rows(train[start : start + size])


def read_soft_labels(folder: Path, dataset: Dataset) -> npt.NDArray[np.float32]:
    """float32 [len(dataset), C] log-probabilities at T=1 in the data set's order; NaN outside train and where no
    fold holds an image out. With several heads: their scores, [len(dataset), D] (see heads.scores_of).

    Raises ArtifactError when the labels belong to other images, other classes or another format.
    """
    joined = np.full((len(dataset), len(dataset.outputs)), np.nan, np.float32)
    if dataset.task is not None:
        meta, row_of = _matched(folder, dataset)
        train = dataset.held_out_rows
        joined[train] = read_scores(folder, dataset, len(train), meta.get("heads", {}))[row_of[train]]
        return joined
    for rows, block in open_soft_labels(folder, dataset).blocks():
        joined[rows] = block
    return joined


def open_soft_labels(folder: Path, dataset: Dataset) -> SoftLabels:
    """The same labels for reading by rows or blocks, which need not fit into memory; of one head alone. Raises as
    read_soft_labels does."""
    meta, row_of = _matched(folder, dataset)
    entry = dict(meta.get("heads", {}).get(HEAD, {}))
    count = len(dataset.held_out_rows)
    return SoftLabels(open_store(folder, HEAD, entry, count=count, class_count=len(dataset.class_names)), row_of)


def soft_rows(folder: Path, dataset: Dataset) -> SoftRows:
    """What read_soft_labels reads, by rows: one label per image stays on the disk, the scores of several heads lie in
    memory. Raises as read_soft_labels does, for damaged labels only when they are read."""
    return open_soft_labels(folder, dataset) if dataset.task is None else HeldRows(read_soft_labels(folder, dataset))


def check_soft_labels(folder: Path, dataset: Dataset) -> None:
    """Raises ArtifactError where read_soft_labels would; all labels are read, and none kept."""
    soft = soft_rows(folder, dataset)
    for rows in row_blocks(dataset.rows("train"), len(dataset.outputs)):
        soft.rows(rows)


def soft_labels_hash(soft: SoftRows, dataset: Dataset) -> str:
    """sha256 over the bytes of the float32 [len(dataset), C] that read_soft_labels returns, which need not lie in memory
    together. What is NaN there counts too."""
    digest = hashlib.sha256()
    for rows in row_blocks(np.arange(len(dataset)), len(dataset.outputs)):
        digest.update(np.ascontiguousarray(soft.rows(rows), np.float32).data)
    return digest.hexdigest()


def _matched(folder: Path, dataset: Dataset) -> tuple[dict[str, Any], npt.NDArray[np.int64]]:
    """(meta.json, SoftLabels.row_of) of labels that belong to exactly this data set."""
    meta_path = folder / "meta.json"
    meta = read_json(meta_path, format=SOFT_LABELS_FORMAT)
    again = "train the teachers again with 'edgedistill teach', or give the --soft-labels of this data set"
    classes = tuple(meta.get("classes", ()))
    if len(classes) != len(dataset.outputs):
        raise ArtifactError(
            f"{meta_path}: {len(classes)} classes, but the data set has {len(dataset.outputs)}; {again}"
        )
    if classes != dataset.outputs:
        raise ArtifactError(
            f"{meta_path}: classes {', '.join(classes[:5])}, but the data set has "
            f"{', '.join(dataset.outputs[:5])}; {again}"
        )
    if meta.get("dataset_hash") != dataset.hash:
        raise ArtifactError(
            f"{meta_path}: made for another data set ({str(meta.get('dataset_hash'))[:12]}..., "
            f"this one is {dataset.hash[:12]}...); {again}"
        )
    ids = read_array(folder / "ids.npy")
    if ids.ndim != 1 or ids.dtype.kind != "U" or len(set(ids.tolist())) != len(ids):
        raise ArtifactError(f"{folder / 'ids.npy'}: expected distinct strings [N], got {ids.dtype} {ids.shape}")
    train = dataset.held_out_rows
    if set(ids.tolist()) != set(dataset.ids[train].tolist()):
        raise ArtifactError(
            f"{folder}: labels for {len(ids)} images that are not exactly the {len(train)} training images: the splits "
            f"differ, and labels of images that are now held out would leak; {again}"
        )
    stored = {name: row for row, name in enumerate(ids.tolist())}
    row_of = np.full(len(dataset), -1, np.int64)
    row_of[train] = [stored[name] for name in dataset.ids[train].tolist()]
    return meta, row_of


def read_teachers(folder: Path) -> list[dict[str, Any]]:
    """What meta.json says of each teacher: fold, architecture, sha256 of its model.pt, trained_on (an ids_hash)."""
    return list(read_json(folder / "meta.json", format=SOFT_LABELS_FORMAT)["teachers"])


def read_heads(folder: Path) -> dict[str, dict[str, Any]]:
    """What meta.json says of each head's files (see soft_label_store.write_store)."""
    heads = read_json(folder / "meta.json", format=SOFT_LABELS_FORMAT).get("heads", {})
    return {str(name): dict(entry) for name, entry in heads.items()}


def blend_of(folder: Path) -> dict[str, Any] | None:
    """How several architectures became one label (teacher.ensemble.Blended.to_dict); None where there is but one."""
    blend = read_json(folder / "meta.json", format=SOFT_LABELS_FORMAT).get("blend")
    return None if blend is None else dict(blend)


def read_folds(folder: Path, dataset: Dataset) -> npt.NDArray[np.int16]:
    """int16 [len(dataset)]: the fold whose teacher labelled each image; ALWAYS_TRAINED where all teachers saw it, else -1
    where nobody labelled it, so that nobody saw it.

    ``dataset`` may have other folds than the run that made the labels. Raises ArtifactError for a damaged folder.
    """
    ids, folds = read_array(folder / "ids.npy"), read_array(folder / "fold.npy")
    if folds.shape != ids.shape or folds.dtype != np.int16:
        raise ArtifactError(f"{folder / 'fold.npy'}: {folds.dtype} {folds.shape}, expected int16 {ids.shape}")
    fold_of = dict(zip(ids.tolist(), folds.tolist(), strict=True))
    labelled = np.array([fold_of.get(name, -1) for name in dataset.ids.tolist()], np.int16)
    return np.where(dataset.folds == ALWAYS_TRAINED, np.int16(ALWAYS_TRAINED), labelled)
