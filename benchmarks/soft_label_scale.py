"""Soft labels of a million images and a thousand classes in bounded memory: written, read back, and learned from.

    python -m edgedistill.benchmarks.soft_label_scale --limit-gib 4 --out benchmarks/results/soft-label-scale.json

Log-probabilities are drawn block by block and never lie on the disk uncompressed. --limit-gib bounds the process's
address space, files that are mapped too, so that finishing is the proof; run it in a process of its own, whose peak of memory is recorded.

Before that, in another process under the same limit, two architectures' answers for the folds that they never saw become
soft labels as `teach` makes them: their quality, the weights of their vote, and the labels themselves.

Then a student's training is prepared as `distill` prepares it, in a third process under the same limit: the labels are
opened, those that look wrong are searched for and left out, all of them are hashed, and the targets of batches are mixed
and learned from. Only the images and the network are missing: logits are drawn.

As many photographs without labels, labelled by an ensemble, are prepared in a fourth process. Their answers are one file of
4 GB, which the limit would count: what bounds this part is its recorded peak of memory.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.artifacts import read_json, write_array, write_json
from edgedistill.benchmarks.machine import machine_record
from edgedistill.data.manifest import Dataset
from edgedistill.data.soft_label_store import (
    BLOCK_ROWS,
    LogProbs,
    open_store,
    parse_store,
    write_blocks,
    write_store,
)
from edgedistill.errors import UsageError

FORMAT, PLAN = "edgedistill-soft-label-scale", "edgedistill-soft-label-scale-student"
HEAD = "label"
FOLDS = 5
STUDENT_BATCHES = 300
RANDOM_ROWS = 256  # a student's batch
RANDOM_BATCHES = 40
SHARPNESS = 5.0  # of the drawn logits: the first choice has 0.54 on average, the first ten 0.92


def drawn(rows: int, classes: int, *, first: int = 0) -> Iterator[LogProbs]:
    """Blocks of log-probabilities, float32 [n, C], that depend on their place and on ``first`` alone."""
    for start in range(0, rows, BLOCK_ROWS):
        draws = np.random.default_rng(first + start)
        logits = draws.standard_normal((min(BLOCK_ROWS, rows - start), classes), dtype=np.float32) * SHARPNESS
        logits -= logits.max(axis=1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def measure(folder: Path, *, rows: int, classes: int, store: str, unlabelled: dict[str, Any]) -> dict[str, Any]:
    """Seconds, bytes and loss of writing, of reading all in order, of reading batches of random rows, and of a student
    that learns from them. ``unlabelled``: the figures of that part."""
    kind = parse_store(store)
    start = time.perf_counter()
    entry = write_store(folder, HEAD, drawn(rows, classes), shape=(rows, classes), kind=kind)
    write_s = time.perf_counter() - start
    start = time.perf_counter()
    for _ in drawn(rows, classes):
        pass
    draw_s = time.perf_counter() - start
    labels = open_store(folder, HEAD, entry, count=rows, class_count=classes)
    start = time.perf_counter()
    read = sum(len(block) for block in labels.blocks())
    read_s = time.perf_counter() - start
    draws = np.random.default_rng(0)
    start = time.perf_counter()
    for _ in range(RANDOM_BATCHES):
        labels.rows(draws.integers(rows, size=min(RANDOM_ROWS, rows)))
    figures = {
        "rows": read,
        "classes": classes,
        "store": store,
        "write_s": write_s,
        "draw_s": draw_s,
        "read_s": read_s,
        "random_batch_ms": 1000 * (time.perf_counter() - start) / RANDOM_BATCHES,
        "disk_bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "float32_bytes": 4 * rows * classes,
        "loss": entry.get("loss"),
        "peak_rss_bytes": peak_rss_bytes(),
    }
    teachers = apart("teachers", folder, rows=rows, classes=classes, store=store)
    return figures | {
        "unlabelled": unlabelled,
        "teachers": teachers,
        "student": apart("student", folder, rows=rows, classes=classes, entry=entry, batches=STUDENT_BATCHES),
    }


def peak_rss_bytes() -> int:
    """Of this program alone; getrusage would count what its parent held when it started it."""
    return _memory_bytes("VmHWM")


def _memory_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def made_up(rows: int, classes: int) -> Dataset:
    """Training images that do not exist, in FOLDS folds. Labels are drawn, so that nearly every one looks wrong."""
    numbers = np.arange(rows)
    ids = np.char.add(np.char.zfill(numbers.astype(np.str_), 8), ".jpg")
    return Dataset(
        ids=ids,
        paths=ids,
        sha256=np.full(rows, b"0" * 64),
        labels=np.random.default_rng(1).integers(classes, size=rows).astype(np.int32),
        groups=np.zeros(rows, np.str_),
        splits=np.full(rows, "train"),
        folds=(numbers % FOLDS).astype(np.int16),
        class_names=tuple(f"class {number:05d}" for number in range(classes)),
    )


def apart(part: str, folder: Path, **sizes: Any) -> dict[str, Any]:
    """``teachers``, ``student`` or ``unlabelled`` in a process of its own, whose peak of memory is then its own too."""
    plan, out = folder / f"{part}-plan.json", folder / f"{part}.json"
    write_json(plan, sizes, format=PLAN)
    command = [sys.executable, "-m", "edgedistill.benchmarks.soft_label_scale", "--part", part, plan, "--out", out]
    subprocess.run([str(word) for word in command], check=True)
    return _plain(read_json(out, format=PLAN))


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in ("format", "version")}


def teachers(folder: Path, *, rows: int, classes: int, store: str) -> dict[str, Any]:
    """Seconds and bytes of what `teach` does once two architectures have answered for their folds."""
    from edgedistill.artifacts import RunDir
    from edgedistill.teacher import teach
    from edgedistill.training.soft_labels import ids_hash

    imported, dataset, run = _memory_bytes("VmRSS"), made_up(rows, classes), RunDir(folder / "run")
    marks = [time.perf_counter()]
    settings = teach.TeacherSettings(soft_label_store=store)
    members = [teach._Member("one", "", settings), teach._Member("two", "two", settings)]
    for number, member in enumerate(members):
        for fold in range(FOLDS):
            held_out, place = dataset.folds == fold, run.teacher(fold, member.folder)
            count = int(held_out.sum())
            write_array(place / "held_out_ids.npy", dataset.ids[held_out])
            answers = drawn(count, classes, first=(number * FOLDS + fold) * rows)
            write_blocks(place / "held_out.log_probs.npy", answers, shape=(count, classes))
            trained = {"trained_on": ids_hash(dataset.ids[~held_out]), "epochs_planned": 1, "epochs_done": 1}
            names = {"fold": fold, "architecture": member.label, "model_sha256": f"{member.label}-{fold}"}
            write_json(place / "fold.json", names | trained, format=teach.FOLD_FORMAT)
    marks.append(time.perf_counter())
    ensemble = teach.Ensemble(label="one", others=(teach.NamedTeacher("two", settings),))
    teach._write_labels(ensemble, members, dataset, run)
    marks.append(time.perf_counter())
    quality = read_json(run.root / "teacher" / "oof.json", format=teach.OOF_FORMAT)
    shutil.rmtree(run.root)
    return dict(zip(("drawn_s", "labels_s"), np.diff(marks).tolist(), strict=True)) | {
        "weights": quality["blend"]["weights"],
        "log_loss": quality["all"]["log_loss"],
        "imported_rss_bytes": imported,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def student(folder: Path, *, rows: int, classes: int, entry: dict[str, Any], batches: int) -> dict[str, Any]:
    """Seconds and bytes of what a student's training does with its labels, by the functions that do it."""
    import torch

    from edgedistill.student import distil
    from edgedistill.training.models import input_spec_for
    from edgedistill.training.soft_labels import SOFT_LABELS_FORMAT

    imported, dataset, marks = _memory_bytes("VmRSS"), made_up(rows, classes), [time.perf_counter()]
    write_array(folder / "ids.npy", dataset.ids)
    write_array(folder / "fold.npy", dataset.folds)
    meta = {"dataset_hash": dataset.hash, "classes": list(dataset.class_names), "heads": {HEAD: entry}, "teachers": []}
    write_json(folder / "meta.json", meta, format=SOFT_LABELS_FORMAT)
    settings = distil.StudentSettings(
        loss="kl", soft_temperature=2.0, label_smoothing=0.1, drop_noisy=0.01, cache_gib=0.0, batch_size=RANDOM_ROWS
    )
    spec, data_set = input_spec_for(settings.name, 32), _memory_bytes("VmRSS")
    marks.append(time.perf_counter())
    lesson = distil._lesson(settings, dataset, folder, device=torch.device("cpu"), cache=folder)
    marks.append(time.perf_counter())
    identity = distil._identity(settings, dataset, lesson, None)
    marks.append(time.perf_counter())
    job = distil._job(settings, dataset, spec, lesson, loaded=spec, folder=folder, wanted=identity)
    drawn_rows = job.phases[0].draw.epoch(0)[:batches]
    marks.append(time.perf_counter())
    names = ("made_up_s", "noisy_labels_s", "identity_s", "job_s")
    return dict(zip(names, np.diff(marks).tolist(), strict=True)) | {
        "soft_labels": identity["soft_labels"],
        "dropped": len(lesson.dropped),
        **_learned(job.targets, settings.mixing(), job.loss, drawn_rows, classes),
        "imported_rss_bytes": imported,
        "data_set_rss_bytes": data_set,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def unlabelled(folder: Path, *, rows: int, classes: int, batches: int) -> dict[str, Any]:
    """Seconds and bytes of what a student's training does with as many photographs without labels, once the teachers have
    answered."""
    import hashlib

    import torch

    from edgedistill.student import distil
    from edgedistill.student import unlabelled as photographs
    from edgedistill.training.losses import LossSettings

    imported, marks = _memory_bytes("VmRSS"), [time.perf_counter()]
    paths = np.char.add(np.char.zfill(np.arange(rows).astype(np.str_), 8), ".jpg")
    digests = np.full(rows, b"0" * 64)
    write_blocks(folder / "log_probs.npy", drawn(rows, classes), shape=(rows, classes))
    wanted = {"images": hashlib.sha256(digests.tobytes()).hexdigest(), "teachers": []}
    write_json(folder / "meta.json", wanted, format=photographs.FORMAT)
    data_set = _memory_bytes("VmRSS")
    marks.append(time.perf_counter())
    labelled = photographs.label_images(
        paths, digests, (), made_up(1, classes), cache=folder, device=torch.device("cpu"), half=False, temperatures=None
    )
    chosen = photographs.choose(labelled, min_confidence=0.2, class_cap=3.0, seed=0)
    marks.append(time.perf_counter())
    digest = chosen.hash
    marks.append(time.perf_counter())
    targets, settings = photographs.unlabelled_targets(chosen, 2.0), distil.StudentSettings()
    numbers = np.random.default_rng(0).integers(len(chosen), size=(batches, RANDOM_ROWS))
    names = ("drawn_s", "chosen_s", "identity_s")
    return dict(zip(names, np.diff(marks).tolist(), strict=True)) | {
        "photographs": rows,
        "chosen": len(chosen),
        "sha256": digest,
        **_learned(targets, settings.mixing(), LossSettings("kl", 0.5, 2.0), numbers, classes),
        "imported_rss_bytes": imported,
        "data_set_rss_bytes": data_set,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _learned(source: Any, mixing: Any, settings: Any, batches: npt.NDArray[np.int64], classes: int) -> dict[str, Any]:
    """Milliseconds of the targets of a batch, and with mixing, loss and gradient. ``batches``: int64 [steps, B], rows of
    ``source``, a TargetSource; ``mixing``: a Mixing, ``settings``: LossSettings."""
    import torch

    from edgedistill.training.losses import loss_of
    from edgedistill.training.mixing import mix

    take_ms, step_ms, losses = [], [], []
    for step, rows in enumerate(batches):
        start = time.perf_counter()
        targets = source.take(rows)
        take_ms.append(1000 * (time.perf_counter() - start))
        images = torch.zeros((len(rows), 8, 8, 3), dtype=torch.uint8)
        _, mixed = mix(images, targets, mixing, seed=0, epoch=0, step=step)
        logits = torch.randn(len(rows), classes, requires_grad=True)
        loss = loss_of(logits, mixed, settings)
        loss.backward()  # type: ignore[no-untyped-call]
        step_ms.append(1000 * (time.perf_counter() - start))
        losses.append(loss.item())
    return {
        "batches": len(batches),
        "targets_ms": statistics.median(take_ms),
        "targets_and_loss_ms": statistics.median(step_ms),
        "mean_loss": statistics.fmean(losses),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--store", default="top-k:10", help="float32, float16 or top-k:N")
    parser.add_argument("--limit-gib", type=float, default=2.0, help="address space that each process may take")
    parser.add_argument("--folder", type=Path, help="where the labels lie while they are measured (default: /tmp)")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # a process of its own, by apart
    arguments = parser.parse_args()
    if arguments.part is not None:
        parts: dict[str, Callable[..., dict[str, Any]]] = {
            "teachers": teachers,
            "student": student,
            "unlabelled": unlabelled,
        }
        plan = Path(arguments.part[1])
        figures = parts[arguments.part[0]](plan.parent, **_plain(read_json(plan, format=PLAN)))
        write_json(arguments.out, figures, format=PLAN)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        widest = arguments.rows * arguments.classes * 4
        needed = (3.2 if arguments.store == "float32" else 2.7) * widest  # the answers of two teachers, and the labels
        if shutil.disk_usage(folder).free < needed:
            raise UsageError(f"{folder}: {needed / 1e9:.1f} GB are needed; free some space, or choose --folder")
        sizes = {"rows": arguments.rows, "classes": arguments.classes}
        photographs = Path(folder) / "photographs"
        figures = apart("unlabelled", photographs, **sizes, batches=STUDENT_BATCHES)
        shutil.rmtree(photographs)
        limit = int(arguments.limit_gib * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        result = measure(Path(folder), **sizes, store=arguments.store, unlabelled=figures)
    result["limit_gib"] = arguments.limit_gib
    show(result)
    if arguments.out is not None:
        command = (
            f"python -m edgedistill.benchmarks.soft_label_scale --rows {arguments.rows} --classes {arguments.classes} "
            f"--store {arguments.store} --limit-gib {arguments.limit_gib}"
        )
        write_json(arguments.out, {"machine": machine_record(), "command": command} | result, format=FORMAT)


def show(result: dict[str, Any]) -> None:
    learned, taught, others = result["student"], result["teachers"], result["unlabelled"]
    shown = [
        ("write (of this drawing)", f"{result['write_s']:.1f} s ({result['draw_s']:.1f} s)"),
        ("read in order", f"{result['read_s']:.1f} s"),
        (f"read {RANDOM_ROWS} random rows", f"{result['random_batch_ms']:.1f} ms"),
        ("disk, of float32's", f"{result['disk_bytes'] / 1e9:.3f} GB ({result['float32_bytes'] / 1e9:.1f} GB)"),
        ("peak memory", f"{result['peak_rss_bytes'] / 1e9:.2f} GB"),
        ("mean loss", "none" if result["loss"] is None else f"{result['loss']['kl_mean']:.3g} nats"),
        ("teachers: quality, vote, labels", f"{taught['labels_s']:.1f} s"),
        ("teachers: peak memory", f"{taught['peak_rss_bytes'] / 1e9:.2f} GB"),
        ("student: labels that look wrong", f"{learned['noisy_labels_s']:.1f} s"),
        ("student: hash of all labels", f"{learned['identity_s']:.1f} s"),
        (f"student: targets of {RANDOM_ROWS} images", f"{learned['targets_ms']:.1f} ms"),
        ("student: peak memory", f"{learned['peak_rss_bytes'] / 1e9:.2f} GB"),
        ("photographs without labels: chosen", f"{others['chosen']:,} in {others['chosen_s']:.1f} s"),
        ("photographs: hash of their answers", f"{others['identity_s']:.1f} s"),
        (f"photographs: targets of {RANDOM_ROWS}", f"{others['targets_ms']:.1f} ms"),
        ("photographs: peak memory", f"{others['peak_rss_bytes'] / 1e9:.2f} GB"),
    ]
    title = f"{result['rows']:,} x {result['classes']:,} soft labels, {result['store']}"
    console.out.print(console.table(title, ("step", "cost"), shown))


if __name__ == "__main__":
    main()
