"""The measuring loop inside every candidate's process: JSON lines in, slices of time out.

Standard library only, so that a peer's own environment can run it too: every candidate is timed by these lines.
Between two requests the process waits on its standard input and burns nothing; how much it did burn is reported.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WARM_UP_S = 0.3
WARM_UP_STEPS = 10
# Before each slice the caches hold another candidate's data: a short run that is not counted.
PRE_ROLL_SHARE = 0.05


@dataclass(frozen=True)
class Case:
    """One candidate in one scope on one input, ready to run; exactly one of ``step`` and ``run`` is set.

    ``step()`` answers one image from start to end (latency). ``run(seconds)`` keeps the machine busy for about that
    long and returns the number of images answered when the last answer is there (throughput). ``answer``: the class
    probabilities for the first image where they are at hand, by which two candidates can be seen to compute the same.
    """

    step: Callable[[], object] | None = None
    run: Callable[[float], int] | None = None
    precision: str = "f32"
    settings: dict[str, Any] = field(default_factory=dict)
    answer: list[float] = field(default_factory=list)


def measure(case: Case, seconds: float, *, clock: Callable[[], int] = time.perf_counter_ns) -> dict[str, Any]:
    """One slice: {"count": images, "seconds": elapsed, "latency_us": one per image, empty in throughput mode}.

    ``clock`` counts nanoseconds. The loop ends with the first answer after ``seconds``, and the time counts to it.
    """
    latencies_ns: list[int] = []
    start = before = clock()
    if case.run is not None:
        count = case.run(seconds)
        before = clock()
    elif case.step is not None:
        deadline = start + int(seconds * 1e9)
        while before < deadline:
            case.step()
            after = clock()
            latencies_ns.append(after - before)
            before = after
        count = len(latencies_ns)
    else:
        raise ValueError("a case needs a step or a run")
    return {
        "count": count,
        "seconds": (before - start) / 1e9,
        "latency_us": [round(value / 1e3, 1) for value in latencies_ns],
    }


def warm_up(case: Case) -> None:
    """Fills caches, lets libraries allocate and the clock rise; never counted."""
    if case.step is not None:
        for _ in range(WARM_UP_STEPS):
            case.step()
    measure(case, WARM_UP_S)


def serve(prepare: Callable[[dict[str, Any]], Case]) -> None:
    """Answers requests until standard input ends: {"do": "prepare", "case": KEY, ...}, {"do": "run", "case": KEY}.

    The answers go to what was standard output at the start; from then on prints of libraries land on standard error.
    """
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    cases: dict[str, Case] = {}
    idle_since, idle_cpu_since = time.perf_counter(), time.process_time()
    for line in sys.stdin:
        idle = {
            "idle_s": time.perf_counter() - idle_since,
            "idle_cpu_s": time.process_time() - idle_cpu_since,
        }
        try:
            reply = _handle(json.loads(line), cases, prepare)
        except Exception as error:  # the parent turns it into a row 'not measured: reason'
            reply = {"error": f"{type(error).__name__}: {error}"}
        channel.write(json.dumps(reply | idle) + "\n")
        channel.flush()
        idle_since, idle_cpu_since = time.perf_counter(), time.process_time()


def _handle(
    request: dict[str, Any], cases: dict[str, Case], prepare: Callable[[dict[str, Any]], Case]
) -> dict[str, Any]:
    if request["do"] == "prepare":
        case = cases[request["case"]] = prepare(request)
        warm_up(case)
        return {"precision": case.precision, "settings": case.settings, "answer": case.answer}
    case = cases[request["case"]]
    measure(case, PRE_ROLL_SHARE * request["seconds"])
    return measure(case, request["seconds"])
