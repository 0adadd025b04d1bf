"""What ``distill --dry-run`` says: the steps, and about how long, how much memory and how much disk each takes.

Times come from a few training steps of the real networks on this machine; nothing is written.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import psutil
import torch
from torch import nn

from edgedistill import console
from edgedistill.data.manifest import Dataset
from edgedistill.pipeline import DistillSettings, NamedStudent, Rehearsal, rehearse
from edgedistill.student.live_teachers import find_teachers
from edgedistill.teacher import TeacherSettings
from edgedistill.training.checkpoints import read_settings
from edgedistill.training.depthwise import quick_depthwise
from edgedistill.training.models import create_model
from edgedistill.training.optimizers import make_optimizer
from edgedistill.training.processes import Part
from edgedistill.training.settings import TrainSettings, choose_device
from edgedistill.training.views import views_of

TRIAL_STEPS = 3
TRIAL_BATCH = 16
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


def make_plan(settings: DistillSettings, *, resume: bool = False, processes: int = 1) -> Plan:
    """Reads and splits the data as the run in so many ``processes`` would; raises what that would raise before its first
    training. Times are those of one process."""
    rehearsal = rehearse(settings, resume=resume, this=Part(0, processes, processes) if processes > 1 else None)
    dataset = rehearsal.dataset
    counts = {split: len(dataset.rows(split)) for split in ("train", "val", "test")}
    classes = len(dataset.outputs)
    steps = []
    if settings.trains_teachers:
        for teacher in (settings.teacher, *(other.settings for other in settings.ensemble.others)):
            steps.append(_teachers(teacher, counts, classes, dataset.fold_count))
    judges = _judges(settings, dataset)
    asked: set[tuple[str, object]] = set()
    for student in settings.students:
        steps += _asking(student, judges, rehearsal, asked, classes)
        steps += _students(settings, student, judges, counts, classes)
    return Plan(counts, classes, tuple(steps))


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


def _asking(
    named: NamedStudent,
    judges: Sequence[TeacherSettings],
    rehearsal: Rehearsal,
    asked: set[tuple[str, object]],
    classes: int,
) -> list[PlanStep]:
    """What the teachers of all folds are asked once before a student learns: photographs without labels, and val for their
    temperatures. ``asked``: what they were before, for another student."""
    student, dataset = named.settings, rehearsal.dataset
    wanted = []
    if student.distillation and student.unlabelled:
        wanted.append(("labelling the unlabelled", student.unlabelled, rehearsal.unlabelled.get(named.label, 0)))
    if student.distillation and student.calibrate_soft_labels:
        wanted.append(("calibrating the teachers", "", len(dataset.rows("val"))))
    steps = []
    for name, what, count in wanted:
        if (name, what) in asked:
            continue
        asked.add((name, what))
        costs = [(_measure(teacher, classes), len(views_of(teacher.tta))) for teacher in judges]
        passes = count * dataset.fold_count
        seconds = sum(FORWARD_SHARE * cost.seconds_per_image * passes * views for cost, views in costs)
        largest = max((cost for cost, _ in costs), key=lambda cost: cost.batch_mib)
        disk = 4 * count * classes / 2**20
        steps.append(_step(name, passes * sum(views for _, views in costs), seconds, largest, disk))
    return steps


def _teachers(teacher: TeacherSettings, counts: dict[str, int], classes: int, folds: int) -> PlanStep:
    cost = _measure(teacher, classes)
    epochs, views = teacher.total_epochs, len(views_of(teacher.tta))
    trained = epochs * counts["train"] * (folds - 1)
    looked_at = counts["train"] * views + folds * (counts["val"] * epochs + counts["test"] * views)
    seconds = cost.seconds_per_image * (trained + FORWARD_SHARE * looked_at)
    # Each fold's model stays; the fold under way also has a checkpoint with two moments per weight.
    disk = cost.weights_mib * (folds + 3)
    return _step(f"{folds} teachers, {teacher.name}", trained + looked_at, seconds, cost, disk)


def _students(
    settings: DistillSettings,
    named: NamedStudent,
    judges: Sequence[TeacherSettings],
    counts: dict[str, int],
    classes: int,
) -> list[PlanStep]:
    """One student and its hard-label baseline where it has one: the same budget."""
    student = named.settings
    cost = _measure(student, classes)
    epochs = student.total_epochs
    trained = epochs * counts["train"]
    looked_at = epochs * counts["val"] + counts["test"] + counts["train"]
    seconds = cost.seconds_per_image * (trained + FORWARD_SHARE * looked_at)
    judging = 0.0
    judged = trained if student.live_teachers else student.views * counts["train"]
    if student.distillation and judged:
        per_image = sum(_measure(teacher, classes).seconds_per_image for teacher in judges)
        judging = FORWARD_SHARE * judged * per_image
    named_seconds = {"student": seconds + judging} if student.distillation else {}
    if settings.has_baseline(named) or not student.distillation:
        named_seconds["hard-label student"] = seconds
    return [
        _step(f"{name}, {named.label or student.name}", trained + looked_at, seconds, cost, 5 * cost.weights_mib)
        for name, seconds in named_seconds.items()
    ]


def _step(name: str, images: int, seconds: float, cost: _Cost, disk_mib: float) -> PlanStep:
    memory = psutil.Process().memory_info().rss / 2**20 + 4 * cost.weights_mib + cost.batch_mib
    return PlanStep(name, images, round(seconds / 60, 2), round(memory), max(1, round(disk_mib)))


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
