"""Fair rounds: candidates in processes of their own, every one measured once per round, the order rotated.

A shared machine gets slower and faster by the minute. Whoever is measured in the same round suffered alike, so ratios
are taken inside rounds and only then summarised; absolute figures carry their smallest and largest round.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

PREPARE_LIMIT_S = 300.0
RUN_GRACE_S = 120.0
SPREAD_LIMIT = 0.20
IDLE_CPU_LIMIT = 0.05
IDLE_WORTH_JUDGING_S = 1.0


class CandidateError(Exception):
    """One candidate cannot be measured; it becomes a row 'not measured: reason' and the others go on."""


@dataclass(frozen=True)
class Slice:
    """One uninterrupted run: images answered, seconds they took, microseconds of each (empty for throughput)."""

    count: int
    seconds: float
    latency_us: tuple[float, ...] = ()

    @property
    def fps(self) -> float:
        return self.count / self.seconds


class Runner(Protocol):
    """What can be measured: runs for about that many seconds and says what it did; raises CandidateError."""

    def run(self, seconds: float) -> Slice: ...


@dataclass(frozen=True)
class Spread:
    """The median of the rounds with the smallest and the largest."""

    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    @property
    def relative(self) -> float:
        """(max - min) / median: 0.2 means that the rounds differ by a fifth."""
        return (self.max - self.min) / self.median if self.median > 0 else math.inf

    def to_dict(self) -> dict[str, float]:
        return {name: round(value, 4) for name, value in vars(self).items()}


def round_order(count: int, round_number: int, rounds: int) -> list[int]:
    """The candidates' order in that round: rotated so that over the rounds everyone stands early, late and between."""
    step = max(1, round(count / rounds)) if rounds else 1
    shift = (round_number * step) % count if count else 0
    return [(shift + position) % count for position in range(count)]


def interleave(
    runners: Sequence[Runner],
    *,
    rounds: int,
    seconds: float,
    advance: Callable[[], None] = lambda: None,
    first: int = 0,
    after_round: Callable[[int, list[Slice | CandidateError]], None] = lambda number, round: None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[Slice] | CandidateError]:
    """Every runner once per round for ``seconds``: per runner its slices, or why it failed.

    A runner that fails once is left out from then on: a median over fewer rounds than the others' compares nothing.
    ``first``: rounds that were measured before. ``after_round``: told each round's number and what every runner did in
    it. ``clock`` counts seconds.
    """
    slices: list[list[Slice]] = [[] for _ in runners]
    failed: dict[int, CandidateError] = {}
    for round_number in range(first, rounds):
        for index in round_order(len(runners), round_number, rounds):
            if index not in failed:
                try:
                    slices[index].append(_checked(runners[index], seconds, clock))
                except CandidateError as error:
                    failed[index] = error
            advance()
        after_round(round_number, [failed[i] if i in failed else slices[i][-1] for i in range(len(runners))])
    return [failed.get(index, slices[index]) for index in range(len(runners))]


def _checked(runner: Runner, seconds: float, clock: Callable[[], float]) -> Slice:
    """Runs one slice and holds what it says about time against our own clock: units and stuck clocks are caught."""
    start = clock()
    result = runner.run(seconds)
    wall = clock() - start
    if result.count < 1:
        raise CandidateError(f"answered no image in {seconds:g} s")
    # Short slices may end a little early where a clock is coarse; half is no clock's error but a wrong unit.
    if not 0.5 * seconds <= result.seconds <= wall * 1.05 + 0.005:
        raise CandidateError(
            f"says that it ran {result.seconds:.3f} s, but was asked for {seconds:g} s and was gone {wall:.3f} s"
        )
    if result.latency_us and not 0.8 <= sum(result.latency_us) / 1e6 / result.seconds <= 1.05:
        raise CandidateError("its latencies do not add up to the time that it ran")
    return result


def percentiles_ms(slices: Sequence[Slice]) -> dict[str, float] | None:
    """p50, p90 and p99 in milliseconds over the images of all rounds; None where no image was timed alone.

    The percentile is the smallest value that at least that share of the images did not exceed.
    """
    pooled = sorted(value for part in slices for value in part.latency_us)
    if not pooled:
        return None
    return {
        f"p{share}": round(pooled[max(0, math.ceil(len(pooled) * share / 100) - 1)] / 1e3, 4) for share in (50, 90, 99)
    }


def ratios(slices: Sequence[Slice], base: Sequence[Slice]) -> Spread:
    """FPS over the base's FPS of the same round, summarised."""
    return Spread.of([one.fps / other.fps for one, other in zip(slices, base, strict=True)])


class Worker:
    """A candidate's process, long-lived and asleep between requests; see ``serve.py`` for what it answers."""

    def __init__(self, command: Sequence[str], *, env: dict[str, str] | None = None) -> None:
        self.idle_s = 0.0
        self.idle_cpu_s = 0.0
        self.failed = False  # once: what else it says is to be doubted
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - closed in close()
        try:
            self._process = subprocess.Popen(
                list(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                encoding="utf-8",
                env=env,
            )
        except OSError as error:
            self._stderr.close()
            raise CandidateError(f"{command[0]}: cannot be started ({error.strerror})") from error

    def request(self, message: dict[str, Any], *, limit_s: float) -> dict[str, Any]:
        """Raises CandidateError with the process's own words when it fails, dies or does not answer in time."""
        try:
            return self._answered(message, limit_s=limit_s)
        except CandidateError:
            self.failed = True
            raise

    def _answered(self, message: dict[str, Any], *, limit_s: float) -> dict[str, Any]:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise CandidateError("was not started with pipes")
        late = threading.Event()

        def stop() -> None:
            late.set()
            self._process.kill()

        timer = threading.Timer(limit_s, stop)
        timer.start()
        try:
            stdin.write(json.dumps(message) + "\n")
            stdin.flush()
            line = stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if not line:
            raise CandidateError(f"no answer in {limit_s:g} s" if late.is_set() else self._last_words())
        reply: dict[str, Any] = json.loads(line)
        self.idle_s += reply.get("idle_s", 0.0)
        self.idle_cpu_s += reply.get("idle_cpu_s", 0.0)
        if "error" in reply:
            raise CandidateError(reply["error"])
        return reply

    def _last_words(self) -> str:
        code = self._process.wait()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr.read().splitlines() if line.strip()]
        return f"its process ended with code {code}" + (f": {lines[-1]}" if lines else "")

    @property
    def spins(self) -> bool:
        """Whether it burnt processor time while it should have slept, which would slow the others down."""
        return self.idle_s > IDLE_WORTH_JUDGING_S and self.idle_cpu_s > IDLE_CPU_LIMIT * self.idle_s

    def close(self) -> None:
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        self._stderr.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True)
class WorkerCase:
    """One case inside a worker's process, as a runner."""

    worker: Worker
    key: str
    precision: str
    settings: dict[str, Any]
    answer: tuple[float, ...]

    @classmethod
    def prepare(cls, worker: Worker, key: str, request: dict[str, Any]) -> WorkerCase:
        """Loads, compiles and warms up in the worker. Raises CandidateError."""
        reply = worker.request({"do": "prepare", "case": key} | request, limit_s=PREPARE_LIMIT_S)
        return cls(worker, key, reply["precision"], reply["settings"], tuple(reply["answer"]))

    def run(self, seconds: float) -> Slice:
        reply = self.worker.request(
            {"do": "run", "case": self.key, "seconds": seconds}, limit_s=2 * seconds + RUN_GRACE_S
        )
        return Slice(reply["count"], reply["seconds"], tuple(reply["latency_us"]))
