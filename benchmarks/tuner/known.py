"""What was measured so far, and what it is worth: accuracy from logits over val, speed from heats, both by the objective.

Accuracy is exact after one pass and belongs to (student, precision, resolution, decoding) alone; temperatures, thresholds
and the answers of cascades follow from the stored logits. FPS = the ratio to the reference deployment x the reference's
median over the tuning. Every measurement goes into the journal as it is taken, and what is there is not measured again.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.benchmarks.score import Objective
from edgedistill.benchmarks.timing import CandidateError, Slice, interleave
from edgedistill.benchmarks.tuner.cascade import cascade_answers
from edgedistill.benchmarks.tuner.heats import Look, Speed, heat_error_of, latencies, percentiles, polish, speed_of
from edgedistill.benchmarks.tuner.journal import Journal
from edgedistill.benchmarks.tuner.measure import Bench, Case, Mode, still_held
from edgedistill.benchmarks.tuner.space import (
    PRECISIONS,
    Deployment,
    Host,
    Student,
    Variant,
    default_serving,
    variants_of,
)
from edgedistill.benchmarks.tuner.truth import Answers, Ints, Truth, answers_of
from edgedistill.errors import ModelError
from edgedistill.images import DecodeMode
from edgedistill.tasks import Task


@dataclass(frozen=True, eq=False)
class Outputs:
    """One variant on val. ``logits``: float32 [N, D]; ``temperature``: fitted on them; ``answers``: int64 [N, A] at that
    temperature; ``metric``: accuracy or macro-F1."""

    logits: npt.NDArray[np.float32]
    temperature: float
    answers: Answers
    metric: float


@dataclass(eq=False)
class Known:
    """Of one tuning. ``truth``: of the val images; ``incumbent``: the deployment that is in place; ``say``: told (phase, best so far);
    ``left_out``: why, by the key of a network or the label of a case; ``ran_with``: settings read back, by label."""

    students: Sequence[Student]
    host: Host
    truth: Truth
    objective: Objective
    bench: Bench
    journal: Journal
    minutes: float = 10.0
    seed: int = 0
    sizes: Sequence[int] = ()
    incumbent: Deployment | None = None
    say: Callable[[str, str], None] = lambda phase, best: None
    outputs: dict[tuple[Variant, DecodeMode], Outputs] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    ran_with: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.students[0]
        self.reference = Deployment((Variant(first.name, "f32", first.size),), default_serving(self.host))
        self.variants = list(
            dict.fromkeys(itertools.chain(*(variants_of(student, self.host, self.sizes) for student in self.students)))
        )
        self.variants += [
            stage for stage in (self.incumbent.stages if self.incumbent else ()) if stage not in self.variants
        ]
        self.variants.sort(
            key=lambda variant: variant != self.reference.stages[0]
        )  # the reference first, else as it was
        self.looks: dict[str, list[Look]] = {}
        self.levels: list[float] = []
        self.deployments: dict[str, Deployment] = {}
        self._heat_error: float | None = None
        self._start_s, self._prepare_s = self.bench.start_s, self.bench.prepare_s
        self._modes: tuple[Mode, ...] = ("throughput",)
        if self.objective.max_p99_ms is not None:
            self._modes = ("throughput", "latency")

    def metric(self, deployment: Deployment) -> float:
        """Accuracy or macro-F1 on val, from the stored logits."""
        if len(deployment.stages) == 1:
            return self.outputs[deployment.stages[0], deployment.decode].metric
        answers, _ = self.expected_answers(deployment)
        return self.truth.metric(answers, self.objective.metric)

    def scorer(self, deployment: Deployment) -> Callable[[Ints], float]:
        """Its metric as a function of the val images that count, rows which may repeat."""
        return self.truth.scorer(self.expected_answers(deployment)[0], self.objective.metric)

    def expected_answers(self, deployment: Deployment) -> tuple[Answers, npt.NDArray[np.int64]]:
        """(answers int64 [N, A], stage int64 [N]) on val."""
        found = [self.outputs[stage, deployment.decode] for stage in deployment.stages]
        if len(found) == 1:
            return found[0].answers, np.zeros(len(self.truth), np.int64)
        fast, slow = found
        return cascade_answers(
            fast.logits,
            slow.logits,
            self.tasks(deployment),
            temperatures=(fast.temperature, slow.temperature),
            threshold=deployment.exit_threshold or 0.0,
        )

    def head_figures(self, deployment: Deployment) -> dict[str, dict[str, float]]:
        """Each head's own figures on val by name; of a cascade those of whichever stage answers."""
        found = [self.outputs[stage, deployment.decode] for stage in deployment.stages]
        shares = [self.truth.task.probabilities(one.logits, one.temperature) for one in found]
        answers, stage = self.expected_answers(deployment)
        return self.truth.head_figures(np.where(stage[:, None] == 0, shares[0], shares[-1]), answers)

    def task_of(self, variant: Variant) -> Task:
        """Its student's own: labels may have other thresholds than another student's."""
        return next(student.task for student in self.students if student.name == variant.student)

    def tasks(self, deployment: Deployment) -> list[Task]:
        return [self.task_of(stage) for stage in deployment.stages]

    def temperatures(self, deployment: Deployment) -> tuple[float, ...]:
        return tuple(self.outputs[stage, deployment.decode].temperature for stage in deployment.stages)

    def speed(self, deployment: Deployment, mode: Mode = "throughput") -> Speed | None:
        """From the longest looks that were taken at it; None before the first."""
        looks = self.looks.get(label_of(deployment, mode, self.objective.scope))
        if not looks or not self.levels:
            return None
        return speed_of(looks, level_fps=statistics.median(self.levels), heat_error=self.heat_error)

    @property
    def heat_error(self) -> float:
        """Of all looks so far (see heats.heat_error_of)."""
        if self._heat_error is None:
            self._heat_error = heat_error_of(self.looks)
        return self._heat_error

    def value(self, deployment: Deployment) -> float:
        """The objective of a measured deployment; conditions are judged on the careful side of the noise."""
        judged = self.judged_speed(deployment)
        if judged is None:
            return -math.inf
        fps, p99_ms = judged
        return self.objective.value(self.metric(deployment), fps, p99_ms=p99_ms, reference=self.reference_metric)

    def judged_speed(self, deployment: Deployment) -> tuple[float, float] | None:
        """(FPS, p99 in ms) that the objective judges; None before the first look."""
        speed, latency = self.speed(deployment), self.speed(deployment, "latency")
        if speed is None:
            return None
        fps = speed.fps - speed.error if self.objective.goal == "accuracy" else speed.fps
        return fps, latency.p99_ms if latency and latency.p99_ms is not None else math.inf

    def worth(self, deployment: Deployment) -> float:
        """What deployments are ranked by. A score: its mean over the tuning's rounds, since FPS beyond the target make up
        for no round below it; on a machine that keeps its speed it is ``value``. Else ``value``.

        A cascade does all that its fast stage does: measured faster, it counts as fast.
        """
        speed = self.speed(deployment)
        if speed is None or self.objective.goal != "score":
            return self.value(deployment)
        fast = self.speed(Deployment(deployment.stages[:1], deployment.serving, deployment.decode))
        fps = speed.fps if fast is None or fast.level != speed.level else min(speed.fps, fast.fps)
        rates = fps * np.array(self.levels) / statistics.median(self.levels)
        fps = float(np.minimum(rates, self.objective.fps_target or math.inf).mean())
        return self.objective.value(self.metric(deployment), fps)

    @property
    def reference_metric(self) -> float:
        """What an accuracy drop is taken from: the best FP32 network at the resolution that it was trained at."""
        own = [Variant(student.name, "f32", student.size) for student in self.students]
        found = [self.outputs[variant, "reduced"].metric for variant in own if (variant, "reduced") in self.outputs]
        return max(found)

    def measured(self) -> list[Deployment]:
        """Everything with a speed, the best first."""
        found = [deployment for deployment in self.deployments.values() if self.speed(deployment) is not None]
        return self._ranked(found)

    def _ranked(self, deployments: Sequence[Deployment]) -> list[Deployment]:
        return sorted(deployments, key=lambda d: (-self.worth(d), self.preference(d)))

    def preference(self, deployment: Deployment) -> tuple[Any, ...]:
        """Among equals: fewer stages, then the more accurate, plainer precision, the usual serving; never by chance."""
        students = {student.name: student for student in self.students}
        strange = sum(abs(stage.size[0] / students[stage.student].size[0] - 1) for stage in deployment.stages)
        return (
            len(deployment.stages),
            -round(self.metric(deployment), 6),
            sum(PRECISIONS.index(stage.precision) for stage in deployment.stages),
            deployment.decode != "reduced",
            round(strange, 6),
            deployment.serving != default_serving(self.host),
            deployment.key,
        )

    def _level(self, deployment: Deployment) -> int:
        looks = self.looks.get(label_of(deployment, "throughput", self.objective.scope), ())
        return max((look.level for look in looks), default=-1)

    @property
    def _logits_shape(self) -> tuple[int, int]:
        return len(self.truth), self.truth.task.width

    @property
    def _limit_s(self) -> float:
        return self.minutes * 60

    @property
    def time_is_up(self) -> bool:
        return self.journal.elapsed_s >= self._limit_s

    # ---- measuring ----

    def judge(
        self, variant: Variant, decode: DecodeMode, known: npt.NDArray[np.float32] | None = None
    ) -> Outputs | None:
        if (variant, decode) in self.outputs:
            return self.outputs[variant, decode]
        key = f"{variant.key}, {decode}"
        known = self.journal.kept_logits(key, self._logits_shape) if known is None else known
        if known is None:
            try:
                known = self.bench.logits(variant, decode)
            except ModelError as error:
                if "the tuner needs every val image" in str(error):
                    raise
                self.left_out[variant.key] = str(error)
                self.journal.add("failed", key=key, reason=str(error))
                return None
            self.journal.keep_logits(key, known)
        temperature = self.truth.fit_temperature(known)
        answers = answers_of(self.task_of(variant), known, temperature)
        found = Outputs(known, temperature, answers, self.truth.metric(answers, self.objective.metric))
        self.outputs[variant, decode] = found
        return found

    def case(self, deployment: Deployment, mode: Mode, *, scope: str | None = None, threads: int | None = None) -> Case:
        return Case(
            deployment,
            self.temperatures(deployment),
            self._fed_rows(deployment),
            scope or self.objective.scope,
            mode,
            threads,
        )

    def _fed_rows(self, deployment: Deployment) -> tuple[int, ...]:
        """Val images in a fixed order of which every stretch passes on the same share as the whole."""
        _, stage = self.expected_answers(deployment)
        order = np.random.default_rng(self.seed).permutation(len(stage))
        places = np.empty(len(stage))
        for kind in (0, 1):
            rows = order[stage[order] == kind]
            places[rows] = (np.arange(len(rows)) + 0.5) / max(1, len(rows))
        return tuple(np.argsort(places, kind="stable").tolist())

    def heat(self, cases: Sequence[Case], *, name: str, level: int, rounds: int, seconds: float) -> None:
        """``cases``, the reference's in front, interleaved; every round goes into the journal as it ends."""
        rows: list[dict[str, Any]] = []
        while len(rows) < rounds and (row := self.journal.find("round", heat=name, round=len(rows))) is not None:
            rows.append(row)
        if len(rows) < rounds:
            rows += self._measured_rounds(cases, name, rounds=rounds, seconds=seconds, first=len(rows))
        for label, look in self._settle(rows, cases, level, name).items():
            self.looks.setdefault(label, []).append(look)
        self._heat_error = None
        self.levels += [row["results"][self._base][0] for row in rows]

    def closing_heat(self, cases: Sequence[Case], *, name: str, seconds: float, rounds: int = 3) -> dict[str, Look]:
        """Looks by label that come after the choice and change nothing about it; none when the time is up."""
        rows = [self.journal.find("round", heat=name, round=number) for number in range(rounds)]
        known = [row for row in rows if row is not None]
        if len(known) < rounds:
            if self.time_is_up:
                return {}
            known += self._measured_rounds(cases, name, rounds=rounds, seconds=seconds, first=len(known))
        return self._settle(known, cases, -1, name)

    def _measured_rounds(
        self, cases: Sequence[Case], name: str, *, rounds: int, seconds: float, first: int
    ) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        labels = {case.label for case in cases}
        held = still_held(self.bench.held, labels)
        began = self.bench.clock()
        with self.bench.prepared(cases) as runners:
            took_s = max(0.0, self.bench.clock() - began - (not held) * self._start_s)
            if labels - held:
                self._prepare_s = (took_s / len(labels - held) + self._prepare_s) / 2
            ready = list(zip(cases, runners, strict=True))
            broken = {case.label: str(one) for case, one in ready if isinstance(one, CandidateError)}
            running = [(case, one) for case, one in ready if not isinstance(one, CandidateError)]
            settings = {case.label: dict(one.settings) for case, one in running}

            def after_round(number: int, results: list[Slice | CandidateError]) -> None:
                found, errors = {}, dict(broken)
                for (case, _), result in zip(running, results, strict=True):
                    if isinstance(result, CandidateError):
                        errors[case.label] = str(result)
                    else:
                        found[case.label] = [round(result.fps, 4), *latencies(result)]
                values = {"results": found, "errors": errors, "settings": settings if number == first else {}}
                rows.append(self.journal.add("round", heat=name, round=number, **values))

            interleave(
                [one for _, one in running],
                rounds=rounds,
                seconds=seconds,
                first=first,
                after_round=after_round,
                clock=self.bench.clock,
            )
        return rows

    @property
    def _base(self) -> str:
        """The label of what everything is compared with."""
        return label_of(self.reference, "throughput", self.objective.scope)

    def _settle(self, rows: Sequence[dict[str, Any]], cases: Sequence[Case], level: int, heat: str) -> dict[str, Look]:
        """The rounds of one heat as looks by label. Raises ModelError when the reference could not be measured."""
        by_label = {case.label: case for case in cases}
        errors = {label: reason for row in rows for label, reason in row["errors"].items()}
        base = self._base
        if base in errors:
            raise ModelError(f"{self.reference.key}: cannot be measured ({errors[base]}), so nothing can be compared")
        for row in rows:
            self.ran_with.update(row.get("settings") or {})
        self.left_out |= errors
        labels = [label for label in by_label if all(label in row["results"] for row in rows)]
        rates = np.log([[row["results"][label][0] for row in rows] for label in labels])
        places, errors_of = polish(rates)
        looks = {}
        for number, label in enumerate(labels):
            looks[label] = Look(
                level,
                heat,
                float(np.exp(np.median(rates[number]))),
                float(places[number] - places[labels.index(base)]),
                float(errors_of[number]),
                len(rows),
                percentiles([row["results"][label][1:] for row in rows]),
            )
            self.deployments[by_label[label].deployment.key] = by_label[label].deployment
        return looks


def label_of(deployment: Deployment, mode: Mode, scope: str) -> str:
    return Case(deployment, (), (), scope, mode).label
