"""The reference trainings: the whole job on ELPV and Fashion-MNIST, in pieces that can be interrupted anywhere.

    python -m edgedistill.benchmarks.reference_runs --protocol gpu --minutes 28    # again and again until it says done
    python -m edgedistill.benchmarks.reference_runs --protocol cpu --only elpv

``gpu`` is the full recipe: EfficientNet-B4 at 224 px in five folds, MobileNetV3-small at 224 px with the contest's settings.
``cpu`` is the largest protocol that two cores finish in an hour or two. Each piece is `distill ... --resume`, so a kill costs
five minutes at most. When a run is whole, its figures are appended to benchmarks/results/reference.csv, and its metrics
and soft labels (small files) can be kept beside it with --keep.
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill import console
from edgedistill.artifacts import RunDir, atomic_path, read_json
from edgedistill.benchmarks.command import exit_with
from edgedistill.benchmarks.machine import machine_record
from edgedistill.data.deal import SplitSettings
from edgedistill.data.folds import freeze_dataset
from edgedistill.data.sources import open_source
from edgedistill.errors import EdgedistillError, UsageError

RESULTS = Path("benchmarks/results/reference.csv")
KEPT = ("config.json", "evaluation/evaluation.json", "teacher/oof.json", "soft_labels/meta.json")
MODELS = ("majority", "hard_label_student", "student", "teacher")


@dataclass(frozen=True)
class Protocol:
    """``options``: of `distill`. ``train_images``: so many of the data's training images, evenly by class (None: all)."""

    data: str
    options: str
    train_images: int | None = None


PROTOCOLS: dict[str, dict[str, Protocol]] = {
    "gpu": {
        "elpv": Protocol(
            "elpv",
            "--test-fraction 0.25 --teacher effb4 --folds 5 --teacher-image-size 256 --teacher-epochs 40"
            " --student mbv3s --image-size 224 --epochs 60 --any-way-up",
        ),
        "fashion-mnist": Protocol(
            "fashion-mnist",
            "--teacher effb4 --folds 5 --teacher-image-size 224 --teacher-epochs 12 --teacher-batch-size 128"
            " --student mbv3s --image-size 224 --epochs 20",
        ),
    },
    "cpu": {
        "elpv": Protocol(
            "elpv",
            "--test-fraction 0.25 --teacher efflite0 --teacher-weights packaged:efficientnet_lite0 --folds 5"
            " --teacher-image-size 128 --teacher-epochs 3 --student mbv3s --image-size 128 --epochs 16"
            " --batch-size 32 --lr 0.003 --cutmix 0 --no-balanced --any-way-up",
        ),
        "fashion-mnist": Protocol(
            "fashion-mnist",
            # At 32 px a stride of 32 leaves one pixel: EfficientNet-B0 from random weights stood at 0.46 after 8 epochs.
            "--teacher efflite0 --teacher-weights packaged:efficientnet_lite0 --folds 2 --teacher-image-size 64"
            " --teacher-epochs 5 --teacher-batch-size 32 --teacher-lr 0.003 --student mbv3s --image-size 64"
            " --epochs 10 --batch-size 64 --lr 0.003 --cutmix 0 --no-balanced",
            train_images=8_000,
        ),
    },
}


def run_piece(command: list[str], seconds: float) -> bool:
    """True when the command is done; False when its time ran out (it goes on from its checkpoint next time)."""
    process = subprocess.Popen(command)
    try:
        code = process.wait(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:  # under nohup or in a background job interrupts are ignored
            process.kill()
            process.wait()
        return False
    if code:
        raise EdgedistillError(f"{shlex.join(command)}: exit code {code}; see above")
    return True


def data_argument(protocol: Protocol, folder: Path) -> str:
    """What --data is given: the protocol's data, or a CSV that names fewer training images of it."""
    if protocol.train_images is None:
        return protocol.data
    path = folder / f"{protocol.data}-{protocol.train_images}.csv"
    if not path.exists():
        write_subset(protocol.data, protocol.train_images, path)
    return str(path)


def write_subset(data: str, count: int, path: Path, *, cut: SplitSettings | None = None) -> None:
    """A CSV of the test split whole and ``count`` other images for training: the first ones of a seeded shuffle, of each
    class as many as its share. ``cut``: the test split is cut first, groups kept together, where the data bring none."""
    source = open_source(data)
    splits = [item.split for item in source.items]
    if cut is not None:
        if "test" in splits:
            raise UsageError(f"{data}: has a test split of its own, so none is to be cut")
        splits = ["test" if split == "test" else "" for split in freeze_dataset(source, cut).splits]
    train = np.flatnonzero(np.array(splits) != "test")
    labels = np.array([item.label for item in source.items])
    order = np.random.default_rng(0 if cut is None else cut.seed).permutation(train)
    of_class = [order[labels[order] == name] for name in source.class_names]
    bounds = np.cumsum([len(rows) for rows in of_class]) * count // len(train)
    chosen = np.concatenate([rows[:n] for rows, n in zip(of_class, np.diff(bounds, prepend=0), strict=True)])
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for row in [*chosen, *np.flatnonzero(np.array(splits) == "test")]:
            writer.writerow([source.items[row].path, source.items[row].label, splits[row] or "train"])


def record(name: str, protocol_name: str, command: list[str], run: RunDir) -> dict[str, Any]:
    """One row: the four models on test, the teachers out of fold, and where and how it was made."""
    evaluation = read_json(run.evaluation / "evaluation.json", format="edgedistill-evaluation")
    oof = read_json(run.root / "teacher" / "oof.json", format="edgedistill-oof")
    machine = machine_record()
    row: dict[str, Any] = {"data": name, "protocol": protocol_name, "test_images": evaluation["n"]}
    for model in MODELS:
        values = evaluation["models"][model]
        row[f"{model}_accuracy"] = round(values["accuracy"], 4)
        row[f"{model}_accuracy_ci95"] = "{:.4f}-{:.4f}".format(*values["accuracy_ci95"])
        row[f"{model}_macro_f1"] = round(values["macro_f1"], 4)
    for pair in evaluation["paired"]:
        if pair["metric"] == "accuracy" and pair["a"] == "student":
            low, high = pair["ci95"]
            row[f"student_minus_{pair['b']}"] = f"{pair['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"
    row |= {"oof_accuracy": round(oof["all"]["accuracy"], 4), "cpu": machine["cpu"], "cores": machine["cores"]}
    return row | {"versions": json.dumps(machine["versions"]), "command": shlex.join(["distill", *command[1:]])}


def append(row: dict[str, Any], path: Path) -> None:
    """The row of an earlier run of the same data and protocol is replaced."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [
                old for old in csv.DictReader(file) if (old["data"], old["protocol"]) != (row["data"], row["protocol"])
            ]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(row), extrasaction="ignore")
        writer.writeheader()
        writer.writerows([*rows, row])


def keep(run: RunDir, folder: Path) -> None:
    """The small files of a run: settings, metrics, soft labels."""
    logs = [str(path.relative_to(run.root)) for path in sorted(run.root.rglob("metrics.jsonl"))]
    for name in (*KEPT, *logs, "soft_labels/ids.npy", "soft_labels/fold.npy", "soft_labels/label.log_probs.npy"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(run.root / name, folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--protocol", choices=sorted(PROTOCOLS), required=True)
    parser.add_argument("--only", choices=("elpv", "fashion-mnist"), help="one of the two data sets")
    parser.add_argument("--minutes", type=float, default=28.0, help="of this piece; run again to go on")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the runs lie")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, help="copy settings, metrics and soft labels there")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    for name, protocol in PROTOCOLS[arguments.protocol].items():
        if arguments.only not in (None, name):
            continue
        run = RunDir(arguments.runs / f"reference-{arguments.protocol}-{name}")
        program = str(Path(sys.executable).with_name("distill"))
        options = ["--data", data_argument(protocol, arguments.runs), *shlex.split(protocol.options)]
        command = [program, *options, "--out", str(run.root), "--resume"]
        if not run_piece(command, deadline - time.monotonic()):
            console.note(f"{name}: time is up; run the same command again to go on")
            return 3
        append(record(name, arguments.protocol, command, run), arguments.out)
        if arguments.keep is not None:
            keep(run, arguments.keep / run.root.name)
    console.note(f"done: {arguments.out}")
    return 0


if __name__ == "__main__":
    exit_with(main)
