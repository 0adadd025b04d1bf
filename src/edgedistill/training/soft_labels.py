"""soft_labels/: what each image's held-out teacher said of it, proven out-of-fold before it is written.

Log-probabilities at T=1 equal logits up to a constant per image, so any temperature stays exact. Images find their
labels by id, never by row position.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.artifacts import read_array, read_json, write_array, write_json
from edgedistill.data.manifest import Dataset
from edgedistill.errors import ArtifactError, DataError
from edgedistill.training.heads import head_files, read_scores, write_scores

SOFT_LABELS_FORMAT = "edgedistill-soft-labels"
HEAD = "label"


@dataclass(frozen=True, eq=False)
class FoldResult:
    """What one teacher leaves behind: ids of its held-out images and their log-probabilities, float32 [n, C], T=1 (with
    several heads: the scores [n, D] of heads.scores_of).

    ``trained_on``: ids_hash of the images that it trained on. ``epochs``: planned and done, which must agree.
    """

    fold: int
    ids: npt.NDArray[np.str_]
    log_probs: npt.NDArray[np.float32]
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

    Held-out folds partition the training ids; no group crosses folds; each teacher trained on exactly the training
    images of the other folds, for a number of epochs fixed beforehand.
    """
    results = list(results)
    train = dataset.rows("train")
    folds_by_id = dict(zip(dataset.ids[train].tolist(), dataset.folds[train].tolist(), strict=True))
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
        others = [i for i, fold in folds_by_id.items() if fold != result.fold]
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


def write_soft_labels(folder: Path, dataset: Dataset, results: Iterable[FoldResult]) -> Path:
    """Prove, then write meta.json, ids.npy, fold.npy and label.log_probs.npy [N, C]; meta.json comes last."""
    results = sorted(results, key=lambda result: result.fold)
    prove_out_of_fold(dataset, results)
    ids = np.concatenate([result.ids for result in results])
    folds = np.concatenate([np.full(len(result.ids), result.fold, np.int16) for result in results])
    log_probs = np.concatenate([result.log_probs for result in results]).astype(np.float32)
    order = np.argsort(ids, kind="stable")
    write_array(folder / "ids.npy", ids[order].astype(str))
    write_array(folder / "fold.npy", folds[order])
    if dataset.task is None:
        write_array(folder / f"{HEAD}.log_probs.npy", log_probs[order])
        heads = {HEAD: {"kind": "softmax", "file": f"{HEAD}.log_probs.npy", "temperature": 1.0, "views": 1}}
    else:
        write_scores(folder, dataset.task, log_probs[order])
        heads = head_files(dataset.task)
    write_json(
        folder / "meta.json",
        {
            "dataset_hash": dataset.hash,
            "classes": list(dataset.outputs),
            "n": len(ids),
            "heads": heads,
            "teachers": [result.teacher() for result in results],
        },
        format=SOFT_LABELS_FORMAT,
    )
    return folder


def read_soft_labels(folder: Path, dataset: Dataset) -> npt.NDArray[np.float32]:
    """float32 [len(dataset), C] log-probabilities at T=1 in the data set's order; NaN outside train. With several heads:
    their scores, [len(dataset), D] (see heads.scores_of).

    Raises ArtifactError when the labels belong to other images, other classes or another format.
    """
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
    _check_ids(folder, ids)
    if dataset.task is None:
        log_probs = read_array(folder / f"{HEAD}.log_probs.npy")
        _check_arrays(folder, ids, log_probs, len(classes))
    else:
        log_probs = read_scores(folder, dataset, len(ids))
    train = dataset.rows("train")
    if set(ids.tolist()) != set(dataset.ids[train].tolist()):
        raise ArtifactError(
            f"{folder}: labels for {len(ids)} images that are not exactly the {len(train)} training images: the splits "
            f"differ, and labels of images that are now held out would leak; {again}"
        )
    row_of = {name: row for row, name in enumerate(ids.tolist())}
    joined = np.full((len(dataset), len(classes)), np.nan, np.float32)
    joined[train] = log_probs[[row_of[name] for name in dataset.ids[train].tolist()]]
    return joined


def _check_ids(folder: Path, ids: npt.NDArray[Any]) -> None:
    if ids.ndim != 1 or ids.dtype.kind != "U" or len(set(ids.tolist())) != len(ids):
        raise ArtifactError(f"{folder / 'ids.npy'}: expected distinct strings [N], got {ids.dtype} {ids.shape}")


def _check_arrays(folder: Path, ids: npt.NDArray[Any], log_probs: npt.NDArray[Any], class_count: int) -> None:
    path = folder / f"{HEAD}.log_probs.npy"
    if log_probs.shape != (len(ids), class_count) or log_probs.dtype != np.float32:
        raise ArtifactError(
            f"{path}: {log_probs.dtype} {log_probs.shape}, expected float32 {(len(ids), class_count)}; make it again"
        )
    sums = np.exp(log_probs.astype(np.float64)).sum(axis=1)
    if not np.all(np.abs(sums - 1) < 1e-3):  # also true of NaN
        raise ArtifactError(f"{path}: rows are not log-probabilities (their exponentials do not sum to 1)")
