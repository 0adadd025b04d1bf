"""A manifest of a million rows: read, dealt to splits and folds, proven, in one minute and 2 GB.

    python -m edgedistill.benchmarks.manifest_scale --rows 1000000 --out benchmarks/results/manifest_scale.json

Run it in a process of its own: the peak of memory is the process's.
"""

from __future__ import annotations

import argparse
import hashlib
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill import console
from edgedistill.artifacts import write_json
from edgedistill.benchmarks.machine import machine_record
from edgedistill.data.manifest import COLUMNS, read_dataset, write_dataset

CLASSES = 100
GROUP_SIZE = 5


def write_example(path: Path, rows: int) -> None:
    """A manifest with names as long as a photographer's and groups of five; written line by line, so in no memory."""
    with path.open("w", encoding="utf-8", newline="") as file:
        file.write(",".join(COLUMNS) + "\n")
        for row in range(rows):
            digest = hashlib.sha256(str(row).encode()).hexdigest()
            name = f"class-{int(digest[:8], 16) % CLASSES:03d}/photograph-{row:08d}.jpg"
            line = f"{name},/data/photographs/season-2/{name},{digest},{name[:9]},session-{row // GROUP_SIZE}"
            file.write(f"{line},train,{row % 5}\n")


def measure(rows: int, folder: Path) -> dict[str, Any]:
    """Seconds of each step and the peak of this process's memory in bytes."""
    from edgedistill.data.deal import SplitSettings, Table, deal_splits
    from edgedistill.data.folds import group_codes, verify_folds
    from edgedistill.data.manifest import Dataset

    seconds: dict[str, float] = {}
    manifest = folder / "dataset.csv"
    write_example(manifest, rows)
    with _timed(seconds, "read"):
        dataset = read_dataset(manifest)
    classes, nothing = dataset.labels.astype(np.int64), np.zeros(rows, np.int64)
    for name, groups in (("ungrouped", np.zeros(rows, "U1")), ("grouped", dataset.groups)):
        with _timed(seconds, f"split and fold, {name}"):
            table = Table(classes, nothing, group_codes(groups), nothing)
            splits, folds = deal_splits(table, SplitSettings(), dataset.class_names)
            frozen = Dataset(
                dataset.ids, dataset.paths, dataset.sha256, dataset.labels, groups, splits, folds, dataset.class_names
            )
            verify_folds(frozen)
    with _timed(seconds, "hash"):
        _ = frozen.hash
    with _timed(seconds, "write"):
        write_dataset(frozen, manifest)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"rows": rows, "seconds": seconds, "peak_rss_bytes": peak}


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(arguments.rows, Path(folder))
    rows = [(name, f"{value:.1f} s") for name, value in result["seconds"].items()]
    rows.append(("peak memory", f"{result['peak_rss_bytes'] / 1e9:.2f} GB"))
    console.out.print(console.table(f"{arguments.rows:,} rows", ("step", "cost"), rows))
    if arguments.out is not None:
        command = f"python -m edgedistill.benchmarks.manifest_scale --rows {arguments.rows}"
        write_json(
            arguments.out,
            {"machine": machine_record(), "command": command} | result,
            format="edgedistill-manifest-scale",
        )


if __name__ == "__main__":
    main()
