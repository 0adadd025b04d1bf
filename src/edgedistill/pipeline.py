"""The main job, stage after stage: freeze the data, teach K folds, distil, evaluate once on the test split.

Stages meet in files only, so each step looks at what lies in the run folder and does what is missing.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import re
import shlex
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from edgedistill import __version__, console
from edgedistill import student as student_module
from edgedistill import teacher as teacher_module
from edgedistill.artifacts import (
    RUN_FORMAT,
    RunDir,
    atomic_path,
    commands_of,
    read_json,
    settings_dict,
    sha256_file,
    sweep,
    write_json,
)
from edgedistill.data.checks import check_data
from edgedistill.data.deal import SplitSettings
from edgedistill.data.folds import freeze_dataset
from edgedistill.data.label_columns import LabelColumns
from edgedistill.data.manifest import ALWAYS_TRAINED, Dataset, read_dataset, write_dataset
from edgedistill.data.soft_label_store import check_store, parse_store
from edgedistill.data.sources import SINGLE_LABEL, open_source
from edgedistill.errors import ArtifactError, DataError, UsageError
from edgedistill.image_headers import DEFAULT_MAX_PIXELS
from edgedistill.student import StudentSettings, find_unlabelled, refuse_several_processes, train_student
from edgedistill.student.live_teachers import find_teachers
from edgedistill.teacher import BlendSettings, Ensemble, NamedTeacher, TeacherSettings, read_blend, train_teachers
from edgedistill.training.evaluation import EVALUATION_FORMAT, Combination, comparison_table, evaluate_test
from edgedistill.training.fixres import deployed_spec
from edgedistill.training.models import (
    create_model,
    input_spec_for,
    locate_weights,
    model_kwargs_for,
    refuse_size,
    resolve_name,
)
from edgedistill.training.noisy_labels import write_noisy_labels
from edgedistill.training.optimizers import resolve_optimizer
from edgedistill.training.processes import Part, check_batch, on_main, part
from edgedistill.training.settings import TrainSettings, choose_device
from edgedistill.training.soft_labels import check_soft_labels, soft_rows

__all__ = [
    "DataSettings",
    "DistillResult",
    "DistillSettings",
    "NamedStudent",
    "TeachSettings",
    "comparison_table",
    "distill",
    "freeze",
    "parse_students",
    "parse_teachers",
    "teach",
]

T = TypeVar("T", bound=TrainSettings)

LIBRARIES = ("torch", "timm", "albumentations", "numpy", "opencv-python", "openvino", "scikit-learn")


@dataclass(frozen=True)
class DataSettings:
    """``data``: a folder, a CSV or a built-in name. ``max_pixels``: larger images are refused as bombs. ``labels``: the
    label columns of a CSV."""

    data: str
    split: SplitSettings
    max_pixels: int = DEFAULT_MAX_PIXELS
    labels: LabelColumns = SINGLE_LABEL

    def __post_init__(self) -> None:
        if not 0 < self.max_pixels <= DEFAULT_MAX_PIXELS:
            raise UsageError(f"max_pixels={self.max_pixels}, expected 1 to {DEFAULT_MAX_PIXELS}: no stage reads more")


@dataclass(frozen=True)
class NamedStudent:
    """A student and its ``label``: its name in files and tables, such as 'mbv4s' or, at a size of its own, 'mbv4s-160'."""

    label: str
    settings: StudentSettings


Baselines = Literal["all", "first", "none"]


@dataclass(frozen=True)
class DistillSettings:
    """One run. ``student``: the first, which becomes model.pt; ``others``: more of them from the same soft labels.

    ``label``: the first one's, asked for only where there are others. ``baselines``: which students are trained on hard
    labels too, under the same budget, and compared. ``soft_labels``: a folder of an earlier run over the same data, in
    place of new teachers. ``ensemble``: further architectures beside ``teacher``, and how they vote. Raises UsageError for
    two students of one label, and for what contradicts each other.
    """

    data: DataSettings
    out: Path
    teacher: TeacherSettings
    student: StudentSettings
    label: str = ""
    others: tuple[NamedStudent, ...] = ()
    baselines: Baselines = "first"
    soft_labels: Path | None = None
    ensemble: Ensemble = field(default_factory=Ensemble)

    def __post_init__(self) -> None:
        if self.baselines not in ("all", "first", "none"):
            raise UsageError(f"--baselines {self.baselines}: expected all, first or none")
        labels = [student.label for student in self.students]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise UsageError(
                f"--student names {', '.join(twice)} twice; name each once, or with another size: NAME@160"
            )
        if not self.student.distillation and self.soft_labels is not None:
            raise UsageError("--no-distillation and --soft-labels contradict each other; give one of them")
        if self.soft_labels is None and self.ensemble.others:
            self._refuse_what_averages()

    def _refuse_what_averages(self) -> None:
        blend, student = self.ensemble.blend, self.student
        asked = {
            "--live-teachers": student.live_teachers,
            "--views": student.views,
            "--unlabelled": student.unlabelled,
            "--calibrate-soft-labels": student.calibrate_soft_labels,
        }
        averaging = [flag for flag, given in asked.items() if given]
        if averaging and (blend.vote != "soft" or blend.override):
            raise UsageError(
                f"{averaging[0]}: averages what several architectures say; leave --teacher-vote and --teacher-override "
                "away (a recipe's: --teacher-vote soft --teacher-override '')"
            )

    @property
    def students(self) -> tuple[NamedStudent, ...]:
        return (NamedStudent(self.label, self.student), *self.others)

    @property
    def trains_teachers(self) -> bool:
        return self.student.distillation and self.soft_labels is None

    def has_baseline(self, student: NamedStudent) -> bool:
        """Whether it is trained on hard labels beside its distilled self."""
        first = student.label == self.label
        return student.settings.distillation and (self.baselines == "all" or (self.baselines == "first" and first))


def parse_students(names: str, weights: str, base: StudentSettings) -> tuple[NamedStudent, ...]:
    """'mbv3s,mbv4s@160' -> students like ``base``, each with its network and where it has one its resolution in pixels.

    ``weights``: one choice for all, or one for each with commas between. Raises UsageError for what cannot be read.
    """
    return tuple(NamedStudent(label, settings) for label, settings in _parse_networks("student", names, weights, base))


def parse_teachers(
    names: str, weights: str, base: TeacherSettings, *, blend: BlendSettings
) -> tuple[TeacherSettings, Ensemble]:
    """'effb4,swinb@384' -> the first teacher and what joins it, each like ``base``; ``weights`` as for students.

    Raises UsageError for what cannot be read and for ``blend`` settings that do not fit.
    """
    (label, first), *others = _parse_networks("teacher", names, weights, base)
    return first, Ensemble(label=label, others=tuple(NamedTeacher(*other) for other in others), blend=blend)


def _parse_networks(stage: str, names: str, weights: str, base: T) -> list[tuple[str, T]]:
    """(label, settings) of each network of --STAGE and --STAGE-weights."""
    parts = [part.strip() for part in names.split(",") if part.strip()]
    choices = [choice.strip() for choice in weights.split(",")]
    if not parts:
        raise UsageError(f"--{stage} {names!r}: expected networks with commas between, such as mbv3s,lcnet@160")
    if len(choices) not in (1, len(parts)):
        raise UsageError(
            f"--{stage}-weights: {len(choices)} for {len(parts)} {stage}s; give one for all, or one for each"
        )
    networks = []
    for entry, choice in zip(parts, choices * len(parts) if len(choices) == 1 else choices, strict=True):
        name, at, size = entry.partition("@")
        if at and not size.isdecimal():
            raise UsageError(
                f"--{stage} {entry}: expected NAME or NAME@SIZE with the size in pixels, such as {name}@160"
            )
        label = re.sub(r"[^A-Za-z0-9_.-]", "_", f"{name}-{int(size)}" if at else name)
        image_size = int(size) if at else base.image_size
        networks.append((label, dataclasses.replace(base, name=name, weights=choice, image_size=image_size)))
    return networks


@dataclass(frozen=True)
class TeachSettings:
    """The first half of a run."""

    data: DataSettings
    out: Path
    teacher: TeacherSettings
    ensemble: Ensemble = field(default_factory=Ensemble)


@dataclass(frozen=True)
class DistillResult:
    """``model``: model.pt; ``models``: each student's, by label. ``evaluation``: evaluation.json as a dict."""

    model: Path
    models: dict[str, Path]
    evaluation: dict[str, Any]


def refuse_early(networks: Sequence[TrainSettings], this: Part | None = None) -> None:
    """What can be known to fail before hours of work and before anything is written: networks, optimisers, devices and
    files of weights that do not exist or do not fit, sizes and classifiers that a network cannot take, batches that
    processes cannot share. ``this``: one of the processes (None: this one).

    Raises UsageError and ModelError.
    """
    this = this or part()
    for number, settings in enumerate(networks):
        resolve_name(settings.name)
        resolve_optimizer(settings.optimizer)
        choose_device(settings.device)
        check_batch(settings.batch_size, this)
        if isinstance(settings, StudentSettings):
            refuse_several_processes(settings, this)
        deployed_spec(settings, input_spec_for(settings.name, settings.image_size, resize=settings.resize))
        _refuse_network(settings)
        known: set[tuple[str, Any]] = {item for before in networks[:number] for item in vars(before).items()}
        known = known.union(*(later.heeds() for later in networks[number + 1 :]))
        for doubt in settings.doubts(known):
            console.warn(f"{settings.role} {settings.name}: {settings.in_own_flags(doubt)}")


def _refuse_network(settings: TrainSettings) -> None:
    """A network is built on trial where anything but its number of classes is asked of it, and looks once at images of a
    size that not every network takes. Two classes: a file of weights may have others."""
    network, given = settings.network(2), settings.weights not in ("auto", "none")
    weights = locate_weights(settings.name, settings.weights, flag=f"--{settings.role}-weights") if given else None
    options = model_kwargs_for(settings.name, **network)
    special = options.keys() - {"num_classes", "drop_rate"}
    sizes = {settings.image_size, settings.test_size or settings.image_size}
    unusual = sorted(size for size in sizes if size < 96 or size % 32 or "img_size" in options)
    if given or special or unusual or not settings.classifier_settings().plain:
        model = create_model(settings.name, pretrained=weights, **network).eval()
        for size in unusual:
            refuse_size(model, settings.name, size)


def refuse_for(dataset: Dataset, networks: Iterable[TrainSettings]) -> None:
    """Raises UsageError where a class is to be drawn more often that the data does not have, for what needs one label per
    image where there are several, for soft labels that keep more classes than there are, and for a fold too many;
    DataError for a column of values of which no training image has one."""
    if dataset.task is not None and dataset.values is not None:
        values = dataset.values[dataset.rows("train")]
        for head, columns in dataset.task.columns():
            if head.kind == "regression" and np.isnan(values[:, columns]).all():
                raise DataError(f"column {head.name!r}: no training image has a value; fill some in, or leave it away")
    for settings in networks:
        settings.refuse_for(dataset.task)
        if isinstance(settings, TeacherSettings):
            check_store(parse_store(settings.soft_label_store), len(dataset.class_names), dataset.task)
            if settings.fold is not None and settings.fold >= dataset.fold_count:
                raise UsageError(f"--fold {settings.fold}: the data set has folds 0 to {dataset.fold_count - 1}")
        settings.sampling(dataset, dataset.rows("train"))
        if (
            isinstance(settings, StudentSettings)
            and settings.distillation
            and (settings.live_teachers or settings.views)
        ):
            _refuse_always_trained(dataset, "--live-teachers" if settings.live_teachers else "--views")


def _refuse_always_trained(dataset: Dataset, flag: str) -> None:
    count = int((dataset.folds == ALWAYS_TRAINED).sum())
    if count:
        raise UsageError(
            f"{flag}: every teacher trained on {count} images (--small-classes train-only), so that none may judge them; "
            "leave it away, or give --small-classes drop"
        )


def _refuse_lesson(settings: DistillSettings, dataset: Dataset, cache: Path) -> dict[str, int]:
    """Raises UsageError, DataError and ArtifactError for soft labels of an earlier run, their teachers and unlabelled images
    that the students cannot learn from. Returns how many of these each student found. ``cache``: where frames of videos
    are kept."""
    folder, found = settings.soft_labels, {}
    if folder is not None:
        check_soft_labels(folder, dataset)
    for named in settings.students:
        student = named.settings
        if not student.distillation:
            continue
        if student.calibrate_soft_labels and not len(dataset.rows("val")):
            raise UsageError(
                "--calibrate-soft-labels: the data set has no val split; give it one with --val-fraction 0.1"
            )
        if folder is not None and student.needs_teachers:
            find_teachers(folder, dataset)
        if student.unlabelled:
            found[named.label] = len(find_unlabelled(student, dataset, cache)[0])
    return found


def freeze(
    settings: DataSettings,
    run: RunDir,
    *,
    resume: bool,
    refuse: Callable[[Dataset], None] = lambda dataset: None,
    write: bool = True,
) -> Dataset:
    """dataset.csv of the run: read if it is there, else checked, split and, unless ``refuse`` raises, written.

    ``write`` False changes nothing on the disk. Raises DataError when check-data finds errors, UsageError when the folder
    holds another run's work.
    """
    if write:
        sweep(run.root)
    if run.dataset.exists():
        if not resume:
            raise UsageError(f"{run.root}: holds a run already; go on with --resume, or choose another --out")
        root = Path(settings.data)
        dataset = read_dataset(run.dataset, data_root=root if root.is_dir() else None)
        _compare_data(settings, run, dataset)
        refuse(dataset)
        return dataset
    source = open_source(settings.data, labels=settings.labels)
    report = check_data(source, settings=settings.split, max_pixels=settings.max_pixels)
    if report.errors:
        remedy = report.errors[0].remedy
        raise DataError(f"{settings.data}: {report.summary()}; {remedy}; see '{check_command(settings)}'")
    for severity, kind, message, *_ in report.rows():
        console.note(f"{severity}: {kind}: {message}")
    dataset = freeze_dataset(source, settings.split, checks=report)
    refuse(dataset)
    if write and run.dataset.exists():  # begun by another process while this one looked at the images
        return freeze(settings, run, resume=resume, refuse=refuse)
    if write:
        write_json(run.root / "data_report.json", report.to_dict(), format="edgedistill-data-report")
        write_dataset(dataset, run.dataset)
    return dataset


def _compare_data(settings: DataSettings, run: RunDir, dataset: Dataset) -> None:
    """A resumed run keeps the images and labels of its dataset.csv: what ``settings.data`` has of others is warned about,
    and data without any of its images are refused with a UsageError."""
    named = run.settings().get("data", {}).get("data")
    try:
        source = open_source(settings.data, labels=settings.labels)
    except (DataError, UsageError, OSError) as error:
        if settings.data == named:
            return  # as when the run was made; images that are still needed are missed where they are read
        raise UsageError(
            f"--data {settings.data}: {error}; a run is resumed with its own data ({named}), or begun with another --out"
        ) from error
    # By id, which outlives a move of the folder; else by path, since an image from elsewhere changes the root of all ids.
    labels, own = {item.id: item.label for item in source.items}, dataset.ids.tolist()
    if labels.keys().isdisjoint(own):
        labels, own = {str(item.path): item.label for item in source.items}, dataset.paths.tolist()
    common = [row for row, name in enumerate(own) if name in labels]
    if not common:
        raise UsageError(
            f"--data {settings.data}: holds none of the images of {run.dataset}; a run is resumed with its own data "
            f"({named}), or begun with another --out"
        )
    report = run.root / "data_report.json"
    then = read_json(report, format="edgedistill-data-report").get("images") if report.exists() else None
    different = [f"lacks {len(own) - len(common)} of the run's images"] if len(common) < len(own) else []
    if isinstance(then, int) and len(labels) > then:
        different.append(f"has {len(labels)} images, {len(labels) - then} more than the run began with")
    if dataset.task is None:
        names = dataset.class_names
        changed = sum(labels[own[row]] != names[dataset.labels[row]] for row in common)
        if changed:
            different.append(f"gives {changed} of its images another label")
    if different:
        console.warn(
            f"--data {settings.data}: {', '.join(different)}; {run.dataset} stays as it was made, and another --out begins "
            "anew"
        )


def check_command(settings: DataSettings) -> str:
    """The check-data that judges the data as this run does."""
    words = ["edgedistill", "check-data", settings.data, *settings.labels.flags()]
    if settings.split.folds != SplitSettings.folds:
        words += ["--folds", str(settings.split.folds)]
    if settings.split.small_classes != SplitSettings.small_classes:
        words += ["--small-classes", settings.split.small_classes]
    if settings.max_pixels != DEFAULT_MAX_PIXELS:
        words += ["--max-pixels", str(settings.max_pixels)]
    return shlex.join(words)


def record(settings: Any, run: RunDir, dataset: Dataset, *, resume: bool) -> None:
    """config.json: every resolved setting, versions, data-set hash and command lines.

    Raises ArtifactError when a resumed run was made from another data set. (Each stage refuses other settings itself.)
    """
    program, wanted = Path(sys.argv[0]).name, settings_dict(settings)
    commands = [shlex.join(["edgedistill" if program == "__main__.py" else program, *sys.argv[1:]])]
    if run.config.exists() and resume:
        saved = read_json(run.config, format=RUN_FORMAT)
        if saved["dataset_hash"] != dataset.hash:
            raise ArtifactError(f"{run.config}: made from another data set; choose another --out")
        wanted["data"] |= _as_frozen(run, saved["settings"].get("data", {}), wanted["data"])
        if isinstance(settings, TeachSettings) and "student" in saved["settings"]:
            return  # teachers alone, for a run that has students: what it was asked for stands
        before = commands_of(saved)
        if before and before[-1].replace(" --resume", "") == commands[0].replace(" --resume", ""):
            commands = []  # it only goes on
        commands = [*before, *commands]
    values = {
        "settings": wanted,
        "versions": {name: importlib.metadata.version(name) for name in LIBRARIES} | {"edgedistill": __version__},
        "dataset_hash": dataset.hash,
        "commands": commands,
    }
    write_json(run.config, values, format=RUN_FORMAT)


def _as_frozen(run: RunDir, saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """How a resumed run's dataset.csv was split and labelled, of which other wishes now change nothing: a warning."""
    parts: dict[str, Any] = {part: saved[part] for part in ("split", "labels") if part in saved}
    different = [
        f"{key}={value!r} (now {wanted[part][key]!r})"
        for part, values in parts.items()
        for key, value in values.items()
        if key in wanted[part] and wanted[part][key] != value
    ]
    if different:
        console.warn(f"{run.dataset}: stays as it was made, with {', '.join(different)}; another --out splits anew")
    return parts


def _refuse_other_work(settings: TeachSettings | DistillSettings, run: RunDir, dataset: Dataset) -> None:
    """Raises ArtifactError where the run's teachers, soft labels or students were made with other settings."""
    if isinstance(settings, DistillSettings):
        for student in settings.students:
            place = place_of(settings, student, run)
            student_module.refuse_other_work(student.settings, place.out, place.folder)
            if settings.has_baseline(student):
                hard = dataclasses.replace(student.settings, distillation=False)
                student_module.refuse_other_work(hard, place.hard_folder / "model.pt", place.hard_folder)
    if isinstance(settings, TeachSettings) or settings.trains_teachers:
        taught = any(run.root.glob("model*.pt"))
        teacher_module.refuse_other_work(settings.teacher, settings.ensemble, dataset, run, taught=taught)


@dataclass(frozen=True)
class Place:
    """Of a student: its model.pt, the folder of its training, and that of its hard-label self."""

    out: Path
    folder: Path
    hard_folder: Path


def place_of(settings: DistillSettings, student: NamedStudent, run: RunDir) -> Place:
    """The first keeps the names of a run with one student, so that others can be added to a finished run."""
    first, label = student.label == settings.label, student.label
    hard_folder = run.hard_label_student if first else run.other_hard_label_student(label)
    distilled_folder = run.student if first else run.other_student(label)
    return Place(
        out=run.model if first else run.model_of(label),
        folder=distilled_folder if student.settings.distillation else hard_folder,
        hard_folder=hard_folder,
    )


def _frozen(settings: TeachSettings | DistillSettings, run: RunDir, *, resume: bool) -> Dataset:
    """The data set of the run, which suits its networks and the soft labels of an earlier run, and config.json. What is
    refused leaves no run in the folder: the same command can be put right and given again."""
    networks = _networks(settings)
    refuse_early(networks)

    def refuse(dataset: Dataset) -> None:
        refuse_for(dataset, networks)
        if isinstance(settings, DistillSettings):
            _refuse_lesson(settings, dataset, run.root)
        if resume:
            _refuse_other_work(settings, run, dataset)

    dataset = freeze(settings.data, run, resume=resume, refuse=refuse)
    record(settings, run, dataset, resume=resume)
    return dataset


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """``dataset``: as the run would have it. ``unlabelled``: images without labels, by the student that learns from them."""

    dataset: Dataset
    unlabelled: dict[str, int]


def rehearse(settings: DistillSettings, *, resume: bool, this: Part | None = None) -> Rehearsal:
    """All that the run would refuse or warn of before its first training; nothing stays on the disk. ``this``: one of the
    processes that it would have. Raises what ``distill`` raises by then."""
    found: dict[str, int] = {}
    networks = _networks(settings)
    refuse_early(networks, this)
    with tempfile.TemporaryDirectory() as scratch:

        def refuse(dataset: Dataset) -> None:
            refuse_for(dataset, networks)
            found.update(_refuse_lesson(settings, dataset, Path(scratch)))
            if resume:
                _refuse_other_work(settings, RunDir(settings.out), dataset)

        dataset = freeze(settings.data, RunDir(settings.out), resume=resume, refuse=refuse, write=False)
    return Rehearsal(dataset, found)


def teach(settings: TeachSettings, *, resume: bool) -> Path:
    """The first half: K teachers and their soft labels. Returns what train_teachers returns."""
    run = RunDir(settings.out)
    dataset = on_main(lambda: _frozen(settings, run, resume=resume))
    path = train_teachers(settings.teacher, dataset, run, resume=resume, ensemble=settings.ensemble)
    if path == run.soft_labels:  # else other folds are still missing
        on_main(lambda: _look_for_noisy_labels(run, dataset, path))
    return path


def _look_for_noisy_labels(run: RunDir, dataset: Dataset, soft_labels: Path) -> None:
    """noisy_labels.csv, which the report shows."""
    path = run.root / "noisy_labels.csv"
    suspects = write_noisy_labels(path, dataset, soft_rows(soft_labels, dataset))
    if suspects:
        what = (
            "training images look like another class"
            if dataset.task is None
            else "labels of training images look wrong"
        )
        console.note(f"{suspects} {what} to a teacher that never saw them: {path}")


def _architectures(settings: TeachSettings | DistillSettings) -> dict[str, TeacherSettings]:
    """By the folder's name: '' is the first, whose folds lie in teacher/ itself."""
    return {"": settings.teacher} | {other.label: other.settings for other in settings.ensemble.others}


def _networks(settings: TeachSettings | DistillSettings) -> list[TrainSettings]:
    """All that will be trained."""
    teachers = list(_architectures(settings).values())
    if isinstance(settings, TeachSettings):
        return [*teachers]
    return [*(named.settings for named in settings.students), *(teachers if settings.trains_teachers else [])]


def distill(settings: DistillSettings, *, resume: bool) -> DistillResult:
    """The whole job, from photographs to model.pt and the one evaluation on the test split."""
    run = RunDir(settings.out)
    dataset = on_main(lambda: _frozen(settings, run, resume=resume))
    models: dict[str, list[Path]] = {}
    combinations: dict[str, Combination] = {}
    labels = settings.soft_labels
    if settings.trains_teachers:
        labels = train_teachers(settings.teacher, dataset, run, resume=resume, ensemble=settings.ensemble)
        models, combinations = on_main(lambda: _teacher_models(settings, run, dataset))
    if labels is not None:
        on_main(lambda: _look_for_noisy_labels(run, dataset, labels))
    outputs: dict[str, Path] = {}
    for student in settings.students:
        found = _train(settings, student, dataset, run, soft_labels=labels, resume=resume)
        models |= {name: [path] for name, path in found.items()}
        outputs[student.label] = next(iter(found.values()))
    device = settings.student.device
    path = on_main(lambda: evaluate_test(run, dataset, models, combinations=combinations, device=device))
    return DistillResult(run.model, outputs, read_json(path, format=EVALUATION_FORMAT))


def _teacher_models(
    settings: DistillSettings, run: RunDir, dataset: Dataset
) -> tuple[dict[str, list[Path]], dict[str, Combination]]:
    """What the evaluation calls 'teacher': the mean over the folds, of several architectures the blend of their means."""
    labels = settings.ensemble.labels
    files = [
        [run.teacher(fold, folder) / "model.pt" for fold in range(dataset.fold_count)]
        for folder in _architectures(settings)
    ]
    blend = read_blend(run)
    if blend is None:
        return {"teacher": files[0]}, {}
    names = tuple(f"teacher-{label}" for label in labels)
    return dict(zip(names, files, strict=True)), {"teacher": Combination(names, blend)}


def _train(
    settings: DistillSettings,
    student: NamedStudent,
    dataset: Dataset,
    run: RunDir,
    *,
    soft_labels: Path | None,
    resume: bool,
) -> dict[str, Path]:
    """One student, then its hard-label baseline where it is wanted; their names in the evaluation and their files.

    Without distillation the hard-label student is the run's model; else it stands beside it to be compared.
    """
    first, label = student.label == settings.label, student.label
    kind = "student" if student.settings.distillation else "hard_label_student"
    end, place = "" if first else f"-{label}", place_of(settings, student, run)
    out = place.out
    train_student(student.settings, dataset, run, soft_labels=soft_labels, out=out, resume=resume, folder=place.folder)
    if first and settings.others:
        on_main(lambda: _copy_of(run.model, run.model_of(label)))
    found = {f"{kind}{end}": out}
    if settings.has_baseline(student):
        hard = dataclasses.replace(student.settings, distillation=False)
        out = place.hard_folder / "model.pt"
        train_student(hard, dataset, run, soft_labels=None, out=out, resume=resume, folder=place.hard_folder)
        found[f"hard_label_student{end}"] = out
    return found


def _copy_of(model: Path, target: Path) -> None:
    """model.pt under the first student's own name too."""
    if target.exists() and sha256_file(target) == sha256_file(model):
        return
    with atomic_path(target) as temporary:
        shutil.copyfile(model, temporary)
