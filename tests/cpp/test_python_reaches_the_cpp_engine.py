"""benchmarks/cpp_from_python: the C++ engine through ctypes answers as our Python engine, and its rows are whole."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from edgedistill.benchmarks.cpp_from_python import CppEngine, check_answers, measure
from edgedistill.benchmarks.inputs import InputSet
from edgedistill.benchmarks.target import Target
from edgedistill.benchmarks.timing import CandidateError
from edgedistill.errors import ModelError
from edgedistill.runtime import Engine
from edgedistill.runtime.network import Frame

pytestmark = [pytest.mark.cpp, pytest.mark.timeout(120)]


@pytest.fixture(autouse=True)
def programs(
    cpp_program: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEDISTILL_CPP_BIN", str(cpp_program("edgedistill-bench").parent))
    monkeypatch.setenv("EDGEDISTILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def engine(test_models: Path) -> Iterator[CppEngine]:
    made = CppEngine(test_models / "single", streams=2, batch=2, queue_size=9)
    yield made
    made.close()


def test_answers_come_in_order_and_errors_with_their_image(engine: CppEngine, test_models: Path) -> None:
    photos = [test_models / "photos" / name for name in ("red.jpg", "broken.jpg", "green.png")] * 20
    answers = list(engine.map(Frame(path.name, path) for path in photos))
    with Engine(test_models / "single", cache_dir=False) as python:
        expected = list(python.map(photos))
    assert [answer.name for answer in answers] == [path.name for path in photos]
    assert [answer.label for answer in answers] == [answer.label for answer in expected]
    assert [answer.error is None for answer in answers] == [True, False, True] * 20
    assert "broken.jpg" in str(answers[1].error)
    np.testing.assert_allclose(answers[0].probabilities, expected[0].probabilities, atol=1e-6)


def test_a_map_that_is_left_leaves_nothing_behind(engine: CppEngine, test_models: Path) -> None:
    red, green = (Frame(name, test_models / "photos" / name) for name in ("red.jpg", "green.png"))
    endless = engine.map(itertools.repeat(red))
    assert next(endless).label == "red"
    endless.close()
    assert [answer.label for answer in engine.map([green])] == ["green"]


def test_both_scopes_are_measured_at_batch_1_and_the_tuned_one(test_models: Path) -> None:
    target = Target.open(test_models / "single")
    images = InputSet("large.jpg", (test_models / "photos" / "large.jpg",))
    rows = measure(target, [images], rounds=2, seconds=0.05)
    assert [(row["scope"], row["batch"]) for row in rows] == [("files", 1), ("frames", 1)]
    for row in rows:
        for name in ("gain", "cpu_gain"):
            assert 0 < row[name]["min"] <= row[name]["median"] <= row[name]["max"]
        assert row["image_size_px"] == 32 and row["streams"] >= 1


def test_what_cannot_be_compared_is_refused(engine: CppEngine, test_models: Path) -> None:
    red, green = (Frame(name, test_models / "photos" / name) for name in ("red.jpg", "green.png"))
    with pytest.raises(CandidateError, match="C\\+\\+ says green, Python red"):
        check_answers(*engine.map([red, green]))
    with pytest.raises(ModelError, match="nowhere"):
        CppEngine(test_models / "nowhere", streams=1, batch=1, queue_size=2)
