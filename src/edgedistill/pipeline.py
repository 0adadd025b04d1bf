"""The main job, stage after stage: freeze the data, teach K folds, distil, evaluate once on the test split.

Stages meet in files only, so each step looks at what lies in the run folder and does what is missing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgedistill import __version__, console
from edgedistill.artifacts import RunDir, read_json, settings_dict, sweep, write_json
from edgedistill.data.checks import check_data
from edgedistill.data.folds import SplitSettings, freeze_dataset
from edgedistill.data.manifest import Dataset, read_dataset, write_dataset
from edgedistill.data.sources import open_source
from edgedistill.errors import ArtifactError, DataError, UsageError
from edgedistill.image_headers import DEFAULT_MAX_PIXELS
from edgedistill.student import StudentSettings, train_student
from edgedistill.teacher import TeacherSettings, train_teachers
from edgedistill.training.evaluation import EVALUATION_FORMAT, comparison_table, evaluate_test
from edgedistill.training.models import locate_weights, resolve_name
from edgedistill.training.settings import TrainSettings

__all__ = [
    "DataSettings",
    "DistillResult",
    "DistillSettings",
    "TeachSettings",
    "comparison_table",
    "distill",
    "freeze",
    "teach",
]

CONFIG_FORMAT = "edgedistill-run"
LIBRARIES = ("torch", "timm", "albumentations", "numpy", "opencv-python", "openvino", "scikit-learn")


@dataclass(frozen=True)
class DataSettings:
    """``data``: a folder, a CSV or a built-in name. ``max_pixels``: larger images are refused as bombs."""

    data: str
    split: SplitSettings
    max_pixels: int = DEFAULT_MAX_PIXELS


@dataclass(frozen=True)
class DistillSettings:
    """One run. ``baseline``: train the same student on hard labels too, under the same budget, and compare.

    ``soft_labels``: a folder of an earlier run over the same data, in place of new teachers.
    """

    data: DataSettings
    out: Path
    teacher: TeacherSettings
    student: StudentSettings
    baseline: bool = True
    soft_labels: Path | None = None

    def __post_init__(self) -> None:
        if not self.student.distillation and self.soft_labels is not None:
            raise UsageError("--no-distillation and --soft-labels contradict each other; give one of them")


@dataclass(frozen=True)
class TeachSettings:
    """The first half of a run."""

    data: DataSettings
    out: Path
    teacher: TeacherSettings


@dataclass(frozen=True)
class DistillResult:
    """``model``: model.pt. ``evaluation``: evaluation.json as a dict."""

    model: Path
    evaluation: dict[str, Any]


def refuse_early(networks: Iterable[TrainSettings]) -> None:
    """What can be known to fail before hours of work: networks and files of weights that do not exist. Raises UsageError."""
    for settings in networks:
        resolve_name(settings.name)
        if settings.weights not in ("auto", "none"):
            locate_weights(settings.name, settings.weights, flag=f"weights of {settings.name}")


def freeze(settings: DataSettings, run: RunDir, *, resume: bool) -> Dataset:
    """dataset.csv of the run: read if it is there, else checked, split and written.

    Raises DataError when check-data finds errors, UsageError when the folder holds another run's work.
    """
    sweep(run.root)
    if run.dataset.exists():
        if not resume:
            raise UsageError(f"{run.root}: holds a run already; go on with --resume, or choose another --out")
        root = Path(settings.data)
        return read_dataset(run.dataset, data_root=root if root.is_dir() else None)
    source = open_source(settings.data)
    report = check_data(source, settings=settings.split, max_pixels=settings.max_pixels)
    if report.errors:
        raise DataError(f"{settings.data}: {report.summary()}; see 'edgedistill check-data {settings.data}'")
    for severity, kind, message, *_ in report.rows():
        console.note(f"{severity}: {kind}: {message}")
    dataset = freeze_dataset(source, settings.split, checks=report)
    write_json(run.root / "data_report.json", report.to_dict(), format="edgedistill-data-report")
    write_dataset(dataset, run.dataset)
    return dataset


def record(settings: Any, run: RunDir, dataset: Dataset, *, resume: bool) -> None:
    """config.json: every resolved setting, versions, data-set hash and command line.

    Raises ArtifactError when a resumed run was made from another data set. (Each stage refuses other settings itself.)
    """
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    if run.config.exists() and resume:
        saved = read_json(run.config, format=CONFIG_FORMAT)
        if saved["dataset_hash"] != dataset.hash:
            raise ArtifactError(f"{run.config}: made from another data set; choose another --out")
        command = saved["command"]
    values = {
        "settings": settings_dict(settings),
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES} | {"edgedistill": __version__},
        "dataset_hash": dataset.hash,
        "command": command,
    }
    write_json(run.config, values, format=CONFIG_FORMAT)


def teach(settings: TeachSettings, *, resume: bool) -> Path:
    """The first half: K teachers and their soft labels. Returns what train_teachers returns."""
    refuse_early([settings.teacher])
    run = RunDir(settings.out)
    dataset = freeze(settings.data, run, resume=resume)
    record(settings, run, dataset, resume=resume)
    return train_teachers(settings.teacher, dataset, run, resume=resume)


def distill(settings: DistillSettings, *, resume: bool) -> DistillResult:
    """The whole job, from photographs to model.pt and the one evaluation on the test split."""
    needs_teachers = settings.student.distillation and settings.soft_labels is None
    refuse_early([settings.student, *([settings.teacher] if needs_teachers else [])])
    run = RunDir(settings.out)
    dataset = freeze(settings.data, run, resume=resume)
    record(settings, run, dataset, resume=resume)
    student = settings.student
    models: dict[str, list[Path]] = {}
    if student.distillation:
        labels = settings.soft_labels
        if labels is None:
            labels = train_teachers(settings.teacher, dataset, run, resume=resume)
            models["teacher"] = [run.teacher(fold) / "model.pt" for fold in range(dataset.fold_count)]
        train_student(student, dataset, run, soft_labels=labels, out=run.model, resume=resume)
        models["student"] = [run.model]
    if settings.baseline or not student.distillation:
        # Without distillation the hard-label student is the run's model; else it stands beside it to be compared.
        hard = dataclasses.replace(student, distillation=False)
        out = run.hard_label_student / "model.pt" if student.distillation else run.model
        train_student(hard, dataset, run, soft_labels=None, out=out, resume=resume)
        models["hard_label_student"] = [out]
    path = evaluate_test(run, dataset, models, device=student.device)
    return DistillResult(run.model, read_json(path, format=EVALUATION_FORMAT))
