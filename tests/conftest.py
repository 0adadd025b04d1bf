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


def manifest_of(paths, labels, *, splits, folds, class_names=("a", "b", "c")):
    """A manifest of pictures that lie in one folder; ``paths``, ``labels``, ``splits``, ``folds``: one each per picture."""
    from edgedistill.data.manifest import Dataset

    return Dataset(
        ids=np.array([Path(path).name for path in paths]),
        paths=np.array([str(path) for path in paths]),
        sha256=np.array([f"{n:064x}" for n in range(len(paths))]),
        labels=labels,
        groups=np.array([""] * len(paths)),
        splits=splits,
        folds=folds.astype(np.int16),
        class_names=class_names,
    )


@pytest.fixture(scope="session")
def dataset_of():
    return manifest_of


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory):
    """44 images of three classes: 32 train in two folds, 6 val, 6 test."""
    import torch

    from edgedistill.training.seeds import generator

    torch.set_num_threads(1)
    root, numbers = tmp_path_factory.mktemp("images"), np.arange(44)
    labels = (numbers % 3).astype(np.int32)
    paths = [str(root / f"im{n:03d}.png") for n in numbers]
    for path, label in zip(paths, labels, strict=True):
        pixels = generator(0, path[-9:]).integers(0, 120, (40, 40, 3), dtype=np.uint8)
        pixels[:, :, label] += 100
        cv2.imwrite(path, pixels)
    return manifest_of(
        paths,
        labels,
        splits=np.where(numbers < 32, "train", np.where(numbers < 38, "val", "test")),
        folds=np.where(numbers < 32, numbers // 3 % 2, -1),
    )


@pytest.fixture(scope="session")
def taught_run(tiny_dataset, tmp_path_factory):
    """A run with two teachers of 40 px (the student has 32) and the labels that they wrote."""
    import torch

    from edgedistill.artifacts import RunDir, sha256_file
    from edgedistill.training.checkpoints import write_model
    from edgedistill.training.models import create_model, input_spec_for, model_kwargs_for
    from edgedistill.training.soft_labels import FoldResult, ids_hash, write_soft_labels

    run, results = RunDir(tmp_path_factory.mktemp("taught")), []
    for fold in range(2):
        torch.manual_seed(fold)
        network = {"class_count": 3, "image_size": 40, "drop_rate": 0.0, "drop_path_rate": 0.0}
        write_model(
            run.teacher(fold) / "model.pt",
            create_model("test_efficientnet", pretrained=None, **network),
            architecture="test_efficientnet",
            model_kwargs=model_kwargs_for("test_efficientnet", **network),
            classes=tiny_dataset.class_names,
            input_spec=input_spec_for("test_efficientnet", 40),
            dataset_hash=tiny_dataset.hash,
            settings={},
        )
        own = tiny_dataset.ids[tiny_dataset.folds == fold]
        others = tiny_dataset.ids[(tiny_dataset.splits == "train") & (tiny_dataset.folds != fold)]
        log_probs = np.full((len(own), 3), np.log(1 / 3), np.float32)
        digest = sha256_file(run.teacher(fold) / "model.pt")
        results.append(FoldResult(fold, own, log_probs, ids_hash(others), 1, 1, "test_efficientnet", digest))
    write_soft_labels(run.soft_labels, tiny_dataset, results)
    return run
