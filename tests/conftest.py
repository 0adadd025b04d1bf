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


def lively_network(dataset, network, seed):
    """An untrained network whose answers differ from image to image by whole logits: without this by 0.0001."""
    import torch

    from edgedistill.training.models import create_model, input_spec_for
    from edgedistill.training.predict import predict_logits, reestimate_batch_norm

    torch.manual_seed(seed)
    model, spec = create_model("test_efficientnet", pretrained=None, **network), input_spec_for("test_efficientnet", 40)
    reestimate_batch_norm(model, dataset.paths, spec, batch_size=44, limit=44, seed=0)
    logits = predict_logits(model, dataset.paths, spec)
    with torch.no_grad():
        layer, scale = model.get_classifier(), 1.5 / float(logits.std(axis=0).mean())
        layer.weight *= scale
        layer.bias.copy_(-scale * torch.from_numpy(logits.mean(axis=0)))
    return model


def teach_tiny(dataset, root, *, settings=None, architectures=("",)):
    """A run with two teachers of 40 px (the student has 32) and uniform soft labels in their name.

    ``architectures``: folders of the teachers, of which several lie in each fold.
    """
    from edgedistill.artifacts import RunDir, sha256_file
    from edgedistill.training.checkpoints import write_model
    from edgedistill.training.heads import scores_of
    from edgedistill.training.models import input_spec_for, model_kwargs_for
    from edgedistill.training.soft_labels import FoldResult, ids_hash, write_soft_labels

    run, results, teachers = RunDir(root), [], []
    width = len(dataset.outputs)
    network = {"class_count": width, "image_size": 40, "drop_rate": 0.0, "drop_path_rate": 0.0}
    for fold in range(2):
        own = dataset.ids[dataset.folds == fold]
        others = dataset.ids[(dataset.splits == "train") & (dataset.folds != fold)]
        zeros = np.zeros((len(own), width), np.float32)
        scores = np.full_like(zeros, np.log(1 / width)) if dataset.task is None else scores_of(dataset.task, zeros)
        for number, label in enumerate(architectures):
            path = run.teacher(fold, label) / "model.pt"
            write_model(
                path,
                lively_network(dataset, network, fold + 2 * number),
                architecture="test_efficientnet",
                model_kwargs=model_kwargs_for("test_efficientnet", **network),
                classes=dataset.outputs,
                input_spec=input_spec_for("test_efficientnet", 40),
                dataset_hash=dataset.hash,
                settings=settings or {},
                task=dataset.task,
            )
            result = FoldResult(fold, own, scores, ids_hash(others), 1, 1, "test_efficientnet", sha256_file(path))
            teachers.append(result.teacher() | {"label": label})
        results.append(result)
    write_soft_labels(run.soft_labels, dataset, results, teachers=teachers)
    return run


@pytest.fixture(scope="session")
def taught_run(tiny_dataset, tmp_path_factory):
    return teach_tiny(tiny_dataset, tmp_path_factory.mktemp("taught"))


@pytest.fixture(scope="session")
def teach_run():
    return teach_tiny


@pytest.fixture
def torch_judges(monkeypatch):
    """Teachers judge with torch: converting each to OpenVINO takes longer than all that such a test asks of it."""
    from edgedistill.student import live_teachers

    def opened(model, spec, *, device, half, name):
        return live_teachers._TorchNetwork(model.to(device).eval(), half=half)

    monkeypatch.setattr(live_teachers, "open_network", opened)


@pytest.fixture(scope="session")
def heads_dataset(tiny_dataset):
    """The same images with a colour, two labels that may apply and a size; of some the colour is not known."""
    import dataclasses

    from edgedistill.tasks import Head, Task

    numbers = np.arange(len(tiny_dataset))
    task = Task(
        (
            Head("color", "softmax", ("blue", "green", "red")),
            Head("tags", "sigmoid", ("odd", "late")),
            Head("size", "regression", weight=0.5),
        )
    )
    color = np.where(numbers % 11 == 5, np.nan, tiny_dataset.labels)
    values = np.column_stack([color, numbers % 2, numbers > 20, 10 + numbers % 7]).astype(np.float32)
    return dataclasses.replace(tiny_dataset, task=task, values=values)


@pytest.fixture(scope="session")
def heads_run(heads_dataset, tmp_path_factory):
    return teach_tiny(heads_dataset, tmp_path_factory.mktemp("heads"))
