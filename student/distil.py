"""A small student learns from labels and stored soft labels, is averaged, and becomes model.pt.

The same function trains the student without distillation under the same budget. Files: student/ (or
student-hard-labels/) with checkpoint.pt and metrics.jsonl, and model.pt, which loads with plain timm (see
training/checkpoints.py).
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgedistill import calibration, console
from edgedistill.artifacts import RunDir, settings_dict
from edgedistill.data.manifest import Dataset
from edgedistill.data.soft_label_store import SoftRows
from edgedistill.errors import DataError, UsageError
from edgedistill.images import InputSpec
from edgedistill.student.calibration import calibrated_rows, teacher_temperatures
from edgedistill.student.live_teachers import LiveTeachers, TeacherFile, find_teachers, open_teachers
from edgedistill.student.unlabelled import (
    MixedDraw,
    Unlabelled,
    choose,
    find_images,
    is_readable,
    joined,
    label_images,
    takes_class_cap,
    unlabelled_targets,
    without_known,
    without_like_test,
)
from edgedistill.student.views import open_views
from edgedistill.tasks import Task
from edgedistill.training.checkpoints import read_identity, read_input_spec, read_model, read_settings, write_model
from edgedistill.training.fixres import adapt, deployed_spec
from edgedistill.training.heads import make_task_targets
from edgedistill.training.loader import Draw, Views, open_store, prepared_spec
from edgedistill.training.loop import Job, open_validation, train, trains_in_half
from edgedistill.training.losses import HardLoss, LossName, LossSettings, TargetSource, targets_of
from edgedistill.training.models import create_model, input_spec_for, locate_weights, model_kwargs_for, resolve_name
from edgedistill.training.noisy_labels import find_noisy_labels, rows_to_drop
from edgedistill.training.optimizers import Phase, make_phases
from edgedistill.training.predict import BATCH_NORM_IMAGES, predict_logits, reestimate_batch_norm
from edgedistill.training.processes import Part, alone_in, on_main, part
from edgedistill.training.seeds import derive
from edgedistill.training.settings import (
    TrainSettings,
    choose_device,
    identity,
    refuse_other_settings,
    refuse_other_wishes,
)
from edgedistill.training.soft_labels import ids_hash, read_folds, soft_labels_hash, soft_rows

# Function matching: the teacher's answer alone, softened. Beyer et al., 2106.05237, found T of 1 to 5 about equal.
LIVE_DEFAULTS: dict[str, Any] = {"loss": "kl", "soft_weight": 1.0, "soft_temperature": 2.0}


def live_defaults(loss: str | None) -> dict[str, Any]:
    """LIVE_DEFAULTS that go with the ``loss`` that is asked for: cross-entropy softens no answer, and so no target."""
    return LIVE_DEFAULTS | ({"soft_temperature": 1.0} if loss == "ce" else {})


@dataclass(frozen=True, kw_only=True)
class StudentSettings(TrainSettings):
    """TrainSettings with the contest recipe's defaults.

    ``distillation`` False trains on hard labels alone under the same budget. ``soft_weight``: share of the soft labels.
    ``live_teachers``: the soft labels are what each image's held-out teachers say of the student's own augmented and
    mixed view (function matching); LIVE_DEFAULTS go well with it. ``calibrate_soft_labels``: each teacher at the
    temperature that fits val. ``drop_noisy``: leave out the training images whose labels look most wrong to their
    held-out teachers, at most this share. ``final_data`` 'train+val' gives the averaged epochs the val images too; then
    no temperature is fitted, since nothing is left to fit it on.
    ``views``: as ``live_teachers`` for so many views per image, fixed beforehand and labelled once; the student trains
    on just these. ``unlabelled``: a folder of images and videos without labels ('': none), labelled by all teachers
    together, ``unlabelled_share`` of each batch; only answers of at least ``unlabelled_min_confidence`` (in every head),
    of no class more than ``unlabelled_class_cap`` times the mean over classes (of no joint answer of several heads; no cap
    where several labels apply), of a video every ``unlabelled_frame_step``-th frame (see student.unlabelled).
    """

    role: ClassVar[str] = "student"

    name: str = "mbv3s"
    epochs: int = 20
    batch_size: int = 256
    lr: float = 2e-3
    distillation: bool = True
    loss: LossName = "ce"
    soft_weight: float = 0.2
    soft_temperature: float = 1.0
    extra_epochs: int = 4
    final_data: Literal["train", "train+val"] = "train"
    live_teachers: bool = False
    calibrate_soft_labels: bool = False
    drop_noisy: float = 0.0
    views: int = 0
    unlabelled: str = ""
    unlabelled_share: float = 0.5
    unlabelled_min_confidence: float = 0.5
    unlabelled_class_cap: float = 3.0
    unlabelled_frame_step: int = 30

    @property
    def needs_teachers(self) -> bool:
        """Whether the teachers' networks are needed, not what they stored alone."""
        return bool(self.live_teachers or self.views or self.calibrate_soft_labels or self.unlabelled)

    def contradictions(self) -> list[tuple[bool, str]]:
        return [
            *super().contradictions(),
            (
                self.hard_loss == "bce" and self.loss != "ce" and self.distillation and 0 < self.soft_weight < 1,
                f"--hard-loss bce trains sigmoids and --loss {self.loss} compares softmax probabilities; give --loss ce",
            ),
            (
                self.live_teachers and self.views > 0,
                f"--live-teachers judge every view anew and --views {self.views} fixes them; give one of them",
            ),
            (
                self.hard_loss == "ldam" and bool(self.unlabelled) and self.distillation and self.soft_weight < 1,
                "--hard-loss ldam needs one true class per image, and unlabelled images have none; give --hard-loss ce",
            ),
            (
                self.final_data == "train+val" and not (self.extra_epochs or self.swa_start),
                "--final-data train+val is for the last, averaged epochs, and there are none; give --extra-epochs 4, or "
                "--final-data train",
            ),
        ]

    def only_with(self) -> list[tuple[tuple[str, ...], bool, str]]:
        photographs = ("unlabelled_share", "unlabelled_min_confidence", "unlabelled_class_cap", "unlabelled_frame_step")
        hard = not self.distillation  # without teachers by choice: the command line tells whoever gave their options
        return [
            *super().only_with(),
            (photographs, hard or bool(self.unlabelled), "photographs: give --unlabelled FOLDER"),
            (("loss", "soft_temperature"), hard or self.soft_weight > 0, "--soft-weight above 0"),
        ]

    def doubts(self, known: Collection[tuple[str, Any]] = ()) -> list[str]:
        found = super().doubts(known)
        sigmoids = self.loss == "ce" and self.hard_loss == "bce" and self.class_weights == "none"  # against soft labels
        if self.distillation and self.soft_weight == 1 and not sigmoids:
            asked = {
                f"--hard-loss {self.hard_loss}": self.hard_loss != "ce",
                f"--class-weights {self.class_weights}": self.class_weights != "none",
                f"--label-smoothing {self.label_smoothing:g}": self.label_smoothing > 0,
            }
            flags = [flag for flag, given in asked.items() if given]
            if flags:
                found.append(
                    f"{', '.join(flags)}: for labels, and this student learns from soft labels alone (--soft-weight 1); "
                    "teachers and hard-label students heed it"
                )
        if self.distillation and self.loss == "ce" and self.soft_weight > 0 and self.soft_temperature != 1:
            found.append(
                f"--loss ce with --soft-temperature {self.soft_temperature:g} softens the target and not the answer, which is "
                "then as unsure as that; give --loss kl, which softens both, or --soft-temperature 1"
            )
        if self.distillation and self.soft_weight == 0 and not self.unlabelled:
            found.append("--soft-weight 0 leaves the soft labels no say; --no-distillation trains no teachers for them")
        return found

    def checks(self) -> list[tuple[str, bool, str]]:
        return [
            *super().checks(),
            ("loss", self.loss in ("ce", "kl", "js"), "ce, kl or js"),
            ("soft_weight", 0 <= self.soft_weight <= 1, "0 to 1"),
            ("soft_temperature", 0 < self.soft_temperature <= 100, "above 0, at most 100"),
            ("live_teachers", not self.live_teachers or self.soft_weight > 0, "--soft-weight above 0 to go with it"),
            ("views", 0 <= self.views <= 10_000, "0 (none) to 10,000"),
            ("views", not self.views or self.soft_weight > 0, "--soft-weight above 0 to go with it"),
            ("drop_noisy", 0 <= self.drop_noisy <= 0.5, "a share of the training images, 0 to 0.5"),
            ("unlabelled_share", 0 < self.unlabelled_share < 1, "a share of the batch, above 0 and below 1"),
            ("unlabelled_min_confidence", 0 <= self.unlabelled_min_confidence <= 1, "a probability, 0 to 1"),
            ("unlabelled_class_cap", self.unlabelled_class_cap >= 1, "1 or more times the mean over classes"),
            ("unlabelled_frame_step", self.unlabelled_frame_step >= 1, "1 or more frames"),
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

    ``soft_labels``: the folder that the teachers wrote; not read when ``settings.distillation`` is False. Where their
    networks are needed they are found in teacher/ beside it. Work in progress lies in ``folder``: by default
    run.student, or run.hard_label_student without distillation. Every process of a launch calls it (see
    training.processes). Raises UsageError if there is work already and ``resume`` is False, ArtifactError if that work or
    the soft labels belong to other settings or data, ImageError for a damaged image, DataError for unlabelled images that
    may not be used.
    """
    settings.refuse_for(dataset.task)
    refuse_several_processes(settings)
    device = choose_device(settings.device)
    folder = folder or (run.student if settings.distillation else run.hard_label_student)
    on_main(lambda: _refuse_existing_work(out, resume=resume))
    lesson = _lesson(settings, dataset, soft_labels, device=device, cache=run.root)
    spec = input_spec_for(settings.name, settings.image_size, resize=settings.resize)
    loaded = _loaded(settings, spec, lesson)
    wanted = _identity(settings, dataset, lesson, loaded if loaded != spec else None)
    if on_main(lambda: _is_done(out, wanted)):
        return out
    deployed_spec(settings, spec)  # refused before images are read where the network cannot change its size
    with alone_in(folder):
        if on_main(lambda: _is_done(out, wanted)):  # by another process, for which this one waited
            return out
        job = _job(settings, dataset, spec, lesson, loaded=loaded, folder=folder, wanted=wanted)
        if settings.distillation and settings.live_teachers:
            job = dataclasses.replace(job, judge=_judge(settings, dataset, lesson, device))
        if settings.distillation and settings.views:
            job = dataclasses.replace(job, views=_views(settings, dataset, lesson, job, device=device, root=run.root))
        network = settings.network(len(dataset.outputs))
        torch.manual_seed(derive(settings.seed, "initial weights"))
        weights = on_main(lambda: locate_weights(settings.name, settings.weights, flag="--student-weights"))
        model = train(job, create_model(settings.name, pretrained=weights, **network), resume=resume)
        model = adapt(job, model, resume=resume)
        on_main(lambda: _finish(settings, dataset, lesson, job, model, out=out))
    return out


def refuse_other_work(settings: StudentSettings, out: Path, folder: Path) -> None:
    """Raises ArtifactError where ``out``, or the checkpoint in ``folder``, was made with other settings: before anything of
    a resumed run is written."""
    if out.exists():
        refuse_other_wishes(out, read_settings(out), settings)
    elif (begun := read_identity(folder)) is not None:
        refuse_other_wishes(*begun, settings)


def refuse_several_processes(settings: StudentSettings, this: Part | None = None) -> None:
    """Raises UsageError where several processes train what one alone can. ``this``: one of them (None: this one)."""
    if settings.distillation and settings.live_teachers and (this or part()).size > 1:
        raise UsageError("--live-teachers judge in one process; start one, or leave them away to train in several")


def _refuse_existing_work(out: Path, *, resume: bool) -> None:
    if out.exists() and not resume:
        raise UsageError(f"{out}: exists already; go on with --resume, or choose another --out")


def _is_done(out: Path, wanted: dict[str, Any]) -> bool:
    if not out.exists():
        return False
    refuse_other_settings(out, read_model(out).settings, wanted, StudentSettings)
    return True


def _finish(
    settings: StudentSettings, dataset: Dataset, lesson: _Lesson, job: Job, model: nn.Module, *, out: Path
) -> None:
    """Batch-norm statistics, temperature and thresholds, model.pt."""
    network, spec = settings.network(len(dataset.outputs)), deployed_spec(settings, job.spec)
    if settings.test_size is None:  # else training.fixres has measured the statistics, and fine-tuned what follows them
        seen = dataset.paths[_final_rows(settings, dataset, lesson)]
        reestimate_batch_norm(
            model, seen, spec, batch_size=settings.batch_size, limit=BATCH_NORM_IMAGES, seed=settings.seed
        )
    fitted = _fitted(settings, dataset, model, spec)
    write_model(
        out,
        model,
        architecture=resolve_name(settings.name),
        model_kwargs=model_kwargs_for(settings.name, **network),
        classes=dataset.outputs,
        input_spec=spec,
        dataset_hash=dataset.hash,
        settings=dict(job.identity),
        temperature=fitted.temperature,
        task=None if dataset.task is None else fitted.task,
        calibration=fitted.calibration,
    )
    shutil.rmtree(job.folder / "fixres", ignore_errors=True)
    job.checkpoint.unlink(missing_ok=True)  # three times the model's size, and nothing is left to resume


@dataclass(frozen=True, eq=False)
class _Lesson:
    """What the teachers left for the student. ``soft``: log-probabilities of rows of the data set; None: hard labels.

    ``folds``: int16 [len(dataset)], which fold's teachers labelled an image. ``dropped``: rows whose labels look wrong.
    ``teachers``: only if their networks are needed; ``temperatures``: by the sha256 of their files, if calibrated;
    ``view_temperatures``: where they judge single views of the student's (the same unless they label by several views).
    ``unlabelled``: follow the labelled rows in the store.
    """

    soft: SoftRows | None = None
    folds: npt.NDArray[np.int16] | None = None
    teachers: tuple[TeacherFile, ...] = ()
    temperatures: dict[str, float] | None = None
    view_temperatures: dict[str, float] | None = None
    dropped: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    unlabelled: Unlabelled | None = None


def _lesson(
    settings: StudentSettings, dataset: Dataset, folder: Path | None, *, device: torch.device, cache: Path
) -> _Lesson:
    if not settings.distillation:
        return _Lesson()
    if folder is None:
        raise UsageError("distillation needs soft labels; train teachers first, or choose --no-distillation")
    soft = soft_rows(folder, dataset)
    folds = read_folds(folder, dataset)
    teachers = tuple(find_teachers(folder, dataset)) if settings.needs_teachers else ()
    temperatures = view_temperatures = None
    if settings.calibrate_soft_labels:
        file = cache / "teacher_temperatures.json"
        temperatures = on_main(lambda: teacher_temperatures(teachers, dataset, cache=file, device=device))
        view_temperatures = temperatures
        if settings.live_teachers or settings.views:
            view_temperatures = on_main(
                lambda: teacher_temperatures(teachers, dataset, cache=file, device=device, one_view=True)
            )
        soft = calibrated_rows(soft, folds, teachers, temperatures, dataset)
    dropped = np.zeros(0, np.int64)
    if settings.drop_noisy:
        dropped = rows_to_drop(find_noisy_labels(dataset, soft), dataset, settings.drop_noisy)
        console.note(f"--drop-noisy: {len(dropped)} of {len(dataset.rows('train'))} training images are left out")
    lesson = _Lesson(soft, folds, teachers, temperatures, view_temperatures, dropped)
    if not settings.unlabelled:
        return lesson
    return dataclasses.replace(lesson, unlabelled=_unlabelled(settings, dataset, lesson, device=device, cache=cache))


def find_unlabelled(
    settings: StudentSettings, dataset: Dataset, cache: Path
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.bytes_]]:
    """Paths and hashes of the images in ``settings.unlabelled`` that no split holds and no test image looks like; frames of
    videos are written below ``cache``.

    Raises UsageError or DataError when the folder cannot be used, above all when it holds a test image.
    """
    frames = cache / "unlabelled" / "frames"
    folder, step = Path(settings.unlabelled), settings.unlabelled_frame_step
    paths, digests = without_known(find_images(folder, frames=frames, frame_step=step), dataset)
    if not len(paths):
        raise DataError(f"--unlabelled {settings.unlabelled}: every image is in the train or val split already")
    paths, digests = without_like_test(paths, digests, dataset, cache=cache / "unlabelled")
    if not any(is_readable(path) for path in paths):
        raise DataError(f"--unlabelled: none of the {len(paths)} images can be read, first {paths[0]}")
    return paths, digests


def _unlabelled(
    settings: StudentSettings, dataset: Dataset, lesson: _Lesson, *, device: torch.device, cache: Path
) -> Unlabelled:
    paths, digests = on_main(lambda: find_unlabelled(settings, dataset, cache))
    labelled = on_main(
        lambda: label_images(
            paths,
            digests,
            lesson.teachers,
            dataset,
            cache=cache / "unlabelled",
            device=device,
            half=trains_in_half(settings, device),
            temperatures=lesson.temperatures,
        )
    )
    if not takes_class_cap(dataset.task) and settings.unlabelled_class_cap != StudentSettings.unlabelled_class_cap:
        console.warn(
            f"--unlabelled-class-cap {settings.unlabelled_class_cap:g} changes nothing: with several labels per image no "
            "one answer can crowd out the others"
        )
    return choose(
        labelled,
        min_confidence=settings.unlabelled_min_confidence,
        class_cap=settings.unlabelled_class_cap,
        seed=settings.seed,
        task=dataset.task,
    )


def _judge(settings: StudentSettings, dataset: Dataset, lesson: _Lesson, device: torch.device) -> LiveTeachers:
    half = trains_in_half(settings, device)
    teachers = open_teachers(lesson.teachers, dataset, device=device, half=half, temperatures=lesson.view_temperatures)
    if lesson.folds is None:
        raise UsageError("live teachers need soft labels: their folds say who may judge which image")
    folds = lesson.folds[_final_rows(settings, dataset, lesson)]
    nobodys = np.full(0 if lesson.unlabelled is None else len(lesson.unlabelled), -1, np.int16)
    return LiveTeachers(teachers, np.concatenate([folds, nobodys]), settings.soft_temperature, dataset.task)


def _views(
    settings: StudentSettings, dataset: Dataset, lesson: _Lesson, job: Job, *, device: torch.device, root: Path
) -> Views:
    unlabelled = "" if lesson.unlabelled is None else lesson.unlabelled.hash
    wanted = {
        "images": ids_hash(dataset.ids[_final_rows(settings, dataset, lesson)]) + unlabelled,
        "dataset_hash": dataset.hash,
        "augmentation": settings_dict(settings.augment_settings()),
        "input_spec": job.pixels.to_dict(),
        "teachers": [
            [t.sha256, t.weight, (lesson.view_temperatures or {}).get(t.sha256, 1.0)] for t in lesson.teachers
        ],
    }
    seed = derive(settings.seed, "student")
    return open_views(
        job.store,
        job.augment,
        lambda: dataclasses.replace(_judge(settings, dataset, lesson, device), temperature=1.0),
        count=settings.views,
        seed=seed,
        wanted=wanted,
        root=root / "views",
        device=device,
        task=dataset.task,
    )


def _loaded(settings: StudentSettings, spec: InputSpec, lesson: _Lesson) -> InputSpec:
    """The pixels that the loader makes: no less detailed than any teacher that judges them expects."""
    if not (settings.distillation and (settings.live_teachers or settings.views)):
        return spec
    return spec.covering(read_input_spec(teacher.path) for teacher in lesson.teachers)


def _identity(
    settings: StudentSettings, dataset: Dataset, lesson: _Lesson, larger_views: InputSpec | None
) -> dict[str, Any]:
    """What the student's weights depend on beyond its settings."""
    labels = "" if lesson.soft is None else soft_labels_hash(lesson.soft, dataset)
    more: dict[str, Any] = {"soft_labels": labels}
    if lesson.teachers and (settings.live_teachers or settings.views):
        more["teachers"] = [teacher.sha256 for teacher in lesson.teachers]
        if lesson.view_temperatures is not None:
            more["teacher_temperatures"] = [lesson.view_temperatures[teacher.sha256] for teacher in lesson.teachers]
    if settings.views and settings.fine_tunes and dataset.task is None:
        more["fine_tuned_on"] = "soft labels"  # before, on the hard ones
    if larger_views is not None:
        more["view_size"] = [larger_views.height, larger_views.width]
    if len(lesson.dropped):
        more["dropped"] = len(lesson.dropped)
    if lesson.unlabelled is not None:
        more["unlabelled_images"] = len(lesson.unlabelled)
        more["unlabelled_sha256"] = lesson.unlabelled.hash
    trained_on = ids_hash(dataset.ids[_train_rows(dataset, lesson)])
    return identity(settings, task=dataset.task, dataset_hash=dataset.hash, trained_on=trained_on, **more)


def _train_rows(dataset: Dataset, lesson: _Lesson) -> npt.NDArray[np.int64]:
    """Rows of the data set that the first epochs see."""
    return np.setdiff1d(dataset.rows("train"), lesson.dropped)


def _final_rows(settings: StudentSettings, dataset: Dataset, lesson: _Lesson) -> npt.NDArray[np.int64]:
    """Rows of the data set that the last epochs see."""
    splits = ("train",) if settings.final_data == "train" else ("train", "val")
    return np.setdiff1d(np.flatnonzero(np.isin(dataset.splits, splits)), lesson.dropped)


def _job(
    settings: StudentSettings,
    dataset: Dataset,
    spec: InputSpec,
    lesson: _Lesson,
    *,
    loaded: InputSpec,
    folder: Path,
    wanted: dict[str, Any],
) -> Job:
    rows = _final_rows(settings, dataset, lesson)
    if not len(dataset.rows("train")):
        raise DataError("the data set has no training images; freeze it again")
    targets, paths = _targets(settings, dataset, rows, lesson), dataset.paths[rows]
    if lesson.unlabelled is not None:
        targets = joined(targets, unlabelled_targets(lesson.unlabelled, settings.soft_temperature, dataset.task))
        paths = np.concatenate([paths, lesson.unlabelled.paths])
    return Job(
        title=folder.name.replace("-hard-labels", ", hard labels"),
        folder=folder,
        settings=settings,
        identity=wanted,
        store=open_store(paths, prepared_spec(loaded), cache_gib=settings.cache_gib),
        targets=targets,
        phases=_phases(settings, dataset, rows, unlabelled=np.arange(len(rows), len(paths))),
        loss=LossSettings(
            settings.loss,
            settings.soft_weight if settings.distillation else 0.0,
            settings.soft_temperature,
            _hard_loss(settings, dataset, _train_rows(dataset, lesson)),
        ),
        spec=spec,
        augment=settings.augmentation(loaded),
        loaded=loaded,
        validation=open_validation(dataset, spec, seed=settings.seed),
        task=dataset.task,
    )


def _hard_loss(settings: StudentSettings, dataset: Dataset, rows: npt.NDArray[np.int64]) -> HardLoss:
    if dataset.task is not None and dataset.values is not None:
        return settings.loss_against_heads(dataset.task, dataset.values[rows])
    return settings.loss_against(dataset.labels[rows], len(dataset.class_names))


def _targets(settings: StudentSettings, dataset: Dataset, rows: npt.NDArray[np.int64], lesson: _Lesson) -> TargetSource:
    temperature, smoothing = settings.soft_temperature, settings.label_smoothing
    if dataset.task is not None and dataset.values is not None:
        chosen, values = None if lesson.soft is None else lesson.soft.rows(rows), dataset.values[rows]
        return make_task_targets(
            dataset.task, values, soft_scores=chosen, temperature=temperature, label_smoothing=smoothing
        )
    # Judged views need nothing that is stored of the plain images; fine-tuning at another size does, after fixed views.
    judged = settings.live_teachers or (settings.views and not settings.fine_tunes)
    return targets_of(
        dataset.labels[rows],
        len(dataset.class_names),
        soft=None if judged else lesson.soft,
        soft_rows=rows,
        temperature=temperature,
        label_smoothing=smoothing,
    )


def _phases(
    settings: StudentSettings,
    dataset: Dataset,
    store_rows: npt.NDArray[np.int64],
    *,
    unlabelled: npt.NDArray[np.int64],
) -> tuple[Phase, ...]:
    """The epochs on train, then those whose weights are averaged, on all labelled rows of the store; the unlabelled ones
    join the batches of both."""
    train_rows = np.flatnonzero(dataset.splits[store_rows] == "train")

    def draw(rows: npt.NDArray[np.int64]) -> Draw:
        labels, weights = settings.sampling(dataset, store_rows[rows])
        plain = Draw(
            rows=rows,
            labels=labels,
            batch_size=min(settings.batch_size, len(train_rows)),
            balanced=settings.balanced_sampling,
            seed=derive(settings.seed, "student"),
            weights=weights,
        )
        if not len(unlabelled):
            return plain
        return MixedDraw(**vars(plain), unlabelled=unlabelled, share=settings.unlabelled_share)

    return make_phases("student", settings, draw(train_rows), last=draw(np.arange(len(store_rows))))


def _fitted(settings: StudentSettings, dataset: Dataset, model: nn.Module, spec: InputSpec) -> calibration.Fitted:
    """On val, which must be unseen for that: one temperature for all heads together, a threshold for each label of
    several."""
    task = dataset.task or Task.single(dataset.class_names)
    val = dataset.rows("val")
    if settings.final_data == "train+val":
        console.note("temperature 1.0, not fitted: the last epochs trained on val (--final-data train+val)")
        return calibration.Fitted(task)
    if not len(val):
        console.note("temperature 1.0, not fitted: the data set has no val split")
        return calibration.Fitted(task)
    logits = predict_logits(model, dataset.paths[val], spec, batch_size=settings.batch_size)
    truth = dataset.labels[:, None].astype(np.float32) if dataset.values is None else dataset.values
    return calibration.fit(task, logits, truth[val])
