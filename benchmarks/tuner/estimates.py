"""What is expected of deployments that nobody measured: larger pictures, other ways of serving, cascades of any two networks.

The metric is known, from the stored logits; the speed is estimated from that of the networks alone. A cascade's image costs
c1 + r * c2, where the share r that is passed on follows from the logits too.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgedistill.benchmarks.tuner.cascade import SEARCHED_POINTS, Curve, exit_curve
from edgedistill.benchmarks.tuner.known import Known, label_of
from edgedistill.benchmarks.tuner.space import PRECISIONS, Deployment, Serving, Variant, default_serving
from edgedistill.images import DecodeMode

# The one larger batch at which every student is tried before any is dropped, and from which gain on it counts: less, or
# less than so many standard errors, may be noise.
EARLY_BATCH, LEAST_GAIN, SURE_GAIN = 4, 1.05, 1.5
# Thresholds that pass on nearly the same share are one.
SAME_SHARE = 0.01
SLOW_PER_PRECISION, FAST_PER_PRECISION = 8, 10


@dataclass(frozen=True)
class Proposal:
    """A deployment with what is known or estimated of it."""

    deployment: Deployment
    metric: float
    fps: float
    value: float
    p99_ms: float = math.inf


class Estimates(Known):
    """What the measurements of one tuning promise."""

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

    def _single(self, deployment: Deployment) -> Proposal:
        speed, latency = self.speed(deployment), self.speed(deployment, "latency")
        fps = speed.fps if speed else 0.0
        p99_ms = (latency.p99_ms if latency else None) or math.inf
        return Proposal(deployment, self.metric(deployment), fps, self.value(deployment), p99_ms)

    def alone(self, cascade: Deployment) -> list[Proposal]:
        """Its networks alone, served as it is where both were measured so, else as the runtime does unasked."""
        served = [Deployment((stage,), cascade.serving) for stage in cascade.stages]
        if any(self.speed(deployment) is None for deployment in served):
            served = [Deployment((stage,), default_serving(self.host)) for stage in cascade.stages]
        return [self._single(deployment) for deployment in served]

    # ---- cascades ----

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

    def curve(
        self, fast: Proposal, slow: Proposal, decode: DecodeMode, *, points: int = SEARCHED_POINTS
    ) -> tuple[Curve, npt.NDArray[np.float64]]:
        """(the exit curve, seconds for an image at each of its points): c1 + r * c2.

        c2 is the slow network's whole time, less its decoding where both take the same decoded picture.
        """
        first, second = fast.deployment.stages[0], slow.deployment.stages[0]
        one, other = self.outputs[first, decode], self.outputs[second, decode]
        curve = exit_curve(
            one.logits,
            other.logits,
            self.truth,
            temperatures=(one.temperature, other.temperature),
            metric=self.objective.metric,
            tasks=[self.task_of(first), self.task_of(second)],
        ).thinned(points)
        # Decoding costs the same however the networks are served.
        served = (slow.deployment, slow.deployment.served(default_serving(self.host)))
        labels = [label_of(deployment, "throughput", self.objective.scope) for deployment in served]
        ran = next((self.ran_with[label] for label in labels if label in self.ran_with), {})
        decoding_s = float(ran.get("decode_us", 0.0)) / 1e6 / self.host.cores
        saved = min(0.9 / slow.fps, decoding_s * self.bench.shared_decoding(first, second, decode))
        return curve, 1 / fast.fps + curve.passed_on * (1 / slow.fps - saved)

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


def diverse(cascades: Sequence[Proposal]) -> list[Proposal]:
    """At most two of each fast and of each slow stage: the fifth neighbour of the best teaches nothing."""
    kept: list[Proposal] = []
    for proposal in cascades:
        fast, slow = proposal.deployment.stages
        alike = [sum(p.deployment.stages[place] == stage for p in kept) for place, stage in enumerate((fast, slow))]
        if max(alike) < 2:
            kept.append(proposal)
    return kept
