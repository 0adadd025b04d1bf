"""Whether memory stays flat while very many images are classified.

    python -m edgedistill.benchmarks.memory_flat BUNDLE --count 50000 --out memory.json

Engine and Classifier answer ``count`` images each, of several sizes and formats, with a damaged one now and then. The
resident set is sampled; its slope is fitted after the first fifth, which is left out as warm-up.
"""

from __future__ import annotations

import argparse
import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from edgedistill import console
from edgedistill.artifacts import write_json
from edgedistill.benchmarks.command import exit_with, module_command
from edgedistill.benchmarks.machine import machine_record
from edgedistill.errors import UsageError
from edgedistill.runtime import Bundle, Classifier, Engine, Prediction

SIZES = ((64, 96), (240, 320), (300, 300), (427, 640))
SAMPLES = 200


def make_images() -> list[bytes]:
    """JPEG and PNG of every size, and one truncated file."""
    rng = np.random.default_rng(0)
    images = []
    for (height, width), suffix in itertools.product(SIZES, (".jpg", ".png")):
        coarse = rng.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
        picture = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        images.append(cv2.imencode(suffix, picture)[1].tobytes())
    return [*images, images[0][: len(images[0]) // 2]]


def resident_bytes(process: int | str = "self") -> int:
    """A process's resident set (Linux), by default this one's."""
    return int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def sample(predictions: Iterable[Prediction], count: int) -> dict[str, Any]:
    """Resident MiB over ``count`` predictions, and its slope in bytes per image."""
    return sampled(predictions, count, resident_bytes)


def sampled(answers: Iterable[Any], count: int, resident_bytes: Callable[[], int]) -> dict[str, Any]:
    """The same for whoever gives ``count`` answers and whoever's memory ``resident_bytes`` tells."""
    step = max(1, count // SAMPLES)
    at, resident = [], []
    for number, _ in enumerate(answers):
        if number % step == 0:
            at.append(number)
            resident.append(resident_bytes())
    if len(at) < 10:
        raise UsageError(f"memory_flat: {count} images give {len(at)} samples, expected at least 10")
    first = len(at) // 5
    slope = float(np.polyfit(at[first:], resident[first:], 1)[0])
    mib = [round(value / 2**20, 2) for value in resident]
    return {
        "images": count,
        "slope_bytes_per_image": round(slope, 2),
        "growth_mib": round(mib[-1] - mib[first], 2),
        "resident_mib": {"start": mib[0], "after_warm_up": mib[first], "end": mib[-1], "peak": max(mib)},
        "samples_mib": mib,
    }


def measure(path: Path, count: int) -> dict[str, Any]:
    """The record that is written, for Classifier and Engine."""
    bundle, images = Bundle.load(path), make_images()
    endless = itertools.cycle(images)
    classifier = Classifier(bundle, cache_dir=False)
    results = {"classifier": sample((classifier.classify([next(endless)])[0] for _ in range(count)), count)}
    with Engine(bundle, cache_dir=False) as engine:
        results["engine"] = sample(engine.map(itertools.islice(endless, count)), count)
    return {
        "machine": machine_record(),
        "command": module_command("memory_flat"),
        "artifact": {"path": bundle.source, "sha256": bundle.config.stages[0].sha256},
        "results": results,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="memory_flat", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--count", type=int, default=50_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    record = measure(options.bundle, options.count)
    if options.out is not None:
        write_json(options.out, record, format="edgedistill-memory-flat")
    rows = [
        (name, result["images"], *result["resident_mib"].values(), result["slope_bytes_per_image"])
        for name, result in record["results"].items()
    ]
    columns = ("", "images", "start MiB", "warm MiB", "end MiB", "peak MiB", "bytes per image")
    console.out.print(console.table("Resident memory", columns, rows))
    return 0


if __name__ == "__main__":
    exit_with(main)
