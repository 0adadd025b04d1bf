"""The figures promised for the C++ runtime, measured in interleaved rounds and judged:

    make cpp cpp-peers peers
    python -m edgedistill.benchmarks.cpp_runtime runs/NAME/openvino --out benchmarks/results/cpp-runtime.json

- files and frames against what one writes in C++ with OpenCV and OpenVINO (benchmarks/cpp/peers.cpp), naive and tuned,
  and ONNX Runtime with a thread per core; at f32, at OpenVINO's own defaults, and at the best precision;
- scope model against benchmark_app with the same IR, streams and precision, ONNX Runtime and ncnn;
- Engine against the machine's limit; Classifier's latency against a bare loop (benchmarks/cpp/bare.cpp);
- memory over very many images, and the time from a new process to its first label.

What is compared is measured in the same rounds. Exit code 0 when every figure is reached, else 1.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgedistill import console
from edgedistill.artifacts import read_json, write_json
from edgedistill.benchmarks.bench_fps import CPP_TOLERANCE, measure_entries, result_rows
from edgedistill.benchmarks.command import (
    add_photo_options,
    add_round_options,
    exit_with,
    module_command,
    module_parser,
)
from edgedistill.benchmarks.cpp_peers import (
    BARE,
    LIMIT,
    NAIVE,
    NAIVE_DEFAULT,
    TUNED,
    TUNED_DEFAULT,
    PeerWorkers,
    latency_blocks,
    memory,
    start_to_label,
)
from edgedistill.benchmarks.inputs import InputSet
from edgedistill.benchmarks.machine import artifact_hash, machine_record
from edgedistill.benchmarks.plan import BenchSettings, Entry, cpp_disagrees, own_precisions
from edgedistill.benchmarks.python_runtime import Figure, photographs, shown_figure
from edgedistill.benchmarks.target import CPP, MODES, OWN, Target
from edgedistill.benchmarks.timing import CandidateError, Slice, Spread, WorkerCase, ratios
from edgedistill.errors import EdgedistillError, UsageError

FORMAT = "edgedistill-cpp-runtime"
PARTS = ("files", "frames", "model", "latency", "memory", "start")
# Of the small and the large photograph: f32 against the naive program, best precision against it.
FILES_TARGETS = ((1.8, 2.3), (3.5, 4.0))
FRAMES_TARGETS = ((2.0, 3.0), (2.0, 3.0))
LIMIT_TARGET = 0.95
LATENCY_TARGET = 1.15
START_TARGET_S = 0.5
MEMORY_TARGET_BYTES = 10.0
MAX_DROP = 0.01


@dataclass
class Run:
    """What one run measures and finds. ``best``: the precision that is judged as the best."""

    settings: BenchSettings
    target: Target
    sets: Sequence[InputSet]
    precisions: tuple[str, ...]
    best: str
    blocks: int = 20
    block_images: int = 500
    count: int = 200_000
    figures: list[Figure] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    not_judged: list[dict[str, str]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def judged(self) -> tuple[str, ...]:
        """f32 and the best precision, once where they are the same."""
        return tuple(dict.fromkeys(("f32", self.best)))

    @property
    def reached(self) -> bool:
        return not self.not_judged and all(figure.reached for figure in self.figures)

    def judge(
        self, name: str, value: Callable[[], Spread], target: float, *, unit: str = "x", at_most: bool = False
    ) -> None:
        """Adds a figure; one that could not be measured is told and costs the others nothing."""
        try:
            self.figures.append(Figure(name, value(), target, unit, at_most))
        except (EdgedistillError, CandidateError) as error:
            self.not_judged.append({"name": name, "reason": str(error)})


def best_precision(target: Target) -> str:
    """INT8 where the export's certificate has it within one point of accuracy, else what is deployed."""
    certificate = target.model.with_name("certificate.json")
    if target.has_int8 and certificate.is_file():
        columns = {c["name"]: c["top1"] for c in read_json(certificate, format="edgedistill-certificate")["columns"]}
        if "ir-int8" in columns and columns["torch"] - columns["ir-int8"] <= MAX_DROP + 1e-9:
            return "int8"
    return target.bundle.config.throughput.precision


# ---- plans ----


def pixel_plan(run: Run, scope: str) -> list[Entry]:
    """Scope files or frames: ours, and everything that is compared with it, on each photograph."""
    entries = []
    for one in run.sets:
        entries += [Entry(CPP, scope, mode, one.name, precision) for precision in run.precisions for mode in MODES]
        entries += [Entry(OWN, scope, "throughput", one.name, precision) for precision in run.judged]
        entries += [Entry(name, scope, "latency", one.name, "f32") for name in (NAIVE, NAIVE_DEFAULT)]
        entries += [Entry(name, scope, "throughput", one.name, "f32") for name in (TUNED, TUNED_DEFAULT)]
        entries.append(Entry("onnxruntime", scope, "throughput", one.name, "f32"))
        if scope == "files":
            entries += [Entry(LIMIT, scope, "throughput", one.name, precision) for precision in run.judged]
    return entries


def model_plan(run: Run) -> list[Entry]:
    tensor = f"{run.target.spec.width}x{run.target.spec.height} tensor"
    # Our Python first: benchmark_app takes its settings.
    entries = [
        Entry(name, "model", mode, tensor, precision)
        for precision in run.judged
        for name in (OWN, CPP, "benchmark_app")
        for mode in MODES
    ]
    return entries + [Entry(name, "model", mode, tensor, "f32") for name in ("onnxruntime", "ncnn") for mode in MODES]


# ---- figures ----


class Measured:
    """The slices of one scope by candidate, mode, input and precision as it was asked for."""

    def __init__(self, planned: Sequence[Entry], entries: Sequence[Entry]) -> None:
        # The precision that a program reached stands in the entry; the one that was asked for, in the plan.
        pairs = zip(planned, entries, strict=True)
        self._entries = {(one.candidate, one.mode, one.input, one.precision): entry for one, entry in pairs}

    def entry(self, candidate: str, mode: str, name: str, precision: str = "f32") -> Entry:
        """Raises EdgedistillError where it was not measured."""
        entry = self._entries.get((candidate, mode, name, precision))
        if entry is None or not entry.slices:
            reason = entry.reason if entry else "not planned"
            raise EdgedistillError(f"{candidate} {precision}, {mode}, {name}: not measured: {reason}")
        return entry

    def slices(self, candidate: str, mode: str, name: str, precision: str = "f32") -> tuple[Slice, ...]:
        return self.entry(candidate, mode, name, precision).slices

    def reached(self, run: Run, candidate: str, mode: str, name: str) -> str:
        """The precision that OpenVINO chose by itself for that peer, where ours was measured in it; else f32."""
        entry = self._entries[candidate, mode, name, "f32"]
        return entry.precision if entry.precision in run.precisions else "f32"


def judge_pixels(run: Run, scope: str, found: Measured) -> None:
    targets = FILES_TARGETS if scope == "files" else FRAMES_TARGETS
    for one, (plain, best) in zip(run.sets, targets, strict=True):

        def against(peer: str, mode: str, precision: str, target: float, name: str = one.name) -> None:
            def ratio() -> Spread:
                return ratios(found.slices(CPP, "throughput", name, precision), found.slices(peer, mode, name))

            run.judge(f"{scope}, {name}: Engine {precision} / {peer}", ratio, target)

        against(NAIVE, "latency", "f32", plain)
        against(NAIVE_DEFAULT, "latency", found.reached(run, NAIVE_DEFAULT, "latency", one.name), plain)
        against(NAIVE, "latency", run.best, best)
        against(TUNED, "throughput", "f32", 1.0)
        against(TUNED_DEFAULT, "throughput", found.reached(run, TUNED_DEFAULT, "throughput", one.name), 1.0)
        against("onnxruntime", "throughput", "f32", 1.0)
        if scope == "files":
            judge_limit(run, one.name, found)


def judge_limit(run: Run, name: str, found: Measured) -> None:
    for precision in run.judged:

        def ratio(precision: str = precision) -> Spread:
            return ratios(*(found.slices(candidate, "throughput", name, precision) for candidate in (CPP, LIMIT)))

        run.judge(f"files, {name}: Engine {precision} / limit", ratio, LIMIT_TARGET)


def judge_model(run: Run, found: Measured, tensor: str) -> None:
    pairs = [("benchmark_app", mode, precision) for precision in run.judged for mode in MODES]
    for peer, mode, precision in [*pairs, ("onnxruntime", "throughput", "f32"), ("ncnn", "throughput", "f32")]:

        def ratio(peer: str = peer, mode: str = mode, precision: str = precision) -> Spread:
            return ratios(*(found.slices(candidate, mode, tensor, precision) for candidate in (CPP, peer)))

        run.judge(f"model, {mode}, {precision}: ours / {peer}", ratio, 1.0)


# ---- parts ----


def measure_rounds(run: Run, scope: str, planned: Sequence[Entry]) -> Measured:
    with ExitStack() as stack:
        workers = PeerWorkers(stack, run.settings, run.target, run.sets)
        prepared = workers.prepare(planned)
        entries = measure_entries(prepared, rounds=run.settings.rounds, seconds=run.settings.seconds)
        run.warnings += [f"{name} used the processor while waiting for its turn" for name in workers.spinning()]
    run.rows += result_rows(entries)
    run.missing += [
        {"candidate": entry.candidate, "scope": scope, "mode": entry.mode, "input": entry.input, "reason": entry.reason}
        for entry in entries
        if entry.reason
    ]
    run.warnings += [f"C++ answers otherwise than Python: {one}" for one in cpp_disagrees(entries, CPP_TOLERANCE)]
    return Measured(planned, entries)


def measure_pixels(run: Run, scope: str) -> None:
    judge_pixels(run, scope, measure_rounds(run, scope, pixel_plan(run, scope)))


def measure_model(run: Run) -> None:
    planned = model_plan(run)
    judge_model(run, measure_rounds(run, "model", planned), planned[0].input)


def measure_latency(run: Run) -> None:
    """Of single small photographs, in f32 and in the best precision."""
    one = run.sets[0]
    run.more["latency_blocks"] = {}
    for precision in run.judged:
        with ExitStack() as stack:
            workers = PeerWorkers(stack, run.settings, run.target, run.sets)
            planned = [Entry(name, "files", "latency", one.name, precision) for name in (CPP, BARE)]
            cases = []
            for entry in workers.prepare(planned):
                if not isinstance(entry.runner, WorkerCase):
                    raise EdgedistillError(f"{entry.candidate} {precision}: not measured: {entry.reason}")
                cases.append(entry.runner)
            blocks = latency_blocks(cases[0], cases[1], blocks=run.blocks, images=run.block_images)
        run.more["latency_blocks"][precision] = blocks.to_dict()
        for percentile in (50, 99):
            name = f"latency, {one.name}: Classifier {precision} p{percentile} / bare loop"
            run.figures.append(Figure(name, blocks.ratio(percentile), LATENCY_TARGET, at_most=True))


def measure_memory(run: Run) -> None:
    run.more["memory"] = {}
    for name in ("Engine", "Classifier"):
        found = memory(run.settings.path, run.count, latency=name == "Classifier")
        run.more["memory"][name] = found
        slope = found["slope_bytes_per_image"]
        spread = Spread(slope, slope, slope)
        figure = f"memory, {name}, {found['images']} images: slope"
        run.figures.append(Figure(figure, spread, MEMORY_TARGET_BYTES, "B/image", at_most=True))


def measure_start(run: Run) -> None:
    image = run.sets[0].paths[0]
    for name in ("Engine", "Classifier"):
        value = functools.partial(start_to_label, run.settings.path, image, latency=name == "Classifier")
        run.judge(f"start to first label, {name}, cached", value, START_TARGET_S, unit="s", at_most=True)


def measure(run: Run, parts: Sequence[str]) -> None:
    others = {"model": measure_model, "latency": measure_latency, "memory": measure_memory, "start": measure_start}
    for part in parts:
        console.note(f"part {part}")
        try:
            others[part](run) if part in others else measure_pixels(run, part)
        except (EdgedistillError, CandidateError) as error:
            run.not_judged.append({"name": part, "reason": str(error)})


def main() -> int:
    options = _parsed()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise UsageError(f"--parts {' '.join(unknown)}: unknown, expected some of {' '.join(PARTS)}")
    machine = machine_record()
    settings = BenchSettings(path=options.bundle, rounds=options.rounds, seconds=options.seconds)
    target = Target.open(options.bundle)
    with tempfile.TemporaryDirectory(prefix="edgedistill-bench-") as scratch:
        sets, origin = photographs(options.images, Path(scratch))
        precisions = tuple(name for name, _ in own_precisions(settings, target))
        best = options.best or best_precision(target)
        run = Run(settings, target, sets, precisions, best, options.blocks, options.block_images, options.count)
        measure(run, options.parts)
    record = {
        "machine": machine,
        "command": module_command("cpp_runtime"),
        "artifact": {"path": str(options.bundle), "sha256": artifact_hash(target.files)},
        "images": origin,
        "rounds": options.rounds,
        "seconds": options.seconds,
        "best_precision": best,
        "figures": [figure.to_dict() for figure in run.figures],
        "not_judged": run.not_judged,
        "results": run.rows,
        "not_measured": run.missing,
        "warnings": run.warnings,
    } | run.more
    write_json(options.out, record, format=FORMAT)
    rows = [shown_figure(figure) for figure in run.figures]
    console.out.print(console.table("C++ runtime", ("figure", "median", "min-max", "target", "reached"), rows))
    for warning in [*run.warnings, *(f"{one['name']}: not judged: {one['reason']}" for one in run.not_judged)]:
        console.warn(warning)
    console.out.print(str(options.out))
    return 0 if run.reached else 1


def _parsed() -> argparse.Namespace:
    parser = module_parser("cpp_runtime", __doc__)
    parser.add_argument("bundle", type=Path, help="openvino/ folder")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    add_photo_options(parser)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help=f"some of {' '.join(PARTS)} (default: all)")
    parser.add_argument("--best", choices=["f32", "bf16", "int8"], help="best precision (default: by the certificate)")
    add_round_options(parser)
    parser.add_argument("--blocks", type=int, default=20, help="of the latency measurement")
    parser.add_argument("--block-images", type=int, default=500, help="single images in a block")
    parser.add_argument("--count", type=int, default=200_000, help="images of the memory measurement")
    return parser.parse_args()


if __name__ == "__main__":
    exit_with(main)
