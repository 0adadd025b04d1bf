"""Does the C++ runtime say what the Python runtime says, image for image?

    make cpp
    python -m edgedistill.benchmarks.cpp_parity RUN --out benchmarks/results/cpp-parity.json

takes every image of the train and val splits in RUN/dataset.csv (or what --images names), asks both runtimes for all
probabilities at every precision of RUN/openvino, and judges: same top-1 everywhere; at f32 within 1e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill import console
from edgedistill.artifacts import write_json
from edgedistill.benchmarks.command import exit_with, module_command, module_parser
from edgedistill.benchmarks.cpp_peers import cpp_program
from edgedistill.benchmarks.machine import artifact_hash, machine_record
from edgedistill.benchmarks.target import Target
from edgedistill.data.manifest import read_dataset
from edgedistill.errors import ModelError
from edgedistill.runtime import Bundle, Engine, frames
from edgedistill.runtime.cpp_programs import CLASSIFY, classify

FORMAT = "edgedistill-cpp-parity"
F32_TOLERANCE = 1e-4


def compare(bundle: Path, paths: Sequence[str], precision: str) -> dict[str, Any]:
    """Counts and the largest difference over ``paths``, of which both or neither must be readable."""
    ours = _python(bundle, paths, precision)
    theirs = _cpp(bundle, paths, precision)
    readable = [number for number, answer in enumerate(ours) if answer is not None]
    one_sided = [paths[n] for n in range(len(paths)) if (ours[n] is None) != (theirs[n] is None)]
    if one_sided:
        raise ModelError(f"{len(one_sided)} images are read by one runtime alone, first {one_sided[0]}")
    if not readable:
        raise ModelError("no image can be read")
    python = np.stack([ours[number] for number in readable]).astype(np.float64)
    cpp = np.stack([theirs[number] for number in readable]).astype(np.float64)
    other_class = int((python.argmax(axis=1) != cpp.argmax(axis=1)).sum())
    largest = float(np.abs(python - cpp).max())
    return {
        "precision": precision,
        "images": len(paths),
        "refused_by_both": len(paths) - len(readable),
        "other_top_1": other_class,
        "largest_difference": largest,
        "reached": other_class == 0 and (precision != "f32" or largest <= F32_TOLERANCE),
    }


def _python(bundle: Path, paths: Sequence[str], precision: str) -> list[Any]:
    with Engine(Bundle.load(bundle), precision=precision, batch=1) as engine:
        return [None if one.error is not None else one.probabilities for one in engine.map(paths)]


def _cpp(bundle: Path, paths: Sequence[str], precision: str) -> list[Any]:
    options = ["--precision", precision, "--probabilities"]
    answers = classify(cpp_program(CLASSIFY), bundle, [Path(path) for path in paths], options)
    return [None if "error" in one else np.asarray(one["probabilities"], np.float32) for one in answers]


def main() -> int:
    parser = module_parser("cpp_parity", __doc__)
    parser.add_argument("run", type=Path, help="run folder with dataset.csv and openvino/, or a bundle with --images")
    parser.add_argument("--images", type=Path, nargs="*", default=[], help="files and folders instead of the splits")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    target = Target.open(options.run)
    bundle = options.run / "openvino" if (options.run / "openvino").is_dir() else options.run
    if options.images:
        paths = [str(frame.name) for source in options.images for frame in frames(source)]
    else:
        dataset = read_dataset(options.run / "dataset.csv")
        paths = [str(path) for split in ("train", "val") for path in dataset.paths[dataset.rows(split)]]
    int8 = Bundle.load(bundle).config.stages[0].int8_sha256 is not None
    results = [compare(bundle, paths, precision) for precision in ("f32", *(["int8"] if int8 else []))]
    record = {
        "machine": machine_record(),
        "command": module_command("cpp_parity"),
        "artifact": {"path": str(options.run), "sha256": artifact_hash(target.files)},
        "results": results,
    }
    write_json(options.out, record, format=FORMAT)
    rows = [[str(value) for value in result.values()] for result in results]
    console.out.print(console.table("C++ and Python", tuple(results[0]), rows))
    return 0 if all(result["reached"] for result in results) else 1


if __name__ == "__main__":
    exit_with(main)
