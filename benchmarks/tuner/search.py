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
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgedistill.benchmarks.tuner.estimates import EARLY_BATCH, Estimates, Proposal, diverse
from edgedistill.benchmarks.tuner.measure import HELD, Case, still_held
from edgedistill.benchmarks.tuner.space import Deployment, Serving, Variant, default_serving, servings
from edgedistill.errors import EdgedistillError, ModelError

# Up to which share of the time each phase may last.
JUDGE_UNTIL, SCREEN_UNTIL, BATCHES_UNTIL, RACE_UNTIL = 0.3, 0.42, 0.45, 0.54
SERVE_UNTIL, ALIKE_UNTIL, AGAIN_UNTIL, STAGES_UNTIL, FINAL_UNTIL = 0.65, 0.69, 0.72, 0.75, 0.93
HEAT = 8  # cases in memory at once, beside the reference
SHORTEST_S = 0.1
SECOND_LOOK = 1 / 6  # of what is left, for each that comes before the play-off where the time is short
# Filling and emptying the streams counts in every slice: shorter ones cost large batches some percent of their FPS.
PLAYED_S = 0.25
RACED_SINGLES, RACED_CASCADES, SERVED = 5, 7, 3
# With the best single network, the incumbent and the rivals about one heat.
FINALISTS, RIVALS = 5, 2
PLAYED_ROUNDS, PLAYED_TIMES = 9, 16
# Scores nearer than this, or than the noise of their difference, are equal: two tunings may differ by 0.01.
TIE_SCORE = 0.004
TIED_BY, LOST_BY = 1.5, 3.0  # standard errors; a field that is looked at again and again must be left late
QUIET_SHARE = 0.5  # less noise than this share of a tie is not worth more rounds
TIE_FPS_SHARE = 0.02
FASTER_SHARE = 0.05


class TooShortError(EdgedistillError):
    """The time does not suffice for one comparison."""


@dataclass(frozen=True)
class Outcome:
    """``chosen`` among ``finalists`` (best first); ``tied``: keys that noise does not tell from the best."""

    chosen: Deployment
    finalists: tuple[Deployment, ...]
    tied: tuple[str, ...]
    best: Deployment


class Search(Estimates):
    """One tuning: ``run`` measures and decides; afterwards ``metric``, ``speed`` and ``value`` answer for every deployment
    that was measured."""

    def run(self) -> Outcome:
        """Raises TooShortError when nothing could be compared in time, ModelError when nothing could be measured."""
        self._judge()
        self._screen()
        self._batches()
        raced = self._race()
        served = self._serve(raced)
        return self.play_off(served)

    def _until(self, share: float, *, part: float = 1 / 3) -> float:
        """When a phase has to end: then, or where the one before took longer, after that part of what is left."""
        done = self.journal.elapsed_s / self._limit_s
        return max(share, done + (FINAL_UNTIL - done) * part)

    def best_so_far(self) -> str:
        ranked = self.measured()
        if not ranked:
            return ""
        return f"best so far {self.value(ranked[0]):.4g}: {ranked[0].key}"

    # ---- accuracy ----

    def _judge(self) -> None:
        for number, variant in enumerate(self.variants):
            key = f"{variant.key}, reduced"
            if self.journal.find("failed", key=key):
                self.left_out[variant.key] = str((self.journal.find("failed", key=key) or {}).get("reason"))
                continue
            known = self.journal.kept_logits(key, self._logits_shape)
            late = self.journal.elapsed_s > JUDGE_UNTIL * self._limit_s
            if known is None and late and number > 0:
                self.left_out[variant.key] = "no time left to measure its accuracy"
                continue
            self.say(f"accuracy {number + 1}/{len(self.variants)}", "")
            self.judge(variant, "reduced", known)
        if (self.reference.stages[0], "reduced") not in self.outputs:
            reason = self.left_out.get(self.reference.stages[0].key, "")
            raise ModelError(f"{self.reference.stages[0].key}: does not answer, so nothing can be compared ({reason})")

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
        # Without one comparison nothing that follows is worth its time. Where the reference has no rival, ways to serve it
        # are compared.
        late = any("no time" in reason for reason in self.left_out.values())
        alone = not wanted and not late
        measured = measured or self.rung("screen", 0, wanted, rounds=6, until=FINAL_UNTIL, most_s=0.1, always=alone)
        if not measured and not alone:
            raise TooShortError(
                f"--minutes {self.minutes:g} is too short for one round: {self.journal.elapsed_s:.0f} s went by before two "
                f"deployments were compared; deploy.json is as it was. Give more --minutes, with --resume to keep what "
                "was measured"
            )
        for deployment in wanted:
            if deployment not in measured and deployment.stages[0].key not in self.left_out:
                self.left_out[deployment.stages[0].key] = "no time left to measure its speed"

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

    def _race(self) -> list[Deployment]:
        proposals = self.proposals()
        singles = [p for p in proposals if len(p.deployment.stages) == 1]
        cascades = diverse([p for p in proposals if len(p.deployment.stages) == 2])
        chosen = [*singles[:RACED_SINGLES], *cascades[:RACED_CASCADES]]
        chosen += self._decoded_whole([*singles[:2], *cascades[:1]])
        wanted = [p.deployment for p in sorted(chosen, key=lambda p: (-p.value, p.deployment.key))]
        incumbent = self.incumbent
        # Of a cascade the scope 'model' times the last network alone.
        timed = incumbent is not None and not (len(incumbent.stages) > 1 and self.objective.scope == "model")
        if incumbent is not None and timed and all((s, incumbent.decode) in self.outputs for s in incumbent.stages):
            wanted.insert(0, incumbent)
        # A threshold is as good as the times of its two stages.
        wanted += [
            Deployment((stage,), p.deployment.serving) for p in cascades[:SERVED] for stage in p.deployment.stages
        ]
        wanted = [d for d in dict.fromkeys(wanted) if d != self.reference]
        self.rung("race", 1, wanted, rounds=6, until=self._until(RACE_UNTIL), most_s=0.4)
        return [d for d in self.measured() if d in wanted or d == self.reference]

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
            cascades = diverse([p for p in found if len(p.deployment.stages) == 2])[:SERVED]
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

    # ---- the choice ----

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
