"""benchmarks/cpp_runtime: ratios are taken where they belong, and what could not be measured is told, never passed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from edgedistill.benchmarks.cpp_peers import Blocks, Limit
from edgedistill.benchmarks.cpp_runtime import Measured, Run, judge_limit
from edgedistill.benchmarks.plan import BenchSettings, Entry, cpp_disagrees
from edgedistill.benchmarks.timing import CandidateError, Slice, Spread
from edgedistill.errors import EdgedistillError


class Sliced:
    def __init__(self, slice: Slice) -> None:
        self.slice = slice

    def run(self, seconds: float) -> Slice:
        return self.slice


@pytest.fixture
def run() -> Run:
    return Run(BenchSettings(path=Path()), None, (), ("f32", "int8"), "int8")  # type: ignore[arg-type]


def entry(candidate: str, precision: str, fps: float | None, **more: object) -> Entry:
    slices = () if fps is None else (Slice(round(fps * 2), 2.0), Slice(round(fps * 4), 2.0))
    one = Entry(candidate, "files", "throughput", "x.jpg", precision, slices=slices)
    return dataclasses.replace(one, **more)  # type: ignore[arg-type]


def test_the_limit_is_the_sum_of_all_processes() -> None:
    one = Limit((Sliced(Slice(100, 1.0)), Sliced(Slice(300, 1.5)))).run(1.0)  # type: ignore[arg-type]
    assert (one.count, one.fps) == (400, pytest.approx(300))


def test_latency_is_compared_block_by_block() -> None:
    blocks = Blocks(((2.0, 4.0), (4.0, 9.0), (3.0, 6.0)), ((2.0, 5.0), (2.0, 9.0), (3.0, 5.0)))
    assert blocks.ratio(50) == Spread(1.0, 1.0, 2.0)
    assert blocks.ratio(99) == Spread(1.0, 0.8, 1.2)
    assert blocks.to_dict()["ours"]["p50_ms"] == 3.0 and blocks.to_dict()["bare"]["p99_ms"] == 5.0


def test_a_figure_that_was_not_measured_is_never_reached(run: Run) -> None:
    entries = [entry("edgedistill-cpp", "f32", 96), entry("limit", "f32", 100), entry("edgedistill-cpp", "int8", 200)]
    missing = entry("limit", "int8", None, reason="taskset is not installed")
    judge_limit(run, "x.jpg", Measured([*entries, missing], [*entries, missing]))
    (figure,) = run.figures
    assert figure.value == Spread(0.96, 0.96, 0.96) and figure.reached
    assert "taskset is not installed" in run.not_judged[0]["reason"] and not run.reached
    run.not_judged.clear()
    assert run.reached

    def broken() -> Spread:
        raise CandidateError("died")

    run.judge("start", broken, 1.0)
    assert not run.reached


def test_a_peer_at_openvinos_defaults_is_met_at_the_precision_that_it_reached(run: Run) -> None:
    planned = [entry("naive-cpp-default", "f32", 50)]
    for reached, expected in (("bf16", "f32"), ("int8", "int8"), ("f32", "f32")):
        found = Measured(planned, [dataclasses.replace(planned[0], precision=reached)])
        assert found.reached(run, "naive-cpp-default", "throughput", "x.jpg") == expected
        assert found.slices("naive-cpp-default", "throughput", "x.jpg"), "it is found by what was asked for"
    with pytest.raises(EdgedistillError, match="not planned"):
        found.slices("naive-cpp", "throughput", "x.jpg")


def test_answers_of_both_languages_are_compared_where_they_did_the_same() -> None:
    python = entry("edgedistill", "f32", 1, answer=(0.7, 0.3))
    assert cpp_disagrees([python, entry("edgedistill-cpp", "f32", 1, answer=(0.7004, 0.2996))], 1e-3) == []
    assert cpp_disagrees([python, entry("edgedistill-cpp", "int8", 1, answer=(0.1, 0.9))], 1e-3) == []
    assert cpp_disagrees([python, entry("edgedistill-cpp", "f32", 1, answer=(0.69, 0.31))], 1e-3) == ["files f32: 0.01"]
    nan = float("nan")
    assert cpp_disagrees([python, entry("edgedistill-cpp", "f32", 1, answer=(nan, nan))], 1e-3) == ["files f32: nan"]
