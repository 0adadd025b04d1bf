"""More val images for the tuner: labelled images of a run's data set that the run did not use, evenly by class.

    python -m edgedistill.benchmarks.unused_images RUN --data fashion-mnist --per-class 400 --out more-val
    edgedistill tune RUN --data more-val/val.csv --images 4000 ...

For runs on a part of a large data set: what 800 val images cannot tell, 4,000 can. Test images are never taken, nor any
image with the content of one that the run knows, with a label or (--unlabelled) without.
"""

from __future__ import annotations

import argparse
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from edgedistill import console
from edgedistill.artifacts import RunDir
from edgedistill.benchmarks.command import exit_with
from edgedistill.benchmarks.tuner.valset import write_val
from edgedistill.data.manifest import hash_files, read_dataset
from edgedistill.data.sources import files_below, open_source
from edgedistill.errors import DataError, UsageError
from edgedistill.images import IMAGE_SUFFIXES


def write_unused(run: Path, data: str, per_class: int, out: Path, seed: int = 0) -> int:
    """Copies of the images to OUT/val, listed in OUT/val.csv; returns how many.

    Raises DataError when a class has fewer than ``per_class`` left or one that the run does not know, or when the run's
    unlabelled images are gone; then nothing is written.
    """
    dataset = read_dataset(run / "dataset.csv")
    known = {digest.decode() for digest in [*dataset.sha256, *hash_files(unlabelled_images(run))]}
    items = [item for item in open_source(data).items if item.split != "test"]
    foreign = sorted({item.label for item in items} - set(dataset.class_names))
    if foreign:
        raise DataError(f"{data}: labels {foreign[:5]} that {run} does not have; give the data set of that run")
    rows: list[tuple[str, str, str, str]] = []
    sources: list[Path] = []
    taken: Counter[str] = Counter()
    for number in np.random.default_rng(seed).permutation(len(items)):
        item = items[number]
        if taken[item.label] == per_class:
            continue
        digest = hash_files([item.path])[0].decode()
        if digest in known:
            continue
        known.add(digest)
        taken[item.label] += 1
        name = f"{number:06d}{item.path.suffix}"
        sources.append(item.path)
        rows.append((item.id, name, item.label, digest))
    short = [name for name in dataset.class_names if taken[name] < per_class]
    if short:
        raise DataError(f"{data}: fewer than {per_class} unused images of {', '.join(short[:5])}; ask for fewer")
    (out / "val").mkdir(parents=True, exist_ok=True)
    for source, row in zip(sources, rows, strict=True):
        shutil.copyfile(source, out / "val" / row[1])
    write_val(out, rows)
    return len(rows)


def unlabelled_images(run: Path) -> list[Path]:
    """What the run's student learnt from without labels (frames of its videos are no images of a data set)."""
    name = RunDir(run).settings().get("student", {}).get("unlabelled")
    if not name:
        return []
    if not Path(name).is_dir():
        raise DataError(
            f"{RunDir(run).config}: the student learnt from {name}, which is not here: start this where the run was made"
        )
    return [path for path in files_below(Path(name)) if path.suffix.lower() in IMAGE_SUFFIXES]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", type=Path, help="a run, with dataset.csv")
    parser.add_argument("--data", required=True, help="the whole data set, as `distill --data` takes it")
    parser.add_argument("--per-class", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if args.per_class < 1:
        raise UsageError(f"--per-class {args.per_class}, expected 1 or more")
    count = write_unused(args.run, args.data, args.per_class, args.out)
    console.note(f"{count} images: {args.out / 'val.csv'}")
    return 0


if __name__ == "__main__":
    exit_with(main)
