"""How far a choice was chance: what the val images would have said, had others of their kind been drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedistill.benchmarks.tuner.cascade import metric_of
from edgedistill.benchmarks.tuner.search import Search
from edgedistill.benchmarks.tuner.space import Deployment

RESAMPLES = 1000
COVERED = 0.95


@dataclass(frozen=True)
class Rival:
    """The best deployment of other networks. ``behind``: the chosen one's value less its; ``low``, ``high``: the 95%
    interval of that difference over val images that are drawn anew, the same for both (Efron's bootstrap, paired)."""

    deployment: Deployment
    behind: float
    low: float
    high: float

    @property
    def told_apart(self) -> bool:
        return self.low > 0

    def to_dict(self) -> dict[str, Any]:
        return {
            "key": self.deployment.key,
            "behind": round(self.behind, 6),
            "interval": [round(self.low, 6), round(self.high, 6)],
            "told_apart": self.told_apart,
        }


def closest_rival(search: Search, chosen: Deployment) -> Rival | None:
    """Of other students where any were measured, else of other networks of the same ones.

    None where nothing else meets the conditions, and for goal 'fps', whose value does not move with the metric.
    """
    if search.objective.goal == "fps" or search.value(chosen) < 0:
        return None
    others = [d for d in search.measured() if d.stages != chosen.stages and search.value(d) >= 0]
    names = {stage.student for stage in chosen.stages}
    strangers = [d for d in others if {stage.student for stage in d.stages} != names]
    found = next(iter(strangers or others), None)
    if found is None:
        return None
    low, high = _interval(search, chosen, found)
    return Rival(found, search.value(chosen) - search.value(found), low, high)


def metric_margin(search: Search, chosen: Deployment) -> float:
    """Half the 95% interval of the chosen one's metric, over val images drawn anew."""
    answers, classes, count = search.expected_answers(chosen)[0], len(search.students[0].labels), len(search.labels)
    rng = np.random.default_rng(search.seed)
    drawn = (rng.integers(0, count, count) for _ in range(RESAMPLES))
    found = [metric_of(answers[rows], search.labels[rows], classes, search.objective.metric) for rows in drawn]
    low, high = np.quantile(found, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(high - low) / 2


def _interval(search: Search, chosen: Deployment, other: Deployment) -> tuple[float, float]:
    """Of the difference of their values at the speeds that were measured."""
    pair = (chosen, other)
    answers = [search.expected_answers(deployment)[0] for deployment in pair]
    rates = [speed.fps if (speed := search.speed(deployment)) else 0.0 for deployment in pair]
    classes, metric, count = len(search.students[0].labels), search.objective.metric, len(search.labels)
    rng, differences = np.random.default_rng(search.seed), np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        rows = rng.integers(0, count, count)
        first, second = (
            search.objective.value(metric_of(found[rows], search.labels[rows], classes, metric), fps, p99_ms=0.0)
            for found, fps in zip(answers, rates, strict=True)
        )
        differences[number] = first - second
    low, high = np.quantile(differences, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)
