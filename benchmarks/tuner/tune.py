"""One tuning from folders to deploy.json: read, search, verify, explain, write."""

from __future__ import annotations

import dataclasses
import math
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from edgedistill import console
from edgedistill.artifacts import atomic_path, read_json, settings_dict, write_json, write_text
from edgedistill.benchmarks.machine import machine_record, package_versions
from edgedistill.benchmarks.tuner.chance import closest_rival, optimism
from edgedistill.benchmarks.tuner.estimates import Proposal
from edgedistill.benchmarks.tuner.explain import explanation, pixels, speed_record, steps_to
from edgedistill.benchmarks.tuner.journal import Journal
from edgedistill.benchmarks.tuner.measure import Bench, Case, RealBench, deploy_config
from edgedistill.benchmarks.tuner.picture import draw_pareto
from edgedistill.benchmarks.tuner.search import Outcome, Search
from edgedistill.benchmarks.tuner.settings import TuneSettings
from edgedistill.benchmarks.tuner.space import Deployment, Host, Serving, Student, Variant, default_serving
from edgedistill.benchmarks.tuner.students import BEFORE, bundle_folder, find_students
from edgedistill.benchmarks.tuner.valset import ValSet, open_val
from edgedistill.errors import ArtifactError, EdgedistillError, ModelError
from edgedistill.runtime.bundle import (
    DEPLOY_FORMAT,
    int8_path,
    model_sha256,
    read_deploy,
    stage_precisions,
    write_deploy,
)

TUNE_FORMAT = "edgedistill-tune"
# Another number of images per inference rounds differently, and an image may sit on the threshold.
ALLOWED_OTHER_ANSWERS = 0.01
CURVE_POINTS = 60


@dataclass(frozen=True)
class TuneResult:
    """``record``: what tune.json holds. ``folder``: where deploy.json and tune.json were written."""

    record: dict[str, Any]
    folder: Path
    picture: Path | None

    def table(self) -> Table:
        """The finalists, the chosen one marked."""
        chosen = self.record["chosen"]["key"]
        rows = [
            [
                ("* " if row["key"] == chosen else "  ") + row["key"],
                f"{row['metric']:.4f}",
                f"{row['fps']:.0f}",
                " / ".join(f"{row['latency_ms'][p]:.2f}" for p in ("p50", "p99")) if row.get("latency_ms") else "-",
                f"{row['value']:.4f}",
            ]
            for row in self.record["finalists"]
        ]
        objective = self.record["objective"]
        columns = ("deployment", objective["metric"], "FPS", "p50 / p99 ms", objective["goal"])
        return console.table(f"finalists on {self.record['machine']['cpu']}", columns, rows)


def tune(settings: TuneSettings) -> TuneResult:
    """Measures, chooses, and writes deploy.json (the old one is kept), tune.json and pareto.png into the folder.

    deploy.json changes last and whole; whatever goes wrong before, the old one stands. Raises UsageError, DataError,
    ArtifactError or ModelError for what cannot be tuned, TooShortError when the time did not suffice, ModelError when no
    deployment meets the conditions or when the chosen one does not answer as it was measured.
    """
    students = find_students(settings.targets)
    folder = settings.out or bundle_folder(settings.targets[0])
    val = open_val(students, settings.data).drawn(settings.images, seed=settings.seed)
    host = Host.here()
    for line in host_notes(host, students):
        console.note(line)
    journal = Journal(folder / "tune", _fingerprint(settings, students, val, host), resume=settings.resume)
    if journal.resumed:
        console.note(f"going on after {journal.elapsed_s:.0f} s of measurements in {journal.folder}")
    with (
        tempfile.TemporaryDirectory(prefix="edgedistill-tune-") as scratch,
        RealBench(
            students, val.unpacked(Path(scratch) / "val"), settings.objective, host, scratch=Path(scratch)
        ) as bench,
        _progress(settings.minutes, journal) as say,
    ):
        search = Search(
            students=students,
            host=host,
            truth=val.truth,
            objective=settings.objective,
            bench=bench,
            journal=journal,
            minutes=settings.minutes,
            seed=settings.seed,
            sizes=settings.sizes,
            incumbent=incumbent(_in_place(bundle_folder(settings.targets[0]), folder, journal), students, host),
            say=say,
        )
        outcome = search.run()
        say("verifying", search.best_so_far())
        record = finish(search, outcome, bench, journal)
    record |= {
        "machine": machine_record(),
        "command": settings.command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "settings": settings_dict(settings),
        "val": {"images": len(val), "source": val.source, "hash": val.hash},
        "seconds": round(journal.elapsed_s, 1),
        "resumed": journal.resumed,
        "notes": host_notes(host, students),
    }
    return _written(folder, record, search, outcome)


def host_notes(host: Host, students: Sequence[Student]) -> list[str]:
    """What this machine or these networks rule out."""
    found = []
    if not host.bf16:
        found.append("this CPU does not compute in bfloat16: BF16 is not tried")
    if not host.int8_dot_products and any(student.int8_sha256 for student in students):
        found.append(
            "this CPU has no 8-bit dot products (VNNI): INT8 is tried, but seldom faster, and its sums may saturate"
        )
    if host.cores == 1:
        found.append("one core: one stream is all there is; batch sizes are still tried")
    missing = [student.name for student in students if student.int8_sha256 is None]
    if missing:
        found.append(f"no INT8 form of {', '.join(missing)}: export-openvino --int8 on makes one where accuracy allows")
    return found


def _progress(minutes: float, journal: Journal) -> Any:
    return _Say(minutes, journal)


class _Say:
    """A bar over the time, with the phase and the best so far; a line for each phase where there is no terminal."""

    def __init__(self, minutes: float, journal: Journal) -> None:
        self._journal, self._total, self._phase = journal, round(minutes * 60), ""
        self._bar = console.progress("tuning (s)", self._total)

    def __enter__(self) -> _Say:
        self._shown = self._bar.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def __call__(self, phase: str, best: str) -> None:
        done = min(self._total, round(self._journal.elapsed_s))
        self._shown.update(self._shown.task_ids[0], completed=done, info=f"{phase}; {best}" if best else phase)
        name = phase.split(",")[0].split(" ")[0]
        if name != self._phase and not console.err.is_terminal:
            console.note(f"{done} s: {phase}" + (f"; {best}" if best else ""))
        self._phase = name


MEASURED_BY = ("edgedistill", "openvino", "opencv-python", "opencv-python-headless", "simplejpeg", "isal", "numpy")


def _fingerprint(settings: TuneSettings, students: Sequence[Student], val: ValSet, host: Host) -> dict[str, Any]:
    """What measurements, and the choice of what to measure next, depend on."""
    return {
        "students": {student.name: [student.sha256, student.int8_sha256] for student in students},
        "val": val.hash,
        "cpu": [host.cpu, host.cores],
        "versions": package_versions(MEASURED_BY),
        "objective": settings_dict(settings.objective),
        "sizes": list(settings.sizes),
        "seed": settings.seed,
    }


def _in_place(bundle: Path, folder: Path, journal: Journal) -> Path:
    """A copy of the deploy.json that was in ``folder``, else in the bundle, when the tuning began: a resumed one has to
    see the same."""
    current, kept = folder / "deploy.json", journal.folder / "incumbent.json"
    current = current if current.is_file() else bundle / "deploy.json"
    if not journal.resumed:
        kept.unlink(missing_ok=True)
        if current.is_file():
            with atomic_path(kept) as temporary:
                shutil.copyfile(current, temporary)
    return kept


def incumbent(deploy: Path, students: Sequence[Student], host: Host) -> Deployment | None:
    """What that deploy.json deploys, if these students can express it: it takes part and has to be beaten.

    Of a cascade only its threshold counts, with the temperature fitted now.
    """
    try:
        config = read_deploy(deploy)
    except EdgedistillError:
        return None
    by_hash, usual = {student.sha256: student for student in students}, default_serving(host)
    if len(config.stages) > 2 or any(stage.sha256 not in by_hash for stage in config.stages):
        return None
    found = []
    for stage, precision in zip(config.stages, stage_precisions(config.throughput, len(config.stages)), strict=True):
        student = by_hash[stage.sha256]
        if (precision == "bf16" and not host.bf16) or (precision == "int8" and student.int8_sha256 is None):
            return None
        found.append(Variant(student.name, precision, (stage.input_spec.height, stage.input_spec.width)))
    stages = tuple(found)
    tuned = config.throughput
    streams = min(tuned.streams or host.cores, host.cores)
    threads = max(streams, min(tuned.threads or 0, host.cores))
    serving = Serving(streams, threads, tuned.batch, bool(tuned.pinning))
    if (config.cpu and config.cpu != host.cpu) or (config.cores and config.cores != host.cores):
        serving = usual
    return Deployment(stages, serving, config.decode, config.stages[0].exit_threshold if len(stages) == 2 else None)


def finish(search: Search, outcome: Outcome, bench: Bench, journal: Journal) -> dict[str, Any]:
    """The last measurements of the chosen one, and the record. Raises ModelError when it does not answer as measured."""
    chosen = outcome.chosen
    case = dataclasses.replace(search.case(chosen, "latency"), threads=_latency_threads(search, chosen))
    verified = _verified(search, case, bench)
    scopes = _scopes(search, chosen)
    rival = closest_rival(search, chosen)
    too_good = optimism(search, _distinct(search.measured()), seed=search.seed)
    objective = search.objective
    return {
        "objective": settings_dict(objective) | {"goal": objective.goal, "words": objective.describe()},
        "chosen": _row(search, chosen)
        | {
            "latency_threads": case.threads,
            "temperatures": [round(value, 6) for value in case.temperatures],
            "optimism": round(too_good, 5),
        },
        "reached": search.value(chosen) >= 0,
        "verified": verified,
        "explanation": explanation(search, outcome, optimism=too_good, rival=rival),
        "rival": rival.to_dict() if rival else None,
        "steps": [dataclasses.asdict(step) for step in steps_to(search, chosen)],
        "finalists": [_row(search, deployment) for deployment in outcome.finalists],
        "tied": list(outcome.tied),
        "measured": [_row(search, deployment) for deployment in search.measured()],
        "pareto": pareto(search),
        "variants": _variants(search),
        "left_out": search.left_out,
        "reference": search.reference.key,
        "cascade": _cascade(search, chosen),
        "scopes": scopes,
        "heads": _heads(search, chosen),
    }


def _heads(search: Search, chosen: Deployment) -> dict[str, Any] | None:
    """Each head's figures on val; None where every image has one label."""
    if search.truth.task.is_single:
        return None
    pair = {"chosen": chosen, "reference": search.reference}
    figures = {role: search.head_figures(deployment) for role, deployment in pair.items()}
    return {
        name: {role: {key: round(value, 6) for key, value in found[name].items()} for role, found in figures.items()}
        for name in figures["chosen"]
    }


def _row(search: Search, deployment: Deployment) -> dict[str, Any]:
    _, stage = search.expected_answers(deployment)
    return {
        "key": deployment.key,
        "stages": len(deployment.stages),
        "networks": [f"{one.student} {pixels(one.size)} px" for one in deployment.stages],
        "precision": deployment.precision,
        "decode": deployment.decode,
        "exit_threshold": deployment.exit_threshold,
        "serving": dataclasses.asdict(deployment.serving),
        "metric": round(search.metric(deployment), 6),
        "value": round(search.value(deployment), 6),
        "shares": [round(float(np.mean(stage == number)), 4) for number in range(len(deployment.stages))],
    } | speed_record(search, deployment)


def _variants(search: Search) -> list[dict[str, Any]]:
    return [
        {
            "variant": variant.key,
            "student": variant.student,
            "precision": variant.precision,
            "size": list(variant.size),
            "decode": decode,
            "metric": round(one.metric, 6),
            "temperature": round(one.temperature, 5),
        }
        for (variant, decode), one in search.outputs.items()
    ]


def _distinct(deployments: Sequence[Deployment]) -> list[Deployment]:
    """One of each network: ways of serving do not change answers."""
    return list({deployment.network_key: deployment for deployment in reversed(deployments)}.values())


def pareto(search: Search) -> list[str]:
    """Keys of the measured deployments that no other beats in both FPS and metric, the fastest first."""
    ranked = [(one.fps, search.metric(d), d.key) for d in search.measured() if (one := search.speed(d)) is not None]
    front: list[str] = []
    best = -1.0
    for _, metric, key in sorted(ranked, key=lambda row: (-row[0], -row[1], row[2])):
        if metric > best:
            front.append(key)
            best = metric
    return front


def _verified(search: Search, case: Case, bench: Bench) -> dict[str, Any]:
    """The deployable as it will be written, over all val images, against what the stored logits promise."""
    answers, stages = bench.answers(case)
    expected, expected_stages = search.expected_answers(case.deployment)
    other = float(np.mean((answers != expected).any(axis=1)))
    shares = [round(float(np.mean(stages == number)), 4) for number in range(len(case.deployment.stages))]
    if other > ALLOWED_OTHER_ANSWERS:
        raise ModelError(
            f"{case.deployment.key}: as deployed it gives {other:.1%} other answers than it was chosen for (limit "
            f"{ALLOWED_OTHER_ANSWERS:.0%}); deploy.json is as it was. Run again without --resume"
        )
    return {
        "other_answers": round(other, 5),
        "accuracy": round(search.truth.metric(answers, "accuracy"), 6),
        "shares": shares,
        "expected_shares": [
            round(float(np.mean(expected_stages == number)), 4) for number in range(len(case.deployment.stages))
        ],
    }


def _latency_threads(search: Search, chosen: Deployment) -> int | None:
    """Threads for one image at a time: None (the runtime's choice), one, or all, by the median latency, among those that
    keep the p99 that was asked for (None has kept it: it is what the search measured)."""
    if search.host.cores == 1:
        return None
    options: list[int | None] = [None, 1, search.host.cores]
    cases = [search.case(search.reference, "throughput")]
    cases += [search.case(chosen, "latency", threads=threads) for threads in options]
    looks = search.closing_heat(cases, name=f"latency of {chosen.key}", seconds=0.3)
    limit_ms = search.objective.max_p99_ms or math.inf
    found = []
    for threads, case in zip(options, cases[1:], strict=True):
        if case.label in looks and looks[case.label].percentiles:
            p50, _, p99 = looks[case.label].percentiles
            if threads is None or p99 <= limit_ms:
                found.append((p50, threads))
    if not found:
        return None
    best = min(found, key=lambda pair: pair[0])
    unasked = next((value for value, threads in found if threads is None), None)
    return None if unasked is not None and unasked <= 1.03 * best[0] else best[1]


def _scopes(search: Search, chosen: Deployment) -> dict[str, Any]:
    """Scope -> {'fps', 'ms': per image of all cores' time, and what was read back}: the chosen one in every scope, in the
    same rounds, which says where the time goes. Only the objective's when the time is up."""
    scopes = [scope for scope in ("model", "frames", "files") if scope != search.objective.scope]
    if len(chosen.stages) > 1 and "model" in scopes:
        scopes.remove("model")
    cases = [search.case(search.reference, "throughput"), search.case(chosen, "throughput")]
    cases += [search.case(chosen, "throughput", scope=scope) for scope in scopes]
    unique = list({case.label: case for case in cases}.values())
    looks = search.closing_heat(unique, name=f"scopes of {chosen.key}", seconds=0.4)
    found: dict[str, Any] = {}
    for scope in ("model", "frames", "files"):
        label = search.case(chosen, "throughput", scope=scope).label
        known = [looks[label]] if label in looks else search.looks.get(label)
        if known:
            fps = known[-1].fps
            found[scope] = {"fps": round(fps, 2), "ms": round(1e3 / fps, 4), "settings": search.ran_with.get(label)}
    return found


def _cascade(search: Search, chosen: Deployment) -> dict[str, Any] | None:
    """The exit curve of the chosen cascade, else of the best one there was, with the times of its stages."""
    proposals = search.proposals()
    pairs = [p.deployment for p in proposals if len(p.deployment.stages) == 2]
    shown = chosen if len(chosen.stages) == 2 else next(iter(pairs), None)
    if shown is None:
        return None
    fast, slow = search.alone(shown)
    if fast.fps <= 0 or slow.fps <= 0:
        return None
    curve, costs = search.curve(fast, slow, shown.decode, points=CURVE_POINTS)
    first_ms, slow_ms = 1e3 / fast.fps, 1e3 / slow.fps
    speed = search.speed(shown)
    passed_on = float(np.mean(search.expected_answers(shown)[1]))
    second_ms = float((1e3 * costs[0] - first_ms) / curve.passed_on[0]) if len(curve) else slow_ms
    return {
        "chosen": shown == chosen,
        "key": shown.key,
        "fast": _brief(search, shown.stages[0], fast),
        "slow": _brief(search, shown.stages[1], slow),
        "exit_threshold": shown.exit_threshold,
        "passed_on": round(passed_on, 4),
        "stage_ms": [round(first_ms, 4), round(second_ms, 4)],
        "expected_ms": round(first_ms + passed_on * second_ms, 4),
        "expected_fps": round(1e3 / (first_ms + passed_on * second_ms), 2),
        "measured_fps": round(speed.fps, 2) if speed else None,
        "metric": round(search.metric(shown), 6),
        "pays_below": round(max(0.0, 1 - first_ms / slow_ms), 4),
        "curve": [
            {
                "threshold": round(float(curve.threshold[row]), 6),
                "passed_on": round(float(curve.passed_on[row]), 4),
                "metric": round(float(curve.metric[row]), 6),
                "fps": round(float(1 / costs[row]), 2),
            }
            for row in range(len(curve))
        ],
    }


def _brief(search: Search, variant: Variant, single: Proposal) -> dict[str, Any]:
    return {"variant": variant.key, "metric": round(single.metric, 6), "fps": round(single.fps, 2)}


# ---- writing ----


def _written(folder: Path, record: dict[str, Any], search: Search, outcome: Outcome) -> TuneResult:
    students = {student.name: student for student in search.students}
    chosen = outcome.chosen
    if not record["reached"]:
        write_json(folder / "tune.json", record, format=TUNE_FORMAT)
        raise ModelError(
            f"nothing reaches it: {search.objective.describe()}. The nearest is {chosen.key} with "
            f"{search.objective.metric} {record['chosen']['metric']:.4f} at {record['chosen'].get('fps', 0):.0f} FPS; "
            f"deploy.json is as it was, {folder / 'tune.json'} holds the measurements"
        )
    case = dataclasses.replace(search.case(chosen, "throughput"), threads=record["chosen"]["latency_threads"])
    config = deploy_config(case, students, search.objective, search.host)
    stages = []
    for variant, stage in zip(chosen.stages, config.stages, strict=True):
        stages.append(dataclasses.replace(stage, model=_in_folder(students[variant.student], folder)))
    config = dataclasses.replace(
        config, stages=tuple(stages), reject_below=_reject_below(search.journal.folder / "incumbent.json")
    )
    _keep_old(folder)
    if not (folder / "labels.txt").is_file():
        labels = "".join(f"{' '.join(name.split())}\n" for name in search.students[0].labels)
        write_text(folder / "labels.txt", labels)
    record |= {"deploy": settings_dict(config)}
    write_json(folder / "tune.json", record, format=TUNE_FORMAT)
    picture = folder / "pareto.png"
    drawn = draw_pareto(record, picture)
    if not drawn:
        console.note("no Pareto picture: matplotlib is not installed; 'edgedistill report' draws one from tune.json")
    write_deploy(folder / "deploy.json", config)
    return TuneResult(record, folder, picture if drawn else None)


def _in_folder(student: Student, folder: Path) -> str:
    """The student's path inside ``folder``; copied there, whole, if it comes from elsewhere."""
    if student.root.resolve() == folder.resolve():
        return student.model
    name = student.name
    if (folder / "stages" / name / "model.xml").is_file() and not _is_copy(student, folder / "stages" / name):
        name = f"{name}-{student.sha256[:8]}"
    target, source = folder / "stages" / name, student.root / student.model
    for path in (source, *([int8_path(source)] if student.int8_sha256 else [])):
        inside = target / ("model.xml" if path == source else "model-int8.xml")
        for one, other in ((path.with_suffix(".bin"), inside.with_suffix(".bin")), (path, inside)):
            with atomic_path(other) as temporary:
                shutil.copyfile(one, temporary)
        expected = student.sha256 if path == source else student.int8_sha256
        if model_sha256(inside) != expected:
            raise ArtifactError(f"{inside}: changed while it was copied; run the command again with --resume")
    return f"stages/{name}/model.xml"


def _is_copy(student: Student, folder: Path) -> bool:
    return (folder / "model.bin").is_file() and model_sha256(folder / "model.xml") == student.sha256


def _reject_below(deploy: Path) -> float | None:
    """Whoever set it meant it: the tuner does not touch it."""
    try:
        return read_deploy(deploy).reject_below
    except ArtifactError:
        return None


def _keep_old(folder: Path) -> None:
    """deploy.json as deploy.before-tune.json, unless it is a tuner's own work and an older one is kept already."""
    current, kept = folder / "deploy.json", folder / BEFORE
    if not current.is_file():
        return
    if kept.is_file() and (folder / "tune.json").is_file():
        try:
            last = read_json(folder / "tune.json", format=TUNE_FORMAT).get("deploy")
            now = read_json(current, format=DEPLOY_FORMAT)
        except ArtifactError:
            last = now = None
        if last and now and {key: now.get(key) for key in last} == last:
            return
    with atomic_path(kept) as temporary:
        shutil.copyfile(current, temporary)
