"""Is what the tuner chose better than every setting that one picks by hand? Judged on the test split, read once.

    edgedistill tune runs/NAME --fps-target N --out runs/NAME/tuned-1      (and tuned-2, tuned-3: is it stable?)
    python -m edgedistill.benchmarks.tuned_score runs/NAME --tuned runs/NAME/tuned-* --out FILE.json

Fixed settings, for every student of the run at the resolution that it was trained at: FP32 one image at a time, FP32
throughput, INT8 throughput, what OpenVINO's throughput hint picks (benchmark_app's default), and ONNX Runtime with a
thread per core. All but the last run through our own runtime, so that only the choice differs. FPS: scope files, test
images, interleaved rounds. The target is the tuner's; where it had none (--max-drop), 4 times the FPS of the naive program,
which runs in the same rounds. Exit code 0 when the score is ahead by the promised margin, runs agree, and val did not
mislead.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import openvino as ov

from edgedistill import console
from edgedistill.artifacts import read_json, write_json
from edgedistill.benchmarks.command import exit_with, module_command, module_parser
from edgedistill.benchmarks.machine import machine_record
from edgedistill.benchmarks.score import score
from edgedistill.benchmarks.target import BASE, OWN
from edgedistill.benchmarks.timing import CandidateError, Spread, Worker, WorkerCase, interleave
from edgedistill.benchmarks.tuner.space import PRECISIONS, Host, Student
from edgedistill.benchmarks.tuner.students import find_students
from edgedistill.benchmarks.tuner.truth import Answers, Truth, predicted_answers
from edgedistill.benchmarks.tuner.tune import TUNE_FORMAT
from edgedistill.benchmarks.tuner.valset import truth_of
from edgedistill.data.manifest import read_dataset
from edgedistill.errors import ModelError, UsageError
from edgedistill.images import DecodeMode
from edgedistill.runtime import Bundle, Engine
from edgedistill.runtime.bundle import (
    DeployConfig,
    LatencySettings,
    Stage,
    ThroughputSettings,
    deployed_precision,
    read_deploy,
    stage_precisions,
    write_deploy,
)
from edgedistill.tasks import Task

FORMAT = "edgedistill-tuned-score"
MARGIN = 0.03
STABLE = 0.01
LOSS = 0.01
NAIVE, NAIVE_TIMES = "naive program", 4
CASCADE_SPEED, CASCADE_DROP = 1.5, 0.003
FED_IMAGES = 256
Z = 1.96
RESAMPLES = 1000


@dataclass(frozen=True)
class Contender:
    """One way to deploy. ``deploy``: its deploy.json; ``kind``: tuned, fixed, slow-stage or naive."""

    name: str
    kind: str
    deploy: Path
    student: Student
    mode: str = "throughput"
    candidate: str = OWN

    def request(self, images: Sequence[str], threads: int) -> dict[str, Any]:
        model = self.student.root / self.student.model
        return {
            "candidate": self.candidate,
            "deployable": str(self.deploy),
            "precision": "f32" if self.candidate == BASE else None,
            "cache_dir": False,
            "mode": self.mode,
            "scope": "files",
            "images": list(images),
            "threads": threads,
            "model": str(model),
            "onnx": str(model.with_suffix(".onnx")),
            "input_spec": self.student.spec.to_dict(),
            "temperature": self.student.temperature,
        }


def fixed_settings(student: Student, folder: Path, host: Host) -> list[Contender]:
    """What one picks by hand for that student; their deploy.json files are written beside its IR's folder."""
    hint = _hinted(student)
    usual = ThroughputSettings("f32", host.cores, host.cores)
    ways = {
        "f32, one image at a time": (usual, "latency", OWN),
        "f32, throughput": (usual, "throughput", OWN),
        "OpenVINO's throughput hint": (hint, "throughput", OWN),
        "onnxruntime, a thread per core": (usual, "throughput", "onnxruntime"),
    }
    if student.int8_sha256 is not None:
        ways["int8, throughput"] = (dataclasses.replace(usual, precision="int8"), "throughput", OWN)
    found = []
    for name, (throughput, mode, candidate) in ways.items():
        path = _write(student, throughput, folder, host)
        found.append(Contender(f"{student.name} {student.size[0]} px, {name}", "fixed", path, student, mode, candidate))
    return found


def _hinted(student: Student) -> ThroughputSettings:
    """The precision and streams that OpenVINO chooses for hint THROUGHPUT, read back."""
    compiled = ov.Core().compile_model(student.root / student.model, "CPU", {"PERFORMANCE_HINT": "THROUGHPUT"})
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    if precision not in PRECISIONS:
        raise ModelError(f"{student.model}: OpenVINO runs it at a precision that deploy.json does not know")
    streams = int(compiled.get_property("NUM_STREAMS"))
    return ThroughputSettings(precision, streams, int(compiled.get_property("INFERENCE_NUM_THREADS")))


def _write(
    student: Student, throughput: ThroughputSettings, folder: Path, host: Host, *, decode: DecodeMode = "reduced"
) -> Path:
    """A new deploy.json of that student alone, beside a copy of its IR."""
    stage = Stage(student.model, student.sha256, student.spec, student.temperature, None, student.int8_sha256)
    config = DeployConfig((stage,), LatencySettings(throughput.precision), throughput, decode=decode, cpu=host.cpu)
    root = folder / student.sha256[:12]
    target = root / Path(student.model).parent
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir()
        for path in (student.root / student.model).parent.glob("model*"):
            (target / path.name).write_bytes(path.read_bytes())
    path = root / f"deploy-{len(list(root.glob('*.json')))}.json"
    write_deploy(path, config)
    return path


def slow_stage(name: str, deploy: Path, students: Sequence[Student], folder: Path, host: Host) -> Contender | None:
    """The second stage of a cascade alone, served as the cascade is; None where there is one stage.

    Raises UsageError where that network is none of ``students``.
    """
    config = read_deploy(deploy)
    if len(config.stages) < 2:
        return None
    last, served = config.stages[-1], config.throughput
    student = next((student for student in students if student.sha256 == last.sha256), None)
    if student is None:
        raise UsageError(
            f"{deploy}: {last.model} is none of the run's students; copy its openvino/ folder into the run"
        )
    sized = dataclasses.replace(student, spec=last.input_spec, temperature=last.temperature)
    alone = dataclasses.replace(
        served, precision=stage_precisions(served, 2)[-1], later_precision=None, later_batch=None
    )
    path = _write(sized, alone, folder, host, decode=config.decode)
    return Contender(f"{name}: its slow stage alone", "slow-stage", path, sized)


def answers(deploy: Path, paths: Sequence[str], task: Task) -> tuple[Answers, npt.NDArray[np.int64]]:
    """(answers int64 [N, A], stages int64 [N]) of the whole runtime."""
    with Engine(Bundle.load(deploy), cache_dir=False) as engine:
        predictions = list(engine.map(paths))
    bad = next((one.error for one in predictions if one.error is not None), None)
    if bad is not None:
        raise ModelError(bad)
    return predicted_answers(task, predictions), np.array([one.stage for one in predictions])


def speeds(
    contenders: Sequence[Contender], images: Sequence[str], *, rounds: int, seconds: float, threads: int
) -> dict[str, list[float]]:
    """FPS of each round, the first of which warms up and is left out. Raises ModelError when a contender fails."""
    with ExitStack() as stack:
        workers: dict[str, Worker] = {}
        cases = []
        for one in contenders:
            # Ours share a process as in the tuner's heats; no two libraries share one, nor its thread pool.
            if one.candidate != OWN or OWN not in workers:
                module = "tuner.worker" if one.candidate == OWN else "candidates"
                command = [sys.executable, "-m", f"edgedistill.benchmarks.{module}"]
                workers[one.candidate] = stack.enter_context(Worker(command))
            worker = workers[one.candidate]
            try:
                cases.append(WorkerCase.prepare(worker, one.name, one.request(images, threads)))
            except CandidateError as error:
                raise ModelError(f"{one.name}: {error}") from error
        with console.progress("measuring", (rounds + 1) * len(cases)) as bar:
            slices = interleave(
                cases, rounds=rounds + 1, seconds=seconds, advance=lambda: bar.update(bar.task_ids[0], advance=1)
            )
    found = {}
    for one, parts in zip(contenders, slices, strict=True):
        if isinstance(parts, CandidateError):
            raise ModelError(f"{one.name}: {parts}")
        found[one.name] = [part.fps for part in parts[1:]]
    return found


@dataclass(frozen=True)
class Judged:
    """A contender with its metric on test, half of the metric's 95% interval there, share of images per stage, FPS and
    score."""

    contender: Contender
    precision: str
    metric: float
    margin: float
    shares: list[float]
    fps: Spread
    score: float

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.contender.name,
            "kind": self.contender.kind,
            "precision": self.precision,
            "stages": len(self.shares),
            "test_metric": round(self.metric, 5),
            "shares": [round(share, 4) for share in self.shares],
            "fps": self.fps.to_dict(),
            "score": round(self.score, 5),
        }


def judge(
    contenders: Sequence[Contender],
    rates: dict[str, list[float]],
    paths: Sequence[str],
    truth: Truth,
    *,
    metric: str,
    w: float,
    fps_target: float,
) -> list[Judged]:
    """Every contender on every test image with a known label. ONNX Runtime and the naive program get the answers of the FP32 IR that they
    run, which the export's certificate holds equal to it. ``metric``: 'accuracy' or 'macro-f1'."""
    seen: dict[str, tuple[float, float, list[float]]] = {}
    judged = []
    for one in contenders:
        config = read_deploy(one.deploy)
        precision = deployed_precision(config.throughput, len(config.stages))
        key = repr((config.stages, precision, config.decode))
        if key not in seen:
            found, stage = answers(one.deploy, paths, truth.task)
            shares = [float(np.mean(stage == number)) for number in range(len(config.stages))]
            seen[key] = (*measured(found, truth, metric), shares)
        value, margin, shares = seen[key]
        fps = Spread.of(rates[one.name])
        judged.append(Judged(one, precision, value, margin, shares, fps, score(value, fps.median, fps_target, w)))
    return judged


def measured(found: Answers, truth: Truth, metric: str) -> tuple[float, float]:
    """(metric, half of its 95% interval over images) of answers int [N, A]."""
    value, count = truth.metric(found, metric), len(truth)
    if metric == "accuracy":
        return value, Z * math.sqrt(value * (1 - value) / count)
    rng, of_rows = np.random.default_rng(0), truth.scorer(found, metric)
    return value, Z * float(np.std([of_rows(rng.integers(0, count, count)) for _ in range(RESAMPLES)]))


def figures(judged: Sequence[Judged], records: dict[str, dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The promises, each with what was found and whether it was kept."""
    tuned = [one for one in judged if one.contender.kind == "tuned"]
    best = max((one for one in judged if one.contender.kind == "fixed"), key=lambda one: one.score)
    # Who was asked for speed or accuracy alone promised no score.
    scored = [one for one in tuned if records[one.contender.name]["objective"]["goal"] == "score"]
    scores = [one.score for one in scored]
    found = [
        _figure(
            f"{one.contender.name}: score over the best fixed ({best.contender.name})", one.score - best.score, MARGIN
        )
        for one in scored
    ]
    if len(scored) > 1:
        found.append(_figure("spread of the tuned scores", max(scores) - min(scores), STABLE, most=True))
    for one in tuned:
        record = records[one.contender.name]
        val, images, metric = record["chosen"]["metric"], record["val"]["images"], record["objective"]["metric"]
        interval = one.margin * math.sqrt(1 + count / images)  # of the difference: val has an interval too
        lost = val - one.metric - interval
        found.append(
            _figure(f"{one.contender.name}: val minus test {metric}, beyond the interval", lost, LOSS, most=True)
            | {"val_metric": round(val, 5), "test_metric": round(one.metric, 5), "interval": round(interval, 5)}
        )
    for one in judged:
        slow = next((o for o in judged if o.contender.name == f"{one.contender.name}: its slow stage alone"), None)
        if slow is not None:
            name, gain, drop = one.contender.name, one.fps.median / slow.fps.median, slow.metric - one.metric
            found.append(_figure(f"{name}: FPS over its slow stage's", gain, CASCADE_SPEED))
            found.append(_figure(f"{name}: metric below its slow stage's", drop, CASCADE_DROP, most=True))
    return found


def _figure(name: str, value: float, target: float, *, most: bool = False) -> dict[str, Any]:
    kept = value <= target if most else value >= target
    return {"name": name, "value": round(value, 5), "target": f"{'<=' if most else '>='} {target:g}", "reached": kept}


def tunings(folders: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """tune.json by the contender's name. Raises UsageError where the folders weigh unlike things."""
    names = [folder.name for folder in folders]
    shown = [folder.name if names.count(folder.name) == 1 else str(folder) for folder in folders]
    found = {
        f"tuned ({name})": read_json(folder / "tune.json", format=TUNE_FORMAT)
        for name, folder in zip(shown, folders, strict=True)
    }
    if len(found) < len(folders):
        raise UsageError(f"--tuned names a folder twice: {', '.join(map(str, folders))}")
    weighed = {(one["objective"]["metric"], one["objective"]["w"]) for one in found.values()}
    if len(weighed) > 1:
        raise UsageError(f"--tuned: {', '.join(map(str, folders))} weigh unlike things; judge them one by one")
    return found


def main() -> int:
    parser = module_parser("tuned_score", __doc__)
    parser.add_argument("run", type=Path, help="run with dataset.csv and exported students")
    parser.add_argument("--students", type=Path, nargs="*", default=[], help="more openvino/ folders that were tuned")
    parser.add_argument("--tuned", type=Path, nargs="+", required=True, help="folders that 'edgedistill tune' wrote")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="per contender and round")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    machine, host = machine_record(), Host.here()
    dataset = read_dataset(options.run / "dataset.csv")
    students = find_students([options.run, *options.students])
    records = tunings(options.tuned)
    objective = next(iter(records.values()))["objective"]
    with tempfile.TemporaryDirectory(prefix="edgedistill-score-") as scratch:
        folder = Path(scratch)
        contenders = []
        for name, path in zip(records, options.tuned, strict=True):
            contenders.append(Contender(name, "tuned", path / "deploy.json", students[0]))
            slow = slow_stage(name, path / "deploy.json", students, folder, host)
            contenders += [slow] if slow is not None else []
        contenders += [one for student in students for one in fixed_settings(student, folder, host)]
        f32 = next(one.deploy for one in contenders if one.kind == "fixed")  # of the first student
        contenders.append(Contender(NAIVE, "naive", f32, students[0], "latency", BASE))
        judged_rows, truth = truth_of(dataset, "test", students[0].task)
        test = [str(path) for path in dataset.paths[judged_rows]]
        fed = [test[row] for row in np.random.default_rng(0).permutation(len(test))[:FED_IMAGES]]
        rates = speeds(contenders, fed, rounds=options.rounds, seconds=options.seconds, threads=host.cores)
        fps_target = objective["fps_target"] or NAIVE_TIMES * Spread.of(rates[NAIVE]).median
        weighed = {"metric": objective["metric"], "w": objective["w"], "fps_target": fps_target}
        judged = judge(contenders, rates, test, truth, **weighed)
    promised = figures(judged, records, len(test))
    record = {
        "machine": machine,
        "command": module_command("tuned_score"),
        "objective": objective,
        "fps_target": fps_target,
        "test_images": len(test),
        "rounds": options.rounds,
        "seconds": options.seconds,
        "results": [one.to_dict() for one in sorted(judged, key=lambda one: -one.score)],
        "chosen": {name: one["chosen"]["key"] for name, one in records.items()},
        "figures": promised,
    }
    write_json(options.out, record, format=FORMAT)
    rows = [
        (one["name"], f"{one['test_metric']:.4f}", f"{one['fps']['median']:.0f}", f"{one['score']:.4f}")
        for one in record["results"]
    ]
    console.out.print(console.table(objective["words"], ("", f"test {objective['metric']}", "FPS", "score"), rows))
    rows = [(one["name"], f"{one['value']:.4f}", one["target"], "yes" if one["reached"] else "NO") for one in promised]
    console.out.print(console.table("promises", ("", "", "target", "reached"), rows))
    return 0 if all(one["reached"] for one in promised) else 1


if __name__ == "__main__":
    exit_with(main)
