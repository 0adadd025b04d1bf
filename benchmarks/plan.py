"""What one run of bench-fps measures: its settings, the list of measurements, and the processes that take them."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from edgedistill import console
from edgedistill.benchmarks.benchmark_app import BenchmarkApp
from edgedistill.benchmarks.inputs import InputSet
from edgedistill.benchmarks.score import score
from edgedistill.benchmarks.target import CPP, CPP_PROGRAM, MODES, OWN, PEERS, SCOPES, Target
from edgedistill.benchmarks.timing import CandidateError, Runner, Slice, Worker, WorkerCase
from edgedistill.errors import UsageError
from edgedistill.images import load_image, normalize
from edgedistill.runtime.bundle import PRECISIONS, deployed_precision, int8_path
from edgedistill.runtime.cpp_programs import HOW_TO_BUILD, find_cpp_program
from edgedistill.runtime.network import usable_cores
from edgedistill.runtime.processor import settings_here

PEERS_PYTHON = Path(".venv-peers/bin/python")
# Candidates that live in the peers' environment, and the script beside this file that each of them is.
PEER_SCRIPTS = {"model-api": "peer_model_api.py", "ncnn": "peer_ncnn.py"}


@dataclass(frozen=True)
class BenchSettings:
    """What to measure. ``path``: an openvino/ folder, its deploy.json or a model.xml.

    ``vs``: peers, keys of ``target.PEERS``. ``images``: files or folders, each an input of its own; empty: the run's val
    split, else generated photographs ('synthetic' asks for those). ``precisions``: of our own candidates; empty: all that
    the deployable has and this CPU computes in, and those of a cascade whose stages are deployed at unlike ones.
    ``seconds``: per candidate and round. ``fps_target`` with ``accuracy`` (0 to 1) adds the score. ``command``: the
    line that repeats this, kept in the record.
    Raises UsageError for a value out of range.
    """

    path: Path
    scopes: tuple[str, ...] = SCOPES
    vs: tuple[str, ...] = ("naive",)
    images: tuple[str, ...] = ()
    rounds: int = 5
    seconds: float = 2.0
    precisions: tuple[str, ...] = ()
    fps_target: float | None = None
    accuracy: float | None = None
    weight: float = 0.7
    out: Path | None = None
    plot: Path | None = None
    peers_python: Path = PEERS_PYTHON
    command: str = ""

    def __post_init__(self) -> None:
        for name, values, known in (
            ("--scope", self.scopes, SCOPES),
            ("--vs", self.vs, tuple(PEERS)),
            ("--precision", self.precisions, PRECISIONS),
        ):
            unknown = [value for value in values if value not in known]
            if unknown:
                raise UsageError(f"{name} {','.join(unknown)}: unknown, expected some of {','.join(known)}")
            if len(set(values)) != len(values):
                raise UsageError(f"{name} {','.join(values)}: something stands twice")
        if not self.scopes:
            raise UsageError(f"--scope: nothing to measure, expected some of {','.join(SCOPES)}")
        if not 1 <= self.rounds <= 1000:
            raise UsageError(f"--rounds {self.rounds}, expected 1 to 1000")
        if not (math.isfinite(self.seconds) and 0.05 <= self.seconds <= 600):
            raise UsageError(f"--seconds {self.seconds}, expected 0.05 to 600 per candidate and round")
        if (self.fps_target is None) != (self.accuracy is None):
            raise UsageError("--fps-target and --accuracy make the score together; give both or none")
        if self.fps_target is not None and self.accuracy is not None:
            score(self.accuracy, 0.0, self.fps_target, self.weight)


@dataclass(frozen=True)
class Entry:
    """One candidate in one scope, mode and input; first planned, then prepared (``runner``), then measured (``slices``).

    ``reason``: why it was not measured; empty if it was or will be.
    """

    candidate: str
    scope: str
    mode: str
    input: str
    precision: str
    reason: str = ""
    runner: Runner | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    answer: tuple[float, ...] = ()
    slices: tuple[Slice, ...] = ()

    @property
    def block(self) -> tuple[str, str]:
        """(scope, input): entries of one block are measured in the same rounds and may be compared."""
        return self.scope, self.input


def plan_entries(settings: BenchSettings, target: Target, sets: Sequence[InputSet]) -> list[Entry]:
    """Every candidate, scope, mode and input to measure, ours first; what cannot run here carries its reason."""
    entries = []
    own = own_precisions(settings, target)
    unlike = {} if settings.precisions else unlike_precisions(target)
    missing = {peer: target.missing(peer, settings.peers_python) or "" for peer in settings.vs}
    for scope in settings.scopes:
        tensor = f"{target.spec.width}x{target.spec.height} tensor"
        for name in [tensor] if scope == "model" else [one.name for one in sets]:
            # Scope ``model`` of a cascade is its last network alone.
            mixed = [] if scope == "model" else list(unlike.items())
            for precision, reason in own:
                entries += [Entry(OWN, scope, mode, name, precision, reason) for mode in MODES]
            entries += [Entry(OWN, scope, mode, name, precision) for mode, precision in mixed]
            for peer in settings.vs:
                shown, modes, scopes = PEERS[peer]
                if scope not in scopes:
                    continue
                plain = [("default" if peer == "naive-default" else "f32", "")]
                for precision, reason in own if peer == CPP else plain:
                    entries += [Entry(shown, scope, mode, name, precision, missing[peer] or reason) for mode in modes]
                if peer == CPP:
                    entries += [Entry(shown, scope, mode, name, one, missing[peer]) for mode, one in mixed]
    return entries


def own_precisions(settings: BenchSettings, target: Target) -> list[tuple[str, str]]:
    """(precision, why not) of our own candidates: unasked, only what can run; asked for by name, also what cannot."""
    abilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    reasons = {
        "f32": "",
        "bf16": "" if "BF16" in abilities else "this CPU does not compute in bfloat16",
        "int8": "" if target.has_int8 else "the deployable has no model-int8.xml; export-openvino writes it",
    }
    if settings.precisions:
        return [(name, reasons[name]) for name in settings.precisions]
    return [(name, "") for name in PRECISIONS if not reasons[name]]


def unlike_precisions(target: Target) -> dict[str, str]:
    """Mode -> 'int8+f32', for the modes in which the stages of a cascade run at unlike precisions here."""
    latency, throughput = settings_here(target.bundle)
    stages = len(target.bundle.config.stages)
    found = {
        "latency": deployed_precision(latency, stages),
        "throughput": deployed_precision(throughput, stages),
    }
    return {mode: name for mode, name in found.items() if name not in PRECISIONS}


class Workers:
    """The candidates' processes, one per candidate and precision; they end when ``stack`` closes."""

    def __init__(self, stack: ExitStack, settings: BenchSettings, target: Target, sets: Sequence[InputSet]) -> None:
        self._stack = stack
        self._peers_python = settings.peers_python
        self._target = target
        self._images = {one.name: [str(path.resolve()) for path in one.paths] for one in sets}
        self._workers: dict[tuple[str, str], Worker] = {}

    def prepare(self, plan: Sequence[Entry]) -> list[Entry]:
        """Starts, compiles and warms up; entries get a runner, or the reason why they have none."""
        entries: list[Entry] = []
        with console.progress("starting candidates", len(plan)) as bar:
            for entry in plan:
                bar.update(0, info=f"{entry.candidate} {entry.scope}")  # type: ignore[arg-type]
                entries.append(entry if entry.reason else self._prepared(entry, entries))
                bar.update(0, advance=1)  # type: ignore[arg-type]
        return entries

    def _prepared(self, entry: Entry, before: Sequence[Entry]) -> Entry:
        try:
            if entry.candidate == "benchmark_app":
                model = self._target.model
                return _benchmark_app(entry, before, int8_path(model) if entry.precision == "int8" else model)
            key = (entry.candidate, entry.precision)
            if key not in self._workers:
                self._workers[key] = self._stack.enter_context(Worker(self.command(entry.candidate)))
            name = f"{entry.scope} {entry.mode} {entry.input}"
            case = WorkerCase.prepare(self._workers[key], name, self.request(entry))
        except CandidateError as error:
            return dataclasses.replace(entry, reason=str(error))
        return dataclasses.replace(
            entry, runner=case, settings=case.settings, answer=case.answer, precision=case.precision
        )

    def command(self, candidate: str) -> list[str]:
        """What starts a process of that candidate."""
        if candidate in PEER_SCRIPTS:
            return [str(self._peers_python), str(Path(__file__).with_name(PEER_SCRIPTS[candidate]))]
        if candidate == CPP:
            program = find_cpp_program(CPP_PROGRAM)
            if program is None:
                raise CandidateError(f"{CPP_PROGRAM} is not built; {HOW_TO_BUILD}")
            return [str(program), "--serve"]
        return [sys.executable, "-m", "edgedistill.benchmarks.candidates"]

    def request(self, entry: Entry) -> dict[str, Any]:
        """What a worker needs to know; the input of scope ``model`` is made from the first image."""
        target = self._target
        checkpoint = target.checkpoint if entry.candidate == "torch" else None  # found by hashing
        return {
            "candidate": entry.candidate,
            "scope": entry.scope,
            "mode": entry.mode,
            # One precision is for all stages; unlike ones are deploy.json's.
            "precision": None if "+" in entry.precision else entry.precision,
            "images": self._images.get(entry.input) or next(iter(self._images.values()))[:1],
            "threads": usable_cores(),
            "deployable": os.fspath(target.path.resolve()),
            "stages": len(target.bundle.config.stages),
            "model": os.fspath(target.model.resolve()),
            "onnx": os.fspath(target.onnx.resolve()),
            "checkpoint": os.fspath(checkpoint.resolve()) if checkpoint else None,
            "input_spec": target.spec.to_dict(),
            "temperature": target.bundle.config.stages[-1].temperature,
            "stage_costs": entry.candidate == OWN and entry.mode == "latency",
            "tensor": os.fspath(self._tensor),
        }

    @cached_property
    def _tensor(self) -> Path:
        """The first image as the network is fed it, float32 [1, 3, H, W], for those who cannot prepare it alike."""
        folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="edgedistill-bench-"))
        pixels = load_image(next(iter(self._images.values()))[0], self._target.spec)
        np.save(Path(folder) / "tensor.npy", normalize(pixels[None], self._target.spec))
        return Path(folder) / "tensor.npy"

    def spinning(self) -> list[str]:
        """Candidates that burnt processor time while they should have slept, and so slowed the others."""
        return sorted({candidate for (candidate, _), worker in self._workers.items() if worker.spins})


def _benchmark_app(entry: Entry, before: Sequence[Entry], model: Path) -> Entry:
    """With the settings of our own candidate of the same mode and precision, which was prepared before it."""
    same = (OWN, entry.mode, entry.precision, entry.block)
    own = next((e for e in before if (e.candidate, e.mode, e.precision, e.block) == same and e.runner), None)
    if own is None:
        raise CandidateError(f"takes its settings from our own {entry.precision} {entry.mode} row, which is not there")
    # What an INT8 network does not do in 8 bits it does in f32, ours too.
    runner = BenchmarkApp(model, entry.mode, "f32" if entry.precision == "int8" else entry.precision, own.settings)
    return dataclasses.replace(entry, runner=runner, settings=own.settings)


def unlike_ours(entries: Sequence[Entry], tolerance: float) -> list[str]:
    """Candidates in scope ``model`` and f32 whose probabilities for the first image are not ours: wrongly set up."""
    rows = [e for e in entries if e.scope == "model" and e.precision == "f32" and e.answer and e.candidate != CPP]
    own = next((e.answer for e in rows if e.candidate == OWN), ())
    return sorted({e.candidate for e in rows if own and _distance(e.answer, own) > tolerance})


def cpp_disagrees(entries: Sequence[Entry], tolerance: float, *, single: bool = True) -> list[str]:
    """Where our C++ runtime's probabilities for the first image are not our Python's: 'files f32: 0.12'. ``single``: the
    network gives one label per image; else scope ``model`` is left out, where only C++ knows what its outputs mean."""
    own = {(e.block, e.precision): e.answer for e in entries if e.candidate == OWN and e.answer}
    found = []
    for entry in entries:
        answer = own.get((entry.block, entry.precision), ())
        comparable = single or entry.scope != "model"
        if entry.candidate == CPP and entry.answer and answer and comparable:
            distance = _distance(entry.answer, answer)
            # bfloat16 sums round differently in every kernel.
            if not distance <= (5 * tolerance if "bf16" in entry.precision else tolerance):
                found.append(f"{entry.scope} {entry.precision}: {distance:.3g}")
    return found


def _distance(one: Sequence[float], other: Sequence[float]) -> float:
    if len(one) != len(other):
        return math.inf
    return max(abs(a - b) for a, b in zip(one, other, strict=True))
