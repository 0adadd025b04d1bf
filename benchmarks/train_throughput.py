"""Training throughput against timm's own train script: same network, size, batch, optimiser, layout and images.

    python -m edgedistill.benchmarks.train_throughput --model mbv3s --size 128 --batch-size 64 --rounds 3 \
        --timm-train train.py --out train_throughput.json

timm's wheel does not hold its train script. Take train.py from https://github.com/huggingface/pytorch-image-models
(checked with the one of commit 2aabaef039d918d453b58714ab84562609981112, run against timm 1.0.31; later ones have the
same log lines). It runs unchanged, behind a few lines that let it use a CPU and import beside a CPU-only torch.

Both trainers are processes of their own, one after the other, in rounds. Both crop, flip and decode the same files; timm
is tried with several worker counts and with both ways in which OpenMP threads can wait, and its best counts. Images per
second are those of whole epochs, the first left out as warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill import console
from edgedistill.artifacts import read_jsonl, sha256_file, write_json
from edgedistill.benchmarks.command import exit_with, module_command
from edgedistill.benchmarks.machine import machine_record
from edgedistill.benchmarks.timing import Spread, round_order
from edgedistill.data.sources import open_source
from edgedistill.errors import UsageError

SPLITS = ("train", "val", "test")
HELD_OUT_PER_CLASS = 16
OURS = "import sys; from edgedistill.cli import distill_main; distill_main()"
THEIRS = """
import runpy, sys, torch
from edgedistill.timm_import import import_timm
import_timm()
import timm.utils
if not torch.cuda.is_available():
    torch.cuda.synchronize = lambda *args: None
    choose = timm.utils.init_distributed_device
    def on_cpu(args):
        args.device = "cpu"
        return choose(args)
    timm.utils.init_distributed_device = on_cpu
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Train: 1 [   9/10 (100%)]  Loss: 0.7 (0.7)  Time: 0.51s,  125.1/s  (0.52s,  123.0/s)  LR: 1e-03  Data: 0.01 (0.02)
LOG_LINE = re.compile(r"Train: (\d+) \[.*?\((\d+\.\d+)s,\s*(\d+\.\d+)/s\).*Data: \S+ \((\d+\.\d+)\)")


@dataclass(frozen=True)
class Measured:
    """One training: images per second over whole epochs, and the share of the time spent waiting for images."""

    images_per_s: float
    wait_fraction: float


@dataclass(frozen=True)
class Candidate:
    """``workers`` None: ours, with the defaults of the command line."""

    name: str
    workers: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


def make_folders(data: str, root: Path, limit: int) -> tuple[int, list[str]]:
    """train, val and test with a folder per class; returns the number of training images and the class names."""
    source = open_source(data)
    names = sorted({item.label for item in source.items})
    counts = dict.fromkeys(names, 0)
    for item in source.items:
        number = counts[item.label]
        if number >= limit // len(names) + 2 * HELD_OUT_PER_CLASS:
            continue
        counts[item.label] += 1
        split = "val" if number < HELD_OUT_PER_CLASS else "test" if number < 2 * HELD_OUT_PER_CLASS else "train"
        folder = root / split / item.label.replace("/", "_")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(item.path, folder / f"{number:06d}{item.path.suffix}")
    return sum(counts.values()) - 2 * HELD_OUT_PER_CLASS * len(names), names


def our_command(args: argparse.Namespace, folders: Path, out: Path) -> list[str]:
    """A hard-label student without CutMix; everything else is the command line's default."""
    options = {
        "--data": folders,
        "--out": out,
        "--student": args.model,
        "--student-weights": "none",
        "--image-size": args.size,
        "--batch-size": args.batch_size,
        "--epochs": args.epochs,
        "--extra-epochs": 0,
        "--cutmix": 0,
    }
    flags = ["--no-distillation", "--no-baseline", "--no-balanced"]
    return [sys.executable, "-c", OURS, *(str(part) for pair in options.items() for part in pair), *flags]


def their_command(args: argparse.Namespace, folders: Path, out: Path, *, classes: int, workers: int) -> list[str]:
    """timm's train script with cheap augmentation (one crop of about our size, one flip) and its fast options."""
    options = {
        "--data-dir": folders,
        "--train-split": "train",
        "--val-split": "val",
        "--model": args.timm_model,
        "--num-classes": classes,
        "--input-size": f"3 {args.size} {args.size}",
        "--batch-size": args.batch_size,
        "--epochs": args.epochs,
        "--opt": "radam",
        "--lr": 0.002,
        "--warmup-epochs": 0,
        "--workers": workers,
        "--scale": "0.765 0.766",
        "--ratio": "1.0 1.0",
        "--color-jitter": 0,
        "--train-interpolation": "bilinear",
        "--smoothing": 0,
        "--log-interval": 1,
        "--checkpoint-hist": 1,
        "--output": out,
        "--experiment": "timm",
    }
    parts = [part for name, value in options.items() for part in (name, *str(value).split(" "))]
    return [sys.executable, "-c", THEIRS, str(args.timm_train), *parts, "--channels-last"]


def run_ours(args: argparse.Namespace, folders: Path, out: Path) -> Measured:
    _run(our_command(args, folders, out), {})
    rows = [row for row in read_jsonl(out / "student-hard-labels" / "metrics.jsonl") if row["epoch"] > 1]
    seconds = sum(row["seconds"] for row in rows)
    images = sum(row["images_per_s"] * row["seconds"] for row in rows)
    return Measured(images / seconds, sum(row["wait_fraction"] * row["seconds"] for row in rows) / seconds)


def run_theirs(args: argparse.Namespace, folders: Path, out: Path, candidate: Candidate, classes: int) -> Measured:
    workers = candidate.workers or 0
    log = _run(their_command(args, folders, out, classes=classes, workers=workers), candidate.environment)
    last = {int(match[1]): match for match in LOG_LINE.finditer(log)}  # the last line of an epoch averages all of it
    epochs = [match for epoch, match in last.items() if epoch > 0]
    if not epochs:
        raise UsageError(f"{args.timm_train}: printed no training lines after epoch 0; is it timm's train.py?")
    seconds = statistics.fmean(float(match[2]) for match in epochs)
    waited = statistics.fmean(float(match[4]) for match in epochs)
    return Measured(args.batch_size / seconds, waited / seconds)


def _run(command: Sequence[str], environment: dict[str, str]) -> str:
    """Standard output and error of the command; UsageError with its last lines if it fails."""
    done = subprocess.run(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise UsageError("a trainer failed:\n" + "\n".join(done.stdout.splitlines()[-15:]))
    return done.stdout


def candidates(args: argparse.Namespace) -> list[Candidate]:
    timm = [
        Candidate(f"timm, {workers} workers{label}", workers, environment)
        for workers in args.timm_workers
        for label, environment in (("", {}), (", threads that sleep", {"OMP_WAIT_POLICY": "PASSIVE"}))
    ]
    return [Candidate("edgedistill"), *timm]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The record that is written."""
    tried = candidates(args)
    results: dict[str, list[Measured]] = {candidate.name: [] for candidate in tried}
    with tempfile.TemporaryDirectory() as scratch:
        folders = Path(scratch) / "images"
        count, names = make_folders(args.data, folders, args.images)
        if count < 2 * args.batch_size:
            raise UsageError(f"{count} training images are less than two batches of {args.batch_size}")
        with console.progress("training", args.rounds * len(tried)) as bar:
            for number in range(args.rounds):
                for index in round_order(len(tried), number, args.rounds):
                    candidate, out = tried[index], Path(scratch) / f"run-{number}-{index}"
                    bar.update(bar.task_ids[0], info=candidate.name)
                    if candidate.workers is None:
                        results[candidate.name].append(run_ours(args, folders, out))
                    else:
                        results[candidate.name].append(run_theirs(args, folders, out, candidate, len(names)))
                    bar.update(bar.task_ids[0], advance=1)
                    shutil.rmtree(out, ignore_errors=True)
    return record(args, results, images=count, classes=len(names))


def record(
    args: argparse.Namespace, results: dict[str, list[Measured]], *, images: int, classes: int
) -> dict[str, Any]:
    """Ratios are taken inside rounds, against the timm candidate with the best median."""
    ours = results["edgedistill"]
    medians = {
        name: statistics.median(run.images_per_s for run in runs)
        for name, runs in results.items()
        if name != "edgedistill"
    }
    best = max(medians, key=lambda name: medians[name])
    ratios = [mine.images_per_s / theirs.images_per_s for mine, theirs in zip(ours, results[best], strict=True)]
    return {
        "machine": machine_record(),
        "command": module_command("train_throughput"),
        "settings": {key: str(value) for key, value in vars(args).items()},
        "timm_train_sha256": sha256_file(args.timm_train),
        "images": images,
        "classes": classes,
        "rounds": args.rounds,
        "results": {
            name: {
                "images_per_s": Spread.of([run.images_per_s for run in runs]).to_dict(),
                "wait_fraction": Spread.of([run.wait_fraction for run in runs]).to_dict(),
            }
            for name, runs in results.items()
        },
        "best_timm": best,
        "ratio_to_best_timm": Spread.of(ratios).to_dict(),
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default="elpv", help="any data that distill takes")
    parser.add_argument("--images", type=int, default=1280, help="at most so many training images")
    parser.add_argument("--model", default="mobilenetv3_small_100", help="our name of the network")
    parser.add_argument("--timm-model", help="timm's name, where --model is a short one")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=4, help="the first is warm-up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timm-workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--timm-train", type=Path, required=True, help="timm's train.py")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    short = {"mbv3s": "mobilenetv3_small_100", "effb4": "efficientnet_b4", "efflite0": "tf_efficientnet_lite0"}
    args.timm_model = args.timm_model or short.get(args.model, args.model)
    if args.epochs < 2 or args.rounds < 1:
        parser.error("--epochs takes 2 or more (the first is warm-up), --rounds 1 or more")
    if not args.timm_train.is_file():
        parser.error(f"--timm-train {args.timm_train}: no such file; see the head of this module")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = arguments(argv)
    result = measure(args)
    write_json(args.out, result, format="edgedistill-train-throughput")
    rows = [
        [
            name,
            *(f"{values['images_per_s'][key]:.0f}" for key in ("median", "min", "max")),
            f"{values['wait_fraction']['median']:.3f}",
        ]
        for name, values in result["results"].items()
    ]
    console.out.print(console.table("training", ("candidate", "images/s", "min", "max", "waiting"), rows))
    console.out.print(json.dumps(result["ratio_to_best_timm"] | {"best_timm": result["best_timm"]}))
    return 0


if __name__ == "__main__":
    exit_with(main)
