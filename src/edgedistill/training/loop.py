"""The training loop that teacher and student share: epochs, batches, loss, step, log.

They differ in data, targets and loss, which arrive in a ``Job``. The loop can be killed at any moment: it goes on from
the last checkpoint and ends with the weights of an unbroken run, bit for bit on the same machine with the same
threads, because every draw derives from (seed, epoch, step) and the checkpoint holds all the rest.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from rich.progress import Progress
from torch import nn
from torch.optim.swa_utils import AveragedModel

from edgedistill import console
from edgedistill.artifacts import append_jsonl, read_jsonl, write_text
from edgedistill.data.manifest import Dataset
from edgedistill.errors import ArtifactError, ModelError, UsageError
from edgedistill.images import ImageU8, InputSpec
from edgedistill.metrics import accuracy, log_loss, macro_f1, softmax
from edgedistill.tasks import Task, Values
from edgedistill.training.answers import shares_of
from edgedistill.training.checkpoints import CHECKPOINT_FORMAT, load_tensors, save_tensors
from edgedistill.training.depthwise import quick_depthwise
from edgedistill.training.heads import task_loss, validation_metrics
from edgedistill.training.loader import Augmentation, Batch, ImageStore, Schedule, Views, batches, core_count
from edgedistill.training.losses import LossSettings, Targets, TargetSource, loss_of, to_device
from edgedistill.training.mixing import mix
from edgedistill.training.models import to_channels_last
from edgedistill.training.optimizers import Phase, learning_rate, make_optimizer, set_learning_rate, update_average
from edgedistill.training.predict import at_size, device_of, load_pixels, network_input, predict_pixels
from edgedistill.training.processes import Part, check_batch, data_parallel, of_all, on_main, part
from edgedistill.training.seeds import derive, generator
from edgedistill.training.settings import TrainSettings, choose_device, refuse_other_settings

VALIDATION_IMAGES = 4096  # kept decoded; their curve is for the eye, temperatures are fitted on all of val
LOSS_CHECK_STEPS = 50  # reading the loss makes a GPU wait, so it is read this often


@dataclass(frozen=True, eq=False)
class Validation:
    """Images that nobody trains on; their metrics are logged after each epoch and decide nothing.

    ``pixels``: uint8 [N, H, W, 3] BGR; ``labels``: int32 [N]; ``values``: float32 [N, V] of a task with several heads.
    """

    pixels: ImageU8
    labels: npt.NDArray[np.int32]
    values: Values | None = None


def open_validation(dataset: Dataset, spec: InputSpec, *, seed: int) -> Validation | None:
    """The val split, or a draw of VALIDATION_IMAGES from a larger one; None without any."""
    rows = dataset.rows("val")
    if len(rows) > VALIDATION_IMAGES:
        rows = np.sort(generator(seed, "validation").choice(rows, VALIDATION_IMAGES, replace=False))
    if not len(rows):
        return None
    values = None if dataset.values is None else dataset.values[rows]
    return Validation(load_pixels(dataset.paths[rows], spec), dataset.labels[rows], values)


class Judge(Protocol):
    """Soft targets for a batch as the network sees it, augmented and mixed.

    ``folds``: int16 [N], of the rows of the store; images are mixed with images of their own fold. Called with images
    [B, H, W, 3] RGB 0-255 on the device and their rows, int64 [B]; returns float32 [B, C] probabilities there (with
    several heads the shares [B, D] of training.answers).
    """

    @property
    def folds(self) -> npt.NDArray[np.int16]: ...

    def __call__(self, images: torch.Tensor, rows: npt.NDArray[np.int64]) -> torch.Tensor: ...


@dataclass(frozen=True, eq=False)
class Job:
    """All that one training needs. ``identity``: plain values on which a resumed run must agree.

    ``folder`` gets checkpoint.pt, metrics.jsonl and tensorboard/. ``targets`` follow the rows of ``store``; with a
    ``judge`` the soft ones are its answers instead, with ``views`` what is stored of each view. ``task``: of a network
    with several heads. ``loaded``: the pixels that the loader makes, if not ``spec``'s: larger ones for a judge that
    sees more than the network does.
    """

    title: str
    folder: Path
    settings: TrainSettings
    identity: Mapping[str, Any]
    store: ImageStore
    targets: TargetSource
    phases: tuple[Phase, ...]
    loss: LossSettings
    spec: InputSpec
    augment: Augmentation
    validation: Validation | None = None
    judge: Judge | None = None
    task: Task | None = None
    views: Views | None = None
    loaded: InputSpec | None = None

    @property
    def pixels(self) -> InputSpec:
        """What the loader makes and a judge sees."""
        return self.loaded or self.spec

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def epochs(self) -> list[tuple[Phase, int]]:
        """(phase, epoch within the phase) of every epoch."""
        return [(phase, epoch) for phase in self.phases for epoch in range(phase.epochs)]


@dataclass
class Tally:
    """Sums of the epoch under way; part of the checkpoint, so that a resumed epoch logs the whole of itself."""

    loss: float = 0.0
    steps: int = 0
    images: int = 0
    seconds: float = 0.0
    waited_s: float = 0.0


@dataclass
class State:
    """Where the training stands: what the next step needs and what a checkpoint holds."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: AveragedModel | None
    part: Part
    epoch: int = 0
    step: int = 0
    tally: Tally = field(default_factory=Tally)
    saved_at: float = field(default_factory=time.monotonic)


def train(job: Job, model: nn.Module, *, resume: bool) -> nn.Module:
    """Train ``model`` through all phases; returns it on its device, with averaged weights if the settings ask for an average.

    Raises UsageError if the folder holds work and ``resume`` is False, ArtifactError if that work was made with other
    settings, ImageError for a damaged image, ModelError when the loss stops being a finite number.
    """
    settings, epochs, this = job.settings, job.epochs, part()
    for phase in job.phases:
        check_batch(phase.draw.batch_size, this)
    device = choose_device(settings.device)
    configure_torch(device, deterministic=settings.deterministic)
    model = to_channels_last(model, device)
    averaged = any(phase.average for phase in job.phases) or settings.ema_decay > 0
    state = State(model, make_optimizer(model, settings), AveragedModel(model) if averaged else None, this)
    restore(job, state, resume=resume)
    schedule = Schedule([phase.draw for phase, _ in epochs], state.epoch, state.step)
    forward: Any = data_parallel(model, this)
    forward = torch.compile(forward) if settings.compile else forward
    workers = worker_count(settings.workers, device, sharers=this.local_size)
    stream = batches(
        job.store,
        schedule,
        job.augment,
        spec=job.pixels,
        seed=settings.seed,
        workers=workers,
        part=this,
        views=job.views,
    )
    total = sum(phase.draw.steps for phase, _ in epochs)
    with console.progress(job.title, total) as bar, tensorboard(job, state) as board:
        bar.update(bar.task_ids[0], completed=total - len(schedule))
        for phase, phase_epoch in epochs[state.epoch :]:
            train_epoch(job, state, phase, phase_epoch, forward=forward, stream=stream, bar=bar)
            row = finish_epoch(job, state, phase)
            if board is not None:
                write_scalars(board, row)
    return model if state.average is None else state.average.module


def train_epoch(
    job: Job, state: State, phase: Phase, phase_epoch: int, *, forward: Any, stream: Iterator[Batch], bar: Progress
) -> None:
    """The steps of one epoch that are still to do, with a checkpoint whenever the last one is old enough."""
    settings, steps = job.settings, phase.draw.steps
    device = device_of(state.model)
    targets = job.targets.to(device)
    loss_sum = torch.tensor(state.tally.loss, dtype=torch.float64, device=device)
    state.model.train()
    mark = time.perf_counter()
    while state.step < steps:
        batch = next(stream)
        set_learning_rate(state.optimizer, learning_rate(phase, phase_epoch, state.step))
        rank = (state.part.rank,) if state.part.rank else ()  # what dropout draws differs from process to process
        torch.manual_seed(derive(settings.seed, "step", state.epoch, state.step, *rank))
        loss_sum += train_step(job, state, batch, targets, forward=forward, batch_size=phase.draw.batch_size)
        if state.average is not None and settings.ema_decay:
            update_average(state.average, state.model, decay=settings.ema_decay)
        state.step += 1
        mark = count(state.tally, batch, mark, device=device)
        show(bar, job, state)
        due = time.monotonic() - state.saved_at >= 60 * settings.checkpoint_minutes
        if due or state.step % LOSS_CHECK_STEPS == 0 or state.step == steps:
            state.tally.loss = finite(loss_sum.item(), job, state)
        if due and state.step < steps and state.part.main:
            save(job, state)


def train_step(
    job: Job, state: State, batch: Batch, source: TargetSource, *, forward: Any, batch_size: int
) -> torch.Tensor:
    """One batch through the network and one step of the optimiser; returns the detached loss, of all processes.

    ``source``: targets of all images, which come on the device: nothing here makes the GPU wait. ``batch_size``: of all
    processes' shares of the batch together: the loss is taken over all of it, for that of a share is another one as soon as
    images weigh unequally.
    """
    settings = job.settings
    device = device_of(state.model)
    images, targets = to_device(batch.images, device), seen_targets(job, batch, source.take(batch.rows))
    if state.epoch < len(job.epochs) - settings.plain_epochs:
        images, targets = mix(
            images,
            targets,
            settings.mixing(),
            seed=settings.seed,
            epoch=state.epoch,
            step=state.step,
            folds=None if job.judge is None else job.judge.folds[batch.rows],
        )
    if job.judge is not None:
        targets = Targets(targets.hard, job.judge(images, batch.rows))
    half = trains_in_half(settings, device)
    quick = nullcontext() if settings.compile else quick_depthwise(device)
    with quick, torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
        logits = forward(network_input(at_size(images, job.spec), job.spec))
    task, settled = job.task, job.loss.at(state.epoch / len(job.epochs))
    logits, hard, soft = of_all((logits, targets.hard, targets.soft), state.part, batch_size)
    targets = Targets(hard, soft)
    loss = loss_of(logits, targets, settled) if task is None else task_loss(logits, targets, settled, task)
    (loss * state.part.size).backward()  # the gradients of all processes are averaged
    if settings.grad_clip is not None:
        nn.utils.clip_grad_norm_(state.model.parameters(), settings.grad_clip)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    return loss.detach()


def seen_targets(job: Job, batch: Batch, targets: Targets) -> Targets:
    """``targets`` with the soft labels of the very views that the batch shows, where they are stored."""
    if job.views is None or batch.views is None:
        return targets
    scores = torch.from_numpy(job.views.log_probs[batch.rows, batch.views].astype(np.float32))
    soft = shares_of(job.task, scores, job.loss.temperature)
    return Targets(targets.hard, to_device(soft.numpy(), targets.hard.device))


def trains_in_half(settings: TrainSettings, device: torch.device) -> bool:
    """Whether networks compute in bfloat16: if asked for, and by default on a GPU."""
    return settings.precision == "bf16" or (settings.precision == "auto" and device.type == "cuda")


def configure_torch(device: torch.device, *, deterministic: bool) -> None:
    """On a GPU, reproducible kernels cost a few per cent and make resumption exact; a CPU's always are."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not deterministic
        torch.backends.cudnn.deterministic = deterministic


def worker_count(wanted: int | None, device: torch.device, *, sharers: int = 1) -> int:
    """Loader processes: enough to feed a GPU; on a CPU one, since it shares the cores with the network.

    ``sharers``: training processes that share this machine's cores.
    """
    if wanted is not None:
        return wanted
    return min(16, max(1, core_count() // sharers)) if device.type == "cuda" else 1


def count(tally: Tally, batch: Batch, mark: float, *, device: torch.device) -> float:
    """Add one step to the tally; returns the new time mark.

    Waiting for the loader counts only if the device had nothing left to do meanwhile.
    """
    busy = device.type == "cuda" and not torch.cuda.current_stream(device).query()
    now = time.perf_counter()
    tally.steps += 1
    tally.images += len(batch.rows)
    tally.seconds += now - mark
    tally.waited_s += 0.0 if busy else batch.waited_s
    return now


def show(bar: Progress, job: Job, state: State) -> None:
    rate = state.tally.images / max(state.tally.seconds, 1e-9)
    info = f"epoch {state.epoch + 1}/{len(job.epochs)}, {rate:.0f} images/s"
    bar.update(bar.task_ids[0], advance=1, info=info)


def finite(loss_sum: float, job: Job, state: State) -> float:
    if not math.isfinite(loss_sum):
        raise ModelError(
            f"{job.title}: the loss is no longer a finite number in epoch {state.epoch + 1}, step {state.step}; "
            f"lower --lr (now {job.settings.lr:g}), set --grad-clip 1 or --warmup-epochs 1, and start anew"
        )
    return loss_sum


def finish_epoch(job: Job, state: State, phase: Phase) -> dict[str, Any]:
    """Average, validate, log, and write the checkpoint from which the next epoch starts; returns the logged row."""
    tally = state.tally
    if phase.average and state.average is not None:
        update_average(state.average, state.model, decay=0.0)
    row: dict[str, Any] = {
        "epoch": state.epoch + 1,
        "phase": phase.name,
        "train_loss": tally.loss / max(1, tally.steps),
        "lr": state.optimizer.param_groups[0]["lr"],
        "images_per_s": tally.images * state.part.size / max(tally.seconds, 1e-9),
        "wait_fraction": tally.waited_s / max(tally.seconds, 1e-9),
        "seconds": tally.seconds,
    }
    state.epoch, state.step, state.tally = state.epoch + 1, 0, Tally()
    if not state.part.main:
        return row
    ema = state.average if job.settings.ema_decay else None
    row |= validate(state.model if ema is None else ema.module, job.validation, job)
    append_jsonl(job.metrics, row)
    save(job, state)
    if not console.err.is_terminal:
        console.note(describe(job, row))
    return row


def validate(model: nn.Module, validation: Validation | None, job: Job) -> dict[str, float]:
    if validation is None:
        return {}
    logits = predict_pixels(model, validation.pixels, job.spec, batch_size=job.settings.batch_size)
    if job.task is not None and validation.values is not None:
        return validation_metrics(job.task, logits, validation.values)
    probabilities = softmax(logits)
    return {
        "val_accuracy": accuracy(probabilities, validation.labels),
        "val_macro_f1": macro_f1(probabilities, validation.labels),
        "val_log_loss": log_loss(probabilities, validation.labels),
    }


def describe(job: Job, row: Mapping[str, Any]) -> str:
    """The line per epoch for logs without a terminal."""
    text = f"{job.title}: epoch {row['epoch']}/{len(job.epochs)}, loss {row['train_loss']:.4f}"
    if "val_accuracy" in row:
        text += f", val accuracy {row['val_accuracy']:.3f}"
    return text + f", {row['images_per_s']:.0f} images/s, {row['seconds']:.1f} s"


@contextmanager
def tensorboard(job: Job, state: State) -> Iterator[Any]:
    """A writer for folder/tensorboard that forgets what a killed run wrote beyond its checkpoint; None if not wanted."""
    if not job.settings.tensorboard or not state.part.main:
        yield None
        return
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(job.folder / "tensorboard"), purge_step=state.epoch + 1) as writer:
        yield writer


def write_scalars(board: Any, row: Mapping[str, Any]) -> None:
    for key, value in row.items():
        if isinstance(value, float):
            board.add_scalar(key, value, row["epoch"])


def save(job: Job, state: State) -> None:
    values = {
        "identity": dict(job.identity),
        "epoch": state.epoch,
        "step": state.step,
        "tally": vars(state.tally),
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "average": state.average.state_dict() if state.average is not None else {},
    }
    save_tensors(job.checkpoint, values, format=CHECKPOINT_FORMAT)
    state.saved_at = time.monotonic()


def restore(job: Job, state: State, *, resume: bool) -> None:
    """Put the checkpoint's values into ``state`` and drop the metrics of what it does not know of."""
    values = on_main(lambda: read_checkpoint(job, resume=resume))
    if values is None:
        return
    try:
        state.model.load_state_dict(values["model"])
        state.optimizer.load_state_dict(values["optimizer"])
        if state.average is not None:
            state.average.load_state_dict(values["average"])
        state.epoch, state.step, state.tally = values["epoch"], values["step"], Tally(**values["tally"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"{job.checkpoint}: not a checkpoint of this training; delete it to start anew") from error
    if state.part.main:
        rows = [row for row in read_jsonl(job.metrics) if row["epoch"] <= state.epoch]
        write_text(job.metrics, "".join(json.dumps(row) + "\n" for row in rows))
    console.note(f"{job.title}: going on from epoch {state.epoch + 1}, step {state.step}")


def read_checkpoint(job: Job, *, resume: bool) -> dict[str, Any] | None:
    """What ``save`` wrote; None where the training has not begun. Raises as ``train`` does."""
    if not job.checkpoint.exists():
        write_text(job.metrics, "")
        return None
    if not resume:
        raise UsageError(f"{job.folder}: holds work already; go on with --resume, or choose another --out")
    values = load_tensors(job.checkpoint, format=CHECKPOINT_FORMAT)
    try:
        refuse_other_settings(job.checkpoint, values["identity"], dict(job.identity), type(job.settings))
    except (KeyError, AttributeError) as error:
        raise ArtifactError(f"{job.checkpoint}: not a checkpoint of this training; delete it to start anew") from error
    return values
