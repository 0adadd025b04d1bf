"""Each fold's teacher gets a temperature of its own, fitted on val, which no teacher trained on (Guo et al., 1706.04599).

Folds whose teachers are unlike in sharpness then say comparable things about their images. A network with several heads has
one temperature for all of them; values of regression heads have none.
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
from edgedistill.artifacts import read_json, write_json
from edgedistill.data.manifest import Dataset
from edgedistill.data.soft_label_store import SoftRows
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.metrics import fit_temperature
from edgedistill.student.live_teachers import TeacherFile
from edgedistill.tasks import Task
from edgedistill.training.checkpoints import read_model, read_tta
from edgedistill.training.heads import scores_from, scores_of
from edgedistill.training.predict import predict_logits
from edgedistill.training.views import predict_probabilities, views_of

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
    model, paths, title = loaded.model.to(device), dataset.paths[rows], f"calibrating fold {file.fold + 1}"
    if tta:
        views = views_of(tta)
        mean = predict_probabilities(model, paths, loaded.input_spec, views=views, task=loaded.task, title=title)
        logits = scores_from(loaded.task, mean)
    else:
        logits = predict_logits(model, paths, loaded.input_spec, title=title)
    if dataset.task is not None and dataset.values is not None:
        return task_metrics.fit_temperature(dataset.task, logits, dataset.values[rows])
    return fit_temperature(logits, dataset.labels[rows])


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
