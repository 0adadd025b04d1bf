"""How far a choice was chance: what the val images would have said, had others of their kind been drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgedistill.benchmarks.tuner.known import Known
from edgedistill.benchmarks.tuner.space import Deployment

RESAMPLES = 1000
RECHOSEN = 200  # resamples in which the choice among all is made anew
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


def closest_rival(known: Known, chosen: Deployment) -> Rival | None:
    """Of other students where any were measured, else of other networks of the same ones.

    None where nothing else meets the conditions, and for goal 'fps', whose value does not move with the metric.
    """
    if known.objective.goal == "fps" or known.value(chosen) < 0:
        return None
    others = [d for d in known.measured() if d.stages != chosen.stages and known.value(d) >= 0]
    names = {stage.student for stage in chosen.stages}
    strangers = [d for d in others if {stage.student for stage in d.stages} != names]
    found = next(iter(strangers or others), None)
    if found is None:
        return None
    low, high = _interval(known, chosen, found)
    return Rival(found, known.value(chosen) - known.value(found), low, high)


def metric_margin(known: Known, chosen: Deployment) -> float:
    """Half the 95% interval of the chosen one's metric, over val images drawn anew."""
    metric, count = known.scorer(chosen), len(known.truth)
    rng = np.random.default_rng(known.seed)
    found = [metric(rng.integers(0, count, count)) for _ in range(RESAMPLES)]
    low, high = np.quantile(found, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(high - low) / 2


def _interval(known: Known, chosen: Deployment, other: Deployment) -> tuple[float, float]:
    """Of the difference of their values at the speeds that were measured."""
    pair = (chosen, other)
    metrics = [known.scorer(deployment) for deployment in pair]
    rates = [speed.fps if (speed := known.speed(deployment)) else 0.0 for deployment in pair]
    count = len(known.truth)
    rng, differences = np.random.default_rng(known.seed), np.empty(RESAMPLES)
    for number in range(RESAMPLES):
        rows = rng.integers(0, count, count)
        first, second = (
            known.objective.value(metric(rows), fps, p99_ms=0.0) for metric, fps in zip(metrics, rates, strict=True)
        )
        differences[number] = first - second
    low, high = np.quantile(differences, [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)


def optimism(known: Known, deployments: Sequence[Deployment], *, seed: int = 0) -> float:
    """By how much the chosen one's val metric is too good because it was chosen on val (Efron's bootstrap of the choice).

    For resampled val images the best of ``deployments`` is chosen anew (with the speeds that were measured), and its
    metric on the resample is held against its metric on all images; the mean difference, 0 or more.
    """
    metrics = [known.scorer(deployment) for deployment in deployments]
    speeds = [known.judged_speed(deployment) or (0.0, math.inf) for deployment in deployments]
    whole = [known.metric(deployment) for deployment in deployments]
    count, rng, excess = len(known.truth), np.random.default_rng(seed), []
    for _ in range(RECHOSEN):
        rows = rng.integers(0, count, count)
        values = [metric(rows) for metric in metrics]
        scored = [
            known.objective.value(value, fps, p99_ms=p99_ms, reference=known.reference_metric)
            for value, (fps, p99_ms) in zip(values, speeds, strict=True)
        ]
        best = int(np.argmax(scored))
        excess.append(values[best] - whole[best])
    return max(0.0, float(np.mean(excess)))
