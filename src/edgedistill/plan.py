"""What ``distill --dry-run`` says: the steps, and about how long, how much memory and how much disk each takes.

Times come from a few training steps of the real networks on this machine; nothing is written.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from torch import nn

from edgedistill import console
from edgedistill.artifacts import RunDir
from edgedistill.data.manifest import SPLITS, Dataset
from edgedistill.data.soft_label_store import label_bytes, parse_store
from edgedistill.images import InputSpec
from edgedistill.pipeline import DistillSettings, NamedStudent, place_of, rehearse
from edgedistill.student.live_teachers import find_teachers
from edgedistill.teacher import TeacherSettings
from edgedistill.training.checkpoints import read_settings
from edgedistill.training.depthwise import quick_depthwise
from edgedistill.training.fixres import deployed_spec
from edgedistill.training.loader import is_jpeg, prepared_spec, store_budget, store_bytes
from edgedistill.training.loop import VALIDATION_IMAGES
from edgedistill.training.models import create_model, input_spec_for
from edgedistill.training.optimizers import make_optimizer
from edgedistill.training.processes import Part
from edgedistill.training.settings import TrainSettings, choose_device
from edgedistill.training.views import views_of

TRIAL_STEPS = 3
TRIAL_BATCH = 16
PARTS = 2  # what is asked by parts, so that a kill costs one of them, lies there twice when they are joined
FORWARD_SHARE = 0.35  # of a training step: measured 0.3 to 0.4 for MobileNetV3-small and EfficientNet on two cores


@dataclass(frozen=True)
class PlanStep:
    """One step; ``images`` counts every image each time that it passes through a network."""

    step: str
    images: int
    minutes: float
    memory_mib: int
    disk_mib: int


@dataclass(frozen=True)
class Plan:
    """``splits``: images in train, val and test. ``steps``: in the order in which they run."""

    splits: dict[str, int]
    classes: int
    steps: tuple[PlanStep, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def table(self) -> Any:
        rows = [
            [step.step, step.images, f"{step.minutes:.1f}", step.memory_mib, step.disk_mib]
            for step in (*self.steps, self.total())
        ]
        splits = ", ".join(f"{count} {name}" for name, count in self.splits.items())
        title = f"{self.classes} classes; {splits} images; nothing was written"
        return console.table(title, ("step", "images through it", "minutes, about", "memory MiB", "disk MiB"), rows)

    def total(self) -> PlanStep:
        return PlanStep(
            "all",
            sum(step.images for step in self.steps),
            sum(step.minutes for step in self.steps),
            max(step.memory_mib for step in self.steps),
            sum(step.disk_mib for step in self.steps),
        )


@dataclass(frozen=True)
class _Cost:
    """Of one network: seconds of a training step per image, megabytes of its weights and of a training batch."""

    seconds_per_image: float
    weights_mib: float
    batch_mib: float


@dataclass(frozen=True, eq=False)
class _Work:
    """What all steps look at. ``unlabelled``: how many images without labels, by student; ``processes``: that share the
    memory."""

    settings: DistillSettings
    dataset: Dataset
    unlabelled: dict[str, int]
    processes: int

    @property
    def run(self) -> RunDir:
        return RunDir(self.settings.out)

    @property
    def classes(self) -> int:
        return len(self.dataset.outputs)

    @cached_property
    def counts(self) -> dict[str, int]:
        return {split: len(self.dataset.rows(split)) for split in SPLITS}

    @cached_property
    def jpeg(self) -> npt.NDArray[np.bool_]:
        return is_jpeg(self.dataset.paths)

    @cached_property
    def judges(self) -> list[TeacherSettings]:
        return _judges(self.settings, self.dataset)

    @property
    def validated(self) -> int:
        """Images of val that each epoch looks at, which stay decoded."""
        return min(self.counts["val"], VALIDATION_IMAGES)

    @property
    def evaluation_bytes(self) -> int:
        """What one network says of test."""
        return 4 * self.counts["test"] * self.classes


def make_plan(settings: DistillSettings, *, resume: bool = False, processes: int = 1) -> Plan:
    """Reads and splits the data as the run in so many ``processes`` would; raises what that would raise before its first
    training. Of a run that is resumed, what remains. Times and memory are those of one process."""
    rehearsal = rehearse(settings, resume=resume, this=Part(0, processes, processes) if processes > 1 else None)
    work = _Work(settings, rehearsal.dataset, rehearsal.unlabelled, processes)
    steps = []
    if settings.trains_teachers:
        steps += [_teachers(work, "", settings.teacher)]
        steps += [_teachers(work, other.label, other.settings) for other in settings.ensemble.others]
    asked: set[tuple[str, object]] = set()
    for student in settings.students:
        steps += _asking(work, student, asked)
        steps += _students(work, student, asked)
    return Plan(work.counts, work.classes, tuple(steps))


def _judges(settings: DistillSettings, dataset: Dataset) -> list[TeacherSettings]:
    """The architectures that a student's networks of teachers have: new ones, or those of --soft-labels."""
    if settings.soft_labels is None:
        return [settings.teacher, *(other.settings for other in settings.ensemble.others)]
    if not any(named.settings.distillation and named.settings.needs_teachers for named in settings.students):
        return []
    names = {field.name for field in fields(TeacherSettings)}
    found = {}
    for teacher in find_teachers(settings.soft_labels, dataset):
        saved = {key: value for key, value in read_settings(teacher.path).items() if key in names}
        found[saved.get("name"), saved.get("image_size")] = TeacherSettings(**saved)
    return list(found.values())


def _asking(work: _Work, named: NamedStudent, asked: set[tuple[str, object]]) -> list[PlanStep]:
    """What the teachers of all folds are asked once before a student learns: photographs without labels, and val for their
    temperatures. ``asked``: what they were before, for another student."""
    student, dataset = named.settings, work.dataset
    wanted = []
    if student.distillation and student.unlabelled:
        count = work.unlabelled.get(named.label, 0)
        wanted.append(("labelling the unlabelled", student.unlabelled, count, 4 * count * work.classes))
    if student.distillation and student.calibrate_soft_labels:
        wanted.append(("calibrating the teachers", "", work.counts["val"], 0))
    steps = []
    for name, what, count, answers in wanted:
        known = (name, what) in asked or place_of(work.settings, named, work.run).out.exists()
        asked.add((name, what))
        if known:
            continue
        costs = [(_measure(teacher, work.classes), len(views_of(teacher.tta))) for teacher in work.judges]
        passes = count * dataset.fold_count
        seconds = sum(FORWARD_SHARE * cost.seconds_per_image * passes * views for cost, views in costs)
        largest = max((cost for cost, _ in costs), key=lambda cost: cost.batch_mib)
        images = passes * sum(views for _, views in costs)
        steps.append(_step(name, images, seconds, largest, disk_bytes=PARTS * answers))
    return steps


def _teachers(work: _Work, label: str, teacher: TeacherSettings) -> PlanStep:
    """One architecture in all folds; ``label``: as their folders have it. The last one's step writes the soft labels."""
    cost, dataset, counts = _measure(teacher, work.classes), work.dataset, work.counts
    folds, held_out = dataset.fold_count, len(dataset.held_out_rows)
    left = sum(not (work.run.teacher(fold, label) / "fold.json").exists() for fold in range(folds))
    epochs, views, fold_size = teacher.total_epochs, len(views_of(teacher.tta)), held_out / folds
    trained = epochs * left * (counts["train"] - fold_size)
    looked_at = left * (fold_size * views + epochs * work.validated) + folds * counts["test"] * views
    seconds = cost.seconds_per_image * (trained + FORWARD_SHARE * looked_at)
    disk = work.evaluation_bytes
    pictures = 0.0
    if left:
        others, id_bytes = work.settings.ensemble.others, dataset.ids.itemsize
        # Each fold's model stays; the fold under way also has a checkpoint with two moments per weight.
        disk += round(cost.weights_mib * 2**20 * (left + 3) + left * fold_size * (4 * work.classes + id_bytes))
        if label == (others[-1].label if others else ""):
            kind = parse_store(work.settings.teacher.soft_label_store)
            disk += held_out * (label_bytes(kind, work.classes, dataset.task) + id_bytes)
            disk += work.evaluation_bytes if others else 0  # of their combination
        pictures = _pictures_mib(work, teacher, work.jpeg[dataset.rows("train")], _pixels(teacher))
    name = f"{folds} teachers" if left == folds else f"{left} of {folds} teachers"
    images = round(trained + looked_at)
    return _step(f"{name}, {teacher.name}", images, seconds, cost, disk_bytes=disk, pictures_mib=pictures)


def _students(work: _Work, named: NamedStudent, asked: set[tuple[str, object]]) -> list[PlanStep]:
    """One student and its hard-label baseline where it has one: the same budget. ``asked``: for which sizes of fixed views
    teachers were, for another student."""
    student, place = named.settings, place_of(work.settings, named, work.run)
    cost = _measure(student, work.classes)
    steps = [_training(work, named, cost, out=place.out, asked=asked)]
    if work.settings.has_baseline(named):
        hard = NamedStudent(named.label, replace(student, distillation=False))
        steps.append(_training(work, hard, cost, out=place.hard_folder / "model.pt", asked=asked))
    return steps


def _training(work: _Work, named: NamedStudent, cost: _Cost, *, out: Path, asked: set[tuple[str, object]]) -> PlanStep:
    """Of one student, whose model.pt is ``out``: what remains of its lesson and training, and what it says of test."""
    student, counts = named.settings, work.counts
    name = f"{'student' if student.distillation else 'hard-label student'}, {named.label or student.name}"
    # The first one's answers have the majority's beside them.
    disk = work.evaluation_bytes * (2 if out == work.run.model else 1)
    splits = ("train",) if student.final_data == "train" else ("train", "val")
    jpeg, loaded, fixed = work.jpeg[np.isin(work.dataset.splits, splits)], _pixels(student), 0
    if student.distillation:
        jpeg = np.concatenate([jpeg, np.ones(work.unlabelled.get(named.label, 0), bool)])  # at most: frames are PNG
    if student.distillation and (student.live_teachers or student.views):
        loaded = loaded.covering(deployed_spec(judge, _pixels(judge)) for judge in work.judges)
        fixed = 0 if ("views", loaded) in asked else student.views * len(jpeg)
        asked.add(("views", loaded))
    if out.exists():
        seconds = FORWARD_SHARE * cost.seconds_per_image * counts["test"]
        return _step(f"{name}, finished", counts["test"], seconds, cost, disk_bytes=disk)
    epochs = student.total_epochs
    trained = epochs * counts["train"]
    looked_at = epochs * work.validated + counts["test"] + counts["train"]
    seconds = cost.seconds_per_image * (trained + FORWARD_SHARE * looked_at)
    judged = trained if student.distillation and student.live_teachers else fixed
    if judged:
        per_image = sum(_measure(judge, work.classes).seconds_per_image for judge in work.judges)
        seconds += FORWARD_SHARE * judged * per_image
    disk += fixed * (PARTS * 2 * work.classes + 8)  # float16, and the seed of each view
    disk += round(5 * cost.weights_mib * 2**20)  # model.pt, its copy, and a checkpoint with two moments per weight
    pictures = _pictures_mib(work, student, jpeg, loaded)
    return _step(name, trained + looked_at, seconds, cost, disk_bytes=disk, pictures_mib=pictures)


def _pixels(settings: TrainSettings) -> InputSpec:
    """At which a network is trained."""
    return input_spec_for(settings.name, settings.image_size, resize=settings.resize)


def _pictures_mib(work: _Work, settings: TrainSettings, jpeg: npt.NDArray[np.bool_], loaded: InputSpec) -> float:
    """Images that stay decoded while a network learns: the store of its images (``jpeg``: bool [N], as the loader makes
    ``loaded`` of them), a second one for fine-tuning at another size, each if it is granted, and val."""
    specs = [prepared_spec(loaded)]
    if settings.fine_tunes:
        specs.append(deployed_spec(settings, loaded).covering([loaded]))
    budget = store_budget(settings.cache_gib, work.processes)
    stores = [needed for needed in (store_bytes(jpeg, spec) for spec in specs) if needed <= budget]
    return (sum(stores) + work.validated * 3 * settings.image_size**2) / 2**20


def _step(
    name: str, images: int, seconds: float, cost: _Cost, *, disk_bytes: int, pictures_mib: float = 0.0
) -> PlanStep:
    memory = psutil.Process().memory_info().rss / 2**20 + 4 * cost.weights_mib + cost.batch_mib + pictures_mib
    return PlanStep(name, images, round(seconds / 60, 2), round(memory), max(1, round(disk_bytes / 2**20)))


def _measure(settings: TrainSettings, classes: int) -> _Cost:
    """Some training steps on noise, the first left out."""
    device = choose_device(settings.device)
    model = create_model(settings.name, pretrained=None, **settings.network(classes)).to(device)
    optimizer = make_optimizer(model, settings)
    batch = min(TRIAL_BATCH, settings.batch_size)
    shape = (batch, 3, settings.image_size, settings.image_size)
    images = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
    labels = torch.zeros(batch, dtype=torch.long, device=device)
    started = 0.0
    for step in range(TRIAL_STEPS + 1):
        if step == 1:
            _wait(device)
            started = time.perf_counter()
        with quick_depthwise(device):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _wait(device)
    seconds = (time.perf_counter() - started) / TRIAL_STEPS / batch
    weights_mib = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()) / 2**20
    return _Cost(seconds, weights_mib, _activations_mib(model, images) * settings.batch_size / batch)


def _activations_mib(model: nn.Module, images: torch.Tensor) -> float:
    """What autograd keeps of one batch, in MiB."""
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        model(images)
    return kept / 2**20


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
