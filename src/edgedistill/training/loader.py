"""Batches of augmented images that keep the device busy.

Images are decoded once, by the deployable transform at 8/7 of the network's size, and kept in memory that the loader
processes share; a worker augments a whole batch straight into a shared ring, so that nothing but a slot number travels
between processes (and Docker's 64 MB /dev/shm is not needed). What a batch holds depends on (seed, epoch, step) alone.
"""

from __future__ import annotations

import difflib
import mmap
import multiprocessing.context
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset

from edgedistill import console
from edgedistill.errors import DataError, ImageError, UsageError
from edgedistill.images import DecodeMode, ImageU8, InputSpec, load_image
from edgedistill.memory import available_bytes
from edgedistill.tasks import Task, Values
from edgedistill.training.processes import ALONE, Part, part
from edgedistill.training.seeds import generator

Counts = npt.NDArray[np.int64]
Augmentation = Callable[[ImageU8, int], ImageU8]
IMAGES_AHEAD = 2  # batches that each worker prepares ahead
FREE_MEMORY_SHARE = 0.5


def prepared_spec(spec: InputSpec) -> InputSpec:
    """Where training images wait for augmentation: the deployable transform at 256/224 of the network's size."""
    return spec.resized(round(spec.height * 256 / 224), round(spec.width * 256 / 224))


def core_count() -> int:
    return len(os.sched_getaffinity(0))


def is_jpeg(paths: npt.NDArray[np.str_]) -> npt.NDArray[np.bool_]:
    """bool [N], by their names."""
    return np.array([Path(path).suffix.lower() in (".jpg", ".jpeg") for path in paths], dtype=bool)


def store_bytes(jpeg: npt.NDArray[np.bool_], spec: InputSpec) -> int:
    """What N prepared images of ``spec`` take: each once, and a JPEG once more as it is decoded in the DCT."""
    return (len(jpeg) + int(jpeg.sum())) * spec.height * spec.width * 3


def store_budget(cache_gib: float | None, processes: int) -> float:
    """Bytes that they may take: ``cache_gib``; None: half of the free memory, shared by so many ``processes``."""
    if cache_gib is not None:
        return cache_gib * 2**30
    return (available_bytes() or 0) * FREE_MEMORY_SHARE / processes


@dataclass(frozen=True, eq=False)
class ImageStore:
    """Prepared images of N files, uint8 [H, W, 3] BGR, decoded both ways where the two ways differ.

    ``pixels``: None, or {'full': [N, H, W, 3], 'reduced': [M, H, W, 3]}; ``reduced_row``: int64 [N], -1 where decoding
    in the DCT changes nothing (not a JPEG, or too small to be reduced).
    """

    paths: npt.NDArray[np.str_]
    spec: InputSpec
    pixels: dict[str, ImageU8] | None = None
    reduced_row: npt.NDArray[np.int64] | None = None

    def image(self, row: int, decode: DecodeMode) -> ImageU8:
        """Raises ImageError that names a damaged file."""
        if self.pixels is None or self.reduced_row is None:
            return load_image(str(self.paths[row]), self.spec, decode=decode)
        if decode == "reduced" and self.reduced_row[row] >= 0:
            return self.pixels["reduced"][self.reduced_row[row]]
        return self.pixels["full"][row]


def open_store(paths: npt.NDArray[np.str_], spec: InputSpec, *, cache_gib: float | None) -> ImageStore:
    """Decode all images into shared memory if they fit into the budget, else leave them to be decoded when needed.

    ``spec``: of the prepared images. ``cache_gib``: the budget; None is half of the free memory.
    Raises ImageError that names the first damaged file.
    """
    jpeg = is_jpeg(paths)
    needed, budget = store_bytes(jpeg, spec), store_budget(cache_gib, part().local_size)
    if needed > budget:
        console.note(
            f"{len(paths)} prepared images take {needed / 2**30:.1f} GiB and {budget / 2**30:.1f} are granted: "
            "decoding anew each epoch (--cache-gib grants more)"
        )
        return ImageStore(paths, spec)
    reduced_row = np.where(jpeg, np.cumsum(jpeg) - 1, -1).astype(np.int64)
    pixels = {"full": shared_images(len(paths), spec), "reduced": shared_images(int(jpeg.sum()), spec)}

    def decode(row: int) -> None:
        pixels["full"][row] = load_image(str(paths[row]), spec, decode="full")
        if reduced_row[row] >= 0:
            pixels["reduced"][reduced_row[row]] = load_image(str(paths[row]), spec, decode="reduced")

    with console.progress("reading images", len(paths)) as bar, ThreadPoolExecutor(core_count()) as pool:
        for _ in pool.map(decode, range(len(paths))):  # the first damaged image stops the job here, by its name
            bar.update(bar.task_ids[0], advance=1)
    return ImageStore(paths, spec, pixels, reduced_row)


def shared_images(count: int, spec: InputSpec) -> ImageU8:
    """uint8 [count, H, W, 3] in anonymous memory that forked workers share."""
    shape = (count, spec.height, spec.width, 3)
    buffer = mmap.mmap(-1, max(1, int(np.prod(shape))))
    return np.frombuffer(buffer, np.uint8, count=int(np.prod(shape))).reshape(shape)


@dataclass(frozen=True, eq=False)
class Draw:
    """Which images the epochs of one phase see, and in which order.

    ``rows``: int64 [N], rows of the store; ``labels``: int [N]. With ``balanced`` each class gives the same number of
    images per epoch. ``weights``: one per class number, the chance of its images relative to others; an epoch stays as
    long as it was, and after each epoch every class has been drawn as often as its share says, give or take an image.
    With either, an image is drawn as often as any other of its class over the epochs.
    """

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    batch_size: int
    balanced: bool
    seed: int
    weights: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.balanced and not self.weights and self.batch_size > len(self.rows):
            raise DataError(f"batches of {self.batch_size} from {len(self.rows)} images; lower --batch-size")

    @property
    def steps(self) -> int:
        """Whole batches per epoch; the images left over differ from epoch to epoch."""
        return max(1, len(self.rows) // self.batch_size)

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        """int64 [steps, batch_size]: rows of the store for each step."""
        count = self.steps * self.batch_size
        if not self.balanced and not self.weights:
            order = generator(self.seed, "order", epoch).permutation(len(self.rows))[:count]
            return self.rows[order].reshape(self.steps, self.batch_size)
        classes = [np.flatnonzero(self.labels == label) for label in np.unique(self.labels)]
        starts, quotas = self._quotas(classes, count, epoch)
        drawn = [
            members[cycled(len(members), int(start), int(quota), self.seed, number)]
            for number, (members, start, quota) in enumerate(zip(classes, starts, quotas, strict=True))
            if quota
        ]
        order = generator(self.seed, "order", epoch).permutation(np.concatenate(drawn))[:count]
        return self.rows[order].reshape(self.steps, self.batch_size)

    def _quotas(self, classes: Sequence[npt.NDArray[np.int64]], count: int, epoch: int) -> tuple[Counts, Counts]:
        """(drawn of each class before the epoch, drawn in it), together at least ``count``."""
        if self.balanced:
            quotas = np.full(len(classes), -(-count // len(classes)))
            return epoch * quotas, quotas
        chances = np.array([len(members) * self.weights[self.labels[members[0]]] for members in classes])
        return shared_out(count * chances / chances.sum(), count, epoch)


def shared_out(shares: npt.NDArray[np.float64], count: int, epoch: int) -> tuple[Counts, Counts]:
    """(given before ``epoch``, given in it), int64 [K]: whole numbers, at least ``count`` an epoch, that follow the sums
    of ``shares`` (float [K], of sum ``count``): what rounding takes from one epoch the next gives back, so that small
    classes beside many others keep their share."""
    before = given = quotas = np.zeros(len(shares), np.int64)
    for passed in range(epoch + 1):
        owed = np.maximum(np.round(shares * (passed + 1) - given, 9), 0.0)
        quotas = np.floor(owed).astype(np.int64)
        lacking = max(0, count - int(quotas.sum()))
        quotas[np.argsort(quotas - owed, kind="stable")[:lacking]] += 1
        before, given = given, given + quotas
    return before, quotas


def sampling_weights(
    labels: npt.NDArray[np.int32],
    class_names: Sequence[str],
    *,
    power: float = 0.0,
    oversample: Sequence[str] = (),
) -> tuple[float, ...]:
    """Draw.weights: n_c^-power for a class of n_c images (1: as often as any other class, 0.5: in between), times the
    factors of ``oversample``, such as ('defective=3',). () when nothing is asked for.

    Raises UsageError for a class that the data does not have and for what cannot be read.
    """
    factors = chosen_factors(oversample, class_names)
    if not power and not factors:
        return ()
    counts = np.maximum(np.bincount(labels, minlength=len(class_names)), 1)
    return tuple(
        float(count) ** -power * factors.get(name, 1.0) for name, count in zip(class_names, counts, strict=True)
    )


def head_sampling_weights(
    task: Task,
    values: Values,
    joint_labels: npt.NDArray[np.int32],
    joint_names: Sequence[str],
    *,
    power: float = 0.0,
    oversample: Sequence[str] = (),
) -> npt.NDArray[np.float64]:
    """float64 [N]: each image's chance relative to others where it carries several labels. ``values``: float32 [N, V];
    ``joint_labels``: int32 [N], numbers of ``joint_names``.

    ``oversample`` names HEAD=CLASS=FACTOR (of one head alone: LABEL=FACTOR), or a joint label such as 'blue, bar=3'; an
    image's factors are multiplied. ``power``: each head multiplies by (n_c / mean n)^-power for the class of n_c images,
    and by 1 where the label is missing. A product, since it makes every head balanced at power 1 where heads are
    independent of each other; a mean over heads would balance none. Of several labels the rarest that applies counts
    alone, as in the repeat factors of LVIS (Gupta et al., 1908.03195): a product would leave an epoch to the few images
    that many labels apply to.
    Raises UsageError for a class that the data does not have and for what cannot be read.
    """
    marks, names = task.marks(values), [name for name in task.outputs if name not in _regressions(task)]
    factors = chosen_factors(oversample, [*names, *(name for name in joint_names if name not in names)])
    of_marks = np.array([factors.get(name, 1.0) for name in names])
    of_joint = np.array([1.0 if name in names else factors.get(name, 1.0) for name in joint_names])
    weights = np.where(marks, of_marks, 1.0).prod(axis=1) * of_joint[joint_labels]
    start = 0
    for head, columns in task.columns() if power else ():
        if head.kind == "regression":
            continue
        own = marks[:, start : start + head.width]
        start += head.width
        if head.kind == "sigmoid":  # images that nothing applies to are one more class
            unknown = np.isnan(values[:, columns]).all(axis=1, keepdims=True)
            own = np.concatenate([own, ~own.any(axis=1, keepdims=True) & ~unknown], axis=1)
        counts = own.sum(axis=0)
        rarest = np.where(own, counts, np.iinfo(np.int64).max).min(axis=1)
        weights *= np.where(own.any(axis=1), (rarest / counts[counts > 0].mean()) ** -power, 1.0)
    return weights


def _regressions(task: Task) -> set[str]:
    return {head.name for head in task.heads if head.kind == "regression"}


def chosen_factors(oversample: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    """{name: factor}. Raises UsageError for names that are not among ``names``, with those that are like them."""
    factors = dict(map(parse_oversample, oversample))
    for name in factors:
        if name not in names:
            of_heads = [full for full in names if full.endswith(f"={name}")]
            close = of_heads or difflib.get_close_matches(name, names, n=3) or list(names)[:5]
            shown = ", ".join(f"'{other}'" for other in close)
            raise UsageError(f"--oversample '{name}': no such class; did you mean {shown}?")
    return factors


def parse_oversample(text: str) -> tuple[str, float]:
    """'defective=3' -> ('defective', 3.0), 'age=old=3' -> ('age=old', 3.0). Raises UsageError."""
    name, _, factor = text.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = 0.0
    if not name or not 0 < value <= 1000:
        raise UsageError(
            f"--oversample {text}: expected CLASS=FACTOR, or HEAD=CLASS=FACTOR, with a factor above 0, such as defective=3"
        )
    return name, value


def cycled(length: int, start: int, count: int, seed: int, number: int) -> npt.NDArray[np.int64]:
    """``count`` entries, from ``start`` on, of endless shuffles of range(length) laid end to end."""
    cycles = range(start // length, (start + count - 1) // length + 1)
    laid = np.concatenate([generator(seed, "cycle", number, cycle).permutation(length) for cycle in cycles])
    offset = start - cycles[0] * length
    return laid[offset : offset + count].astype(np.int64)


@dataclass(frozen=True, eq=False)
class Views:
    """M augmented views of each row of the store, fixed beforehand: the only ones that batches then show.

    ``seeds``: int64 [N, M], of the augmentation; the lowest bit says how to decode. ``log_probs``: float16 [N, M, C],
    what the teachers said of each; with several heads their scores [N, M, D] (see training.answers).
    """

    seeds: npt.NDArray[np.int64]
    log_probs: npt.NDArray[np.float16]

    def chosen(self, seed: int, step: Step) -> npt.NDArray[np.int64]:
        """int64 [B]: which view of each image a batch shows."""
        return generator(seed, "view", step.epoch, step.step).integers(self.seeds.shape[1], size=len(step.rows))


def decode_of(seed: int) -> DecodeMode:
    """How the image of a stored view is decoded."""
    return "reduced" if seed & 1 else "full"


@dataclass(frozen=True)
class Batch:
    """``images``: uint8 [B, H, W, 3] RGB, valid until the next batch is asked for. ``rows``: int64 [B]. ``views``:
    int64 [B], which of its views each image shows, where views are fixed."""

    images: ImageU8
    rows: npt.NDArray[np.int64]
    waited_s: float
    views: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, eq=False)
class Step:
    """The place of one batch: running number (it picks the slot in the ring), epoch, step; ``rows``: int64 [B]."""

    number: int
    epoch: int
    step: int
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Schedule:
    """All steps from (epoch, step) to the end; ``draws`` has one entry per epoch. Iterates anew each time."""

    draws: Sequence[Draw]
    epoch: int = 0
    step: int = 0

    def __len__(self) -> int:
        return sum(draw.steps for draw in self.draws[self.epoch :]) - self.step

    def __iter__(self) -> Iterator[Step]:
        number = 0
        for epoch in range(self.epoch, len(self.draws)):
            rows = self.draws[epoch].epoch(epoch)
            for step in range(self.step if epoch == self.epoch else 0, len(rows)):
                yield Step(number, epoch, step, rows[step])
                number += 1


class _BatchMaker(Dataset[tuple[int, str]]):
    """Augments one batch into its slot of the ring; runs in the workers."""

    def __init__(
        self,
        store: ImageStore,
        augment: Augmentation,
        *,
        ring: ImageU8,
        seed: int,
        part: Part,
        views: Views | None,
    ) -> None:
        self.store, self.augment, self.ring, self.seed = store, augment, ring, seed
        self.part, self.views = part, views

    def __getitem__(self, step: Step) -> tuple[int, str]:  # type: ignore[override]
        slot = step.number % len(self.ring)
        seeds, reduced = self._drawn(step)
        try:
            for place, number in enumerate(self.part.of(np.arange(len(step.rows)))):
                image = self.store.image(step.rows[number], "reduced" if reduced[number] else "full")
                cv2.cvtColor(self.augment(image, int(seeds[number])), cv2.COLOR_BGR2RGB, dst=self.ring[slot, place])
        except ImageError as error:
            return slot, str(error)  # as a value: torch would bury the message in a worker's traceback
        return slot, ""

    def _drawn(self, step: Step) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Each image's augmentation seed and whether it is decoded reduced."""
        if self.views is not None:
            seeds = self.views.seeds[step.rows, self.views.chosen(self.seed, step)]
            return seeds, (seeds & 1).astype(bool)
        draws = generator(self.seed, "images", step.epoch, step.step)
        return draws.integers(2**31, size=len(step.rows)), draws.random(len(step.rows)) < 0.5


class _Flag:
    """An event without a lock: the trainer asks torch's own, and waits without a limit for the lock of a killed process."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1)  # a forked process shares it

    def is_set(self) -> bool:
        return self._memory[0] != 0

    def set(self) -> None:
        self._memory[0] = 1


class _Fork(multiprocessing.context.ForkContext):
    def Event(self) -> Any:
        return _Flag()


def batches(
    store: ImageStore,
    schedule: Schedule,
    augment: Augmentation,
    *,
    spec: InputSpec,
    seed: int,
    workers: int,
    part: Part = ALONE,
    views: Views | None = None,
) -> Iterator[Batch]:
    """The batches of ``schedule`` in order, prepared ahead by ``workers`` processes (0: in this one).

    ``part``: of several training processes this one, which gets its share of each batch. ``views``: the only ones that
    images are shown in; without, each batch draws views of its own.

    Raises ImageError that names the damaged file.
    """
    if not len(schedule):
        return
    size = max(draw.batch_size for draw in schedule.draws)
    # The loader hands out at most IMAGES_AHEAD * workers batches beyond the one in use: no slot is written while read.
    slots = IMAGES_AHEAD * workers + 2
    ring = shared_images(slots * size, spec).reshape(slots, size, spec.height, spec.width, 3)
    loader = DataLoader(
        _BatchMaker(store, augment, ring=ring, seed=seed, part=part, views=views),
        batch_size=None,
        sampler=schedule,  # type: ignore[arg-type]
        num_workers=workers,
        prefetch_factor=IMAGES_AHEAD if workers else None,
        collate_fn=_unchanged,
        worker_init_fn=_worker_start,
        multiprocessing_context=_Fork() if workers else None,
    )
    answers = iter(loader)
    for step in schedule:
        start = time.perf_counter()
        slot, error = _next_answer(answers)
        waited = time.perf_counter() - start
        if error:
            raise ImageError(error)
        rows = part.of(step.rows)
        chosen = None if views is None else part.of(views.chosen(seed, step))
        yield Batch(ring[slot, : len(rows)], rows, waited, chosen)


def _next_answer(answers: Iterator[tuple[int, str]]) -> tuple[int, str]:
    try:
        return next(answers)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(
            f"a loader process ended ({error}); if memory ran out, lower --workers, and go on with --resume"
        ) from error


def _unchanged(answer: Any) -> Any:
    return answer


def _worker_start(worker: int) -> None:
    cv2.setNumThreads(0)  # OpenCV's own threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the trainer, which ends its workers
