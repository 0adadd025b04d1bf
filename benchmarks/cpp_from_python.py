"""What Python users would gain from the C++ engine behind a thin binding, against our Python `Engine`:

    make cpp
    python -m edgedistill.benchmarks.cpp_from_python runs/NAME/openvino ... --out benchmarks/results/cpp-from-python.json

The binding is ctypes over the C interface: it hands over paths or pixels and turns each answer into the `Prediction` that
`Engine.map` gives. Both run what deploy.json says (precision, streams), at batch 1 and at the tuned batch, on files and on
decoded frames of a small and a large photograph, in the same process and in interleaved rounds. Beside images a second stands the
processor time of an image, of all threads: where other programs run beside it, that is the steadier figure. The C
interface copies frames, which a binding to C++ need not: the copies are timed too.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import tempfile
import time
from collections import deque
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
from edgedistill.benchmarks.cpp_peers import cpp_program
from edgedistill.benchmarks.inputs import InputSet
from edgedistill.benchmarks.machine import artifact_hash, machine_record
from edgedistill.benchmarks.python_runtime import photographs
from edgedistill.benchmarks.target import CPP_PROGRAM, Target
from edgedistill.benchmarks.timing import CandidateError, Slice, Spread, interleave, ratios
from edgedistill.errors import ModelError, UsageError
from edgedistill.images import decode_image, read_bytes
from edgedistill.runtime import Engine, Prediction
from edgedistill.runtime.network import Frame, failed

FORMAT = "edgedistill-cpp-from-python"
SCOPES = ("files", "frames")
LIBRARY = "libedgedistill.so.0"
ERROR_BYTES = 400
# Of edgedistill.h: statuses and formats.
OK, IMAGE = 0, -2
BGR = 0


class _Options(ctypes.Structure):
    _fields_ = (
        ("struct_size", ctypes.c_size_t),
        ("precision", ctypes.c_char_p),
        ("threads", ctypes.c_int32),
        ("streams", ctypes.c_int32),
        ("batch", ctypes.c_int32),
        ("queue_size", ctypes.c_int32),
        ("drop_oldest", ctypes.c_int32),
        ("decode", ctypes.c_int32),
        ("use_cache", ctypes.c_int32),
        ("cache_folder", ctypes.c_char_p),
        ("max_pixels", ctypes.c_int64),
        ("log", ctypes.c_void_p),
        ("log_context", ctypes.c_void_p),
    )


class _Image(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("height", ctypes.c_int32),
        ("width", ctypes.c_int32),
        ("row_bytes", ctypes.c_size_t),
        ("format", ctypes.c_int),
    )


class _Prediction(ctypes.Structure):
    _fields_ = (
        ("index", ctypes.c_int32),
        ("label", ctypes.c_char_p),
        ("probability", ctypes.c_float),
        ("stage", ctypes.c_int32),
    )


def load_library() -> ctypes.CDLL:
    """The C++ runtime beside its programs. Raises UsageError where it is not built."""
    path = cpp_program(CPP_PROGRAM).resolve().parent.parent / "lib" / LIBRARY
    if not path.is_file():
        raise UsageError(f"{path}: no such file; build the shared library with 'make cpp'")
    library = ctypes.CDLL(str(path))
    text, size, user = ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64
    engine, number = ctypes.c_void_p, ctypes.c_int32
    library.edgedistill_default_options_sized.argtypes = (ctypes.c_void_p, size)
    library.edgedistill_engine_open.argtypes = (text, ctypes.c_void_p, ctypes.c_void_p, text, size)
    library.edgedistill_engine_wait_until_ready.argtypes = (engine, text, size)
    library.edgedistill_engine_free.argtypes = (engine,)
    library.edgedistill_engine_class_count.argtypes = (engine,)
    library.edgedistill_engine_submit_file.argtypes = (engine, text, user, number, text, size)
    library.edgedistill_engine_submit_pixels.argtypes = (engine, ctypes.c_void_p, user, number, text, size)
    library.edgedistill_engine_next.argtypes = (engine, *[ctypes.c_void_p] * 3, size, text, size)
    return library


class CppEngine:
    """`Engine.map` of the C++ runtime, for networks that give one label. Raises ModelError when it cannot be made."""

    def __init__(self, bundle: Path, *, streams: int, batch: int, queue_size: int) -> None:
        self._library, self._handle = load_library(), ctypes.c_void_p()
        self._error = ctypes.create_string_buffer(ERROR_BYTES)
        options = _Options()
        self._library.edgedistill_default_options_sized(ctypes.byref(options), ctypes.sizeof(options))
        options.streams, options.batch, options.queue_size = streams, batch, queue_size
        path = str(bundle).encode()
        self._check(
            self._library.edgedistill_engine_open(
                path, ctypes.byref(options), ctypes.byref(self._handle), self._error, ERROR_BYTES
            )
        )
        self._check(self._library.edgedistill_engine_wait_until_ready(self._handle, self._error, ERROR_BYTES))
        self.queue_size = queue_size
        classes = self._library.edgedistill_engine_class_count(self._handle)
        self._answer, self._number = _Prediction(), ctypes.c_uint64()
        self._probabilities = np.zeros(classes, np.float32)
        # Made once: finding an array's address takes longer than a call.
        self._out = (
            *(ctypes.addressof(one) for one in (self._number, self._answer)),
            self._probabilities.ctypes.data,
            classes,
            self._error,
            ERROR_BYTES,
        )

    def map(self, frames: Iterable[Frame]) -> Generator[Prediction, None, None]:
        """One Prediction per frame, in order; never more than ``queue_size`` frames ahead of what was taken."""
        names: deque[str] = deque()
        try:
            for frame in frames:
                if len(names) == self.queue_size:
                    yield self._next(names.popleft())
                self._submit(frame)
                names.append(frame.name)
            while names:
                yield self._next(names.popleft())
        finally:
            while names:
                self._next(names.popleft())

    def close(self) -> None:
        """Twice does no harm."""
        self._library.edgedistill_engine_free(self._handle)
        self._handle = ctypes.c_void_p()

    def _submit(self, frame: Frame) -> None:
        data = frame.data
        if isinstance(data, np.ndarray):
            image = _Image(data.ctypes.data, data.shape[0], data.shape[1], data.strides[0], BGR)
            submitted = self._library.edgedistill_engine_submit_pixels(
                self._handle, ctypes.addressof(image), 0, -1, self._error, ERROR_BYTES
            )
        else:
            submitted = self._library.edgedistill_engine_submit_file(
                self._handle, str(data).encode(), 0, -1, self._error, ERROR_BYTES
            )
        self._check(submitted)

    def _next(self, name: str) -> Prediction:
        status = self._library.edgedistill_engine_next(self._handle, *self._out)
        if status == IMAGE:
            return failed(name, self._error.value.decode(errors="replace"))
        self._check(status)
        answer = self._answer
        label, shares = answer.label.decode(), self._probabilities.copy()
        return Prediction(label, answer.index, answer.probability, shares, name=name, stage=answer.stage)

    def _check(self, status: int) -> None:
        if status != OK:
            raise ModelError(f"the C++ engine: {self._error.value.decode(errors='replace')} (status {status})")


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
    """Our Python engine and the C++ one with its settings."""
    with Engine(target.bundle, batch=batch) as python:
        cpp = CppEngine(target.path, streams=python.streams, batch=python.batch, queue_size=python.queue_size)
        try:
            yield python, cpp
        finally:
            cpp.close()


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


def copy_us(images: InputSet, repeats: int = 200) -> float:
    """Microseconds that a copy of the photograph's pixels takes: what the C interface adds to each frame."""
    pixels = photograph("frames", images).data
    if not isinstance(pixels, np.ndarray):
        raise UsageError(f"{images.name}: no pixels to copy")
    into = np.empty_like(pixels)
    start = time.perf_counter()
    for _ in range(repeats):
        np.copyto(into, pixels)
    return (time.perf_counter() - start) / repeats * 1e6


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
        copying = {one.name: round(copy_us(one), 1) for one in sets}
    record = {
        "machine": machine,
        "command": module_command("cpp_from_python"),
        "artifacts": [{"path": str(one.path), "sha256": artifact_hash(one.files)} for one in targets],
        "images": origin,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "frame_copy_us": copying,
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
    parser.add_argument("bundles", type=Path, nargs="+", help="openvino/ folders whose networks give one label")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    add_photo_options(parser)
    add_round_options(parser)
    return parser.parse_args()


if __name__ == "__main__":
    exit_with(main)
