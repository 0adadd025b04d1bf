"""M augmented views per image, drawn once: their seeds and what the held-out teachers said of each are stored.

Function matching at the price of one pass: the student then trains on exactly these views, one of an image's M drawn
each time that the image comes. Files in views/KEY/ of the run (KEY: what the views depend on): meta.json, seeds.npy
int64 [N, M], log_probs.npy float16 [N, M, C] at T=1 (a probability of 0.5 is off by at most 0.0003); with several heads
their scores [N, M, D] (see training.answers).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from edgedistill import console
from edgedistill.artifacts import read_array, read_json, write_array, write_json
from edgedistill.data.soft_label_store import write_blocks
from edgedistill.errors import ArtifactError
from edgedistill.images import ImageU8
from edgedistill.student.live_teachers import LiveTeachers
from edgedistill.tasks import Task
from edgedistill.training.answers import scores_of_shares
from edgedistill.training.loader import Augmentation, ImageStore, Views, decode_of
from edgedistill.training.processes import on_main
from edgedistill.training.seeds import generator

FORMAT = "edgedistill-views"
PART_IMAGES = 256  # labelled between two writes: what a kill can cost
BATCH = 64
LEAST_PROBABILITY = 1e-7


def open_views(
    store: ImageStore,
    augment: Augmentation,
    teachers: Callable[[], LiveTeachers],
    *,
    count: int,
    seed: int,
    wanted: dict[str, Any],
    root: Path,
    device: torch.device,
    task: Task | None = None,
) -> Views:
    """The views of all rows of ``store``; labelled now where they are not yet, going on where a kill stopped.

    ``teachers``: opens them, only if they are needed, at temperature 1 and with the fold of each row: who may judge an
    image may judge its views. ``task``: where they have several heads. ``wanted``: plain values on which the views depend (images, augmentation, teachers). The
    main process labels, all read. Raises ArtifactError for a damaged folder.
    """
    key = hashlib.sha256(json.dumps(wanted | {"views": count, "seed": seed}, sort_keys=True).encode()).hexdigest()
    folder = root / key[:16]
    seeds = generator(seed, "views").integers(2**31, size=(len(store.paths), count))

    def label() -> None:
        if (folder / "meta.json").exists():
            return
        _label(store, augment, teachers(), seeds, folder, device=device, task=task)
        write_array(folder / "seeds.npy", seeds)
        write_json(folder / "meta.json", wanted | {"views": count, "seed": seed}, format=FORMAT)
        for part in folder.glob("part-*.npy"):
            part.unlink()

    on_main(label)
    read_json(folder / "meta.json", format=FORMAT)
    log_probs = read_array(
        folder / "log_probs.npy", mmap=True
    )  # of a million images 16 GB for 8 views of 1,000 classes
    if log_probs.shape[:2] != seeds.shape or not np.array_equal(read_array(folder / "seeds.npy"), seeds):
        raise ArtifactError(f"{folder}: holds other views than its name says; delete the folder")
    return Views(seeds, log_probs)


def _label(
    store: ImageStore,
    augment: Augmentation,
    teachers: LiveTeachers,
    seeds: npt.NDArray[np.int64],
    folder: Path,
    *,
    device: torch.device,
    task: Task | None,
) -> None:
    rows = np.arange(len(seeds))
    parts = []
    with console.progress("labelling views", len(rows)) as bar:
        for start in range(0, len(rows), PART_IMAGES):
            part = folder / f"part-{start:010d}.npy"
            if not part.exists():
                members = rows[start : start + PART_IMAGES]
                found = _log_probs(store, augment, teachers, members, seeds[members], device=device, task=task)
                write_array(part, found)
            parts.append(part)
            bar.update(bar.task_ids[0], completed=min(start + PART_IMAGES, len(rows)))
    shape = (len(rows), *read_array(parts[0], mmap=True).shape[1:])
    write_blocks(folder / "log_probs.npy", (read_array(part) for part in parts), shape=shape, dtype=np.float16)


def _log_probs(
    store: ImageStore,
    augment: Augmentation,
    teachers: LiveTeachers,
    rows: npt.NDArray[np.int64],
    seeds: npt.NDArray[np.int64],
    *,
    device: torch.device,
    task: Task | None,
) -> npt.NDArray[np.float16]:
    """float16 [n, M, C], scores for the images ``rows`` and their ``seeds`` [n, M]."""
    flat_rows, flat_seeds = np.repeat(rows, seeds.shape[1]), seeds.ravel()
    answers = []
    for start in range(0, len(flat_rows), BATCH):
        some = slice(start, start + BATCH)
        pixels = np.stack([view(store, augment, r, s) for r, s in zip(flat_rows[some], flat_seeds[some], strict=True)])
        images = torch.from_numpy(pixels).to(device)
        shares = teachers(images, flat_rows[some])
        answers.append(scores_of_shares(task, shares, least=LEAST_PROBABILITY).cpu().numpy())
    return np.concatenate(answers).reshape(len(rows), seeds.shape[1], -1).astype(np.float16)


def view(store: ImageStore, augment: Augmentation, row: int, seed: int) -> ImageU8:
    """uint8 [H, W, 3] RGB: what the loader gives the student for this image and seed."""
    image = augment(store.image(int(row), decode_of(int(seed))), int(seed))
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)  # type: ignore[return-value]
