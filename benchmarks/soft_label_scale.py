"""Soft labels of a million images and a thousand classes: written and read back in bounded memory.

    python -m edgedistill.benchmarks.soft_label_scale --out benchmarks/results/soft-label-scale.json

Log-probabilities are drawn block by block and never lie on the disk uncompressed. --limit-gib bounds the process's
address space, so that finishing is the proof; run it in a process of its own, whose peak of memory is recorded.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill import console
from edgedistill.artifacts import write_json
from edgedistill.benchmarks.machine import machine_record
from edgedistill.data.soft_label_store import BLOCK_ROWS, LogProbs, open_store, parse_store, write_store
from edgedistill.errors import UsageError

HEAD = "label"
RANDOM_ROWS = 256  # a student's batch
RANDOM_BATCHES = 40
SHARPNESS = 5.0  # of the drawn logits: the first choice has 0.54 on average, the first ten 0.92


def drawn(rows: int, classes: int) -> Iterator[LogProbs]:
    """Blocks of log-probabilities, float32 [n, C], that depend on their place alone."""
    for start in range(0, rows, BLOCK_ROWS):
        draws = np.random.default_rng(start)
        logits = draws.standard_normal((min(BLOCK_ROWS, rows - start), classes), dtype=np.float32) * SHARPNESS
        logits -= logits.max(axis=1, keepdims=True)
        yield logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def measure(folder: Path, *, rows: int, classes: int, store: str) -> dict[str, Any]:
    """Seconds, bytes and loss of writing, of reading all in order, and of reading batches of random rows."""
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
    return {
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


def peak_rss_bytes() -> int:
    """Of this program alone; getrusage would count what its parent held when it started it."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--store", default="top-k:10", help="float32, float16 or top-k:N")
    parser.add_argument("--limit-gib", type=float, default=2.0, help="address space that the process may take")
    parser.add_argument("--folder", type=Path, help="where the labels lie while they are measured (default: /tmp)")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    limit = int(arguments.limit_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        widest = arguments.rows * arguments.classes * 4
        if arguments.store == "float32" and shutil.disk_usage(folder).free < 1.1 * widest:
            raise UsageError(f"{folder}: float32 takes {widest / 1e9:.1f} GB; free some space, or choose --folder")
        result = measure(Path(folder), rows=arguments.rows, classes=arguments.classes, store=arguments.store)
    result["limit_gib"] = arguments.limit_gib
    shown = [
        ("write (of this drawing)", f"{result['write_s']:.1f} s ({result['draw_s']:.1f} s)"),
        ("read in order", f"{result['read_s']:.1f} s"),
        (f"read {RANDOM_ROWS} random rows", f"{result['random_batch_ms']:.1f} ms"),
        ("disk, of float32's", f"{result['disk_bytes'] / 1e9:.3f} GB ({result['float32_bytes'] / 1e9:.1f} GB)"),
        ("peak memory", f"{result['peak_rss_bytes'] / 1e9:.2f} GB"),
        ("mean loss", "none" if result["loss"] is None else f"{result['loss']['kl_mean']:.3g} nats"),
    ]
    title = f"{arguments.rows:,} x {arguments.classes:,} soft labels, {arguments.store}"
    console.out.print(console.table(title, ("step", "cost"), shown))
    if arguments.out is not None:
        command = (
            f"python -m edgedistill.benchmarks.soft_label_scale --rows {arguments.rows} --classes {arguments.classes} "
            f"--store {arguments.store} --limit-gib {arguments.limit_gib}"
        )
        values = {"machine": machine_record(), "command": command} | result
        write_json(arguments.out, values, format="edgedistill-soft-label-scale")


if __name__ == "__main__":
    main()
