"""bench-fps: how many images a second a deployable answers on this machine, beside what people use instead.

Three scopes that are never mixed: ``model`` (finished tensor to scores), ``frames`` (decoded pixels to answer) and
``files`` (encoded bytes in memory to answer). Every candidate lives in a process of its own, is warmed up, then measured
once per round in rotated order; figures are medians over rounds with the smallest and largest.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from edgedistill import console
from edgedistill.artifacts import settings_dict, write_json
from edgedistill.benchmarks.inputs import input_sets
from edgedistill.benchmarks.machine import artifact_hash, machine_record
from edgedistill.benchmarks.plan import BenchSettings, Entry, Workers, cpp_disagrees, plan_entries, unlike_ours
from edgedistill.benchmarks.plot import check_plot, plot_bench
from edgedistill.benchmarks.score import score
from edgedistill.benchmarks.target import BASE, CPP, OWN, Target
from edgedistill.benchmarks.timing import (
    SPREAD_LIMIT,
    CandidateError,
    Slice,
    Spread,
    interleave,
    percentiles_ms,
    ratios,
)
from edgedistill.errors import ArtifactError, ModelError
from edgedistill.runtime.bundle import deployed_precision

__all__ = ["BENCH_FORMAT", "BenchResult", "BenchSettings", "bench_fps"]

BENCH_FORMAT = "edgedistill-bench"
# Candidates that compute the same network in f32 differ by rounding only.
ANSWER_TOLERANCE = 0.01
# The same pixels and the same network in another program of ours.
CPP_TOLERANCE = 1e-3
COLUMNS = ("candidate", "mode", "FPS", "min-max", "p50 / p90 / p99 ms", "x naive")
CASCADE_NOTE = "cascade"
HOW_TO_READ = (
    "Rows of one table may be compared; other scopes and inputs may not. 'latency' answers one image at a time, "
    "'throughput' many at once; 'x naive' is taken round by round against plain OpenCV + OpenVINO at f32."
)


@dataclass(frozen=True)
class BenchResult:
    """``record``: the JSON that was written. ``notes``: sentences for the reader. ``out`` and ``plot``: files written."""

    record: dict[str, Any]
    notes: tuple[str, ...]
    out: Path | None = None
    plot: Path | None = None

    def tables(self) -> list[Table]:
        """One table per scope and input: what stands in one table may be compared. The caption says what is missing."""
        rows: dict[tuple[str, str], list[list[str]]] = {}
        captions: dict[tuple[str, str], dict[str, None]] = {}
        for row in (*self.record["results"], *self.record["not_measured"]):
            block = row["scope"], row["input"]
            rows.setdefault(block, []).append(_cells(row))
            if "reason" in row:
                captions.setdefault(block, {})[f"{row['candidate']} not measured: {row['reason']}"] = None
        tables = []
        for (scope, name), cells in rows.items():
            table = console.table(f"{scope}: {name}", COLUMNS, cells)
            table.caption = "\n".join(captions.get((scope, name), ())) or None
            table.caption_justify = "left"
            table.box = SIMPLE_HEAD
            table.padding = (0, 1, 0, 0)
            tables.append(table)
        return tables


def _cells(row: dict[str, Any]) -> list[str]:
    """Narrow enough for 80 columns: three significant digits, the ratios' spread only in the record."""
    name = row["candidate"] if row["candidate"].endswith(row["precision"]) else f"{row['candidate']} {row['precision']}"
    named = [name, row["mode"]]
    if "reason" in row:
        return [*named, "-", "not measured", "-", "-"]
    fps, latency, ratio = row["fps"], row["latency_ms"], row["ratio_to_naive_f32"]
    return [
        *named,
        short(fps["median"]),
        f"{short(fps['min'])}-{short(fps['max'])}",
        " / ".join(short(latency[name]) for name in ("p50", "p90", "p99")) if latency else "-",
        f"{ratio['median']:.2f}" if ratio else "-",
    ]


def short(value: float) -> str:
    """Three significant digits or all before the point: 1234, 123, 12.3, 1.23, 0.12."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def bench_fps(settings: BenchSettings) -> BenchResult:
    """Measures, writes the JSON record and, where asked for, the plot; returns the record and where it lies.

    Without ``settings.out`` the record goes into the deployable's folder as bench.json, where the report finds it.

    Raises UsageError for paths, images or options that cannot be, ArtifactError or ModelError for a deployable that
    does not load, ModelError when not one of our own candidates could be measured.
    """
    if settings.plot is not None:
        check_plot(settings.plot)
    target = Target.open(settings.path)
    machine = machine_record()
    entries, origin, spinning = _measured(settings, target)
    rows = result_rows(entries)
    if not any(row["candidate"] == OWN for row in rows):
        reasons = next(entry.reason for entry in entries if entry.candidate == OWN)
        raise ModelError(f"{settings.path}: could not be measured: {reasons}")
    notes = (HOW_TO_READ, *cascade_notes(rows), *_warnings(entries, rows, spinning, single=target.bundle.single))
    record = {
        "machine": machine,
        "command": settings.command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "artifact": _artifact(target),
        "settings": settings_dict(settings) | {"images_from": origin},
        "rounds": settings.rounds,
        "results": rows,
        "not_measured": [_named(entry) | {"reason": entry.reason} for entry in entries if entry.reason],
        "score": _score(settings, target, rows),
        "warnings": [note for note in notes[1:] if not note.startswith(CASCADE_NOTE)],
    }
    return _written(settings, target, BenchResult(record, notes))


def _measured(settings: BenchSettings, target: Target) -> tuple[list[Entry], str, list[str]]:
    """(measured entries, where the images come from, candidates that did not sleep between their turns)."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgedistill-bench-")))
        sets, origin = input_sets(settings.images, dataset=target.beside("dataset.csv"), scratch=scratch)
        plan = plan_entries(settings, target, sets)
        console.note(origin)
        console.note(_estimate(plan, settings))
        workers = Workers(stack, settings, target, sets)
        entries = measure_entries(workers.prepare(plan), rounds=settings.rounds, seconds=settings.seconds)
        return entries, origin, workers.spinning()


def _artifact(target: Target) -> dict[str, Any]:
    return {"path": str(target.path), "sha256": artifact_hash(target.files), "models": target.sha256}


def _estimate(plan: Sequence[Entry], settings: BenchSettings) -> str:
    count = sum(not entry.reason for entry in plan)
    minutes = count * settings.rounds * settings.seconds / 60
    slices = f"{count} measurements x {settings.rounds} rounds x {settings.seconds:g} s"
    return f"{slices}: about {minutes:.1f} minutes and the start of each candidate"


def measure_entries(entries: Sequence[Entry], *, rounds: int, seconds: float) -> list[Entry]:
    """The prepared entries with their slices, block by block, interleaved within a block; failures get their reason."""
    done = list(entries)
    runnable = [index for index, entry in enumerate(entries) if entry.runner is not None]
    with console.progress("measuring", len(runnable) * rounds) as bar:
        for block in dict.fromkeys(entries[index].block for index in runnable):
            bar.update(0, info=f"{block[0]}: {block[1]}")  # type: ignore[arg-type]
            members = [index for index in runnable if entries[index].block == block]
            runners = [runner for index in members if (runner := entries[index].runner) is not None]
            outcomes = interleave(runners, rounds=rounds, seconds=seconds, advance=lambda: bar.advance(0))  # type: ignore[arg-type]
            for index, outcome in zip(members, outcomes, strict=True):
                done[index] = _outcome(entries[index], outcome)
    return done


def _outcome(entry: Entry, outcome: list[Slice] | CandidateError) -> Entry:
    if isinstance(outcome, CandidateError):
        return dataclasses.replace(entry, reason=str(outcome))
    return dataclasses.replace(entry, slices=tuple(outcome))


def _named(entry: Entry) -> dict[str, Any]:
    names = ("candidate", "scope", "mode", "precision", "input")
    return {name: getattr(entry, name) for name in names}


def result_rows(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """One row per measured entry: FPS (images a second), latency in ms, ratio to the naive program of the same block."""
    bases = {entry.block: entry.slices for entry in entries if entry.candidate == BASE and entry.slices}
    rows = []
    for entry in entries:
        if not entry.slices:
            continue
        base = bases.get(entry.block)
        fps = [one.fps for one in entry.slices]
        rows.append(
            _named(entry)
            | {
                "fps": Spread.of(fps).to_dict() | {"rounds": [round(value, 2) for value in fps]},
                "latency_ms": percentiles_ms(entry.slices),
                "ratio_to_naive_f32": ratios(entry.slices, base).to_dict() if base else None,
                "settings": entry.settings,
            }
        )
    return rows


def cascade_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Of our own cascade, one sentence for each scope and input: who answered, and what that should cost."""
    found: dict[str, None] = {}
    for row in rows:
        cascade = row["settings"].get("cascade") if row["candidate"] == OWN else None
        if cascade:
            first, passed_on = cascade["shares"][0], 1 - cascade["shares"][0]
            c1, c2 = cascade["stage_ms"]
            found[
                f"{CASCADE_NOTE} ({row['precision']}, {row['scope']}, {row['input']}): the first stage answered {first:.0%} of "
                f"the images; an image should cost {c1:.2f} + {passed_on:.2f} x {c2:.2f} = {cascade['expected_ms']:.2f} ms "
                f"in one thread, {c1 + c2:.2f} ms if all went through both"
            ] = None
    return list(found)


def _warnings(
    entries: Sequence[Entry], rows: Sequence[dict[str, Any]], spinning: Sequence[str], *, single: bool
) -> list[str]:
    """What should make the reader doubt a figure. ``single``: the network gives one label per image."""
    found = []
    spreads = [(row["fps"]["max"] - row["fps"]["min"]) / row["fps"]["median"] for row in rows]
    noisy = sum(spread > SPREAD_LIMIT for spread in spreads)
    if noisy:
        found.append(
            f"{noisy} of {len(rows)} figures vary by more than {SPREAD_LIMIT:.0%} between rounds (up to "
            f"{max(spreads):.0%}): something else uses this machine; trust the ratios, not the absolute figures, or "
            "measure again with more --rounds"
        )
    unlike = unlike_ours(entries, ANSWER_TOLERANCE)
    if unlike:
        found.append(
            f"{', '.join(unlike)}: other probabilities than ours for the same tensor at f32; not the same network?"
        )
    unlike = cpp_disagrees(entries, CPP_TOLERANCE, single=single)
    if unlike:
        found.append(
            f"{CPP} answers otherwise than Python for the same image ({', '.join(unlike)}); build it again with 'make cpp'"
        )
    if spinning:
        found.append(f"{', '.join(spinning)}: used the processor while waiting for its turn and slowed the others")
    return found


def _score(settings: BenchSettings, target: Target, rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The score of our fastest row in scope ``files`` (else the last measured scope) at the precision that deploys."""
    if settings.fps_target is None or settings.accuracy is None:
        return None
    config = target.bundle.config
    deployed = {
        mode: deployed_precision(one, len(config.stages))
        for mode, one in (("latency", config.latency), ("throughput", config.throughput))
    }
    own = [row for row in rows if row["candidate"] == OWN]
    scope = "files" if any(row["scope"] == "files" for row in own) else own[-1]["scope"]
    inputs = next(row["input"] for row in own if row["scope"] == scope)
    counted = [row for row in own if row["scope"] == scope and row["input"] == inputs]
    counted = [row for row in counted if row["precision"] == deployed[row["mode"]]] or counted
    best = max(counted, key=lambda row: row["fps"]["median"])
    fps = best["fps"]["median"]
    return {name: best[name] for name in ("scope", "mode", "precision", "input")} | {
        "accuracy": settings.accuracy,
        "fps": fps,
        "fps_target": settings.fps_target,
        "weight": settings.weight,
        "value": round(score(settings.accuracy, fps, settings.fps_target, settings.weight), 5),
    }


def _written(settings: BenchSettings, target: Target, result: BenchResult) -> BenchResult:
    """A folder of ours that cannot be written (an image of a device) costs a warning; a file that was asked for, an error."""
    out = settings.out
    if out is None and target.deploy_folder is not None:
        out = target.deploy_folder / "bench.json"
    if out is not None:
        try:
            write_json(out, result.record, format=BENCH_FORMAT)
        except ArtifactError as error:
            if settings.out is not None:
                raise
            console.warn(f"{error}; the record is not kept")
            out = None
    if settings.plot is not None:
        plot_bench(result.record, settings.plot)
    return dataclasses.replace(result, out=out, plot=settings.plot)
