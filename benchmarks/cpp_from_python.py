"""What Python users gain from the C++ engine, `CppEngine`, against our Python `Engine`:

    make cpp-python
    python -m edgedistill.benchmarks.cpp_from_python runs/NAME/openvino ... --out benchmarks/results/cpp-from-python.json

Both hand over paths or pixels, turn each answer into a `Prediction`, and run what deploy.json says (precision, streams), at
batch 1 and at the tuned batch, on files and on decoded frames of a small and a large photograph, in the same process and in
interleaved rounds. Beside images a second stands the processor time of an image, of all threads: where other programs run
beside it, that is the steadier figure.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgedistill import console
from edgedistill.artifacts import write_json
from edgedistill.benchmarks.bench_fps import CPP_TOLERANCE, short
from edgedistill.benchmarks.command import (
    add_photo_options,
    add_round_options,
    exit_with,
    module_command,
    module_parser,
)
from edgedistill.benchmarks.inputs import InputSet
from edgedistill.benchmarks.machine import artifact_hash, machine_record
from edgedistill.benchmarks.python_runtime import photographs
from edgedistill.benchmarks.target import Target
from edgedistill.benchmarks.timing import CandidateError, Slice, Spread, interleave, ratios
from edgedistill.errors import ModelError
from edgedistill.images import decode_image, read_bytes
from edgedistill.runtime import CppEngine, Engine, Frame, Prediction

FORMAT = "edgedistill-cpp-from-python"
SCOPES = ("files", "frames")


@dataclass
class Mapped:
    """Images a second that one engine's ``map`` gives; ``cpu_ms``: processor time of an image in each run."""

    map: Callable[[Iterable[Frame]], Generator[Prediction, None, None]]
    frame: Frame
    cpu_ms: list[float] = field(default_factory=list)

    def run(self, seconds: float) -> Slice:
        predictions = self.map(itertools.repeat(self.frame))
        self._checked(next(predictions))
        start, used, count = time.perf_counter(), time.process_time(), 0
        while (now := time.perf_counter()) - start < seconds:
            self._checked(next(predictions))
            count += 1
        self.cpu_ms.append((time.process_time() - used) / max(count, 1) * 1e3)
        predictions.close()
        return Slice(count, now - start)

    def answer(self) -> Prediction:
        return self._checked(next(self.map([self.frame])))

    @staticmethod
    def _checked(prediction: Prediction) -> Prediction:
        if prediction.error is not None:
            raise CandidateError(prediction.error)
        return prediction


@contextmanager
def engines(target: Target, batch: int) -> Iterator[tuple[Engine, CppEngine]]:
    """Our Python engine and the C++ one with its settings, both ready."""
    with (
        Engine(target.bundle, batch=batch) as python,
        CppEngine(target.path, streams=python.streams, batch=batch, queue_size=python.queue_size) as cpp,
    ):
        cpp.wait_until_ready()
        yield python, cpp


def photograph(scope: str, images: InputSet) -> Frame:
    """Scope files: its path; scope frames: its pixels, uint8 [h, w, 3] BGR."""
    path = images.paths[0]
    if scope == "files":
        return Frame(str(path), str(path))
    data, name = read_bytes(path)
    return Frame(name, np.ascontiguousarray(decode_image(data, name=name)))


def check_answers(python: Prediction, cpp: Prediction) -> None:
    """Raises CandidateError where the two engines do not say the same."""
    distance = float(np.abs(python.probabilities - cpp.probabilities).max())
    if python.label != cpp.label or not distance <= CPP_TOLERANCE:
        raise CandidateError(f"C++ says {cpp.label}, Python {python.label}; probabilities differ by {distance:.3g}")


def measure(target: Target, sets: Sequence[InputSet], *, rounds: int, seconds: float) -> list[dict[str, Any]]:
    """A row per batch, scope and photograph: images a second of both and their ratio. Raises CandidateError."""
    rows = []
    for batch in sorted({1, target.bundle.config.throughput.batch}):
        with engines(target, batch) as (python, cpp):
            for scope, images in itertools.product(SCOPES, sets):
                frame = photograph(scope, images)
                sides = [Mapped(python.map, frame), Mapped(cpp.map, frame)]
                check_answers(*(side.answer() for side in sides))
                for side in sides:
                    side.run(min(seconds, 0.5))
                    side.cpu_ms.clear()
                console.note(f"{target.spec.height} px, batch {batch}, {scope}, {images.name}")
                slices = [_measured(one) for one in interleave(sides, rounds=rounds, seconds=seconds)]
                settings = {"precision": python.precision, "streams": python.streams, "batch": python.batch}
                row = {"image_size_px": target.spec.height, "scope": scope, "input": images.name}
                rows.append(row | settings | _figures(sides, slices))
    return rows


def _measured(outcome: list[Slice] | CandidateError) -> list[Slice]:
    if isinstance(outcome, CandidateError):
        raise outcome
    return outcome


def _figures(sides: Sequence[Mapped], slices: Sequence[Sequence[Slice]]) -> dict[str, dict[str, float]]:
    """``gain``: images a second of C++ over Python's; ``cpu_gain``: processor time of Python over that of C++."""
    found = {}
    for name, side, rounds in zip(("python", "cpp"), sides, slices, strict=True):
        found[f"{name}_fps"] = Spread.of([one.fps for one in rounds])
        found[f"{name}_cpu_ms"] = Spread.of(side.cpu_ms)
    found["gain"] = ratios(slices[1], slices[0])
    found["cpu_gain"] = Spread.of([one / other for one, other in zip(sides[0].cpu_ms, sides[1].cpu_ms, strict=True)])
    return {name: spread.to_dict() for name, spread in found.items()}


def main() -> int:
    options = _parsed()
    machine = machine_record()
    targets = [Target.open(path) for path in options.bundles]
    rows = []
    with tempfile.TemporaryDirectory(prefix="edgedistill-bench-") as scratch:
        sets, origin = photographs(options.images, Path(scratch))
        try:
            for target in targets:
                rows += measure(target, sets, rounds=options.rounds, seconds=options.seconds)
        except CandidateError as error:
            raise ModelError(str(error)) from error
    record = {
        "machine": machine,
        "command": module_command("cpp_from_python"),
        "artifacts": [{"path": str(one.path), "sha256": artifact_hash(one.files)} for one in targets],
        "images": origin,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "results": rows,
    }
    write_json(options.out, record, format=FORMAT)
    columns = ("size", "scope", "input", "batch", "Python fps", "C++ fps", "gain", "CPU gain")
    console.out.print(console.table("The C++ engine from Python", columns, [_shown(row) for row in rows]))
    console.out.print(str(options.out))
    return 0


def _shown(row: dict[str, Any]) -> list[str]:
    shown = [str(row[name]) for name in ("image_size_px", "scope", "input", "batch")]
    shown += [short(row[name]["median"]) for name in ("python_fps", "cpp_fps")]
    gains = (row["gain"], row["cpu_gain"])
    return shown + [f"{one['median']:.2f} ({one['min']:.2f}-{one['max']:.2f})" for one in gains]


def _parsed() -> argparse.Namespace:
    parser = module_parser("cpp_from_python", __doc__)
    parser.add_argument("bundles", type=Path, nargs="+", help="openvino/ folders")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    add_photo_options(parser)
    add_round_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    exit_with(main)
