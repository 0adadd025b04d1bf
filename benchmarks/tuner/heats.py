"""What rounds say of speeds: the noise of a round, of a heat, and what is left of both in a mean over several.

Every heat measures the same reference deployment too, and speeds count as ratios to it, freed of what a round's cases have
in common: a machine that is slow for a minute is slow for all.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.benchmarks.timing import Slice, percentiles_ms

# What a case's FPS are apart by from one heat to the next, until so many degrees of freedom have shown it on this machine.
HEAT_ERROR, GUESSED_HEATS = 0.02, 4
# The longest latencies of a slice that the journal keeps. p99 of a heat may lie in one slow slice, all of which then counts:
# 1000 are 1% of 100,000 images, more than a heat has.
KEPT_LATEST = 1000


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


def speed_of(looks: Sequence[Look], *, level_fps: float, heat_error: float) -> Speed:
    """From the longest looks among ``looks``, at least one; ``level_fps``: the FPS of what they are ratios to."""
    top = max(look.level for look in looks)
    looks = [look for look in looks if look.level == top]
    rounds = sum(look.rounds for look in looks)
    ratio = math.exp(sum(look.rounds * look.log_ratio for look in looks) / rounds)
    error = math.sqrt(sum((look.rounds * look.error) ** 2 for look in looks)) / rounds
    error = math.hypot(error, heat_error * math.sqrt(sum(look.rounds**2 for look in looks)) / rounds)
    fps = ratio * level_fps
    timed = [look.percentiles for look in looks if look.percentiles]
    p50, p90, p99 = (statistics.median(column) for column in zip(*timed, strict=True)) if timed else (None,) * 3
    return Speed(fps, error * fps, rounds, top, p50, p90, p99)


def heat_error_of(looks: Mapping[str, Sequence[Look]]) -> float:
    """The standard deviation of one case's log FPS from heat to heat, beyond what its rounds explain: neighbours of the
    machine and places in memory last as long as a heat, and more rounds of it do not average them out. A guess, until
    enough cases were measured in several heats. ``looks``: of each case."""
    places = [(case, look.heat, look.log_ratio, look.error) for case, found in looks.items() for look in found]
    excess, freedom = between_heats(places)
    missing = max(0, GUESSED_HEATS - freedom)
    return math.sqrt(max(0.0, excess + missing * HEAT_ERROR**2) / (freedom + missing))


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


def latencies(result: Slice) -> list[Any]:
    """What the journal keeps of a slice's latencies: p50 and p90 in ms, how many there were, and the longest ones, of which
    p99 over all rounds is made; nothing in throughput mode."""
    found = percentiles_ms([result])
    if found is None:
        return []
    count = len(result.latency_us)
    longest = sorted(result.latency_us, reverse=True)[:KEPT_LATEST]
    return [found["p50"], found["p90"], count, [round(value / 1e3, 4) for value in longest]]


def percentiles(rounds: Sequence[Sequence[Any]]) -> tuple[float, ...]:
    """p50, p90 and p99 in ms of what `latencies` kept of each round; () where nothing was timed alone."""
    if not rounds or not all(rounds):
        return ()
    p50, p90, counts, longest = zip(*rounds, strict=True)
    total = sum(counts)
    latest = sorted(itertools.chain(*longest), reverse=True)
    p99 = latest[total - math.ceil(0.99 * total)]
    return statistics.median(p50), statistics.median(p90), p99
