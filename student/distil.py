"""A small student learns from labels and stored soft labels, is averaged, and becomes model.pt.

The same function trains the student without distillation under the same budget. Files: student/ (or
student-hard-labels/) with checkpoint.pt and metrics.jsonl, and model.pt, which loads with plain timm (see
training/checkpoints.py).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgedistill import console, task_metrics
from edgedistill.artifacts import RunDir
from edgedistill.data.manifest import Dataset
from edgedistill.errors import DataError, UsageError
from edgedistill.images import InputSpec
from edgedistill.metrics import fit_temperature
from edgedistill.training.checkpoints import read_model, write_model
from edgedistill.training.heads import make_task_targets
from edgedistill.training.loader import Draw, open_store, prepared_spec
from edgedistill.training.loop import Job, Phase, open_validation, train
from edgedistill.training.losses import LossName, LossSettings, Targets, make_targets
from edgedistill.training.models import create_model, input_spec_for, locate_weights, model_kwargs_for, resolve_name
from edgedistill.training.predict import predict_logits, reestimate_batch_norm
from edgedistill.training.seeds import derive
from edgedistill.training.settings import (
    TrainSettings,
    choose_device,
    identity,
    refuse_other_settings,
    refuse_several_processes,
)
from edgedistill.training.soft_labels import ids_hash, read_soft_labels

BATCH_NORM_IMAGES = 16_384  # statistics of more images do not move in the fourth digit


@dataclass(frozen=True, kw_only=True)
class StudentSettings(TrainSettings):
    """TrainSettings with the contest recipe's defaults.

    ``distillation`` False trains on hard labels alone under the same budget. ``soft_weight``: share of the soft labels.
    ``extra_epochs`` more, at a constant ``lr * extra_lr``, whose weights are averaged. ``final_data`` 'train+val' gives
    these epochs the val images too; then no temperature is fitted, since nothing is left to fit it on.
    """

    name: str = "mbv3s"
    epochs: int = 20
    batch_size: int = 256
    lr: float = 2e-3
    distillation: bool = True
    loss: LossName = "ce"
    soft_weight: float = 0.2
    soft_temperature: float = 1.0
    extra_epochs: int = 4
    extra_lr: float = 0.1
    final_data: Literal["train", "train+val"] = "train"

    def checks(self) -> list[tuple[str, bool, str]]:
        return [
            *super().checks(),
            ("loss", self.loss in ("ce", "kl", "js"), "ce, kl or js"),
            ("soft_weight", 0 <= self.soft_weight <= 1, "0 to 1"),
            ("soft_temperature", 0 < self.soft_temperature <= 100, "above 0, at most 100"),
            ("extra_epochs", 0 <= self.extra_epochs <= 1000, "0 or more"),
            ("extra_lr", 0 < self.extra_lr <= 1, "a share of lr, above 0 to 1"),
            ("final_data", self.final_data in ("train", "train+val"), "train or train+val"),
        ]


def train_student(
    settings: StudentSettings,
    dataset: Dataset,
    run: RunDir,
    *,
    soft_labels: Path | None,
    out: Path,
    resume: bool,
    folder: Path | None = None,
) -> Path:
    """Train the student and write model.pt to ``out``; returns ``out``.

    ``soft_labels``: the folder that the teachers wrote; not read when ``settings.distillation`` is False. Work in
    progress lies in ``folder``: by default run.student, or run.hard_label_student without distillation. Raises
    UsageError if there is work already and ``resume`` is False, ArtifactError if that work or the soft labels belong to
    other settings or data, ImageError for a damaged image.
    """
    refuse_several_processes()
    choose_device(settings.device)
    folder = folder or (run.student if settings.distillation else run.hard_label_student)
    soft = _soft_labels(settings, dataset, soft_labels)
    wanted = _identity(settings, dataset, soft)
    if out.exists():
        if not resume:
            raise UsageError(f"{out}: exists already; go on with --resume, or choose another --out")
        refuse_other_settings(out, read_model(out).settings, wanted)
        return out
    spec = input_spec_for(settings.name, settings.image_size, resize=settings.resize)
    job = _job(settings, dataset, spec, soft, folder=folder, wanted=wanted)
    network = settings.network(len(dataset.outputs))
    torch.manual_seed(derive(settings.seed, "initial weights"))
    weights = locate_weights(settings.name, settings.weights, flag="--student-weights")
    model = train(job, create_model(settings.name, pretrained=weights, **network), resume=resume)
    seen = dataset.paths[_final_rows(settings, dataset)]
    reestimate_batch_norm(
        model, seen, spec, batch_size=settings.batch_size, limit=BATCH_NORM_IMAGES, seed=settings.seed
    )
    write_model(
        out,
        model,
        architecture=resolve_name(settings.name),
        model_kwargs=model_kwargs_for(settings.name, **network),
        classes=dataset.outputs,
        input_spec=spec,
        dataset_hash=dataset.hash,
        settings=wanted,
        temperature=_temperature(settings, dataset, model, spec),
        task=dataset.task,
    )
    job.checkpoint.unlink(missing_ok=True)  # three times the model's size, and nothing is left to resume
    return out


def _soft_labels(settings: StudentSettings, dataset: Dataset, folder: Path | None) -> npt.NDArray[np.float32] | None:
    if not settings.distillation:
        return None
    if folder is None:
        raise UsageError("distillation needs soft labels; train teachers first, or choose --no-distillation")
    return read_soft_labels(folder, dataset)


def _identity(settings: StudentSettings, dataset: Dataset, soft: npt.NDArray[np.float32] | None) -> dict[str, Any]:
    """What the student's weights depend on beyond its settings."""
    labels = "" if soft is None else hashlib.sha256(soft.tobytes()).hexdigest()
    return identity(
        settings,
        task=dataset.task,
        dataset_hash=dataset.hash,
        trained_on=ids_hash(dataset.ids[dataset.rows("train")]),
        soft_labels=labels,
    )


def _final_rows(settings: StudentSettings, dataset: Dataset) -> npt.NDArray[np.int64]:
    """Rows of the data set that the last epochs see."""
    splits = ("train",) if settings.final_data == "train" else ("train", "val")
    return np.flatnonzero(np.isin(dataset.splits, splits))


def _job(
    settings: StudentSettings,
    dataset: Dataset,
    spec: InputSpec,
    soft: npt.NDArray[np.float32] | None,
    *,
    folder: Path,
    wanted: dict[str, Any],
) -> Job:
    rows = _final_rows(settings, dataset)
    if not len(dataset.rows("train")):
        raise DataError("the data set has no training images; freeze it again")
    return Job(
        title=folder.name.replace("-hard-labels", ", hard labels"),
        folder=folder,
        settings=settings,
        identity=wanted,
        store=open_store(dataset.paths[rows], prepared_spec(spec), cache_gib=settings.cache_gib),
        targets=_targets(settings, dataset, rows, soft),
        phases=_phases(settings, dataset.sampling_labels[rows], np.flatnonzero(dataset.splits[rows] == "train")),
        loss=LossSettings(
            settings.loss, settings.soft_weight if settings.distillation else 0.0, settings.soft_temperature
        ),
        spec=spec,
        augment=settings.augmentation(spec),
        validation=open_validation(dataset, spec, seed=settings.seed),
        task=dataset.task,
    )


def _targets(
    settings: StudentSettings, dataset: Dataset, rows: npt.NDArray[np.int64], soft: npt.NDArray[np.float32] | None
) -> Targets:
    chosen = None if soft is None else soft[rows]
    temperature, smoothing = settings.soft_temperature, settings.label_smoothing
    if dataset.task is not None and dataset.values is not None:
        values = dataset.values[rows]
        return make_task_targets(
            dataset.task, values, soft_scores=chosen, temperature=temperature, label_smoothing=smoothing
        )
    return make_targets(
        dataset.labels[rows],
        len(dataset.class_names),
        soft_log_probs=chosen,
        temperature=temperature,
        label_smoothing=smoothing,
    )


def _phases(
    settings: StudentSettings, labels: npt.NDArray[np.int32], train_rows: npt.NDArray[np.int64]
) -> tuple[Phase, ...]:
    """The epochs on train, then the extra ones whose weights are averaged, on all rows of the store."""

    def draw(rows: npt.NDArray[np.int64]) -> Draw:
        return Draw(
            rows=rows,
            labels=labels[rows],
            batch_size=min(settings.batch_size, len(train_rows)),
            balanced=settings.balanced_sampling,
            seed=derive(settings.seed, "student"),
        )

    first = Phase(
        "student",
        settings.epochs,
        draw(train_rows),
        settings.lr,
        settings.lr * settings.final_lr,
        settings.warmup_epochs,
    )
    if not settings.extra_epochs:
        return (first,)
    rate = settings.lr * settings.extra_lr
    everything = draw(np.arange(len(labels)))
    return (first, Phase("average", settings.extra_epochs, everything, rate, rate, average=True))


def _temperature(settings: StudentSettings, dataset: Dataset, model: nn.Module, spec: InputSpec) -> float:
    """Fitted on val, which must be unseen for that; one for all heads together."""
    val = dataset.rows("val")
    if settings.final_data == "train+val":
        console.note("temperature 1.0, not fitted: the last epochs trained on val (--final-data train+val)")
        return 1.0
    if not len(val):
        console.note("temperature 1.0, not fitted: the data set has no val split")
        return 1.0
    logits = predict_logits(model, dataset.paths[val], spec, batch_size=settings.batch_size)
    if dataset.task is not None and dataset.values is not None:
        return task_metrics.fit_temperature(dataset.task, logits, dataset.values[val])
    return fit_temperature(logits, dataset.labels[val])
