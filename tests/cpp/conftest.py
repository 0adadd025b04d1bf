"""What the tests of the C++ programs share. They run what `make cpp` built, and fail where that is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = Path(os.environ.get("EDGEDISTILL_CPP_BUILD", ROOT / "build" / "cpp"))


@pytest.fixture(scope="session")
def cpp_program() -> Callable[[str], Path]:
    """Name -> path of a built program."""

    def find(name: str) -> Path:
        path = BUILD / "bin" / name
        if not path.is_file():
            pytest.fail(f"{path} is not built; run 'make cpp' first")
        return path

    return find


@pytest.fixture(scope="session")
def test_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The deployables and pictures of make_models.py. Treat them as read-only."""
    folder = tmp_path_factory.mktemp("models") / "models"
    subprocess.run([sys.executable, str(Path(__file__).with_name("make_models.py")), str(folder)], check=True)
    return folder
