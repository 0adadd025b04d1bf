"""Photographs without labels, and frames of camera recordings: labelled by the teacher ensemble, mixed into each batch.

What SSLD (2103.05959) gained most from, beside a longer schedule. The ensemble is the mean of the teachers' probabilities
(of values where a head is a regression), each teacher's over the views by which it labelled its fold; images of which it is
unsure are left out, and no class may crowd out the others. Nothing of the test split may be among them: that is proven by
content (sha256) before anything is labelled, and what merely looks like a test image (a re-encoded copy) is left out.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import torch

from edgedistill import console
from edgedistill.artifacts import atomic_path, read_array, read_json, sha256_file, write_array, write_json
from edgedistill.data import duplicates
from edgedistill.data.manifest import Dataset, hash_files
from edgedistill.data.soft_label_store import row_blocks, write_blocks
from edgedistill.data.sources import files_below
from edgedistill.errors import DataError, ImageError, UsageError
from edgedistill.images import IMAGE_SUFFIXES, ImageU8, InputSpec, decode_image, load_image, read_bytes
from edgedistill.student.live_teachers import Teacher, TeacherFile, open_teachers
from edgedistill.tasks import Task
from edgedistill.training.answers import confidences, first_choices, scores_of_shares, shares_of, tempered
from edgedistill.training.checkpoints import read_tta
from edgedistill.training.loader import Draw, core_count, cycled
from edgedistill.training.losses import WHOLE_TARGETS, JoinedTargets, Targets, TargetSource, to_device
from edgedistill.training.predict import network_input
from edgedistill.training.seeds import generator
from edgedistill.training.soft_labels import Ordered, ScoreTable, StoredTable
from edgedistill.training.views import seen_through, zoomed

FORMAT = "edgedistill-unlabelled"
CPU = torch.device("cpu")
LABELLING_BATCH = 64
PART_IMAGES = 4 * LABELLING_BATCH  # labelled between two writes: what a kill can cost


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """``paths``: str [M]; ``sha256``: bytes [M]; ``log_probs``: float32 [M, C] of the teacher ensemble at T=1, of which a
    file may hold what is not asked for; with several heads its scores, [M, D] (see training.answers)."""

    paths: npt.NDArray[np.str_]
    sha256: npt.NDArray[np.bytes_]
    log_probs: ScoreTable

    def __len__(self) -> int:
        return len(self.paths)

    def take(self, rows: npt.NDArray[np.int64]) -> Unlabelled:
        return Unlabelled(self.paths[rows], self.sha256[rows], Ordered(self.log_probs, rows))

    def blocks(self) -> Iterator[npt.NDArray[np.float32]]:
        """All of ``log_probs`` in order, as many rows at a time as stay small."""
        for rows in row_blocks(np.arange(len(self)), self.log_probs.shape[1]):
            yield self.log_probs[rows]

    @functools.cached_property
    def hash(self) -> str:
        """What they and their labels are, wherever they lie."""
        digest = hashlib.sha256(self.sha256.tobytes())
        for block in self.blocks():
            digest.update(np.ascontiguousarray(block, np.float32).data)
        return digest.hexdigest()


def find_images(folder: Path, *, frames: Path, frame_step: int) -> npt.NDArray[np.str_]:
    """Paths of all images below ``folder`` and of every ``frame_step``-th frame of its videos, written to ``frames``.

    Raises UsageError when there is no such folder, DataError when it holds no image or a video that cannot be read.
    """
    from edgedistill.runtime.video import VIDEO_SUFFIXES  # here, since it imports OpenVINO

    if not folder.is_dir():
        raise UsageError(f"--unlabelled {folder}: no such folder")
    files = files_below(folder)
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    for path in files:
        if path.suffix.lower() in VIDEO_SUFFIXES:
            images += extract_frames(path, frames / f"{path.stem}-{sha256_file(path)[:12]}-{frame_step}", frame_step)
    unread = [path for path in files if path.suffix.lower() not in IMAGE_SUFFIXES | VIDEO_SUFFIXES]
    if unread:
        counts = Counter(path.suffix.lower() or "without a suffix" for path in unread)
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts.most_common())
        console.warn_once(
            f"--unlabelled: {len(unread)} files are none that can be read and are left out ({kinds}), first {unread[0]}; "
            "convert images to JPEG or PNG, and unpack archives"
        )
    if not images:
        raise DataError(f"--unlabelled {folder}: no image and no video in it")
    return np.array([str(path) for path in images])


def extract_frames(video: Path, folder: Path, step: int) -> list[Path]:
    """Every ``step``-th frame as PNG; those that lie there already are kept. Raises DataError for a damaged video."""
    import mmcv

    reader = mmcv.VideoReader(str(video))
    paths: list[Path] = []

    def keep(number: int, frame: ImageU8) -> None:
        path = folder / f"{number:08d}.png"
        if not path.exists():
            with atomic_path(path) as temporary:
                temporary.write_bytes(cv2.imencode(".png", frame)[1].tobytes())
        paths.append(path)

    if reader.frame_cnt <= 0:  # a live recording: its length was never written
        for number in itertools.count():
            frame = reader.read()
            if frame is None:
                break
            if number % step == 0:
                keep(number, frame)
    for number in range(0, max(0, reader.frame_cnt), step):
        path = folder / f"{number:08d}.png"
        if path.exists():
            paths.append(path)
            continue
        frame = reader.get_frame(number)
        if frame is None:  # containers often promise more frames than they hold
            console.warn(f"{video}: no frame from {number} on can be read; {len(paths)} are taken")
            break
        keep(number, frame)
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
        first_known = paths[np.flatnonzero(splits != "")[0]]
        console.warn_once(
            f"--unlabelled: {known} images are in the train or val split and are left out, first {first_known}"
        )
    fresh = np.flatnonzero(splits == "")
    first = np.sort(np.unique(digests[fresh], return_index=True)[1])
    return paths[fresh[first]], digests[fresh[first]]


def without_like_test(
    paths: npt.NDArray[np.str_], digests: npt.NDArray[np.bytes_], dataset: Dataset, *, cache: Path
) -> tuple[npt.NDArray[np.str_], npt.NDArray[np.bytes_]]:
    """``paths`` and ``digests`` without near-duplicates of test images (data.duplicates), which are warned about.

    The evaluation would judge the student on what it has as good as seen. ``cache``: a folder that keeps what was found,
    so that the images are compared once. Raises DataError when nothing is left.
    """
    test, file = dataset.rows("test"), cache / "like_test.json"
    wanted = {
        "images": hashlib.sha256(digests.tobytes()).hexdigest(),
        "test": hashlib.sha256(dataset.sha256[test].tobytes()).hexdigest(),
    }
    saved = read_json(file, format=FORMAT) if file.exists() else {}
    if {key: saved.get(key) for key in wanted} != wanted:
        pairs = duplicates.near_duplicates_across(paths.tolist(), dataset.paths[test].tolist())
        if pairs is None:
            console.warn_once(
                "--unlabelled: so many images look alike that copies of test images are found by content alone"
            )
            pairs = duplicates.NO_PAIRS
        saved = wanted | {"rows": np.unique(pairs[:, 0]).tolist()}
        write_json(file, saved, format=FORMAT)
    rows = [int(row) for row in saved["rows"]]
    if rows:
        console.warn_once(
            f"--unlabelled: {len(rows)} images look like test images and are left out, first {paths[rows[0]]}"
        )
    if len(rows) == len(paths):
        raise DataError("--unlabelled: every image looks like one of the test split; give other images")
    return np.delete(paths, rows), np.delete(digests, rows)


def is_readable(path: str) -> bool:
    try:
        decode_image(read_bytes(path)[0])
    except ImageError:
        return False
    return True


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
    """The teachers' probabilities, a mean by their weights, of the images that can be read; others are warned about.

    Kept in ``cache``, so that a resumed run does not ask again, and written in parts, so that a kill costs one of them; they
    stay there, and are read by rows. Raises DataError when no image can be read.
    """
    wanted = {
        "images": hashlib.sha256(digests.tobytes()).hexdigest(),
        "teachers": [_judge_key(file, temperatures) for file in files],
    }
    if not _is_labelled(cache, wanted):

        def judges() -> list[Teacher]:
            teachers = open_teachers(files, dataset, device=device, half=half, temperatures=temperatures)
            return [teacher for teacher in teachers if teacher.weight > 0]

        key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
        parts = _label_parts(paths, judges, dataset, cache / f"parts-{key[:16]}", device)
        shape = (len(paths), len(dataset.outputs))
        write_blocks(cache / "log_probs.npy", (read_array(part) for part in parts), shape=shape)
        write_json(cache / "meta.json", wanted, format=FORMAT)
        shutil.rmtree(parts[0].parent)
    found = Unlabelled(paths, digests, StoredTable(cache / "log_probs.npy"))
    unreadable = np.concatenate([np.isnan(block[:, 0]) for block in found.blocks()])
    if unreadable.all():
        raise DataError(f"--unlabelled: none of the {len(paths)} images can be read, first {paths[0]}")
    if unreadable.any():
        console.warn(
            f"--unlabelled: {int(unreadable.sum())} images cannot be read and are left out, first {paths[unreadable][0]}"
        )
    return found.take(np.flatnonzero(~unreadable))


def _judge_key(file: TeacherFile, temperatures: Mapping[str, float] | None) -> list[Any]:
    """What a teacher's answers depend on."""
    views = read_tta(file.path)
    key: list[Any] = [file.sha256, file.weight, 1.0 if temperatures is None else temperatures[file.sha256]]
    return [*key, views] if views else key


def _is_labelled(cache: Path, wanted: dict[str, Any]) -> bool:
    if not (cache / "meta.json").exists():
        return False
    meta = read_json(cache / "meta.json", format=FORMAT)
    return {key: meta.get(key) for key in wanted} == wanted


def _label_parts(
    paths: npt.NDArray[np.str_],
    open_judges: Callable[[], list[Teacher]],
    dataset: Dataset,
    folder: Path,
    device: torch.device,
) -> list[Path]:
    """Files of float32 [<= PART_IMAGES, C] in the order of ``paths``; those that lie there already are kept."""
    starts = range(0, len(paths), PART_IMAGES)
    files = [folder / f"{start:010d}.npy" for start in starts]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    if not missing:
        return files
    judges = open_judges()
    specs = list(dict.fromkeys(zoomed(judge.spec, view.zoom) for judge in judges for view in judge.views))

    with ThreadPoolExecutor(core_count()) as pool, console.progress("labelling unlabelled images", len(paths)) as bar:

        def start(number: int) -> list[Iterator[ImageU8 | None]]:
            some = paths[number * PART_IMAGES : (number + 1) * PART_IMAGES]
            return [pool.map(functools.partial(_read, spec=spec), some) for spec in specs]

        ahead = start(missing[0])
        for number, following in itertools.zip_longest(missing, missing[1:]):
            pictures = dict(zip(specs, map(list, ahead), strict=True))
            ahead = start(following) if following is not None else []
            write_array(files[number], _log_mean(judges, pictures, dataset, device))
            bar.update(bar.task_ids[0], completed=min((number + 1) * PART_IMAGES, len(paths)))
    return files


def _read(path: np.str_, spec: InputSpec) -> ImageU8 | None:
    """None: the image is damaged."""
    try:
        return load_image(str(path), spec)
    except ImageError:
        return None


def _log_mean(
    judges: Sequence[Teacher],
    pictures: Mapping[InputSpec, Sequence[ImageU8 | None]],
    dataset: Dataset,
    device: torch.device,
) -> npt.NDArray[np.float32]:
    """float32 [N, C], NaN where an image is damaged. ``pictures``: the N images in all sizes that the judges' views need."""
    images = list(zip(*pictures.values(), strict=True))
    readable = [row for row, sizes in enumerate(images) if all(image is not None for image in sizes)]
    log_probs = np.full((len(images), len(dataset.outputs)), np.nan, np.float32)
    if readable:
        usable = {spec: [some[row] for row in readable] for spec, some in pictures.items()}
        answers = [_shares(judge, usable, dataset.task, device) for judge in judges]
        mean = torch.from_numpy(np.average(answers, axis=0, weights=[judge.weight for judge in judges]))
        log_probs[readable] = scores_of_shares(dataset.task, mean).numpy()
    return log_probs


def _shares(
    judge: Teacher, pictures: Mapping[InputSpec, Sequence[Any]], task: Task | None, device: torch.device
) -> npt.NDArray[np.float64]:
    """float64 [N, C], what a judge says of N images uint8 [H, W, 3] BGR: the mean over its views, then tempered, as the
    stored soft labels are."""
    parts = []
    for start in range(0, len(next(iter(pictures.values()))), LABELLING_BATCH):
        scores = []
        for view in judge.views:
            size = np.stack(pictures[zoomed(judge.spec, view.zoom)][start : start + LABELLING_BATCH])
            images = torch.from_numpy(seen_through(size, view, judge.spec)).to(device).flip(-1)
            scores.append(judge.network(network_input(images, judge.spec)))
        if len(scores) > 1:
            mean = torch.stack([shares_of(task, each.double()) for each in scores]).mean(dim=0)
            scores = [scores_of_shares(task, mean)]
        parts.append(shares_of(task, tempered(task, scores[0], judge.temperature).double()).cpu().numpy())
    return np.concatenate(parts)


def choose(
    images: Unlabelled, *, min_confidence: float, class_cap: float, seed: int, task: Task | None = None
) -> Unlabelled:
    """Those of which the ensemble is sure enough, no class with more than ``class_cap`` times the mean over classes.

    Of several heads the least sure one counts, and the cap is for what the softmax heads answer together, in times the mean
    over the joint answers that occur (one softmax head: over its classes); without such a head (several labels per image)
    there is no cap. Too many of a class are drawn by ``seed``, not by confidence: the surest are the easiest. Raises
    DataError when nothing is left.
    """
    confidence, answers = _looked_over(images, task)
    sure = np.flatnonzero(confidence >= min_confidence)
    if not len(sure):
        raise DataError(
            f"--unlabelled: of {len(images)} images the teachers are sure of none (--unlabelled-min-confidence "
            f"{min_confidence:g}, the surest has {confidence.max():.2f}); lower it, or leave --unlabelled out"
        )
    chosen = sure
    if takes_class_cap(task):
        given = answers[sure]
        cap = max(1, int(class_cap * len(sure) / _class_count(task, images.log_probs.shape[1], given)))
        kept = []
        for label in np.unique(given):
            members = sure[given == label]
            kept.append(generator(seed, "unlabelled", int(label)).permutation(members)[:cap])
        chosen = np.sort(np.concatenate(kept))
    console.note(f"--unlabelled: {len(chosen)} of {len(images)} images; the teachers are sure of {len(sure)}")
    return images.take(chosen)


def _looked_over(images: Unlabelled, task: Task | None) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """[M] each: the confidence of the least sure head, and a number for what the softmax heads answer together."""
    confidence, choices = [], []
    for block in images.blocks():
        shares = shares_of(task, torch.from_numpy(block))
        confidence.append(confidences(task, shares).numpy())
        choices.append(first_choices(task, shares).numpy())
    chosen = np.concatenate(choices)
    joint = chosen[:, 0] if task is None else np.unique(chosen, axis=0, return_inverse=True)[1].reshape(-1)
    return np.concatenate(confidence), joint


def takes_class_cap(task: Task | None) -> bool:
    """Whether an image has one answer that ``choose`` can count: labels that apply or not can each be common."""
    return task is None or any(head.kind == "softmax" for head in task.heads)


def _class_count(task: Task | None, outputs: int, answers: npt.NDArray[np.int64]) -> int:
    """Over how many classes the cap's mean goes. Of several heads not over all combinations: most never occur."""
    if task is None:
        return outputs
    widths = [head.width for head in task.heads if head.kind == "softmax"]
    return widths[0] if len(widths) == 1 else len(np.unique(answers))


@dataclass(frozen=True, eq=False)
class ScoredTargets:
    """What ``unlabelled_targets`` gives, made for the rows of a batch alone. ``scores``: [M, C] as in Unlabelled; ``device``:
    where they come."""

    scores: ScoreTable
    temperature: float
    task: Task | None = None
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.scores)

    def to(self, device: torch.device) -> ScoredTargets:
        return dataclasses.replace(self, device=device)

    def take(self, rows: npt.NDArray[np.int64]) -> Targets:
        scores = torch.from_numpy(self.scores[rows])
        hard, soft = shares_of(self.task, scores), shares_of(self.task, scores, self.temperature)
        return Targets(to_device(hard.numpy(), self.device), to_device(soft.numpy(), self.device))


def unlabelled_targets(images: Unlabelled, temperature: float, task: Task | None = None) -> TargetSource:
    """The ensemble's probabilities and values stand in for the hard label too; the soft ones are at ``temperature``. Beyond
    losses.WHOLE_TARGETS values they are made when a batch asks for them."""
    scored = ScoredTargets(images.log_probs, temperature, task)
    if len(images) * images.log_probs.shape[1] > WHOLE_TARGETS:
        return scored
    return scored.take(np.arange(len(images)))


def joined(first: TargetSource, second: TargetSource) -> TargetSource:
    """Targets of the rows of both."""
    if not (isinstance(first, Targets) and isinstance(second, Targets)):
        return JoinedTargets(first, second)
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
