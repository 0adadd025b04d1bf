"""A training that was stopped anywhere and resumed ends with the bytes of one that was never stopped."""

import dataclasses
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import cv2
import numpy as np
import pytest
import torch

from edgedistill.artifacts import RunDir, sha256_file
from edgedistill.data.manifest import Dataset
from edgedistill.errors import ArtifactError, ImageError, ModelError, UsageError
from edgedistill.images import InputSpec
from edgedistill.student import StudentSettings, train_student
from edgedistill.training import loop
from edgedistill.training.checkpoints import CHECKPOINT_FORMAT, load_tensors
from edgedistill.training.loader import Draw, open_store, prepared_spec
from edgedistill.training.losses import LossSettings, make_targets
from edgedistill.training.models import create_model
from edgedistill.training.optimizers import Phase, learning_rate

# Dropout, stochastic depth, CutMix, jitter and averaging: every source of chance is on.
SETTINGS = StudentSettings(
    name="test_efficientnet",
    weights="none",
    image_size=32,
    epochs=3,
    extra_epochs=2,
    batch_size=8,
    drop_rate=0.3,
    drop_path_rate=0.1,
    color_jitter=0.3,
    distillation=False,
    workers=0,
    device="cpu",
    checkpoint_minutes=0.0,
    tensorboard=False,
)


def make_dataset(root, count=56):
    rng = np.random.default_rng(0)
    numbers = np.arange(count)
    labels = (numbers % 3).astype(np.int32)
    paths = [str(root / f"im{n:03d}.jpg") for n in numbers]
    for path, label in zip(paths, labels, strict=True):
        pixels = rng.integers(0, 120, (90, 90, 3), dtype=np.uint8)
        pixels[:, :, label] += 100
        cv2.imwrite(path, pixels)
    split = np.where(numbers < 40, "train", np.where(numbers < 48, "val", "test"))
    return Dataset(
        ids=np.array([f"im{n:03d}.jpg" for n in numbers]),
        paths=np.array(paths),
        sha256=np.array([f"{n:064x}" for n in numbers]),
        labels=labels,
        groups=np.array([""] * count),
        splits=split,
        folds=np.where(numbers < 40, numbers % 2, -1).astype(np.int16),
        class_names=("a", "b", "c"),
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    torch.set_num_threads(1)
    return make_dataset(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def unbroken(dataset, tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("unbroken"))
    train_student(SETTINGS, dataset, run, soft_labels=None, out=run.model, resume=False)
    return run


def read_rows(run):
    lines = (run.hard_label_student / "metrics.jsonl").read_text().splitlines()
    timing = ("seconds", "images_per_s", "wait_fraction")
    return [{key: value for key, value in json.loads(line).items() if key not in timing} for line in lines]


def interrupt_after(checkpoint, writes, done):
    """Ctrl-C to this process once the checkpoint was written that many times."""
    seen: set[int] = set()
    while len(seen) < writes and not done.wait(0.001):
        if checkpoint.exists():
            seen.add(checkpoint.stat().st_mtime_ns)
    if len(seen) >= writes:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_training_stopped_again_and_again_ends_with_the_same_bytes(dataset, unbroken, tmp_path):
    run, stops = RunDir(tmp_path), 0
    for writes in (3, 7, 1, 5, 10_000):
        done = threading.Event()
        checkpoint = run.hard_label_student / "checkpoint.pt"
        watcher = threading.Thread(target=interrupt_after, args=(checkpoint, writes, done))
        try:
            try:
                watcher.start()  # it may interrupt at once
                train_student(SETTINGS, dataset, run, soft_labels=None, out=run.model, resume=True)
            finally:
                done.set()
                watcher.join()
        except KeyboardInterrupt:
            stops += 1
        if run.model.exists():
            break
    assert stops >= 2
    assert run.model.read_bytes() == unbroken.model.read_bytes()
    assert read_rows(run) == read_rows(unbroken)
    assert [row["epoch"] for row in read_rows(run)] == [1, 2, 3, 4, 5]
    assert not list(tmp_path.rglob("*.tmp"))


def test_two_runs_are_equal_and_a_seed_changes_them(dataset, unbroken, tmp_path):
    again, other = RunDir(tmp_path / "again"), RunDir(tmp_path / "other")
    settings = dataclasses.replace(SETTINGS, workers=1, cache_gib=0, checkpoint_minutes=5, tensorboard=True)
    train_student(settings, dataset, again, soft_labels=None, out=again.model, resume=False)
    assert again.model.read_bytes() == unbroken.model.read_bytes()
    assert list((again.hard_label_student / "tensorboard").glob("events*"))
    settings = dataclasses.replace(SETTINGS, seed=1, checkpoint_minutes=5)
    train_student(settings, dataset, other, soft_labels=None, out=other.model, resume=False)
    assert other.model.read_bytes() != unbroken.model.read_bytes()


def make_job(dataset, folder, *, epochs=1, average=2, settings=SETTINGS):
    rows = dataset.rows("train")
    draw = Draw(np.arange(len(rows)), dataset.labels[rows], 8, balanced=False, seed=1)
    spec = InputSpec(height=32, width=32)
    phases = [Phase("first", epochs, draw, 1e-3, 1e-5)]
    if average:
        phases.append(Phase("average", average, draw, 1e-3, 1e-3, average=True))
    return loop.Job(
        title="test",
        folder=folder,
        settings=settings,
        identity={"lr": settings.lr, "soft_labels": "abc"},
        store=open_store(dataset.paths[rows], prepared_spec(spec), cache_gib=None),
        targets=make_targets(dataset.labels[rows], 3),
        phases=tuple(phases),
        loss=LossSettings(),
        spec=spec,
        augment=settings.augmentation(spec),
    )


def network():
    torch.manual_seed(0)
    return create_model("test_efficientnet", class_count=3)


def test_the_result_is_the_mean_of_the_last_checkpoints(dataset, tmp_path):
    ends = []
    for count in (1, 2):
        averaged = loop.train(make_job(dataset, tmp_path / str(count), average=count), network(), resume=False)
        saved = load_tensors(tmp_path / str(count) / "checkpoint.pt", format=CHECKPOINT_FORMAT)
        ends.append(saved["model"])
    for name, parameter in averaged.named_parameters():
        assert torch.allclose(parameter, (ends[0][name] + ends[1][name]) / 2, atol=1e-6), name


def test_work_made_with_other_settings_is_not_resumed(dataset, tmp_path):
    job = make_job(dataset, tmp_path, average=0)
    loop.train(job, network(), resume=False)
    with pytest.raises(UsageError, match="holds work already; go on with --resume"):
        loop.train(job, network(), resume=False)
    other = dataclasses.replace(job, identity=dict(job.identity) | {"lr": 5.0})
    with pytest.raises(ArtifactError, match=r"checkpoint.pt: made with lr=0.002 \(now 5.0\)"):
        loop.train(other, network(), resume=True)
    resized = dataclasses.replace(job, identity=dict(job.identity) | {"crop_min": 0.875, "crop_max": 1.0})
    with pytest.raises(
        ArtifactError, match=r"checkpoint.pt: made with crop_max=0.875 \(now 1.0\)"
    ):  # before it had a name
        loop.train(resized, network(), resume=True)
    as_before = dataclasses.replace(job, identity=dict(job.identity) | {"crop_min": 0.875, "crop_max": 0.875})
    loop.train(as_before, network(), resume=True)
    job.checkpoint.write_bytes(job.checkpoint.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match=r"checkpoint.pt: "):
        loop.train(job, network(), resume=True)


def test_metrics_beyond_the_checkpoint_are_dropped(dataset, tmp_path):
    job = make_job(dataset, tmp_path, average=0)
    loop.train(job, network(), resume=False)
    with job.metrics.open("a") as file:
        file.write('{"epoch": 2, "phase": "first"}\n{"epoch": 3, "pha')
    loop.train(job, network(), resume=True)
    assert [json.loads(line)["epoch"] for line in job.metrics.read_text().splitlines()] == [1]


def test_a_diverged_training_says_so_and_keeps_the_last_good_checkpoint(dataset, tmp_path):
    job = make_job(dataset, tmp_path, average=0)
    broken = network()
    with torch.no_grad():
        broken.conv_stem.weight[0] = float("nan")
    with pytest.raises(ModelError, match=r"no longer a finite number in epoch 1.*lower --lr"):
        loop.train(job, broken, resume=False)
    assert not job.checkpoint.exists()


def test_a_damaged_image_leaves_no_half_state(dataset, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8" + b"x" * 50)
    paths = dataset.paths.astype("U500")
    paths[5] = str(broken)
    run = RunDir(tmp_path / "run")
    with pytest.raises(ImageError, match=r"broken\.jpg"):
        train_student(
            SETTINGS, dataclasses.replace(dataset, paths=paths), run, soft_labels=None, out=run.model, resume=False
        )
    assert not [path for path in run.root.rglob("*") if path.is_file()]


def test_the_rate_rises_then_falls_on_a_cosine(dataset):
    draw = Draw(np.arange(40), np.zeros(40, np.int32), 8, balanced=False, seed=0)
    phase = Phase("first", 4, draw, 1.0, 0.1, warmup_epochs=1.0)
    rates = [learning_rate(phase, epoch, step) for epoch in range(4) for step in range(5)]
    assert rates[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert rates[5] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[5:]))
    assert 0.1 < rates[-1] < 0.12
    constant = Phase("average", 2, draw, 0.3, 0.3)
    assert {learning_rate(constant, epoch, step) for epoch in range(2) for step in range(5)} == {0.3}


SCRIPT = """
import sys
from pathlib import Path
from edgedistill.artifacts import RunDir
from edgedistill.data.manifest import read_dataset
from edgedistill.student import StudentSettings, train_student
from edgedistill.teacher import TeacherSettings, train_teachers
import torch
torch.set_num_threads(1)
common = dict(name="test_efficientnet", weights="none", image_size=32, batch_size=8, workers=1, device="cpu",
              checkpoint_minutes=0.0, drop_rate=0.3)
run = RunDir(Path(sys.argv[1]))
dataset = read_dataset(Path(sys.argv[2]))
soft = train_teachers(TeacherSettings(epochs=4, **common), dataset, run, resume=True)
train_student(StudentSettings(epochs=4, extra_epochs=2, **common), dataset, run, soft_labels=soft, out=run.model,
              resume=True)
"""


@pytest.mark.slow
def test_kill_9_at_random_moments_changes_no_bit(tmp_path):
    from edgedistill.data.manifest import write_dataset

    (tmp_path / "images").mkdir()
    write_dataset(make_dataset(tmp_path / "images"), tmp_path / "dataset.csv")

    def start(name):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / name), str(tmp_path / "dataset.csv")]
        return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)

    begin = time.monotonic()
    assert start("whole").wait() == 0
    duration = time.monotonic() - begin
    chance, kills = random.Random(int(time.time())), 0
    while not (tmp_path / "broken" / "model.pt").exists():
        process = start("broken")
        try:
            # Until six kills landed; imports take the first half of the time, so kills come after them.
            process.wait(timeout=duration * chance.uniform(0.5, 0.9) if kills < 6 else None)
            assert process.returncode == 0, process.stderr.read().decode()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
    assert kills >= 1
    files = ["model.pt", "soft_labels/label.log_probs.npy", "teacher/fold-0/model.pt", "teacher/fold-1/model.pt"]
    for name in files:
        assert sha256_file(tmp_path / "broken" / name) == sha256_file(tmp_path / "whole" / name), name


def test_a_checkpoint_holds_plain_values_only(dataset, tmp_path):
    job = make_job(dataset, tmp_path, average=1)
    loop.train(job, network(), resume=False)
    values = torch.load(job.checkpoint, weights_only=True)
    assert values["epoch"] == 2
    assert values["identity"] == dict(job.identity)
