"""The figures promised for the Python runtime, measured and judged:

    python -m edgedistill.benchmarks.python_runtime runs/NAME/openvino --out benchmarks/results/python-runtime.json

- scope files, FP32, against the naive program: at least 1.8x on a 640x427 JPEG and 3x on a 1920x1281 one;
- scope model, FP32, within 5% of benchmark_app on the same IR with the same streams, threads and requests;
- `edgedistill --help` in under half a second.

The engine against the machine's limit and its memory have programs of their own, ``engine_limit`` and ``memory_flat``.
The rounds interleave everything that is compared. Exit code 0 when every figure is reached, else 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2

from edgedistill import console
from edgedistill.artifacts import write_json
from edgedistill.benchmarks.bench_fps import measure_entries, result_rows, short
from edgedistill.benchmarks.command import (
    add_photo_options,
    add_round_options,
    exit_with,
    module_command,
    module_parser,
)
from edgedistill.benchmarks.inputs import InputSet, input_sets, write_jpeg
from edgedistill.benchmarks.machine import artifact_hash, machine_record
from edgedistill.benchmarks.plan import BenchSettings, Entry, Workers, plan_entries
from edgedistill.benchmarks.target import BASE, OWN, Target
from edgedistill.benchmarks.timing import Slice, Spread, ratios
from edgedistill.errors import EdgedistillError, UsageError

FORMAT = "edgedistill-python-runtime"
LARGE = (1920, 1281)
TARGET_SMALL, TARGET_LARGE, TARGET_BENCHMARK_APP = 1.8, 3.0, 0.95
TARGET_HELP_S = 0.5


@dataclass(frozen=True)
class Figure:
    """One promise: ``value`` in ``unit`` has to be at least (or, ``at_most``, at most) ``target``."""

    name: str
    value: Spread
    target: float
    unit: str = "x"
    at_most: bool = False

    @property
    def reached(self) -> bool:
        return self.value.median <= self.target if self.at_most else self.value.median >= self.target

    def to_dict(self) -> dict[str, Any]:
        sign = "<=" if self.at_most else ">="
        shown = self.value.to_dict()
        return {"name": self.name, "value": shown, "unit": self.unit, "target": f"{sign} {self.target}"} | {
            "reached": self.reached
        }


def photographs(images: Sequence[str], scratch: Path) -> tuple[list[InputSet], str]:
    """(a 640x427 and a 1920x1281 JPEG, where they come from): given ones, scikit-learn's photograph, or generated."""
    if images:
        if len(images) != 2:
            raise UsageError(f"--images: {len(images)} given, expected two, a small and a large JPEG")
        return input_sets(images, dataset=None, scratch=scratch)
    package = importlib.util.find_spec("sklearn")
    china = Path(package.origin or "").parent / "datasets/images/china.jpg" if package else Path()
    if not china.is_file():
        return input_sets((), dataset=None, scratch=scratch)
    large = scratch / "china-1920x1281.jpg"
    write_jpeg(large, cv2.resize(cv2.imread(str(china)), LARGE, interpolation=cv2.INTER_CUBIC))  # type: ignore[arg-type]
    sets = [InputSet("china.jpg 640x427 JPEG", (china,)), InputSet("china.jpg at 1920x1281 JPEG", (large,))]
    return sets, "scikit-learn's china.jpg, as it is and enlarged (bicubic, JPEG quality 90)"


def speed_entries(settings: BenchSettings, sets: Sequence[InputSet]) -> list[Entry]:
    """Everything that is compared in FPS, measured."""
    target = Target.open(settings.path)
    with ExitStack() as stack:
        prepared = Workers(stack, settings, target, sets).prepare(plan_entries(settings, target, sets))
        return measure_entries(prepared, rounds=settings.rounds, seconds=settings.seconds)


def speed_figures(entries: Sequence[Entry], sets: Sequence[InputSet]) -> list[Figure]:
    """Raises EdgedistillError where something that has to be compared was not measured."""
    tensor = next(entry.input for entry in entries if entry.scope == "model")
    figures = []
    for one, target in zip(sets, (TARGET_SMALL, TARGET_LARGE), strict=True):
        engine = _slices(entries, OWN, "throughput", "files", one.name)
        naive = _slices(entries, BASE, "latency", "files", one.name)
        figures.append(Figure(f"files, {one.name}: Engine / naive f32", ratios(engine, naive), target))
    for mode in ("latency", "throughput"):
        own, app = (_slices(entries, name, mode, "model", tensor) for name in (OWN, "benchmark_app"))
        figures.append(Figure(f"model, {mode}: ours / benchmark_app", ratios(own, app), TARGET_BENCHMARK_APP))
    return figures


def _slices(entries: Sequence[Entry], candidate: str, mode: str, scope: str, name: str) -> tuple[Slice, ...]:
    entry = next(e for e in entries if (e.candidate, e.mode, e.scope, e.input) == (candidate, mode, scope, name))
    if entry.reason:
        raise EdgedistillError(f"{candidate}, scope {scope}: not measured: {entry.reason}")
    return entry.slices


def help_figure(runs: int = 9) -> Figure:
    """Wall time of `edgedistill --help` in a fresh process, as a user waits for it."""
    command = [sys.executable, "-c", "from edgedistill.cli import main; main()", "--help"]
    seconds = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    # The first run may read everything from disk; a user's second call is what half a second is promised for.
    return Figure("edgedistill --help", Spread.of(seconds[1:]), TARGET_HELP_S, unit="s", at_most=True)


def main() -> int:
    options = _parsed()
    machine = machine_record()
    with tempfile.TemporaryDirectory(prefix="edgedistill-bench-") as scratch:
        sets, origin = photographs(options.images, Path(scratch))
        settings = BenchSettings(
            path=options.bundle,
            scopes=("model", "files"),
            vs=("naive", "benchmark_app"),
            precisions=("f32",),
            rounds=options.rounds,
            seconds=options.seconds,
        )
        entries = speed_entries(settings, sets)
        figures = speed_figures(entries, sets)
    figures.append(help_figure())
    record = {
        "machine": machine,
        "command": module_command("python_runtime"),
        "artifact": {"path": str(options.bundle), "sha256": artifact_hash(Target.open(options.bundle).files)},
        "images": origin,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "figures": [figure.to_dict() for figure in figures],
        "results": result_rows(entries),
    }
    write_json(options.out, record, format=FORMAT)
    rows = [shown_figure(figure) for figure in figures]
    console.out.print(console.table("Python runtime", ("figure", "median", "min-max", "target", "reached"), rows))
    console.out.print(str(options.out))
    return 0 if all(figure.reached for figure in figures) else 1


def shown_figure(figure: Figure) -> list[str]:
    value, target = figure.value, figure.to_dict()["target"]
    spread = f"{short(value.min)}-{short(value.max)}"
    return [figure.name, f"{short(value.median)} {figure.unit}", spread, target, "yes" if figure.reached else "NO"]


def _parsed() -> argparse.Namespace:
    parser = module_parser("python_runtime", __doc__)
    parser.add_argument("bundle", type=Path, help="openvino/ folder or model.xml")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    add_photo_options(parser)
    add_round_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    exit_with(main)
