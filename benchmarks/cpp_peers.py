"""What ``cpp_runtime`` compares the C++ runtime with, as runners of interleaved rounds: the programs of benchmarks/cpp,
the machine's limit, a bare loop; and how a program's memory and its start are measured from outside."""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from edgedistill import console
from edgedistill.benchmarks.memory_flat import make_images, resident_bytes, sampled
from edgedistill.benchmarks.plan import Entry, Workers
from edgedistill.benchmarks.target import CPP, CPP_PROGRAM
from edgedistill.benchmarks.timing import RUN_GRACE_S, CandidateError, Slice, Spread, Worker, WorkerCase
from edgedistill.errors import ModelError, UsageError
from edgedistill.runtime.bundle import int8_path
from edgedistill.runtime.cpp_programs import HOW_TO_BUILD, find_cpp_program

PEERS_BUILD = Path(__file__).resolve().parent.parent / "build" / "cpp-peers" / "bin"
NAIVE, NAIVE_DEFAULT = "naive-cpp", "naive-cpp-default"
TUNED, TUNED_DEFAULT = "tuned-cpp", "tuned-cpp-default"
LIMIT, BARE = "limit", "bare"
PIPED_LINES = 10_000
PROGRAMS = {
    **dict.fromkeys((NAIVE, NAIVE_DEFAULT, TUNED, TUNED_DEFAULT), "edgedistill-peers"),
    BARE: "edgedistill-bare",
}


def cpp_program(name: str) -> Path:
    """Raises UsageError where it is not built."""
    program = find_cpp_program(name)
    if program is None:
        raise UsageError(f"{name} is not built; {HOW_TO_BUILD}")
    return program


def cpp_peer(name: str) -> Path:
    """A program of benchmarks/cpp. Raises UsageError where it is not built."""
    program = PEERS_BUILD / name
    if not program.is_file():
        raise UsageError(f"{name} is not built; run 'make cpp-peers'")
    return program


@dataclass(frozen=True)
class Limit:
    """One independent single-threaded process per core, each bound to its core, all at once: nothing is shared."""

    cases: tuple[WorkerCase, ...]

    def run(self, seconds: float) -> Slice:
        with ThreadPoolExecutor(len(self.cases)) as pool:
            slices = list(pool.map(lambda case: case.run(seconds), self.cases))
        count = sum(one.count for one in slices)
        return Slice(count, count / sum(one.fps for one in slices))


class PeerWorkers(Workers):
    """The workers of bench-fps and those of benchmarks/cpp."""

    def command(self, candidate: str) -> list[str]:
        if candidate not in PROGRAMS:
            return super().command(candidate)
        try:
            return [str(cpp_peer(PROGRAMS[candidate]))]
        except UsageError as error:
            raise CandidateError(str(error)) from error

    def request(self, entry: Entry) -> dict[str, Any]:
        request = super().request(entry)
        if entry.candidate in (NAIVE_DEFAULT, TUNED_DEFAULT):
            return request | {"candidate": entry.candidate.removesuffix("-default"), "precision": "default"}
        if entry.candidate == BARE and entry.precision == "int8":
            return request | {"model": os.fspath(int8_path(Path(request["model"])))}
        return request

    def _prepared(self, entry: Entry, before: Sequence[Entry]) -> Entry:
        if entry.candidate != LIMIT:
            return super()._prepared(entry, before)
        request = self.request(entry) | {"candidate": CPP, "mode": "latency", "own_threads": 1}
        try:
            cases = [
                WorkerCase.prepare(self._pinned(entry.precision, core), f"{entry.scope} {entry.input}", request)
                for core in sorted(os.sched_getaffinity(0))
            ]
        except CandidateError as error:
            return replace(entry, reason=str(error))
        settings = cases[0].settings | {"processes": len(cases)}
        return replace(entry, runner=Limit(tuple(cases)), settings=settings)

    def _pinned(self, precision: str, core: int) -> Worker:
        key = (f"{LIMIT} {core}", precision)
        if key not in self._workers:
            command = ["taskset", "-c", str(core), str(cpp_program(CPP_PROGRAM)), "--serve"]
            self._workers[key] = self._stack.enter_context(Worker(command))
        return self._workers[key]


@dataclass(frozen=True)
class Blocks:
    """Latency of two programs in the same rounds: each block a p50 and a p99 in milliseconds."""

    ours: tuple[tuple[float, float], ...]
    bare: tuple[tuple[float, float], ...]

    def ratio(self, percentile: int) -> Spread:
        """Ours over the bare loop's, block by block; ``percentile`` 50 or 99."""
        place = (50, 99).index(percentile)
        return Spread.of([one[place] / other[place] for one, other in zip(self.ours, self.bare, strict=True)])

    def to_dict(self) -> dict[str, Any]:
        """Medians over the blocks, and the blocks."""
        sides = {"ours": self.ours, "bare": self.bare}
        return {
            name: {
                "p50_ms": round(statistics.median(p50 for p50, _ in blocks), 4),
                "p99_ms": round(statistics.median(p99 for _, p99 in blocks), 4),
                "blocks_ms": [[round(value, 4) for value in block] for block in blocks],
            }
            for name, blocks in sides.items()
        }


def latency_blocks(ours: WorkerCase, bare: WorkerCase, *, blocks: int, images: int) -> Blocks:
    """``blocks`` of ``images`` single images each, the two in turns. Raises CandidateError."""
    found: dict[str, list[tuple[float, float]]] = {"ours": [], "bare": []}
    with console.progress("latency", 2 * blocks) as bar:
        for number in range(blocks):
            sides = [("ours", ours), ("bare", bare)]
            for name, case in sides if number % 2 else sides[::-1]:
                found[name].append(_block(case, images))
                bar.update(0, advance=1)  # type: ignore[arg-type]
    return Blocks(tuple(found["ours"]), tuple(found["bare"]))


def _block(case: WorkerCase, images: int) -> tuple[float, float]:
    request = {"do": "run", "case": case.key, "seconds": 1.0, "count": images}
    reply = case.worker.request(request, limit_s=RUN_GRACE_S + images)
    latency = sorted(reply["latency_us"])
    if len(latency) != images:
        raise CandidateError(f"answered {len(latency)} of {images} images")
    return tuple(latency[math.ceil(images * share / 100) - 1] / 1e3 for share in (50, 99))  # type: ignore[return-value]


def memory(deployable: Path, count: int, *, latency: bool) -> dict[str, Any]:
    """Resident memory of edgedistill-classify over ``count`` images of several sizes and formats, one damaged among them."""
    with tempfile.TemporaryDirectory(prefix="edgedistill-bench-") as folder:
        images = Path(folder) / "i"
        images.mkdir()
        encoded = make_images()
        for number, data in enumerate(encoded):
            # The program reads by content, not by name.
            (images / f"{number}.jpg").write_bytes(data)
        # What is still in the pipe when the last sample is taken must not be the program's last words.
        repeats = math.ceil((count + PIPED_LINES) / len(encoded))
        options = ["--latency"] if latency else []
        command = [str(cpp_program("edgedistill-classify")), str(deployable.resolve()), *options, *["i"] * repeats]
        with _lines(command, folder) as (process, lines):
            answers = (_line(lines) for _ in range(count))
            return sampled(answers, count, lambda: resident_bytes(process.pid))


def _line(lines: Iterator[str]) -> str:
    line = next(lines, None)
    if line is None:
        raise ModelError("edgedistill-classify ended before its last answer")
    return line


@contextmanager
def _lines(command: Sequence[str], folder: str) -> Iterator[tuple[subprocess.Popen[str], Iterator[str]]]:
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        try:
            if process.stdout is None:
                raise ModelError("edgedistill-classify was not started with a pipe")
            yield process, iter(process.stdout)
        finally:
            process.kill()


def start_to_label(deployable: Path, image: Path, *, latency: bool, runs: int = 9) -> Spread:
    """Seconds from a new process to its first label, as a user waits for it, with OpenVINO's compiled model kept."""
    options = ["--latency"] if latency else []
    command = [str(cpp_program("edgedistill-classify")), str(deployable), str(image), *options]
    seconds = []
    with tempfile.TemporaryDirectory(prefix="edgedistill-bench-") as cache:
        for _ in range(runs + 1):
            start = time.perf_counter()
            with subprocess.Popen(
                command, stdout=subprocess.PIPE, env=os.environ | {"EDGEDISTILL_CACHE": cache}
            ) as process:
                line = process.stdout.readline() if process.stdout else b""
                seconds.append(time.perf_counter() - start)
            if not line or process.returncode != 0:
                raise ModelError(f"edgedistill-classify ended with code {process.returncode} and no label")
    # The first run fills the cache.
    return Spread.of(seconds[1:])
