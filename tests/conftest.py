"""What several test files need: a small folder of real-looking photographs and a finished run made from it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

# A shell's background jobs start with interrupts ignored, and so would every child of theirs: tests send them.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test here may depend on whether the C++ runtime happens to be built; those of tests/cpp say where it is.
os.environ["EDGEDISTILL_CPP_BIN"] = ""

# Small enough for seconds, large enough for two folds, a val and a test split.
IMAGES_PER_CLASS = 30
TINY = (
    "--teacher mbv3s050 --student mbv3s050 --teacher-weights none --student-weights none --folds 2 --image-size 32"
    " --teacher-epochs 2 --epochs 2 --extra-epochs 1 --batch-size 8 --teacher-batch-size 8 --test-fraction 0.25"
).split()


def write_photos(root: Path, *, per_class: int = IMAGES_PER_CLASS, suffix: str = ".jpg", seed: int = 0) -> Path:
    """Folder per class: discs and bars on noise, 60 to 99 pixels a side."""
    rng = np.random.default_rng(seed)
    for label in ("bar", "disc"):
        (root / label).mkdir(parents=True)
        for number in range(per_class):
            height, width = (int(v) for v in rng.integers(60, 100, 2))
            image = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
            color = tuple(int(v) for v in rng.integers(130, 256, 3))
            x, y = (int(v) for v in rng.integers(20, 40, 2))
            if label == "disc":
                cv2.circle(image, (x, y), 15, color, -1)
            else:
                cv2.rectangle(image, (x, y - 18), (x + 6, y + 18), color, -1)
            cv2.imwrite(str(root / label / f"{number:03d}{suffix}"), image)
    return root


def run_cli(*arguments: str | Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`edgedistill ARGUMENTS` in a process of its own."""
    command = [sys.executable, "-m", "edgedistill", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert not check or result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("photos") / "data")


@pytest.fixture(scope="session")
def cli() -> Callable[..., subprocess.CompletedProcess[str]]:
    return run_cli


@pytest.fixture(scope="session")
def make_photos() -> Callable[..., Path]:
    return write_photos


@pytest.fixture(scope="session")
def tiny_options() -> list[str]:
    return list(TINY)


@pytest.fixture(scope="session")
def tiny_run(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, exported run: model.pt, evaluation, openvino/. Treat it as read-only."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    run_cli("distill", "--data", photos, "--out", out, *TINY)
    run_cli("export-openvino", out / "model.pt", "--int8", "off", "--test-parity")
    return out
