"""What to measure next: every network's accuracy once, then speed in rounds that get longer as the field gets smaller.

Successive halving, and no model of the space: accuracy is exact after one pass over val and belongs to (student, precision,
resolution, decoding) alone, so that what is left is to rank speeds under noise, which is a race. A race wants the many
short looks of the first rung and the long, interleaved ones of the last, and nothing that a base install does not have.

    judge     logits of every variant over val, by the runtime (once; thresholds and temperatures are evaluated on them)
    screen    speed of every variant at the resolution that it was trained at, served as the runtime does unasked
    sizes     of the others that no smaller one beats, the most promising first
    batches   the best variant of every student once more, several images per inference: some double, some gain nothing
    race      the best single networks and the best cascades (estimated from logits and stage times), measured
    serve     the best three in every way of using the cores
    alike     every student's best, and the neighbours in size of what leads, in the way that served best
    again     networks for which the gains seen there promise more than the best so far
    stages    each network of the best cascades alone, served as they are: their thresholds follow from these times
    play off  the best few, interleaved until they differ by more than noise or the time is up

Every heat also measures the same reference deployment, and speeds count as ratios to it, freed of what a round's cases have
in common: a machine that is slow for a minute is slow for all. FPS = that ratio x the reference's median over the tuning.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.benchmarks.score import Objective
from edgedistill.benchmarks.timing import CandidateError, Slice, interleave, percentiles_ms
from edgedistill.benchmarks.tuner.cascade import (
    SEARCHED_POINTS,
    Curve,
    cascade_answers,
    exit_curve,
    metric_of,
)
from edgedistill.benchmarks.tuner.journal import Journal
from edgedistill.benchmarks.tuner.measure import HELD, Bench, Case, Mode, still_held
from edgedistill.benchmarks.tuner.space import (
    PRECISIONS,
    Deployment,
    Host,
    Serving,
    Student,
    Variant,
    default_serving,
    servings,
    variants_of,
)
from edgedistill.errors import EdgedistillError, ModelError
from edgedistill.images import DecodeMode
from edgedistill.metrics import fit_temperature

# Up to which share of the time each phase may last.
JUDGE_UNTIL, SCREEN_UNTIL, BATCHES_UNTIL, RACE_UNTIL = 0.3, 0.42, 0.45, 0.54
SERVE_UNTIL, ALIKE_UNTIL, AGAIN_UNTIL, STAGES_UNTIL, FINAL_UNTIL = 0.65, 0.69, 0.72, 0.75, 0.93
HEAT = 8  # cases in memory at once, beside the reference
SHORTEST_S = 0.1
SECOND_LOOK = 1 / 6  # of what is left, for each that comes before the play-off where the time is short
# Filling and emptying the streams counts in every slice: shorter ones cost large batches some percent of their FPS.
PLAYED_S = 0.25
RACED_SINGLES, RACED_CASCADES, SERVED = 5, 7, 3
# The one larger batch at which every student is tried before any is dropped, and from which gain on it counts: less, or
# less than so many standard errors, may be noise.
EARLY_BATCH, LEAST_GAIN, SURE_GAIN = 4, 1.05, 1.5
# With the best single network, the incumbent and the rivals about one heat.
FINALISTS, RIVALS = 5, 2
# What a case's FPS are apart by from one heat to the next, until so many degrees of freedom have shown it on this machine.
HEAT_ERROR, GUESSED_HEATS = 0.02, 4
PLAYED_ROUNDS, PLAYED_TIMES = 9, 16
# Scores nearer than this, or than the noise of their difference, are equal: two tunings may differ by 0.01.
TIE_SCORE = 0.004
TIED_BY, LOST_BY = 1.5, 3.0  # standard errors; a field that is looked at again and again must be left late
QUIET_SHARE = 0.5  # less noise than this share of a tie is not worth more rounds
TIE_FPS_SHARE = 0.02
FASTER_SHARE = 0.05
# Thresholds that pass on nearly the same share are one.
SAME_SHARE = 0.01
SLOW_PER_PRECISION, FAST_PER_PRECISION = 8, 10
# The longest latencies of a slice that the journal keeps: enough for p99 over the ten rounds of a heat or fewer.
KEPT_LATEST, KEPT_LATEST_SHARE = 20, 0.1
RESAMPLES = 200


class TooShortError(EdgedistillError):
    """The time does not suffice for one comparison."""


@dataclass(frozen=True, eq=False)
class Outputs:
    """One variant on val. ``logits``: float32 [N, C]; ``temperature``: fitted on them; ``metric``: accuracy or macro-F1."""

    logits: npt.NDArray[np.float32]
    temperature: float
    metric: float


@dataclass(frozen=True)
class Speed:
    """``fps``: images a second; ``error``: its standard error; ``level``: of the looks it is from; ``p50_ms``, ``p99_ms``:
    of the latency mode."""

    fps: float
    error: float
    rounds: int
    level: int
    p50_ms: float | None = None
    p90_ms: float | None = None
    p99_ms: float | None = None


@dataclass(frozen=True)
class Proposal:
    """A deployment with what is known or estimated of it."""

    deployment: Deployment
    metric: float
    fps: float
    value: float
    p99_ms: float = math.inf


@dataclass(frozen=True)
class Look:
    """One case in one heat. ``log_ratio``: of its FPS to the reference's, ``error`` its standard error; ``fps``: the median
    as it was read; ``percentiles``: of the latency mode, in ms: p50 and p90, medians over rounds, and p99 over the images of
    all rounds (a slice of fewer than 100 images has no p99 of its own)."""

    level: int
    heat: str
    fps: float
    log_ratio: float
    error: float
    rounds: int
    percentiles: tuple[float, ...] = ()


@dataclass(frozen=True)
class Outcome:
    """``chosen`` among ``finalists`` (best first); ``tied``: keys that noise does not tell from the best."""

    chosen: Deployment
    finalists: tuple[Deployment, ...]
    tied: tuple[str, ...]
    best: Deployment


@dataclass(eq=False)
class Search:
    """One tuning. ``labels``: int [N]; ``incumbent``: the deployment that is in place; ``say``: told (phase, best so far).

    ``run`` measures and decides; afterwards ``metric``, ``speed`` and ``value`` answer for every deployment measured.
    """

    students: Sequence[Student]
    host: Host
    labels: npt.NDArray[np.int32]
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
        self.curves: dict[str, Curve] = {}
        self._heat_error: float | None = None
        self._start_s, self._prepare_s = self.bench.start_s, self.bench.prepare_s
        self._modes: tuple[Mode, ...] = ("throughput",)
        if self.objective.max_p99_ms is not None:
            self._modes = ("throughput", "latency")

    def run(self) -> Outcome:
        """Raises TooShortError when nothing could be compared in time, ModelError when nothing could be measured."""
        self._judge()
        self._screen()
        self._batches()
        raced = self._race()
        served = self._serve(raced)
        return self.play_off(served)

    # ---- what is known ----

    def metric(self, deployment: Deployment) -> float:
        """Accuracy or macro-F1 on val, from the stored logits."""
        if len(deployment.stages) == 1:
            return self.outputs[deployment.stages[0], deployment.decode].metric
        answers, _ = self.expected_answers(deployment)
        return metric_of(answers, self.labels, self._classes, self.objective.metric)

    def expected_answers(self, deployment: Deployment) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(answers int64 [N], stage int64 [N]) on val."""
        found = [self.outputs[stage, deployment.decode] for stage in deployment.stages]
        if len(found) == 1:
            answers = found[0].logits.argmax(axis=1)
            return answers, np.zeros(len(answers), np.int64)
        return cascade_answers(
            found[0].logits,
            found[1].logits,
            temperature=found[0].temperature,
            threshold=deployment.exit_threshold or 0.0,
        )

    def temperatures(self, deployment: Deployment) -> tuple[float, ...]:
        return tuple(self.outputs[stage, deployment.decode].temperature for stage in deployment.stages)

    def speed(self, deployment: Deployment, mode: Mode = "throughput") -> Speed | None:
        """From the longest looks that were taken at it; None before the first."""
        looks = self.looks.get(_label(deployment, mode, self.objective.scope))
        if not looks or not self.levels:
            return None
        top = max(look.level for look in looks)
        looks = [look for look in looks if look.level == top]
        rounds = sum(look.rounds for look in looks)
        ratio = math.exp(sum(look.rounds * look.log_ratio for look in looks) / rounds)
        error = math.sqrt(sum((look.rounds * look.error) ** 2 for look in looks)) / rounds
        error = math.hypot(error, self.heat_error * math.sqrt(sum(look.rounds**2 for look in looks)) / rounds)
        fps = ratio * statistics.median(self.levels)
        timed = [look.percentiles for look in looks if look.percentiles]
        p50, p90, p99 = (statistics.median(column) for column in zip(*timed, strict=True)) if timed else (None,) * 3
        return Speed(fps, error * fps, rounds, top, p50, p90, p99)

    @property
    def heat_error(self) -> float:
        """The standard deviation of one case's log FPS from heat to heat, beyond what its rounds explain: neighbours of the
        machine and places in memory last as long as a heat, and more rounds of it do not average them out. A guess, until
        enough cases were measured in several heats."""
        if self._heat_error is None:
            seen = [(label, look) for label, looks in self.looks.items() for look in looks]
            excess, freedom = between_heats([(label, look.heat, look.log_ratio, look.error) for label, look in seen])
            missing = max(0, GUESSED_HEATS - freedom)
            self._heat_error = math.sqrt(max(0.0, excess + missing * HEAT_ERROR**2) / (freedom + missing))
        return self._heat_error

    def value(self, deployment: Deployment) -> float:
        """The objective of a measured deployment; conditions are judged on the careful side of the noise."""
        speed = self.speed(deployment)
        if speed is None:
            return -math.inf
        latency = self.speed(deployment, "latency")
        fps = speed.fps - speed.error if self.objective.goal == "accuracy" else speed.fps
        p99_ms = latency.p99_ms if latency and latency.p99_ms is not None else math.inf
        return self.objective.value(self.metric(deployment), fps, p99_ms=p99_ms, reference=self.reference_metric)

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

    @property
    def _classes(self) -> int:
        return len(self.students[0].labels)

    @property
    def _limit_s(self) -> float:
        return self.minutes * 60

    def _until(self, share: float, *, part: float = 1 / 3) -> float:
        """When a phase has to end: then, or where the one before took longer, after that part of what is left."""
        done = self.journal.elapsed_s / self._limit_s
        return max(share, done + (FINAL_UNTIL - done) * part)

    @property
    def time_is_up(self) -> bool:
        return self.journal.elapsed_s >= self._limit_s

    # ---- accuracy ----

    def _judge(self) -> None:
        shape = (len(self.labels), self._classes)
        for number, variant in enumerate(self.variants):
            key = f"{variant.key}, reduced"
            if self.journal.find("failed", key=key):
                self.left_out[variant.key] = str((self.journal.find("failed", key=key) or {}).get("reason"))
                continue
            known = self.journal.kept_logits(key, shape)
            late = self.journal.elapsed_s > JUDGE_UNTIL * self._limit_s
            if known is None and late and number > 0:
                self.left_out[variant.key] = "no time left to measure its accuracy"
                continue
            self.say(f"accuracy {number + 1}/{len(self.variants)}", "")
            self.judge(variant, "reduced", known)
        if (self.reference.stages[0], "reduced") not in self.outputs:
            reason = self.left_out.get(self.reference.stages[0].key, "")
            raise ModelError(f"{self.reference.stages[0].key}: does not answer, so nothing can be compared ({reason})")

    def judge(
        self, variant: Variant, decode: DecodeMode, known: npt.NDArray[np.float32] | None = None
    ) -> Outputs | None:
        if (variant, decode) in self.outputs:
            return self.outputs[variant, decode]
        key = f"{variant.key}, {decode}"
        known = self.journal.kept_logits(key, (len(self.labels), self._classes)) if known is None else known
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
        metric = metric_of(known.argmax(axis=1), self.labels, self._classes, self.objective.metric)
        found = Outputs(known, fit_temperature(known, self.labels), metric)
        self.outputs[variant, decode] = found
        return found

    # ---- speed ----

    def _screen(self) -> None:
        judged = [variant for variant in self.variants if (variant, "reduced") in self.outputs]
        wanted = []
        for variant in judged:
            better = self._beaten_by(variant, judged)
            if better is not None:
                self.left_out[variant.key] = f"{better.key} is smaller and at least as good"
            elif variant != self.reference.stages[0]:
                wanted.append(Deployment((variant,), default_serving(self.host)))
        wanted.sort(key=lambda d: (-self.metric(d), d.key))
        own = self._own(wanted)
        wanted = [*own, *(d for d in wanted if d not in own)]
        # The sizes that were trained at say what the others promise. What a plan held to be too long is planned again
        # with the times that were measured since, as long as something still fits.
        measured = self.rung("screen", 0, own, rounds=6, until=SCREEN_UNTIL, most_s=0.3)
        for number in itertools.count(1):
            left = [d for d in wanted if d not in measured and d.stages[0].key not in self.left_out]
            left = self._by_promise(left) if measured else left
            more = self.rung(f"sizes-{number}", 0, left, rounds=6, until=SCREEN_UNTIL, most_s=0.3)
            if not more:
                break
            measured += more
        # Without one comparison nothing that follows is worth its time.
        measured = measured or self.rung("screen", 0, wanted, rounds=6, until=FINAL_UNTIL, most_s=0.1)
        if not measured and (wanted or any("no time" in reason for reason in self.left_out.values())):
            raise TooShortError(
                f"--minutes {self.minutes:g} is too short for one round: {self.journal.elapsed_s:.0f} s went by before two "
                f"deployments were compared; deploy.json is as it was. Give more --minutes, with --resume to keep what "
                "was measured"
            )
        for deployment in wanted:
            if deployment not in measured and deployment.stages[0].key not in self.left_out:
                self.left_out[deployment.stages[0].key] = "no time left to measure its speed"

    def _own(self, deployments: Sequence[Deployment]) -> list[Deployment]:
        """Those whose network sees the resolution that it was trained at."""
        own = {student.name: student.size for student in self.students}
        return [d for d in deployments if d.stages[0].size == own[d.stages[0].student]]

    def _by_promise(self, deployments: Sequence[Deployment]) -> list[Deployment]:
        """In turn the best that are left by the objective, and by the metric alone, which later stages of cascades are
        wanted for. Speeds are those of the same student, at the same precision where it was measured, by the root of the
        pixels: decoding costs the same at every size."""
        known = self._own([d for d in self.measured() if len(d.stages) == 1])

        def promise(deployment: Deployment) -> Proposal:
            stage, metric = deployment.stages[0], self.metric(deployment)
            same = [d for d in known if d.stages[0].student == stage.student]
            like = next((d for d in same if d.stages[0].precision == stage.precision), same[0] if same else None)
            if like is None:
                return Proposal(deployment, metric, 0.0, -math.inf)
            one = self._single(like)
            times = math.sqrt(math.prod(like.stages[0].size) / math.prod(stage.size))
            fps, p99_ms = one.fps * times, one.p99_ms / times
            value = self.objective.value(metric, fps, p99_ms=p99_ms, reference=self.reference_metric)
            return Proposal(deployment, metric, fps, value, p99_ms)

        found = [promise(deployment) for deployment in deployments]
        by_value = sorted(found, key=lambda p: (-p.value, -p.metric, p.deployment.key))
        by_metric = sorted(found, key=lambda p: (-p.metric, -p.fps, p.deployment.key))
        turns = itertools.chain(*zip(by_value, by_metric, strict=True))
        return list(dict.fromkeys(p.deployment for p in turns))

    def _beaten_by(self, variant: Variant, judged: Sequence[Variant]) -> Variant | None:
        """The same network at the same precision on fewer pixels with a metric at least as good, which cannot be slower.

        A student's own resolution is always measured: the explanation starts there.
        """
        student = next(student for student in self.students if student.name == variant.student)
        if variant.size == student.size or (self.incumbent is not None and variant in self.incumbent.stages):
            return None
        metric = self.outputs[variant, "reduced"].metric
        for other in judged:
            same = (other.student, other.precision) == (variant.student, variant.precision)
            smaller = math.prod(other.size) < math.prod(variant.size)
            if same and smaller and self.outputs[other, "reduced"].metric >= metric:
                return other
        return None

    def _batches(self) -> None:
        """What a batch brings each student, measured on its best variant so far; one student alone loses to nobody."""
        singles = [d for d in self.measured() if d.serving == default_serving(self.host)]
        leaders = {d.stages[0].student: d for d in reversed(singles)}
        if len(self.students) > 1:
            wanted = [leader.served(self._batched) for leader in self._ranked(list(leaders.values()))]
            self.rung("batches", 0, wanted, rounds=6, until=self._until(BATCHES_UNTIL), most_s=0.3)

    @property
    def _batched(self) -> Serving:
        return dataclasses.replace(default_serving(self.host), batch=EARLY_BATCH)

    def gain(self, student: str, way: Serving) -> float:
        """How many times as fast the student's networks are served that way: the largest gain that was measured and is
        no noise, else 1. Against what the runtime does unasked, or step by step by way of the first batch; what was
        measured on a cascade counts for its first student."""
        gains, usual = [1.0], default_serving(self.host)
        steps = {usual: 1.0} if way == self._batched else {usual: 1.0, self._batched: self.gain(student, self._batched)}
        for deployment in list(self.deployments.values()):
            if deployment.stages[0].student != student or deployment.serving != way:
                continue
            for before, known in steps.items():
                plain, served = self.speed(deployment.served(before)), self.speed(deployment)
                if plain is None or served is None:
                    continue
                gain = served.fps / plain.fps
                error = gain * math.hypot(served.error / served.fps, plain.error / plain.fps)
                if gain >= max(LEAST_GAIN if before == usual else 1.0, 1 + SURE_GAIN * error):
                    gains.append(known * gain)
        return max(gains)

    def _race(self) -> list[Deployment]:
        proposals = self.proposals()
        singles = [p for p in proposals if len(p.deployment.stages) == 1]
        cascades = _diverse([p for p in proposals if len(p.deployment.stages) == 2])
        chosen = [*singles[:RACED_SINGLES], *cascades[:RACED_CASCADES]]
        chosen += self._decoded_whole([*singles[:2], *cascades[:1]])
        wanted = [p.deployment for p in sorted(chosen, key=lambda p: (-p.value, p.deployment.key))]
        if self.incumbent is not None and all(
            (s, self.incumbent.decode) in self.outputs for s in self.incumbent.stages
        ):
            wanted.insert(0, self.incumbent)
        # A threshold is as good as the times of its two stages.
        wanted += [
            Deployment((stage,), p.deployment.serving) for p in cascades[:SERVED] for stage in p.deployment.stages
        ]
        wanted = [d for d in dict.fromkeys(wanted) if d != self.reference]
        self.rung("race", 1, wanted, rounds=6, until=self._until(RACE_UNTIL), most_s=0.4)
        return [d for d in self.measured() if d in wanted or d == self.reference]

    def proposals(self, way: Serving | None = None) -> list[Proposal]:
        """Every measured single network and, for each pair, the cascade with the best threshold; the best first.

        Image by image or in batches (``way``), whichever is better by what they bring each student.
        """
        way = way or self._batched
        usual = default_serving(self.host)
        plain = [self._single(d) for d in self.measured() if len(d.stages) == 1 and d.serving == usual]
        ways = [plain]
        known = [way] if way.batch < EARLY_BATCH else [way, self._batched]  # a larger batch is no slower
        gains = {one.name: max(self.gain(one.name, served) for served in known) for one in self.students}
        if max(gains.values()) > 1:
            ways.append([self._served(p, way, gains[p.deployment.stages[0].student]) for p in plain])
        best: dict[tuple[tuple[Variant, ...], DecodeMode], Proposal] = {}
        for singles in ways:
            for proposal in (*singles, *self._cascades(singles, "reduced")):
                networks = proposal.deployment.stages, proposal.deployment.decode
                if networks not in best or proposal.value > best[networks].value:
                    best[networks] = proposal
        return sorted(best.values(), key=lambda p: (-p.value, p.deployment.key))

    def _served(self, single: Proposal, way: Serving, gain: float) -> Proposal:
        deployment = single.deployment.served(way)
        speed = self.speed(deployment)
        fps = single.fps * gain if speed is None else speed.fps
        value = self.objective.value(single.metric, fps, p99_ms=single.p99_ms, reference=self.reference_metric)
        return Proposal(deployment, single.metric, fps, value, single.p99_ms)

    def _cascades(self, singles: Sequence[Proposal], decode: DecodeMode) -> Iterator[Proposal]:
        if self.objective.scope == "model":
            return  # which images are passed on depends on images
        fast, slow = list[Proposal](), list[Proposal]()
        for precision in PRECISIONS:
            here = [p for p in singles if p.deployment.precision == precision and p.deployment.decode == "reduced"]
            slow += sorted(here, key=lambda p: (-p.metric, -p.fps))[:SLOW_PER_PRECISION]
            fast += sorted(here, key=lambda p: (-p.value, -p.fps))[: FAST_PER_PRECISION // 2]
            fast += [p for p in sorted(here, key=lambda p: -p.fps) if p not in fast][: FAST_PER_PRECISION // 2]
        for one, other in itertools.product(fast, slow):
            if one.fps > 1.2 * other.fps and other.metric > one.metric:
                proposal = self.cascade(one, other, decode)
                if proposal is not None:
                    yield proposal

    def cascade(self, fast: Proposal, slow: Proposal, decode: DecodeMode) -> Proposal | None:
        """The pair, served as both are, with the threshold that is best by the smoothed curve and the stages' times."""
        curve, costs = self.curve(fast, slow, decode)
        p99_ms = (fast.p99_ms, slow.p99_ms)
        point = self._best_point(curve, costs, p99_ms)
        if point is None:
            return None
        deployment = Deployment(
            (fast.deployment.stages[0], slow.deployment.stages[0]),
            fast.deployment.serving,
            decode,
            round(float(curve.threshold[point]), 6),
        )
        fps = float(1 / costs[point])
        value = self._point_value(float(curve.smoothed[point]), float(curve.passed_on[point]), fps, p99_ms)
        return Proposal(deployment, float(curve.metric[point]), fps, value)

    def _best_point(self, curve: Curve, costs: npt.NDArray[np.float64], p99_ms: tuple[float, float]) -> int | None:
        """None where no threshold makes it more than one of its two networks alone."""
        values = {
            point: self._point_value(
                float(curve.smoothed[point]), float(curve.passed_on[point]), float(1 / costs[point]), p99_ms
            )
            for point in range(len(curve))
            if SAME_SHARE <= curve.passed_on[point] <= 1 - SAME_SHARE
        }
        return max(values, key=lambda point: values[point]) if values else None

    def _point_value(self, metric: float, passed_on: float, fps: float, p99_ms: tuple[float, float]) -> float:
        late_ms = p99_ms[0] + (p99_ms[1] if passed_on > 0.01 else 0.0)
        return self.objective.value(metric, fps, p99_ms=late_ms, reference=self.reference_metric)

    def refitted(self, deployment: Deployment) -> Deployment:
        """A measured cascade with the threshold that its own speed asks for: the first one came from a few short looks.

        c1 + r * c2 keeps its shape and is scaled to what this cascade, served this way, took at every threshold that was
        measured.
        """
        if len(deployment.stages) != 2 or self.speed(deployment) is None:
            return deployment
        fast, slow = self.alone(deployment)
        if fast.fps <= 0 or slow.fps <= 0:
            return deployment
        curve, costs = self.curve(fast, slow, deployment.decode, points=4 * SEARCHED_POINTS)
        order = np.argsort(curve.passed_on)
        logs, weights = [], []
        for sibling in self._siblings(deployment):
            speed = self.speed(sibling)
            if speed is not None:
                expected = np.interp(self._passed_on(sibling), curve.passed_on[order], costs[order])
                logs.append(math.log(1 / (speed.fps * float(expected))))
                weights.append(speed.rounds)
        scale = math.exp(float(np.average(logs, weights=weights)))
        point = self._best_point(curve, costs * scale, (fast.p99_ms, slow.p99_ms))
        if point is None:
            return deployment
        found = dataclasses.replace(deployment, exit_threshold=round(float(curve.threshold[point]), 6))
        return min((*self._siblings(deployment), found), key=lambda d: (self._apart(d, found), d != deployment))

    def _siblings(self, deployment: Deployment) -> list[Deployment]:
        """The same networks served alike, with the thresholds that were measured."""
        same = dataclasses.replace(deployment, exit_threshold=None)
        return [d for d in self.deployments.values() if dataclasses.replace(d, exit_threshold=None) == same]

    def _passed_on(self, deployment: Deployment) -> float:
        return float(self.expected_answers(deployment)[1].mean())

    def _apart(self, one: Deployment, other: Deployment) -> float:
        """How differently two thresholds split the images, in steps that are worth a measurement."""
        return math.floor(abs(self._passed_on(one) - self._passed_on(other)) / SAME_SHARE)

    def curve(
        self, fast: Proposal, slow: Proposal, decode: DecodeMode, *, points: int = SEARCHED_POINTS
    ) -> tuple[Curve, npt.NDArray[np.float64]]:
        """(the exit curve, seconds for an image at each of its points): c1 + r * c2.

        c2 is the slow network's whole time, less its decoding where both take the same decoded picture.
        """
        first, second = fast.deployment.stages[0], slow.deployment.stages[0]
        one, other = self.outputs[first, decode], self.outputs[second, decode]
        curve = exit_curve(
            one.logits, other.logits, self.labels, temperature=one.temperature, metric=self.objective.metric
        ).thinned(points)
        # Decoding costs the same however the networks are served.
        served = (slow.deployment, slow.deployment.served(default_serving(self.host)))
        labels = [_label(deployment, "throughput", self.objective.scope) for deployment in served]
        ran = next((self.ran_with[label] for label in labels if label in self.ran_with), {})
        decoding_s = float(ran.get("decode_us", 0.0)) / 1e6 / self.host.cores
        saved = min(0.9 / slow.fps, decoding_s * self.bench.shared_decoding(first, second, decode))
        return curve, 1 / fast.fps + curve.passed_on * (1 / slow.fps - saved)

    def _decoded_whole(self, leaders: Sequence[Proposal]) -> list[Proposal]:
        """The leaders with decode 'full', where that gives other pixels: slower, now and then more accurate."""
        if self.objective.scope != "files":
            return []
        found = []
        for leader in leaders:
            stages = leader.deployment.stages
            if not any(self.bench.decoding_differs(stage) for stage in stages):
                continue
            # What an earlier call had time for is known by now, and counts.
            known = all(self.journal.find("logits", key=f"{stage.key}, full") for stage in stages)
            if not known and self.journal.elapsed_s > SCREEN_UNTIL * self._limit_s:
                continue
            outputs = [self.judge(stage, "full") for stage in stages]
            if any(one is None for one in outputs):
                continue
            if len(stages) == 1:
                deployment = Deployment(stages, leader.deployment.serving, "full")
                metric = self.metric(deployment)
                value = self.objective.value(metric, leader.fps, p99_ms=leader.p99_ms, reference=self.reference_metric)
                found.append(Proposal(deployment, metric, leader.fps, value, leader.p99_ms))
            else:
                fast, slow = self.alone(leader.deployment)
                proposal = self.cascade(fast, slow, "full")
                found += [proposal] if proposal is not None else []
        return found

    def alone(self, cascade: Deployment) -> list[Proposal]:
        """Its networks alone, served as it is where both were measured so, else as the runtime does unasked."""
        served = [Deployment((stage,), cascade.serving) for stage in cascade.stages]
        if any(self.speed(deployment) is None for deployment in served):
            served = [Deployment((stage,), default_serving(self.host)) for stage in cascade.stages]
        return [self._single(deployment) for deployment in served]

    def _single(self, deployment: Deployment) -> Proposal:
        speed, latency = self.speed(deployment), self.speed(deployment, "latency")
        fps = speed.fps if speed else 0.0
        p99_ms = (latency.p99_ms if latency else None) or math.inf
        return Proposal(deployment, self.metric(deployment), fps, self.value(deployment), p99_ms)

    def _serve(self, raced: Sequence[Deployment]) -> list[Deployment]:
        leaders = list(raced[:SERVED])
        for stages in (1, 2):  # the best of each kind, whoever leads
            leaders += [d for d in raced if len(d.stages) == stages][:1]
        leaders = list(dict.fromkeys(self.refitted(leader) for leader in leaders))
        # One way of serving after the other, so that a budget that ends early has tried every leader.
        tries = zip(*([leader.served(way) for way in self._ways(leader)] for leader in leaders), strict=True)
        wanted = list(itertools.chain(*tries))
        wanted = [d for d in dict.fromkeys(wanted) if d != self.reference]
        self.rung("serve", 2, wanted, rounds=5, until=self._until(SERVE_UNTIL), most_s=0.4)
        self.rung("alike", 2, self._alike(), rounds=5, until=self._until(ALIKE_UNTIL, part=SECOND_LOOK), most_s=0.4)
        self.rung("again", 2, self._again(), rounds=5, until=self._until(AGAIN_UNTIL, part=SECOND_LOOK), most_s=0.4)
        # A batch may cost the two networks unlike shares of what they cost image by image.
        cascades = [d for d in self.measured() if len(d.stages) == 2 and self._level(d) > 0][:FINALISTS]
        alone = dict.fromkeys(Deployment((stage,), d.serving) for d in cascades for stage in d.stages)
        wanted = [d for d in alone if d != self.reference and self._level(d) < 1]
        self.rung("stages", 2, wanted, rounds=5, until=self._until(STAGES_UNTIL, part=SECOND_LOOK), most_s=0.4)
        ranked = self.measured()
        # The luckiest of a hundred short looks is no finalist.
        return [d for d in ranked if self._level(d) > 0] or ranked

    def _alike(self) -> list[Deployment]:
        """Served as the best that was measured: every student's best network, and those next in size to what leads. One
        unlucky look at a batch drops a student, and one at a network hides every cascade that it is part of."""
        measured = self.measured()
        way = measured[0].serving
        leaders: dict[str, Deployment] = {}
        for deployment in measured:
            if len(deployment.stages) == 1 and deployment.decode == "reduced":
                leaders.setdefault(deployment.stages[0].student, deployment)
        best = next(iter(leaders.values()))
        stages = dict.fromkeys([*(d.stages[0] for d in leaders.values()), *measured[0].stages])
        leading = dict.fromkeys([*best.stages, *measured[0].stages])
        stages |= dict.fromkeys(itertools.chain(*(self._next_in_size(stage) for stage in leading)))
        wanted = [Deployment((stage,), way) for stage in stages]
        return [d for d in wanted if self.speed(d) is None and d.stages[0].key not in self.left_out]

    def _next_in_size(self, stage: Variant) -> list[Variant]:
        """The two that are next smaller and the one that is next larger, of those that were judged and not beaten."""
        same = [
            variant
            for variant, decode in self.outputs
            if (variant.student, variant.precision, decode) == (stage.student, stage.precision, "reduced")
            and (variant.key not in self.left_out or self.speed(Deployment((variant,), default_serving(self.host))))
        ]
        pixels = math.prod(stage.size)
        smaller = sorted((v for v in same if math.prod(v.size) < pixels), key=lambda v: -math.prod(v.size))
        larger = sorted((v for v in same if math.prod(v.size) > pixels), key=lambda v: math.prod(v.size))
        return [*smaller[:2], *larger[:1]]

    def _again(self) -> list[Deployment]:
        """What promises more than the best that was measured, were it served as that is, or as the next best way: where
        a batch brings the FPS that were asked for and to spare, a larger picture is better than the one that was fast
        enough before."""
        measured = self.measured()
        worth, promised = self.worth(measured[0]), dict[Deployment, float]()
        for way in list(dict.fromkeys(d.serving for d in measured))[:2]:
            found = [p for p in self.proposals(way) if p.deployment.serving == way and p.value > worth]
            singles = [p for p in found if len(p.deployment.stages) == 1][:SERVED]
            cascades = _diverse([p for p in found if len(p.deployment.stages) == 2])[:SERVED]
            promised |= {p.deployment: p.value for p in (*singles, *cascades)}
        unknown = [d for d in promised if self.speed(d) is None]
        return sorted(unknown, key=lambda d: (-promised[d], d.key))

    def _ways(self, leader: Deployment) -> list[Serving]:
        """All ways of serving, the likeliest first: where a batch has paid, larger ones before smaller ones."""
        ways = servings(self.host)
        if leader.serving == self._batched:
            larger = [way for way in ways if way.batch >= EARLY_BATCH]
            smaller = [way for way in ways if way.batch < EARLY_BATCH]
            ways = sorted([*larger, *reversed(smaller)], key=lambda way: way.streams != leader.serving.streams)
        return ways

    def _level(self, deployment: Deployment) -> int:
        looks = self.looks.get(_label(deployment, "throughput", self.objective.scope), ())
        return max((look.level for look in looks), default=-1)

    def play_off(self, ranked: Sequence[Deployment]) -> Outcome:
        """The choice among the best of ``ranked`` (best first), in as many interleaved rounds as the time allows."""
        finalists = self._starters(ranked)
        running = finalists
        for number in range(PLAYED_TIMES):
            wanted = [d for d in running if d != self.reference]
            until = FINAL_UNTIL if number else (self._until(STAGES_UNTIL) + FINAL_UNTIL) / 2
            name = f"final-{number + 1}"
            done = self.rung(name, 3, wanted, rounds=PLAYED_ROUNDS, until=until, most_s=PLAYED_S, always=number == 0)
            finalists = [d for d in finalists if self.speed(d) is not None]
            best = self._ranked(finalists)[0]
            running = [d for d in finalists if self._gap(best, d) <= LOST_BY * self._noise(best, d)]
            better = self.refitted(best)
            # Who was passed over, and by its shorter looks is ahead of what leads now, plays too.
            passed_over = [d for d in ranked if d not in finalists and self.worth(d) > self.worth(best)]
            challengers = _varied(self._ranked(passed_over))[: max(1, HEAT - len(running))]
            settled = self._settled(best, running) and better in finalists and not challengers
            if (wanted and not done) or settled:
                break
            finalists = list(dict.fromkeys([*finalists, better, *challengers]))
            running = list(dict.fromkeys([better, *challengers, *running]))[:HEAT]
        # Those that the time did not let play are known by short looks, and picked for the luckiest of them.
        played = max(self._level(d) for d in finalists if self.speed(d) is not None)
        known = [d for d in finalists if self.speed(d) is not None]
        finalists = self._ranked([d for d in known if self._level(d) == played or d == self.incumbent])
        best = finalists[0]
        tied = [d for d in finalists if self._gap(best, d) <= max(self._tie(best), TIED_BY * self._noise(best, d))]
        chosen = min((d for d in tied if not any(self._beats(one, d) for one in tied)), key=self.preference)
        # Preference is between networks. How these are served is measured: the fastest way, not the plainest.
        chosen = next(d for d in self._ranked(tied) if (d.stages, d.decode) == (chosen.stages, chosen.decode))
        if self.value(chosen) < 0 <= self.value(best):
            chosen = best
        return Outcome(chosen, tuple(finalists), tuple(d.key for d in tied), best)

    def _starters(self, ranked: Sequence[Deployment]) -> list[Deployment]:
        """Who plays: the best, the best single network, the incumbent, and what each leading cascade has to be worth
        its second network against: its fast stage alone."""
        starters = _varied(ranked)[:FINALISTS] + [d for d in ranked if len(d.stages) == 1][:1]
        if self.incumbent is not None and self.incumbent in ranked:
            starters.append(self.incumbent)
        starters = [self.refitted(d) for d in starters]
        cascades = [d for d in starters if len(d.stages) == 2][:RIVALS]
        starters += [Deployment(d.stages[:1], d.serving, d.decode) for d in cascades]
        return list(dict.fromkeys([*starters, self.reference]))

    def _settled(self, best: Deployment, running: Sequence[Deployment]) -> bool:
        return len(running) < 2 or max(self._noise(best, d) for d in running) <= QUIET_SHARE * self._tie(best)

    def _beats(self, one: Deployment, other: Deployment) -> bool:
        """Whether ``one`` is clearly faster at no loss: then there is nothing to be said for the other."""
        fast, slow = self.speed(one), self.speed(other)
        if fast is None or slow is None or len(one.stages) > len(other.stages):
            return False
        clear = max(FASTER_SHARE * slow.fps, 2 * math.hypot(fast.error, slow.error))
        return self.metric(one) >= self.metric(other) and fast.fps > slow.fps + clear

    def _ranked(self, deployments: Sequence[Deployment]) -> list[Deployment]:
        return sorted(deployments, key=lambda d: (-self.worth(d), self.preference(d)))

    def _gap(self, best: Deployment, other: Deployment) -> float:
        return self.worth(best) - self.worth(other)

    def _tie(self, best: Deployment) -> float:
        if self.objective.goal == "fps" and self.value(best) > 0:
            return TIE_FPS_SHARE * self.value(best)
        return TIE_SCORE if self.objective.goal == "score" else 1e-9

    def _noise(self, one: Deployment, other: Deployment) -> float:
        """The standard error of the difference of two values."""
        if self.objective.goal == "accuracy":
            return 0.0
        errors = [speed.error if (speed := self.speed(d)) else 0.0 for d in (one, other)]
        if self.objective.goal == "fps":
            return math.hypot(*errors)
        return (1 - self.objective.w) * math.hypot(*errors) / (self.objective.fps_target or 1.0)

    # ---- rungs ----

    def rung(
        self,
        name: str,
        level: int,
        wanted: Sequence[Deployment],
        *,
        rounds: int,
        until: float,
        most_s: float,
        always: bool = False,
    ) -> list[Deployment]:
        """Measures as many of ``wanted`` (the most promising first) as fit before ``until`` (share of the time), in heats.

        Returns those with a speed. ``always``: at least the first few, whatever the time. A rung that an earlier call
        finished is read from the journal, a half-finished one is gone on with; with more --minutes than it had, what it
        had no time for is measured in a rung of its own.
        """
        by_key = {deployment.key: deployment for deployment in wanted}
        plan = self.journal.find("rung", name=name)
        if plan is None or not set(plan["keys"]) <= set(by_key):
            left_s = until * self._limit_s - self.journal.elapsed_s
            count, seconds = self._fitting(wanted, rounds, left_s, most_s)
            if always:
                count = max(count, min(3, len(wanted)))
            if count == 0 and not (always and not wanted):
                return []
            keys = [deployment.key for deployment in wanted[:count]]
            number = sum(row["kind"] == "rung" for row in self.journal.rows)
            plan = self.journal.add(
                "rung",
                name=name,
                number=number,
                keys=keys,
                rounds=rounds,
                seconds=round(seconds, 3),
                minutes=self.minutes,
            )
        chosen = [by_key[key] for key in plan["keys"]]
        heats = [chosen[start : start + HEAT] for start in range(0, len(chosen), HEAT)] or [[]]
        for number, heat in enumerate(heats):
            self.say(f"{name}, heat {number + 1}/{len(heats)}", self.best_so_far())
            cases = self._cases(heat)
            self.heat(
                cases,
                name=f"{name} {plan['number']}/{number}",
                level=level,
                rounds=plan["rounds"],
                seconds=plan["seconds"],
            )
        measured = [deployment for deployment in chosen if self.speed(deployment) is not None]
        left = [deployment for deployment in wanted if deployment not in chosen]
        if left and plan.get("minutes", self.minutes) < self.minutes:
            measured += self.rung(f"{name}+", level, left, rounds=rounds, until=until, most_s=most_s)
        return measured

    def _cases(self, deployments: Sequence[Deployment]) -> list[Case]:
        """The reference's in front."""
        return [self.case(deployment, mode) for deployment in (self.reference, *deployments) for mode in self._modes]

    def _fitting(self, wanted: Sequence[Deployment], rounds: int, left_s: float, most_s: float) -> tuple[int, float]:
        """(how many deployments fit into the time, seconds of each slice)."""
        labels = [{case.label for case in self._cases([deployment])} for deployment in wanted]

        def spare(number: int) -> float:
            """What is left for slices."""
            cases = set().union(*labels[:number])
            held = still_held(self.bench.held, cases)
            starts = math.ceil(len(cases) / HELD) - bool(held)
            return left_s - starts * self._start_s - len(cases - held) * self._prepare_s

        def slices(number: int) -> float:
            return (number + math.ceil(number / HEAT)) * len(self._modes) * rounds * 1.06

        count = len(wanted)
        while count > 0 and spare(count) < slices(count) * SHORTEST_S:
            count -= 1
        return count, min(most_s, max(SHORTEST_S, spare(count) / slices(count))) if count else SHORTEST_S

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
                        found[case.label] = [round(result.fps, 4), *_latencies(result)]
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
        return _label(self.reference, "throughput", self.objective.scope)

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
                _percentiles([row["results"][label][1:] for row in rows]),
            )
            self.deployments[by_label[label].deployment.key] = by_label[label].deployment
        return looks

    def best_so_far(self) -> str:
        ranked = self.measured()
        if not ranked:
            return ""
        return f"best so far {self.value(ranked[0]):.4g}: {ranked[0].key}"


def polish(rates: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Tukey's median polish of log FPS [cases, rounds]: (each case's place, its standard error), both [cases].

    What all cases of a round have in common is the machine, and is taken out with the help of all of them: against the
    reference alone every ratio would carry the reference's own noise too. Half of an error's variance is that of all
    cases: a handful of rounds lie close together by chance now and then, and nothing is measured without noise.
    """
    places = np.median(rates, axis=1)
    for _ in range(8):
        common = np.median(rates - places[:, None], axis=0)
        places = np.median(rates - common, axis=1)
    around = np.abs(rates - common - places[:, None])
    deviation = np.sqrt((np.median(around, axis=1) ** 2 + np.median(around) ** 2) / 2)
    cases, rounds = rates.shape
    taken = math.sqrt(cases * rounds / max(1, (cases - 1) * (rounds - 1)))  # by the fit
    # Median absolute deviation to standard deviation, and that of a median of n values.
    return places, 1.4826 * 1.2533 * taken * deviation / math.sqrt(rounds)


def between_heats(places: Sequence[tuple[str, str, float, float]]) -> tuple[float, int]:
    """(sum of squares, degrees of freedom) of what sets a case apart from itself in other heats, beyond the noise of rounds.

    ``places``: (case, heat, log FPS to the heat's reference, standard error). What all cases of a heat have in common is
    the reference's, and is taken out like each case's own place.
    """
    heats_of = Counter(case for case, *_ in places)
    seen = [place for place in places if heats_of[place[0]] > 1]
    if not seen:
        return 0.0, 0
    cases, heats = ([place[column] for place in seen] for column in (0, 1))
    groups = [np.unique(names, return_inverse=True)[1] for names in (cases, heats)]
    rest = np.array([place for *_, place, _ in seen])
    for _ in range(10):
        for group in groups:
            rest = rest - (np.bincount(group, rest) / np.bincount(group))[group]
    freedom = max(0, len(rest) - sum(int(group.max()) + 1 for group in groups) + 1)
    return float(np.square(rest).sum()) - freedom * statistics.fmean(error**2 for *_, error in seen), freedom


def _label(deployment: Deployment, mode: Mode, scope: str) -> str:
    return Case(deployment, (), (), scope, mode).label


def _latencies(result: Slice) -> list[Any]:
    """What the journal keeps of a slice's latencies: p50 and p90 in ms, how many there were, and the longest ones, of which
    p99 over all rounds is made; nothing in throughput mode."""
    found = percentiles_ms([result])
    if found is None:
        return []
    count = len(result.latency_us)
    longest = sorted(result.latency_us, reverse=True)[: max(KEPT_LATEST, math.ceil(KEPT_LATEST_SHARE * count))]
    return [found["p50"], found["p90"], count, [round(value / 1e3, 4) for value in longest]]


def _percentiles(rounds: Sequence[Sequence[Any]]) -> tuple[float, ...]:
    """p50, p90 and p99 in ms of what `_latencies` kept of each round; () where nothing was timed alone."""
    if not rounds or not all(rounds):
        return ()
    p50, p90, counts, longest = zip(*rounds, strict=True)
    total = sum(counts)
    latest = sorted(itertools.chain(*longest), reverse=True)
    p99 = latest[total - math.ceil(0.99 * total)]
    return statistics.median(p50), statistics.median(p90), p99


def _diverse(cascades: Sequence[Proposal]) -> list[Proposal]:
    """At most two of each fast and of each slow stage: the fifth neighbour of the best teaches nothing."""
    kept: list[Proposal] = []
    for proposal in cascades:
        fast, slow = proposal.deployment.stages
        alike = [sum(p.deployment.stages[place] == stage for p in kept) for place, stage in enumerate((fast, slow))]
        if max(alike) < 2:
            kept.append(proposal)
    return kept


def _varied(ranked: Sequence[Deployment]) -> list[Deployment]:
    """At most two ways of serving the same networks, and three of what answers first with the same network: of twenty
    that differ in what a second network does with the last percent, the others are no finalists."""
    kept: list[Deployment] = []
    for deployment in ranked:
        alike = sum(d.stages == deployment.stages for d in kept)
        begun = sum(d.stages[0] == deployment.stages[0] for d in kept)
        if alike < 2 and begun < 3:
            kept.append(deployment)
    return kept


def optimism(search: Search, deployments: Sequence[Deployment], *, seed: int = 0) -> float:
    """By how much the chosen one's val metric is too good because it was chosen on val (Efron's bootstrap of the choice).

    For resampled val images the best of ``deployments`` is chosen anew (with the speeds that were measured), and its
    metric on the resample is held against its metric on all images; the mean difference, 0 or more.
    """
    answers = [search.expected_answers(deployment)[0] for deployment in deployments]
    speeds = [search.speed(deployment) for deployment in deployments]
    fps = [speed.fps if speed else 0.0 for speed in speeds]
    whole = [search.metric(deployment) for deployment in deployments]
    classes, metric = len(search.students[0].labels), search.objective.metric
    rng, excess = np.random.default_rng(seed), []
    for _ in range(RESAMPLES):
        rows = rng.integers(0, len(search.labels), len(search.labels))
        values = [metric_of(found[rows], search.labels[rows], classes, metric) for found in answers]
        scored = [
            search.objective.value(value, rate, p99_ms=0.0, reference=search.reference_metric)
            for value, rate in zip(values, fps, strict=True)
        ]
        best = int(np.argmax(scored))
        excess.append(values[best] - whole[best])
    return max(0.0, float(np.mean(excess)))
