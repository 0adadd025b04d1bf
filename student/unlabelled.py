"""Photographs without labels, and frames of camera recordings: labelled by the teacher ensemble, mixed into each batch.

What SSLD (2103.05959) gained most from, beside a longer schedule. The ensemble is the mean of the teachers' probabilities;
images of which it is unsure are left out, and no class may crowd out the others. Nothing of the test split may be among
them: that is proven by content (sha256) before anything is labelled.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch

from edgedistill import console
from edgedistill.artifacts import atomic_path, read_array, read_json, sha256_file, write_array, write_json
from edgedistill.data.manifest import Dataset, hash_files
from edgedistill.errors import DataError, UsageError
from edgedistill.images import IMAGE_SUFFIXES
from edgedistill.student.live_teachers import Teacher, TeacherFile, open_teachers
from edgedistill.training.loader import Draw, cycled
from edgedistill.training.losses import Targets
from edgedistill.training.predict import decoded_batches, network_input
from edgedistill.training.seeds import generator

FORMAT = "edgedistill-unlabelled"
LABELLING_BATCH = 64


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """``paths``: str [M]; ``sha256``: bytes [M]; ``log_probs``: float32 [M, C] of the teacher ensemble at T=1."""

    paths: npt.NDArray[np.str_]
    sha256: npt.NDArray[np.bytes_]
    log_probs: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: npt.NDArray[np.int64]) -> Unlabelled:
        return Unlabelled(self.paths[rows], self.sha256[rows], self.log_probs[rows])

    @property
    def hash(self) -> str:
        """What they and their labels are, wherever they lie."""
        return hashlib.sha256(self.sha256.tobytes() + self.log_probs.tobytes()).hexdigest()


def find_images(folder: Path, *, frames: Path, frame_step: int) -> npt.NDArray[np.str_]:
    """Paths of all images below ``folder`` and of every ``frame_step``-th frame of its videos, written to ``frames``.

    Raises UsageError when there is no such folder, DataError when it holds no image or a video that cannot be read.
    """
    from edgedistill.runtime.video import VIDEO_SUFFIXES  # here, since it imports OpenVINO

    if not folder.is_dir():
        raise UsageError(f"--unlabelled {folder}: no such folder")
    files = sorted(path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    for path in files:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            images += extract_frames(path, frames / f"{path.stem}-{sha256_file(path)[:12]}-{frame_step}", frame_step)
    if not images:
        raise DataError(f"--unlabelled {folder}: no image and no video in it")
    return np.array([str(path) for path in images])


def extract_frames(video: Path, folder: Path, step: int) -> list[Path]:
    """Every ``step``-th frame as PNG; those that lie there already are kept. Raises DataError for a damaged video."""
    import mmcv

    reader = mmcv.VideoReader(str(video))
    paths: list[Path] = []
    for number in range(0, len(reader), step):
        path = folder / f"{number:08d}.png"
        if not path.exists():
            frame = reader.get_frame(number)
            if frame is None:  # containers often promise more frames than they hold
                console.warn(f"{video}: no frame from {number} on can be read; {len(paths)} are taken")
                break
            with atomic_path(path) as temporary:
                temporary.write_bytes(cv2.imencode(".png", frame)[1].tobytes())
        paths.append(path)
    if not paths:
        raise DataError(f"{video}: no frame can be read; convert it to H.264 in MP4, or leave it out")
    return paths


def without_known(paths: npt.NDArray[np.str_], dataset: Dataset) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.bytes_]]:
    """Paths and hashes of the images that no split holds, each content once.

    Raises DataError when one is a test image; those of train and val are left out with a warning.
    """
    digests = hash_files(paths)
    split_of = dict(zip(dataset.sha256.tolist(), dataset.splits.tolist(), strict=True))
    splits = np.array([split_of.get(digest, "") for digest in digests.tolist()])
    leaked = np.flatnonzero(splits == "test")
    if len(leaked):
        raise DataError(
            f"--unlabelled: {len(leaked)} images are in the test split, first {paths[leaked[0]]}; the evaluation would "
            "judge what the student has seen: take them out of the folder"
        )
    known = int((splits != "").sum())
    if known:
        console.warn(f"--unlabelled: {known} images are in the train or val split and are left out")
    fresh = np.flatnonzero(splits == "")
    first = np.sort(np.unique(digests[fresh], return_index=True)[1])
    return paths[fresh[first]], digests[fresh[first]]


def label_images(
    paths: npt.NDArray[np.str_],
    digests: npt.NDArray[np.bytes_],
    files: Sequence[TeacherFile],
    dataset: Dataset,
    *,
    cache: Path,
    device: torch.device,
    half: bool,
    temperatures: Mapping[str, float] | None,
) -> Unlabelled:
    """The teachers' probabilities, a mean by their weights; kept in ``cache``, so that a resumed run does not ask again."""
    wanted = {
        "images": hashlib.sha256(digests.tobytes()).hexdigest(),
        "teachers": [
            [file.sha256, file.weight, 1.0 if temperatures is None else temperatures[file.sha256]] for file in files
        ],
    }
    if (cache / "meta.json").exists():
        meta = read_json(cache / "meta.json", format=FORMAT)
        if {key: meta.get(key) for key in wanted} == wanted:
            return Unlabelled(paths, digests, read_array(cache / "log_probs.npy"))
    teachers = open_teachers(files, dataset, device=device, half=half, temperatures=temperatures)
    judges = [teacher for teacher in teachers if teacher.weight > 0]
    answers = [_probabilities(judge, paths, device) for judge in judges]
    mean = np.average(answers, axis=0, weights=[judge.weight for judge in judges])
    log_probs = np.log(np.clip(mean, 1e-12, None)).astype(np.float32)
    write_array(cache / "log_probs.npy", log_probs)
    write_json(cache / "meta.json", wanted, format=FORMAT)
    return Unlabelled(paths, digests, log_probs)


def _probabilities(teacher: Teacher, paths: npt.NDArray[np.str_], device: torch.device) -> npt.NDArray[np.float64]:
    """float64 [M, C] through the deployable transform."""
    parts = []
    with console.progress("labelling unlabelled images", len(paths)) as bar:
        for pixels in decoded_batches(paths, teacher.spec, batch_size=LABELLING_BATCH):
            images = torch.from_numpy(pixels).to(device).flip(-1)
            logits = teacher.network(network_input(images, teacher.spec)) / teacher.temperature
            parts.append(torch.softmax(logits.double(), dim=1).cpu().numpy())
            bar.update(bar.task_ids[0], advance=len(pixels))
    return np.concatenate(parts)


def choose(images: Unlabelled, *, min_confidence: float, class_cap: float, seed: int) -> Unlabelled:
    """Those of which the ensemble is sure enough, no class with more than ``class_cap`` times the mean over classes.

    Too many of a class are drawn by ``seed``, not by confidence: the surest are the easiest. Raises DataError when
    nothing is left.
    """
    probabilities = np.exp(images.log_probs)
    sure = np.flatnonzero(probabilities.max(axis=1) >= min_confidence)
    if not len(sure):
        raise DataError(
            f"--unlabelled: of {len(images)} images the teachers are sure of none (--unlabelled-min-confidence "
            f"{min_confidence:g}, the surest has {probabilities.max():.2f}); lower it, or leave --unlabelled out"
        )
    answers = probabilities[sure].argmax(axis=1)
    cap = max(1, int(class_cap * len(sure) / probabilities.shape[1]))
    kept = []
    for label in np.unique(answers):
        members = sure[answers == label]
        kept.append(generator(seed, "unlabelled", int(label)).permutation(members)[:cap])
    chosen = np.sort(np.concatenate(kept))
    console.note(f"--unlabelled: {len(chosen)} of {len(images)} images; the teachers are sure of {len(sure)}")
    return images.take(chosen)


def unlabelled_targets(images: Unlabelled, temperature: float) -> Targets:
    """The ensemble's probabilities stand in for the hard label too; the soft ones are at ``temperature``."""
    log_probs = torch.from_numpy(images.log_probs)
    return Targets(torch.softmax(log_probs, dim=1), torch.softmax(log_probs / temperature, dim=1))


def joined(first: Targets, second: Targets) -> Targets:
    """Targets of the rows of both."""
    return Targets(torch.cat([first.hard, second.hard]), torch.cat([first.soft, second.soft]))


@dataclass(frozen=True, eq=False)
class MixedDraw(Draw):
    """A Draw whose batches hold ``share`` unlabelled images, after the labelled ones; as many steps as without them.

    ``unlabelled``: int64 [M], their rows of the store.
    """

    unlabelled: npt.NDArray[np.int64] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    share: float = 0.0

    def epoch(self, epoch: int) -> npt.NDArray[np.int64]:
        extra = min(max(1, round(self.share * self.batch_size)), self.batch_size - 1)
        labelled = Draw(self.rows, self.labels, self.batch_size - extra, self.balanced, self.seed, self.weights).epoch(
            epoch
        )
        places = cycled(len(self.unlabelled), epoch * self.steps * extra, self.steps * extra, self.seed, -1)
        return np.concatenate([labelled[: self.steps], self.unlabelled[places].reshape(self.steps, extra)], axis=1)
