"""K teachers, each trained on all folds but one, label the images of the fold that they never saw.

Each trains a fixed number of epochs and is never selected on its held-out fold. Files: teacher/fold-K/{checkpoint.pt,
metrics.jsonl, model.pt, held_out_ids.npy, held_out.log_probs.npy, fold.json}, teacher/oof.json, soft_labels/.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgedistill import console
from edgedistill.artifacts import RunDir, read_array, read_json, sha256_file, write_array, write_json
from edgedistill.data.manifest import Dataset
from edgedistill.errors import DataError, UsageError
from edgedistill.images import InputSpec
from edgedistill.metrics import accuracy, expected_calibration_error, log_loss, macro_f1
from edgedistill.task_metrics import Scored, summary
from edgedistill.training.checkpoints import write_model
from edgedistill.training.heads import make_task_targets, scores_of
from edgedistill.training.loader import Draw, ImageStore, open_store, prepared_spec
from edgedistill.training.loop import Job, Phase, Validation, open_validation, train
from edgedistill.training.losses import LossSettings, make_targets
from edgedistill.training.models import (
    Weights,
    create_model,
    input_spec_for,
    locate_weights,
    model_kwargs_for,
    resolve_name,
)
from edgedistill.training.predict import predict_logits
from edgedistill.training.seeds import derive
from edgedistill.training.settings import (
    TrainSettings,
    choose_device,
    identity,
    refuse_other_settings,
    refuse_several_processes,
)
from edgedistill.training.soft_labels import FoldResult, ids_hash, write_soft_labels

FOLD_FORMAT = "edgedistill-teacher-fold"
OOF_FORMAT = "edgedistill-oof"
METRICS = ("accuracy", "macro_f1", "log_loss", "ece")


@dataclass(frozen=True, kw_only=True)
class TeacherSettings(TrainSettings):
    """TrainSettings with a teacher's defaults. ``fold``: train this fold alone (job arrays); None: all that remain."""

    name: str = "effb4"
    epochs: int = 10
    batch_size: int = 32
    balanced_sampling: bool = False
    cutmix_probability: float = 0.0
    drop_rate: float = 0.2
    fold: int | None = None

    def checks(self) -> list[tuple[str, bool, str]]:
        return [*super().checks(), ("fold", self.fold is None or self.fold >= 0, "0 or more, or None")]


@dataclass(frozen=True, eq=False)
class _Shared:
    """What all folds have in common; ``rows`` of the data set are the rows of ``store``."""

    dataset: Dataset
    rows: np.ndarray[Any, np.dtype[np.int64]]
    store: ImageStore
    spec: InputSpec
    weights: Weights | None
    validation: Validation | None


def train_teachers(settings: TeacherSettings, dataset: Dataset, run: RunDir, *, resume: bool) -> Path:
    """Train what remains of the folds, then write teacher/oof.json and soft_labels/.

    Returns the soft_labels folder; with ``settings.fold`` and other folds still missing, that fold's folder.
    Raises UsageError if the folders hold work and ``resume`` is False, ArtifactError if that work was made with other
    settings or data, ImageError for a damaged image.
    """
    refuse_several_processes()
    wanted = _wanted_folds(settings, dataset)
    if not resume:
        _refuse_existing_work(run, wanted)
    todo = [fold for fold in wanted if not _is_done(settings, dataset, run, fold)]
    if todo:
        shared = _prepare(settings, dataset)
        for fold in todo:
            _train_fold(settings, shared, run, fold, resume=resume)
    missing = [fold for fold in range(dataset.fold_count) if not (run.teacher(fold) / "fold.json").exists()]
    if missing:
        console.note(f"folds still to train: {', '.join(map(str, missing))}; the last one writes the soft labels")
        return run.teacher(wanted[-1])
    for fold in range(dataset.fold_count):
        _is_done(settings, dataset, run, fold)  # folds trained elsewhere must have the same settings
    results = [_read_fold(run.teacher(fold)) for fold in range(dataset.fold_count)]
    _write_quality(dataset, results, run)
    return write_soft_labels(run.soft_labels, dataset, results)


def _wanted_folds(settings: TeacherSettings, dataset: Dataset) -> list[int]:
    count = dataset.fold_count
    if count < 2:
        raise DataError(f"the data set has {count} folds; teachers need 2 or more: freeze it again with --folds 5")
    if settings.fold is None:
        return list(range(count))
    if settings.fold >= count:
        raise UsageError(f"--fold {settings.fold}: the data set has folds 0 to {count - 1}")
    return [settings.fold]


def _refuse_existing_work(run: RunDir, folds: Sequence[int]) -> None:
    for fold in folds:
        for name in ("fold.json", "checkpoint.pt", "model.pt"):
            if (run.teacher(fold) / name).exists():
                raise UsageError(
                    f"{run.teacher(fold)}: holds work already; go on with --resume, or choose another --out"
                )


def _identity(settings: TeacherSettings, dataset: Dataset, fold: int) -> dict[str, Any]:
    """What a teacher's weights depend on beyond its settings: the images that it may see."""
    seen = dataset.ids[(dataset.splits == "train") & (dataset.folds != fold)]
    return identity(
        settings, task=dataset.task, dataset_hash=dataset.hash, held_out_fold=fold, trained_on=ids_hash(seen)
    )


def _is_done(settings: TeacherSettings, dataset: Dataset, run: RunDir, fold: int) -> bool:
    path = run.teacher(fold) / "fold.json"
    if not path.exists():
        return False
    refuse_other_settings(path, read_json(path, format=FOLD_FORMAT)["identity"], _identity(settings, dataset, fold))
    return True


def _prepare(settings: TeacherSettings, dataset: Dataset) -> _Shared:
    choose_device(settings.device)  # a device that is not there is told before images are read
    spec = input_spec_for(settings.name, settings.image_size, resize=settings.resize)
    weights = locate_weights(settings.name, settings.weights, flag="--teacher-weights")
    rows = dataset.rows("train")
    store = open_store(dataset.paths[rows], prepared_spec(spec), cache_gib=settings.cache_gib)
    return _Shared(dataset, rows, store, spec, weights, open_validation(dataset, spec, seed=settings.seed))


def _train_fold(settings: TeacherSettings, shared: _Shared, run: RunDir, fold: int, *, resume: bool) -> None:
    """One teacher, and what it says of its held-out fold; fold.json is written last and marks the fold as done."""
    dataset, folder = shared.dataset, run.teacher(fold)
    job = _job(settings, shared, folder, fold)
    torch.manual_seed(derive(settings.seed, "initial weights", fold))
    network = settings.network(len(dataset.outputs))
    model = create_model(settings.name, pretrained=shared.weights, **network)
    model = train(job, model, resume=resume)
    write_model(
        folder / "model.pt",
        model,
        architecture=resolve_name(settings.name),
        model_kwargs=model_kwargs_for(settings.name, **network),
        classes=dataset.outputs,
        input_spec=shared.spec,
        dataset_hash=dataset.hash,
        settings=dict(job.identity),
        task=dataset.task,
    )
    held_out = shared.rows[dataset.folds[shared.rows] == fold]
    logits = predict_logits(model, dataset.paths[held_out], shared.spec, title=f"labelling fold {fold + 1}")
    if dataset.task is None:
        log_probs = torch.log_softmax(torch.from_numpy(logits).double(), dim=1).float().numpy()
    else:
        log_probs = scores_of(dataset.task, logits)
    write_array(folder / "held_out_ids.npy", dataset.ids[held_out].astype(str))
    write_array(folder / "held_out.log_probs.npy", log_probs)
    values = {
        "fold": fold,
        "identity": dict(job.identity),
        "trained_on": job.identity["trained_on"],
        "epochs_planned": settings.epochs,
        "epochs_done": len(job.epochs),
        "architecture": resolve_name(settings.name),
        "model_sha256": sha256_file(folder / "model.pt"),
    }
    write_json(folder / "fold.json", values, format=FOLD_FORMAT)
    job.checkpoint.unlink(missing_ok=True)  # three times the model's size, and nothing is left to resume


def _job(settings: TeacherSettings, shared: _Shared, folder: Path, fold: int) -> Job:
    dataset, rows = shared.dataset, shared.rows
    smoothing = settings.label_smoothing
    if dataset.task is None or dataset.values is None:
        targets = make_targets(dataset.labels[rows], len(dataset.class_names), label_smoothing=smoothing)
    else:
        targets = make_task_targets(dataset.task, dataset.values[rows], label_smoothing=smoothing)
    seen = np.flatnonzero(dataset.folds[rows] != fold)
    draw = Draw(
        rows=seen,
        labels=dataset.sampling_labels[rows][seen],
        batch_size=min(settings.batch_size, len(seen)),
        balanced=settings.balanced_sampling,
        seed=derive(settings.seed, "fold", fold),
    )
    return Job(
        title=f"teacher {fold + 1}/{dataset.fold_count}",
        folder=folder,
        settings=settings,
        identity=_identity(settings, dataset, fold),
        store=shared.store,
        targets=targets,
        phases=(
            Phase(
                "teacher", settings.epochs, draw, settings.lr, settings.lr * settings.final_lr, settings.warmup_epochs
            ),
        ),
        loss=LossSettings(),
        spec=shared.spec,
        augment=settings.augmentation(shared.spec),
        validation=shared.validation,
        task=dataset.task,
    )


def _read_fold(folder: Path) -> FoldResult:
    values = read_json(folder / "fold.json", format=FOLD_FORMAT)
    return FoldResult(
        fold=values["fold"],
        ids=read_array(folder / "held_out_ids.npy"),
        log_probs=read_array(folder / "held_out.log_probs.npy"),
        trained_on=values["trained_on"],
        epochs_planned=values["epochs_planned"],
        epochs_done=values["epochs_done"],
        architecture=values["architecture"],
        model_sha256=values["model_sha256"],
    )


def _write_quality(dataset: Dataset, results: Sequence[FoldResult], run: RunDir) -> None:
    """teacher/oof.json and a table: per fold and over all training images."""
    row_of = {name: row for row, name in enumerate(dataset.ids.tolist())}
    places = [np.array([row_of[name] for name in result.ids.tolist()], np.int64) for result in results]
    folds = [
        {"fold": result.fold} | _quality(dataset, result.log_probs, rows)
        for result, rows in zip(results, places, strict=True)
    ]
    everything = _quality(dataset, np.concatenate([result.log_probs for result in results]), np.concatenate(places))
    write_json(run.root / "teacher" / "oof.json", {"folds": folds, "all": everything}, format=OOF_FORMAT)
    rows = [
        [str(values.get("fold", "all")), values["n"], *(f"{values[name]:.4f}" for name in METRICS)]
        for values in (*folds, everything)
    ]
    console.err.print(console.table("teachers, out of fold", ("fold", "images", *METRICS), rows))


def _quality(dataset: Dataset, scores: np.ndarray[Any, Any], rows: np.ndarray[Any, Any]) -> dict[str, Any]:
    """Of the images ``rows`` of the data set, by what their held-out teachers said of them."""
    if dataset.task is not None and dataset.values is not None:
        return summary(Scored(dataset.task, dataset.task.probabilities(scores), dataset.values[rows]))
    probabilities, labels = np.exp(scores), dataset.labels[rows]
    return {
        "n": len(labels),
        "accuracy": accuracy(probabilities, labels),
        "macro_f1": macro_f1(probabilities, labels),
        "log_loss": log_loss(probabilities, labels),
        "ece": expected_calibration_error(probabilities, labels),
    }
