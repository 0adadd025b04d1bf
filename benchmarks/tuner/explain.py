"""The choice in words: what each step brought, what was given up, and how sure that is."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from edgedistill.benchmarks.tuner.chance import Rival, metric_margin
from edgedistill.benchmarks.tuner.search import TIE_SCORE, Outcome, Search
from edgedistill.benchmarks.tuner.space import Deployment, Variant, default_serving

# Of a head of each kind: its figure, and what it is called.
SHOWN_FIGURE = {"softmax": ("accuracy", "accuracy"), "sigmoid": ("map", "mAP"), "regression": ("mae", "MAE")}
PRECISION_NAMES = {"f32": "FP32", "bf16": "BF16", "int8": "INT8"}


@dataclass(frozen=True)
class Step:
    """One change on the way from the reference to the choice, with what was measured after it."""

    what: str
    key: str
    metric: float
    fps: float
    value: float


def steps_to(search: Search, chosen: Deployment) -> list[Step]:
    """From FP32 at the training resolution, one change at a time; steps that nobody measured are passed over."""
    usual, last = default_serving(search.host), chosen.stages[-1]
    sizes = {student.name: student.size for student in search.students}
    first = search.reference.stages[0]
    path: list[tuple[str, Deployment]] = [(f"{_named(first)}, one stream per core", search.reference)]

    def single(student: str, precision: str, size: tuple[int, int]) -> Deployment:
        return Deployment((Variant(student, precision, size),), usual)

    own = sizes[last.student]
    if last.student != first.student:
        path.append((f"{last.student} instead of {first.student}", single(last.student, "f32", own)))
    if last.precision != "f32":
        what = f"{PRECISION_NAMES[last.precision]} instead of FP32"
        path.append((what, single(last.student, last.precision, own)))
    if last.size != own:
        path.append((f"{pixels(last.size)} px instead of {pixels(own)}", single(*_parts(last))))
    if chosen.decode == "full" and len(chosen.stages) == 1:
        path.append(("JPEGs decoded whole", Deployment((last,), usual, "full")))
    if len(chosen.stages) == 2:
        what = f"{_named(chosen.stages[0])} in front of it"
        path.append((what, chosen.served(usual)))
    if chosen.serving != usual:
        path.append((chosen.serving.words(), chosen))
    steps = []
    for what, deployment in path:
        speed = search.speed(deployment)
        if speed is not None:
            value = search.value(deployment)
            steps.append(Step(what, deployment.key, search.metric(deployment), speed.fps, value))
    return steps


def _parts(variant: Variant) -> tuple[str, str, tuple[int, int]]:
    return variant.student, variant.precision, variant.size


def _named(variant: Variant) -> str:
    return f"{variant.student} {PRECISION_NAMES[variant.precision]} at {pixels(variant.size)} px"


def pixels(size: tuple[int, int]) -> str:
    return str(size[0]) if size[0] == size[1] else f"{size[0]}x{size[1]}"


def explanation(search: Search, outcome: Outcome, *, optimism: float, rival: Rival | None = None) -> list[str]:
    """Sentences, the most important first. ``rival``: of the chosen one; named where the val images do not tell them
    apart."""
    chosen, objective = outcome.chosen, search.objective
    speed = search.speed(chosen)
    fps = speed.fps if speed else 0.0
    metric, count = search.metric(chosen), len(search.truth)
    sentences = [f"Chosen: {words(chosen)}. {objective.metric.capitalize()} {metric:.4f} on val, {fps:.0f} FPS "
                 f"({objective.scope}). Goal: {objective.describe()}{_reached(search, chosen)}."]  # fmt: skip
    steps = steps_to(search, chosen)
    if len(steps) < 2:
        sentences.append("Nothing that was measured beats the plain FP32 network served as the runtime does unasked.")
    for before, after in itertools.pairwise(steps):
        sentences.append(f"- {after.what}: {_change(search, before, after)}.")
    sentences += _given_up(search, chosen)
    if not search.truth.task.is_single:
        sentences.append(_heads(search, chosen))
    if len(outcome.tied) > 1:
        limit = f"{TIE_SCORE:g}" if objective.goal == "score" else "the noise"
        sentences.append(
            f"{len(outcome.tied)} finalists lie within {limit} of each other; of equals, unless "
            "another is clearly faster at no loss, the one with fewer networks, then the more accurate, then the plainer, "
            "served in the way that measured best."
        )
    if rival is not None and not rival.told_apart:
        sentences.append(_by_chance(search, rival))
    margin = metric_margin(search, chosen)
    sentences.append(
        f"{count} val images carry +-{100 * margin:.1f} points; having been chosen on them makes the figure about "
        f"{100 * optimism:.1f} points too good, so expect {metric - optimism:.3f} on new images."
    )
    return sentences


def _heads(search: Search, chosen: Deployment) -> str:
    """What the figure for all heads means, and each head's own."""
    task, now, before = search.truth.task, search.head_figures(chosen), search.head_figures(search.reference)
    own = []
    for head in task.heads:
        figure, name = SHOWN_FIGURE[head.kind]
        if figure in now[head.name]:
            own.append(f"{head.name} {name} {now[head.name][figure]:.4f} ({before[head.name][figure]:.4f})")
    said = "An image counts as right when every known label of it is; macro-F1 is the mean over heads."
    if len(chosen.stages) > 1:
        surest = "its least sure head" if len(task.class_heads) > 1 else "its likeliest label"
        said += f" The confidence of the first network is that of {surest}, as in both runtimes."
    return f"{said} Each head's own, and the reference's: {', '.join(own)}."


def _by_chance(search: Search, rival: Rival) -> str:
    what = "score" if search.objective.goal == "score" else search.objective.metric
    by = f"{abs(rival.behind):.4f} {'lower' if rival.behind >= 0 else 'higher'}"
    if rival.high < 0:  # it was passed over as an equal
        return (
            f"The {what} of {words(rival.deployment)} is {by}, and over val images drawn anew, the same for both, between "
            f"{-rival.high:.4f} and {-rival.low:.4f} higher in 95 of 100: so little that it counted as an equal, and the "
            "chosen one has fewer networks or is plainer."
        )
    return (
        f"{len(search.truth)} val images do not tell the chosen one from {words(rival.deployment)}, whose {what} is "
        f"{by}: over images drawn anew, the same for both, the difference lies between {rival.low:+.4f} and "
        f"{rival.high:+.4f} in 95 of 100. Which of the two was chosen is chance; more val images would tell."
    )


def _reached(search: Search, chosen: Deployment) -> str:
    if search.objective.goal == "score":
        return f" = {search.value(chosen):.4f}"
    return ""


def _change(search: Search, before: Step, after: Step) -> str:
    parts = [
        f"{search.objective.metric} {100 * (after.metric - before.metric):+.1f} points",
        f"FPS {before.fps:.0f} to {after.fps:.0f} ({after.fps / before.fps:.2f} times)",
    ]
    if search.objective.goal == "score":
        parts.append(f"score {after.value - before.value:+.4f}")
    return ", ".join(parts)


def _given_up(search: Search, chosen: Deployment) -> list[str]:
    """Against the most accurate and against the fastest that were measured."""
    speed, metric = search.speed(chosen), search.metric(chosen)
    measured = [(d, one) for d in search.measured() if (one := search.speed(d)) is not None]
    if speed is None or not measured:
        return []
    found = []
    sharp, sharp_speed = max(measured, key=lambda pair: (search.metric(pair[0]), pair[1].fps))
    if search.metric(sharp) > metric:
        found.append(
            f"Given up: {100 * (search.metric(sharp) - metric):.1f} points against the most accurate ({words(sharp)}), "
            f"for {speed.fps / sharp_speed.fps:.2f} times its FPS."
        )
    quick, quick_speed = max(measured, key=lambda pair: pair[1].fps)
    if quick_speed.fps > 1.02 * speed.fps:
        found.append(
            f"Given up: speed against the fastest ({words(quick)}: {quick_speed.fps / speed.fps:.2f} times the FPS), for "
            f"{100 * (metric - search.metric(quick)):+.1f} points."
        )
    return found


def words(deployment: Deployment) -> str:
    """A deployment for people."""
    names = " then ".join(_named(stage) for stage in deployment.stages)
    if deployment.exit_threshold is not None:
        names += f" (the first answers from {deployment.exit_threshold:.3f} confidence)"
    decoded = ", JPEGs decoded whole" if deployment.decode == "full" else ""
    return f"{names}{decoded}, {deployment.serving.words()}"


def speed_record(search: Search, deployment: Deployment) -> dict[str, Any]:
    """FPS with its standard error, and the latency where it was measured; plain JSON values."""
    speed, latency = search.speed(deployment), search.speed(deployment, "latency")
    found: dict[str, Any] = {}
    if speed is not None:
        found = {"fps": round(speed.fps, 2), "fps_error": round(speed.error, 2), "rounds": speed.rounds}
    if latency is not None and latency.p99_ms is not None:
        values = zip(("p50", "p90", "p99"), (latency.p50_ms, latency.p90_ms, latency.p99_ms), strict=True)
        found["latency_ms"] = {name: round(value, 3) for name, value in values if value is not None}
    return found
