"""Each fold's teacher gets a temperature of its own, fitted on val, which no teacher trained on (Guo et al., 1706.04599).

Folds whose teachers are unlike in sharpness then say comparable things about their images. Where several architectures
labelled each fold, each of them gets its own, and their answers are mixed anew. A network with several heads has one
temperature for all of them; values of regression heads have none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from edgedistill import task_metrics
from edgedistill.artifacts import read_array, read_json, write_json
from edgedistill.data.manifest import Dataset
from edgedistill.data.soft_label_store import SoftRows
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.metrics import fit_temperature
from edgedistill.student.live_teachers import TeacherFile
from edgedistill.tasks import Task
from edgedistill.training.checkpoints import read_model, read_tta
from edgedistill.training.heads import logs_of, scores_of, shares_from
from edgedistill.training.soft_labels import StoredTable
from edgedistill.training.views import label_pictures

FORMAT = "edgedistill-teacher-temperatures"


def teacher_temperatures(
    files: Sequence[TeacherFile], dataset: Dataset, *, cache: Path, device: torch.device, one_view: bool = False
) -> dict[str, float]:
    """The temperature of each teacher by the sha256 of its model.pt, fitted to what labelled its fold: the mean over the
    views of its ``tta``, or with ``one_view`` to its answers on whole pictures, as live teachers give them.

    ``cache``: a JSON file that keeps them, so that a resumed run looks at val no second time. Raises UsageError without
    a val split.
    """
    rows = dataset.rows("val")
    if not len(rows):
        raise UsageError(
            "--calibrate-soft-labels: the data set has no val split; freeze it again with --val-fraction 0.1"
        )
    known: dict[str, float] = {}
    if cache.exists():
        saved = read_json(cache, format=FORMAT)
        known = saved["temperatures"] if saved["dataset_hash"] == dataset.hash else {}
    chosen = {}
    for file in files:
        tta = "" if one_view else read_tta(file.path)
        key = f"{file.sha256}:{tta}" if tta else file.sha256
        if key not in known:
            known[key] = _fitted(file, dataset, rows, tta=tta, device=device)
        chosen[file.sha256] = float(known[key])
    write_json(cache, {"dataset_hash": dataset.hash, "temperatures": known}, format=FORMAT)
    return chosen


def _fitted(
    file: TeacherFile, dataset: Dataset, rows: npt.NDArray[np.int64], *, tta: str, device: torch.device
) -> float:
    loaded = read_model(file.path)
    if loaded.classes != dataset.outputs:
        raise ArtifactError(f"{file.path}: its classes are not the data set's; give this run's --soft-labels")
    title = f"calibrating fold {file.fold + 1}"
    model, paths = loaded.model.to(device), dataset.paths[rows]
    scores = label_pictures(model, paths, loaded.input_spec, tta=tta, task=loaded.task, title=title)
    if dataset.task is not None and dataset.values is not None:
        return task_metrics.fit_temperature(dataset.task, scores, dataset.values[rows])
    return fit_temperature(scores, dataset.labels[rows])


def calibrated_rows(
    source: SoftRows,
    folds: npt.NDArray[np.int16],
    files: Sequence[TeacherFile],
    temperatures: Mapping[str, float],
    dataset: Dataset,
) -> SoftRows:
    """The soft labels of ``source`` with each teacher at its temperature; ``temperatures``: by the sha256 of their files,
    ``folds``: int16 [len(dataset)], of the teachers that labelled each image.

    Raises ArtifactError where what each of several teachers said of its fold does not lie beside its model.pt.
    """
    by_fold = {file.fold: temperatures[file.sha256] for file in files}
    if len(by_fold) == len(files):
        return CalibratedRows(source, folds, by_fold, dataset.task)
    row_of = {name: row for row, name in enumerate(dataset.ids.tolist())}
    answers = [_answer(file, temperatures[file.sha256], row_of, np.flatnonzero(folds == file.fold)) for file in files]
    return CalibratedBlend(source, folds, tuple(answers), dataset.task)


def _answer(
    file: TeacherFile, temperature: float, row_of: Mapping[str, int], held_out: npt.NDArray[np.int64]
) -> Answer:
    folder = file.path.parent
    ids = read_array(folder / "held_out_ids.npy")
    scores = StoredTable(folder / "held_out.log_probs.npy")
    place = np.full(len(row_of), -1, np.int64)
    for at, name in enumerate(ids.tolist()):
        if name in row_of:
            place[row_of[name]] = at
    if len(scores) != len(ids) or (place[held_out] < 0).any():
        raise ArtifactError(f"{folder}: not its teacher's answers for all of fold {file.fold + 1}; train it again")
    return Answer(file.fold, scores, place, temperature, file.weight)


def calibrated(
    log_probs: npt.NDArray[np.float32],
    folds: npt.NDArray[np.int16],
    temperatures: Mapping[int, float],
    *,
    task: Task | None = None,
) -> npt.NDArray[np.float32]:
    """float32 [N, C] log-probabilities at each fold's temperature; ``folds``: int16 [N], rows of -1 stay as they are.
    ``task``: of several heads, whose scores [N, D] then go in and come out."""
    scale = np.ones(len(folds))
    for fold, temperature in temperatures.items():
        scale[folds == fold] = temperature
    scaled = log_probs.astype(np.float64) / scale[:, None]
    if task is not None:
        for head, part in task.slices():
            if head.kind == "regression":
                scaled[:, part] = log_probs[:, part]
        scaled = scores_of(task, scaled).astype(np.float64)
    else:
        scaled -= scaled.max(axis=1, keepdims=True)
        scaled -= np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return np.where((folds >= 0)[:, None], scaled, log_probs).astype(np.float32)


@dataclass(frozen=True, eq=False)
class CalibratedRows:
    """SoftRows of ``source``, calibrated when they are read. ``folds``: int16 [N], of the rows of the data set. ``task``: of
    several heads."""

    source: SoftRows
    folds: npt.NDArray[np.int16]
    temperatures: Mapping[int, float]
    task: Task | None = None

    def rows(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        return calibrated(self.source.rows(rows), self.folds[rows], self.temperatures, task=self.task)


@dataclass(frozen=True, eq=False)
class Answer:
    """What one of several teachers said of its fold. ``scores``: [n, C], on the disk; ``place``: int64
    [len(dataset)], where an image of the data set lies in them, else -1; ``weight``: its share in the fold's labels."""

    fold: int
    scores: StoredTable
    place: npt.NDArray[np.int64]
    temperature: float
    weight: float


@dataclass(frozen=True, eq=False)
class CalibratedBlend:
    """SoftRows of several teachers a fold: each one's answer at its own temperature, and their weighted mean.

    The weights are those of the stored labels (cross-fitted, see teacher.ensemble). ``source``: what images have that no
    fold holds out. ``folds``: int16 [N], of the rows of the data set.
    """

    source: SoftRows
    folds: npt.NDArray[np.int16]
    answers: tuple[Answer, ...]
    task: Task | None = None

    def rows(self, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        mixed, folds = self.source.rows(rows).astype(np.float32, copy=True), self.folds[rows]
        for fold in np.unique(folds[folds >= 0]).tolist():
            mine = folds == fold
            mixed[mine] = self._mixed(fold, rows[mine])
        return mixed

    def _mixed(self, fold: int, rows: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.float32]:
        total: npt.NDArray[Any] = np.zeros(())
        for answer in self.answers:
            if answer.fold == fold:
                all_its, scores = np.full(len(rows), fold, np.int16), answer.scores[answer.place[rows]]
                scores = calibrated(scores, all_its, {fold: answer.temperature}, task=self.task)
                total = total + answer.weight * shares_from(self.task, scores)
        return logs_of(self.task, total)
