"""cpp_engine.py where edgedistill_cpp is not built, or not this one: every other part works, and the remedy is named."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

import edgedistill
from edgedistill.cli import main
from edgedistill.errors import UsageError
from edgedistill.runtime import CppEngine
from edgedistill.runtime.cpp_engine import load_extension
from edgedistill.runtime.predict import PredictSettings


@pytest.fixture
def not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "edgedistill_cpp", None)


@pytest.mark.usefixtures("not_built")
def test_an_engine_that_is_not_built_says_how_to_build_it(make: Any) -> None:
    with pytest.raises(UsageError, match=r"'make cpp-python' or 'pip install ./runtime/cpp/python'"):
        CppEngine(make.deployable())


@pytest.mark.usefixtures("not_built")
def test_predict_says_so_too_and_answers_without_it(
    make: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = ["edgedistill", "predict", str(make.deployable()), str(make.photo("red"))]
    for options, code, says in ((["--engine", "cpp"], 2, "make cpp-python"), ([], 0, "red")):
        monkeypatch.setattr(sys, "argv", [*arguments, *options])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == code
        assert says in "".join(capfd.readouterr())


def test_a_module_of_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    other = types.ModuleType("edgedistill_cpp")
    other.__version__ = "0.0.9"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "edgedistill_cpp", other)
    with pytest.raises(UsageError, match=f"version 0.0.9, edgedistill of {edgedistill.__version__}.*make cpp-python"):
        load_extension()


def test_another_engine_is_refused() -> None:
    with pytest.raises(UsageError, match="--engine rust, expected python or cpp"):
        PredictSettings("model.xml", ("photo.jpg",), engine="rust")  # type: ignore[arg-type]
