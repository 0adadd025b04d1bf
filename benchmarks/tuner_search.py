"""Which search finds the better deployment in the same measuring time: the tuner's, Optuna's TPE, or random draws?

    edgedistill tune runs/NAME --fps-target N --out runs/NAME/tuned-1           (and tuned-2: as many as there are)
    python -m edgedistill.benchmarks.tuner_search runs/NAME/tuned-1 runs/NAME/tuned-2 --out FILE.json

Tunings are replayed on what real ones recorded: every network's logits on val, speeds as ratios to the reference, what a
judgement, a heat and a case cost, and the noise, as swings that a round's cases share, as what sets a case apart from
itself in another heat, and as the rest that each slice has of its own (drawn from the recorded rest, so that its long
tail is as long). All three searches pay for the same things by the same clock and end with the same play-off; only what
they measure before it differs. Regret is the true score of the best there is less that of the choice. Exit code 0 when
the tuner's mean regret is the smallest and three of its tunings agree in 95 of 100 draws.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.artifacts import read_json, write_json
from edgedistill.benchmarks.command import exit_with, module_command, module_parser
from edgedistill.benchmarks.machine import machine_record
from edgedistill.benchmarks.score import Objective
from edgedistill.benchmarks.timing import Slice
from edgedistill.benchmarks.tuner.cascade import cascade_answers, exit_curve
from edgedistill.benchmarks.tuner.heats import between_heats, polish
from edgedistill.benchmarks.tuner.journal import Journal
from edgedistill.benchmarks.tuner.measure import Case, still_held
from edgedistill.benchmarks.tuner.search import Search
from edgedistill.benchmarks.tuner.space import Deployment, Host, Serving, Student, Variant, default_serving, servings
from edgedistill.benchmarks.tuner.students import find_students
from edgedistill.benchmarks.tuner.truth import Answers, Truth, answers_of
from edgedistill.benchmarks.tuner.tune import TUNE_FORMAT
from edgedistill.benchmarks.tuner.valset import open_val
from edgedistill.errors import ArtifactError, ModelError, UsageError
from edgedistill.images import DecodeMode
from edgedistill.tasks import Task

FORMAT = "edgedistill-tuner-search"
STABLE, STABLE_SHARE = 0.01, 0.95
# Within an hour the reference machine's speed moves by 30% either way: two standard deviations.
TUNINGS_APART = 0.15
SWING_S = 20.0
TRIAL_ROUNDS, TRIAL_S = 5, 0.3
DRAWN_UNTIL = 0.66
MOST_PASSED_ON = 0.6
CURVE_POINTS = 32
DRAWN_TRIPLES = 5000


@dataclass(frozen=True)
class Noise:
    """Of log FPS. ``apart``: standard deviation between tunings; ``swing``: of what a round's cases share, within one;
    ``rest``: recorded deviations of single slices; ``heat``: standard deviation of a case between heats, which more rounds
    of one heat do not average out."""

    apart: float
    swing: float
    rest: tuple[float, ...]
    heat: float = 0.0


@dataclass(frozen=True)
class Costs:
    """Seconds: of one network over val, of starting a process, and of compiling and warming up one case."""

    judge_s: float
    start_s: float
    prepare_s: float


@dataclass(frozen=True, eq=False)
class Table:
    """A space whose true figures are known. ``logits``: float32 [N, D] of each variant; ``fps``: of each variant that has
    one, served as the runtime does unasked; ``gains``: of each student, what another serving multiplies it by."""

    students: tuple[Student, ...]
    host: Host
    truth: Truth
    objective: Objective
    logits: dict[Variant, npt.NDArray[np.float32]]
    fps: dict[Variant, float]
    gains: dict[str, dict[Serving, float]]
    noise: Noise
    costs: Costs

    @cached_property
    def temperatures(self) -> dict[Variant, float]:
        return {variant: self.truth.fit_temperature(logits) for variant, logits in self.logits.items()}

    def answers(self, deployment: Deployment) -> tuple[Answers, npt.NDArray[np.int64]]:
        """(answers int64 [N, A], stage int64 [N])."""
        first = deployment.stages[0]
        if len(deployment.stages) == 1:
            answers = answers_of(self.tasks[first.student], self.logits[first], self.temperatures[first])
            return answers, np.zeros(len(self.truth), np.int64)
        last = deployment.stages[1]
        return cascade_answers(
            self.logits[first],
            self.logits[last],
            (self.tasks[first.student], self.tasks[last.student]),
            temperatures=(self.temperatures[first], self.temperatures[last]),
            threshold=deployment.exit_threshold or 0.0,
        )

    @cached_property
    def tasks(self) -> dict[str, Task]:
        return {student.name: student.task for student in self.students}

    def stage_fps(self, variant: Variant, serving: Serving) -> float:
        return self.fps[variant] * self.gains[variant.student][serving]

    def true_fps(self, deployment: Deployment) -> float:
        """Of a cascade 1 / (c1 + r * c2)."""
        rates = [self.stage_fps(stage, deployment.serving) for stage in deployment.stages]
        if len(rates) == 1:
            return rates[0]
        return 1 / (1 / rates[0] + float(self.answers(deployment)[1].mean()) / rates[1])

    def true_value(self, deployment: Deployment) -> float:
        answers, _ = self.answers(deployment)
        metric = self.truth.metric(answers, self.objective.metric)
        return self.objective.value(metric, self.true_fps(deployment))

    def at(self, level: float) -> Table:
        """The same on a machine so many times as fast. A target in FPS is an absolute one: what is best depends on it."""
        return dataclasses.replace(self, fps={variant: level * fps for variant, fps in self.fps.items()})

    @cached_property
    def best(self) -> float:
        """The largest true score of all single networks and all cascades, at 32 thresholds each, however served."""
        ways = servings(self.host)
        singles = [Deployment((variant,), way) for variant in self.fps for way in ways]
        values = [self.true_value(one) for one in singles]
        values += [self._best_cascade(fast, slow, ways) for fast, slow in itertools.permutations(self.fps, 2)]
        return max(values)

    def _best_cascade(self, fast: Variant, slow: Variant, ways: Sequence[Serving]) -> float:
        curve = exit_curve(
            self.logits[fast],
            self.logits[slow],
            self.truth,
            temperatures=(self.temperatures[fast], self.temperatures[slow]),
            metric=self.objective.metric,
            tasks=(self.tasks[fast.student], self.tasks[slow.student]),
        ).thinned(CURVE_POINTS)
        seconds = [1 / self.stage_fps(fast, way) + curve.passed_on / self.stage_fps(slow, way) for way in ways]
        points = zip(curve.metric, np.min(seconds, axis=0), strict=True)
        return max((self.objective.value(float(metric), 1 / float(least_s)) for metric, least_s in points), default=0.0)


# ---- what real tunings recorded ----


def read_table(folders: Sequence[Path]) -> Table:
    """One table of several tunings of the same students on the same machine. The students and the val images are read
    where the first tuning found them.

    Raises UsageError for tunings of different things, ArtifactError for folders without a whole tuning.
    """
    records = [read_json(folder / "tune.json", format=TUNE_FORMAT) for folder in folders]
    settings, objective = records[0]["settings"], records[0]["objective"]
    students = tuple(find_students([Path(target) for target in settings["targets"]]))
    val = open_val(students, settings["data"]).drawn(settings["images"], seed=settings["seed"])
    journals = [Journal.read(folder / "tune") for folder in folders]
    first = journals[0].rows[0]["fingerprint"]
    for folder, journal in zip(folders, journals, strict=True):
        if journal.rows[0]["fingerprint"] != first:
            raise UsageError(
                f"{folder}: tuned other networks, images or goals than {folders[0]}; give tunings of one thing"
            )
    if first["val"] != val.hash:
        raise ArtifactError(f"{folders[0]}: was judged on other val images than those that are there now; tune again")
    cpu, cores = first["cpu"]
    kinds = {row["variant"].split()[1] for row in records[0]["variants"]}
    host = Host(cores, "bf16" in kinds, "int8" in kinds, cpu)
    logits = {}
    for row in records[0]["variants"]:
        variant = Variant(row["student"], row["variant"].split()[1], (row["size"][0], row["size"][1]))
        kept = journals[0].kept_logits(f"{variant.key}, reduced", (len(val), val.truth.task.width))
        if kept is not None:
            logits[variant] = kept
    goal = {key: objective[key] for key in ("w", "fps_target", "metric", "scope")}
    heats = [heat for journal in journals for heat in recorded_heats(journal.rows)]
    fps, gains = speeds_of(heats, students, host, list(logits))
    logits = {variant: logits[variant] for variant in fps}  # what no tuning had the time to measure cannot be replayed
    return Table(students, host, val.truth, Objective(**goal), logits, fps, gains, noise_of(heats), costs_of(journals))


@dataclass(frozen=True, eq=False)
class Heat:
    """``labels``: of the throughput cases, the reference first; ``rates``: log FPS [cases, rounds]."""

    labels: list[str]
    rates: npt.NDArray[np.float64]


def recorded_heats(rows: Sequence[dict[str, Any]]) -> list[Heat]:
    """Those with at least three cases and rounds."""
    rounds: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] == "round":
            rounds.setdefault(row["heat"], []).append(row["results"])
    found = []
    for results in rounds.values():
        labels = [label for label in results[0] if " | throughput files" in label and all(label in r for r in results)]
        if len(labels) >= 3 and len(results) >= 3:
            found.append(Heat(labels, np.log([[one[label][0] for one in results] for label in labels])))
    return found


def speeds_of(
    heats: Sequence[Heat], students: Sequence[Student], host: Host, variants: Sequence[Variant]
) -> tuple[dict[Variant, float], dict[str, dict[Serving, float]]]:
    """(FPS of each variant that was measured as the runtime serves unasked, each student's gain from each serving).

    A gain that nobody measured is the other students'; failing that, the product of its streams' and its batch's.
    """
    base = statistics.median(math.exp(rate) for heat in heats for rate in heat.rates[0])
    ratios: dict[str, list[tuple[float, int]]] = {}
    for heat in heats:
        places, _ = polish(heat.rates)
        for label, place in zip(heat.labels, places - places[0], strict=True):
            ratios.setdefault(label.split(" | ")[0], []).append((float(place), heat.rates.shape[1]))
    known = {key: math.exp(_weighted(seen)) for key, seen in ratios.items()}
    usual, ways = default_serving(host), servings(host)
    fps, measured = {}, {student.name: {usual: [1.0]} for student in students}
    for variant in variants:
        plain = known.get(Deployment((variant,), usual).key)
        if plain is None:
            continue
        fps[variant] = base * plain
        for way in ways:
            served = known.get(Deployment((variant,), way).key)
            if served is not None and way != usual:
                measured[variant.student].setdefault(way, []).append(served / plain)
    everyone: dict[Serving, list[float]] = {}
    for gains in measured.values():
        for way, values in gains.items():
            everyone.setdefault(way, []).extend(values)

    def gain(own: dict[Serving, list[float]], way: Serving) -> float:
        for seen in (own, everyone):
            if way in seen:
                return statistics.geometric_mean(seen[way])
        one_part = dataclasses.replace(way, batch=1, pinning=False)
        other = Serving(usual.streams, usual.threads, way.batch)
        return math.prod(gain(own, part) for part in (one_part, other) if part != way and part in everyone)

    return fps, {name: {way: gain(own, way) for way in ways} for name, own in measured.items()}


def _weighted(seen: Sequence[tuple[float, int]]) -> float:
    return sum(value * rounds for value, rounds in seen) / sum(rounds for _, rounds in seen)


def noise_of(heats: Sequence[Heat]) -> Noise:
    common, rest, seen = [], [], []
    for number, heat in enumerate(heats):
        places, errors = polish(heat.rates)
        seen += [
            (label, str(number), float(place - places[0]), float(error))
            for label, place, error in zip(heat.labels, places, errors, strict=True)
        ]
        shared = np.median(heat.rates - places[:, None], axis=0)
        cases, rounds = heat.rates.shape
        widened = math.sqrt(cases * rounds / ((cases - 1) * (rounds - 1)))  # what the fit took away
        rest += ((heat.rates - places[:, None] - shared) * widened).ravel().tolist()
        common += (shared - shared.mean()).tolist()
    excess, freedom = between_heats(seen)
    apart = math.sqrt(max(0.0, excess) / max(1, freedom))
    return Noise(TUNINGS_APART, float(np.std(common)), tuple(round(value, 4) for value in rest), apart)


def costs_of(journals: Sequence[Journal]) -> Costs:
    """What a network over val and a compiled case took; a process start is 2 s of a heat's preparation."""
    judged, prepared, start_s = [], [], 2.0
    for journal in journals:
        seconds = {row["name"]: row["seconds"] for row in journal.rows if row["kind"] == "rung"}
        for before, row in itertools.pairwise(journal.rows):
            took_s = row["elapsed_s"] - before["elapsed_s"]
            if row["kind"] == "logits":
                judged.append(took_s)
            elif row["kind"] == "round" and row["round"] == 0 and row["heat"].split()[0] in seconds:
                cases = len(row["results"])
                slices_s = 1.07 * cases * seconds[row["heat"].split()[0]]
                prepared.append(max(0.1, took_s - slices_s - start_s) / cases)
    return Costs(round(statistics.median(judged), 3), start_s, round(statistics.median(prepared), 3))


# ---- a machine that is replayed ----


class ReplayBench:
    """The tuner's ``Bench`` on a table: a clock that only measurements move, and the recorded noise. ``seed``: of it."""

    def __init__(self, table: Table, seed: int) -> None:
        self.table, self.rng = table, np.random.default_rng(seed)
        self.start_s, self.prepare_s = table.costs.start_s, table.costs.prepare_s
        self.now = 0.0
        self._held: set[str] = set()
        self._luck: dict[str, float] = {}
        self._level = self.rng.normal(0, table.noise.apart)  # log of how fast the machine is during this tuning
        self._swing, self._swung = self.rng.normal(0, table.noise.swing), 0.0

    @property
    def held(self) -> Set[str]:
        return self._held

    def clock(self) -> float:
        return self.now

    def logits(self, variant: Variant, decode: DecodeMode) -> npt.NDArray[np.float32]:
        self.now += self.table.costs.judge_s
        if variant not in self.table.logits:
            raise ModelError(f"{variant.key}: the tunings that are replayed had no time for it")
        return self.table.logits[variant]

    @contextmanager
    def prepared(self, cases: Sequence[Case]) -> Iterator[list[Any]]:
        labels = {case.label for case in cases}
        held = still_held(self._held, labels)
        self.now += (not held) * self.start_s + len(labels - held) * self.prepare_s
        self._held = held | labels
        self._luck = {label: float(self.rng.normal(0, self.table.noise.heat)) for label in sorted(labels)}
        yield [_Replayed(self, case) for case in cases]

    def answers(self, case: Case) -> tuple[Answers, npt.NDArray[np.int64]]:
        return self.table.answers(case.deployment)

    def shared_decoding(self, fast: Variant, slow: Variant, decode: DecodeMode) -> float:
        return 0.0

    def decoding_differs(self, variant: Variant) -> bool:
        return False

    @property
    def level(self) -> float:
        """How fast the machine is during this tuning; 1: as it was recorded."""
        return math.exp(self._level)

    def speed_now(self, label: str) -> float:
        """What this moment multiplies the FPS of that case by."""
        noise = self.table.noise
        left = math.exp(-(self.now - self._swung) / SWING_S)
        self._swing = left * self._swing + math.sqrt(1 - left * left) * self.rng.normal(0, noise.swing)
        self._swung = self.now
        return math.exp(self._level + self._swing + self._luck[label] + float(self.rng.choice(noise.rest)))


@dataclass
class _Replayed:
    bench: ReplayBench
    case: Case
    settings: dict[str, Any] = field(default_factory=dict)

    def run(self, seconds: float) -> Slice:
        fps = self.bench.table.true_fps(self.case.deployment) * self.bench.speed_now(self.case.label)
        self.bench.now += seconds * 1.05
        return Slice(max(1, round(fps * seconds)), seconds)


# ---- the searches ----


class Draw(Protocol):
    """One trial's choices, made one after the other; ``told`` what came of them."""

    def choose(self, name: str, count: int) -> int: ...
    def share(self, name: str, low: float, high: float) -> float: ...
    def told(self, value: float) -> None: ...


class RandomDraw:
    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng

    def choose(self, name: str, count: int) -> int:
        return int(self._rng.integers(count))

    def share(self, name: str, low: float, high: float) -> float:
        return float(self._rng.uniform(low, high))

    def told(self, value: float) -> None:
        pass


class OptunaDraw:
    def __init__(self, study: Any) -> None:
        self._study, self._trial = study, study.ask()

    def choose(self, name: str, count: int) -> int:
        return int(self._trial.suggest_categorical(name, list(range(count))))

    def share(self, name: str, low: float, high: float) -> float:
        return float(self._trial.suggest_float(name, low, high))

    def told(self, value: float) -> None:
        self._study.tell(self._trial, value)


def random_draws(seed: int) -> Callable[[], Draw]:
    rng = np.random.default_rng(seed)
    return lambda: RandomDraw(rng)


def tpe_draws(seed: int) -> Callable[[], Draw]:
    """Optuna's tree-structured Parzen estimator, as it comes. Raises UsageError where Optuna is not installed."""
    try:
        import optuna
    except ImportError:
        raise UsageError("comparing with Optuna needs it; pip install 'edgedistill[search-benchmark]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed))
    return lambda: OptunaDraw(study)


def drawn_deployment(table: Table, draw: Draw) -> Deployment:
    """One of the space that the tuner searches: one or two networks that have a speed, threshold, serving."""
    variants = list(table.fps)
    ways = servings(table.host)
    way = ways[draw.choose("serving", len(ways))]
    first = variants[draw.choose("network", len(variants))]
    others = [variant for variant in variants if variant != first]
    if draw.choose("cascade", 2) == 0 or not others:
        return Deployment((first,), way)
    slow = others[draw.choose(f"{first.key} passes on to", len(others))]
    passed_on = draw.share("passed on", 0.01, MOST_PASSED_ON)
    sure = np.sort(exit_confidences(table, first))
    return Deployment((first, slow), way, exit_threshold=round(float(np.quantile(sure, passed_on)), 6))


def exit_confidences(table: Table, variant: Variant) -> npt.NDArray[np.float32]:
    logits = table.logits[variant] / table.temperatures[variant]
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    return (1 / shifted.sum(axis=1)).astype(np.float32)


def search_by_draws(search: Search, table: Table, next_draw: Callable[[], Draw]) -> Deployment:
    """One deployment after the other, each interleaved with the reference, then the tuner's play-off."""
    search.judge(search.reference.stages[0], "reduced")
    reference = search.case(search.reference, "throughput")
    limit_s, number = DRAWN_UNTIL * search.minutes * 60, 0
    while search.journal.elapsed_s < limit_s:
        draw = next_draw()
        deployment = drawn_deployment(table, draw)
        for stage in deployment.stages:
            search.judge(stage, "reduced")
        cases = [reference, search.case(deployment, "throughput")]
        unique = list({case.label: case for case in cases}.values())
        search.heat(unique, name=f"trial {number}", level=1, rounds=TRIAL_ROUNDS, seconds=TRIAL_S)
        draw.told(search.value(deployment))
        number += 1
    return search.play_off(search.measured()).chosen


def searched(table: Table, name: str, *, minutes: float, seed: int) -> Deployment:
    """What one replayed tuning chooses. ``name``: tuner, optuna-tpe or random."""
    bench = ReplayBench(table, seed)
    with tempfile.TemporaryDirectory(prefix="edgedistill-replay-") as folder:
        search = Search(
            students=table.students,
            host=table.host,
            truth=table.truth,
            objective=table.objective,
            bench=bench,
            journal=Journal(Path(folder), {}, resume=False, clock=bench.clock),
            minutes=minutes,
            sizes=sorted({variant.size[0] for variant in table.logits}),
        )
        if name == "tuner":
            return search.run().chosen
        return search_by_draws(search, table, DRAWS[name](seed))


DRAWS: dict[str, Callable[[int], Callable[[], Draw]]] = {"optuna-tpe": tpe_draws, "random": random_draws}
SEARCHES = ("tuner", *DRAWS)


# ---- the comparison ----


@dataclass(frozen=True)
class Regrets:
    """True scores that a search's choices fell short of the best by, one for each replay."""

    values: tuple[float, ...]

    def agreeing(self, within: float = STABLE) -> float:
        """The share of three tunings drawn at random whose true scores differ by at most that."""
        drawn = np.random.default_rng(0).choice(self.values, (DRAWN_TRIPLES, 3))
        return float((np.ptp(drawn, axis=1) <= within + 1e-12).mean())

    def to_dict(self) -> dict[str, float]:
        values = np.array(self.values)
        return {
            "mean_regret": round(float(values.mean()), 5),
            "mean_regret_error": round(float(values.std() / math.sqrt(len(values))), 5),
            "median_regret": round(float(np.median(values)), 5),
            "p95_regret": round(float(np.quantile(values, 0.95)), 5),
            "spread": round(float(values.std()), 5),
            "three_within_0.01": round(self.agreeing(), 4),
        }


def replayed(table: Table, names: Sequence[str], *, replays: int, minutes: float) -> dict[str, Regrets]:
    """Every search on the same replays: seed k has the same noise for all. A choice is judged on the machine as fast as it
    was for that replay, which is what the search was asked about."""
    found: dict[str, list[float]] = {name: [] for name in names}
    with console.progress("replaying", replays * len(names)) as bar:
        for seed in range(replays):
            judge = table.at(ReplayBench(table, seed).level)
            for name in names:
                chosen = searched(table, name, minutes=minutes, seed=seed)
                found[name].append(judge.best - judge.true_value(chosen))
                bar.update(bar.task_ids[0], advance=1)
    return {name: Regrets(tuple(values)) for name, values in found.items()}


def main() -> int:
    parser = module_parser("tuner_search", __doc__)
    parser.add_argument(
        "tuned", type=Path, nargs="+", help="folders that 'edgedistill tune' wrote, with their journals"
    )
    parser.add_argument("--searches", nargs="+", choices=SEARCHES, default=list(SEARCHES))
    parser.add_argument("--replays", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=4.0, help="of each replayed tuning")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()
    if options.replays < 2 or not options.minutes > 0:
        raise UsageError("--replays: expected 2 or more; --minutes: expected more than 0")
    table = read_table(options.tuned)
    found = replayed(table, options.searches, replays=options.replays, minutes=options.minutes)
    rows = {name: regrets.to_dict() for name, regrets in found.items()}
    record = {
        "machine": machine_record(),
        "command": module_command("tuner_search"),
        "objective": dataclasses.asdict(table.objective),
        "minutes": options.minutes,
        "replays": options.replays,
        "costs": dataclasses.asdict(table.costs),
        "noise": {
            "apart": table.noise.apart,
            "swing": round(table.noise.swing, 4),
            "slice": round(float(np.std(table.noise.rest)), 4),
            "heat": round(table.noise.heat, 4),
            "slice_mad": round(1.4826 * float(np.median(np.abs(table.noise.rest))), 4),
            "slices": len(table.noise.rest),
        },
        "networks": len(table.fps),
        "best_score": round(table.best, 5),
        "searches": rows,
    }
    write_json(options.out, record, format=FORMAT)
    columns = ("mean_regret", "median_regret", "p95_regret", "spread", "three_within_0.01")
    shown = [(name, *(f"{row[column]:.4f}" for column in columns)) for name, row in rows.items()]
    title = f"{options.replays} tunings of {options.minutes:g} minutes, best score {table.best:.4f}"
    console.out.print(console.table(title, ("search", *columns), shown))
    if "tuner" not in rows:
        return 0
    ahead = rows["tuner"]["mean_regret"] <= min(row["mean_regret"] for row in rows.values())
    return 0 if ahead and rows["tuner"]["three_within_0.01"] >= STABLE_SHARE else 1


if __name__ == "__main__":
    exit_with(main)
