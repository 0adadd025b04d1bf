"""How close `Engine` comes to what the machine can do at all.

    python -m edgedistill.benchmarks.engine_limit BUNDLE --images DIR|FILE... --rounds 5 --out limit.json

The limit is the summed rate of one independent process per core, all at once, each pinned to its core and doing the
same work (file -> label) through a single-threaded `Classifier`: no lock, queue or cache line is shared. Engine and
limit take turns within every round, so that a noisy machine hurts both alike; the first round warms up and is left out.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import cv2

from edgedistill import console
from edgedistill.artifacts import write_json
from edgedistill.benchmarks.command import exit_with, module_command
from edgedistill.benchmarks.machine import machine_record
from edgedistill.errors import UsageError
from edgedistill.images import decode_image, read_bytes
from edgedistill.runtime import Bundle, Classifier, Engine, frames
from edgedistill.runtime.bundle import deployed_precision


@dataclass(frozen=True)
class LimitSettings:
    """``seconds``: of each of the two turns of a round. ``precision``, ``batch``: None means what deploy.json says."""

    bundle: Path
    images: tuple[Path, ...]
    rounds: int = 5
    seconds: float = 3.0
    precision: str | None = None
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.rounds < 1 or not self.seconds > 0 or not self.images:
            raise UsageError("engine_limit: expected at least one image, one round and a time above 0 seconds")


def measure(settings: LimitSettings) -> dict[str, Any]:
    """The record that is written: images per second of both sides and their ratio, median with spread over rounds."""
    bundle = Bundle.load(settings.bundle)
    paths = [str(path) for path in settings.images]
    for path in paths:
        data, name = read_bytes(path)
        decode_image(data, name=name)
    precision = settings.precision or _single_precision(bundle)
    cores = sorted(os.sched_getaffinity(0))
    rounds: list[dict[str, float]] = []
    with (
        _processes(str(settings.bundle), paths, precision, cores) as processes,
        Engine(bundle, precision=precision, batch=settings.batch, cache_dir=False) as engine,
    ):
        for number in range(settings.rounds + 1):
            sides = [
                ("limit_fps", lambda: _limit_rate(processes, settings.seconds)),
                ("engine_fps", lambda: _engine_rate(engine, paths, settings.seconds)),
            ]
            # Who goes first changes, so that neither always runs on a cooler machine.
            rates = {name: side() for name, side in (sides if number % 2 else sides[::-1])}
            if number:
                rounds.append(rates | {"ratio": rates["engine_fps"] / rates["limit_fps"]})
        return {
            "machine": machine_record(),
            "command": module_command("engine_limit"),
            "artifact": {"path": bundle.source, "sha256": bundle.config.stages[0].sha256},
            "settings": {
                "precision": engine.precision,
                "streams": engine.streams,
                "batch": engine.batch,
                "images": len(paths),
                "seconds": settings.seconds,
                "cores": len(cores),
            },
            "rounds": rounds,
            "summary": {name: _spread([entry[name] for entry in rounds]) for name in rounds[0]},
        }


def _single_precision(bundle: Bundle) -> str:
    """Raises UsageError for a cascade whose stages are deployed at unlike precisions."""
    precision = deployed_precision(bundle.config.throughput, len(bundle.config.stages))
    if "+" in precision:
        raise UsageError(f"{bundle.source}: runs at {precision}; both sides need one precision, give --precision")
    return precision


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def _engine_rate(engine: Engine, paths: list[str], seconds: float) -> float:
    """Images per second between the first answer and the last one inside the time."""
    predictions = engine.map(itertools.cycle(paths))
    _checked(next(predictions))
    start, count = time.perf_counter(), 0
    while (now := time.perf_counter()) - start < seconds:
        _checked(next(predictions))
        count += 1
    predictions.close()
    return count / (now - start)


def _checked(prediction: Any) -> None:
    if prediction.error is not None:
        raise UsageError(f"{prediction.error}; measure with images that can be read")


@contextmanager
def _processes(bundle: str, paths: list[str], precision: str, cores: list[int]) -> Iterator[list[Connection]]:
    """One waiting process per core; each answers a number of seconds with (images, seconds)."""
    context = multiprocessing.get_context("spawn")
    pipes, started = [], []
    try:
        for core in cores:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, bundle, paths, precision, core), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            started.append(process)
        for pipe in pipes:
            pipe.recv()
        yield pipes
    finally:
        for pipe in pipes:
            pipe.close()
        for process in started:
            process.join(10)
            process.kill()


def _serve(pipe: Connection, bundle: str, paths: list[str], precision: str, core: int) -> None:
    os.sched_setaffinity(0, {core})
    cv2.setNumThreads(1)
    classifier = Classifier(bundle, precision=precision, threads=1, cache_dir=False)
    for path in paths:
        classifier.classify(path)
    pipe.send("ready")
    endless = itertools.cycle(paths)
    while True:
        try:
            seconds = pipe.recv()
        except EOFError:
            return
        start, count = time.perf_counter(), 0
        while (now := time.perf_counter()) - start < seconds:
            classifier.classify(next(endless))
            count += 1
        pipe.send((count, now - start))


def _limit_rate(pipes: list[Connection], seconds: float) -> float:
    for pipe in pipes:
        pipe.send(seconds)
    return float(sum(count / spent for count, spent in [pipe.recv() for pipe in pipes]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="engine_limit", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--images", type=Path, nargs="+", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--precision", choices=["f32", "bf16", "int8"])
    parser.add_argument("--batch", type=int)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    images = tuple(Path(frame.name) for source in options.images for frame in frames(source))
    record = measure(
        LimitSettings(options.bundle, images, options.rounds, options.seconds, options.precision, options.batch)
    )
    if options.out is not None:
        write_json(options.out, record, format="edgedistill-engine-limit")
    rows = [
        (name, *(f"{value:.3f}" if name == "ratio" else f"{value:.1f}" for value in spread.values()))
        for name, spread in record["summary"].items()
    ]
    console.out.print(console.table("Engine against the machine's limit", ("", "median", "min", "max"), rows))
    return 0


if __name__ == "__main__":
    exit_with(main)
