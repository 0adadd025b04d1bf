"""Each fold's teacher gets a temperature of its own, fitted on val, which no teacher trained on (Guo et al., 1706.04599).

Folds whose teachers are unlike in sharpness then say comparable things about their images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from edgedistill.artifacts import read_json, write_json
from edgedistill.data.manifest import Dataset
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.metrics import fit_temperature
from edgedistill.student.live_teachers import TeacherFile
from edgedistill.training.checkpoints import read_model
from edgedistill.training.predict import predict_logits

FORMAT = "edgedistill-teacher-temperatures"


def teacher_temperatures(
    files: Sequence[TeacherFile], dataset: Dataset, *, cache: Path, device: torch.device
) -> dict[str, float]:
    """The temperature of each teacher by the sha256 of its model.pt.

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
    for file in files:
        if file.sha256 not in known:
            loaded = read_model(file.path)
            if loaded.classes != dataset.class_names:
                raise ArtifactError(f"{file.path}: its classes are not the data set's; give this run's --soft-labels")
            title = f"calibrating fold {file.fold + 1}"
            logits = predict_logits(loaded.model.to(device), dataset.paths[rows], loaded.input_spec, title=title)
            known[file.sha256] = fit_temperature(logits, dataset.labels[rows])
    chosen = {file.sha256: float(known[file.sha256]) for file in files}
    write_json(cache, {"dataset_hash": dataset.hash, "temperatures": chosen}, format=FORMAT)
    return chosen


def calibrated(
    log_probs: npt.NDArray[np.float32], folds: npt.NDArray[np.int16], temperatures: Mapping[int, float]
) -> npt.NDArray[np.float32]:
    """float32 [N, C] log-probabilities at each fold's temperature; ``folds``: int16 [N], rows of -1 stay as they are."""
    scale = np.ones(len(folds))
    for fold, temperature in temperatures.items():
        scale[folds == fold] = temperature
    scaled = log_probs.astype(np.float64) / scale[:, None]
    scaled -= scaled.max(axis=1, keepdims=True)
    scaled -= np.log(np.exp(scaled).sum(axis=1, keepdims=True))
    return np.where((folds >= 0)[:, None], scaled, log_probs).astype(np.float32)
