"""Live teachers judge the student's own view of images that they never trained on, and a resumed run stays exact."""

import contextlib
import dataclasses
import os
import signal
import threading

import numpy as np
import pytest
import torch

from edgedistill.artifacts import RunDir, read_json, sha256_file, write_json
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.images import InputSpec, prepare
from edgedistill.student import LIVE_DEFAULTS, StudentSettings, train_student
from edgedistill.student.live_teachers import (
    LiveTeachers,
    Teacher,
    find_teachers,
    open_network,
    open_teachers,
    teacher_view,
)
from edgedistill.tasks import Head, Task
from edgedistill.training import loop
from edgedistill.training.checkpoints import read_model
from edgedistill.training.losses import Targets
from edgedistill.training.mixing import Mixing, draw_partners, mix
from edgedistill.training.predict import at_size, network_input
from edgedistill.training.seeds import generator
from edgedistill.training.soft_labels import ids_hash

CPU = torch.device("cpu")
SETTINGS = StudentSettings(
    name="test_efficientnet",
    weights="none",
    image_size=32,
    epochs=2,
    extra_epochs=1,
    final_data="train+val",  # val images are judged by both teachers
    batch_size=8,
    cutmix_probability=1.0,
    workers=0,
    device="cpu",
    checkpoint_minutes=0.0,
    tensorboard=False,
    live_teachers=True,
    **LIVE_DEFAULTS,
)


def test_partners_share_a_fold_and_nobody_is_its_own():
    folds = np.array([0, 1, 2, 0, 1, 0, -1, -1, 1, 0], np.int16)
    for step in range(50):
        partners = draw_partners(generator(0, step), len(folds), folds)
        assert np.array_equal(folds[partners], folds)
        assert sorted(partners.tolist()) == list(range(len(folds)))
        assert [place for place, partner in enumerate(partners) if place == partner] == [2]  # its fold's only one
    plain = draw_partners(generator(0, 1), 10)
    assert np.array_equal(plain, generator(0, 1).permutation(10))  # what earlier runs drew


@pytest.mark.parametrize("mixing", [Mixing(cutmix=1.0), Mixing(mixup=1.0)])
def test_images_are_mixed_within_the_fold_alone(mixing):
    folds = np.array([0, 1] * 6, np.int16)
    for step in range(20):
        images = torch.from_numpy(folds.astype(np.uint8)).view(-1, 1, 1, 1).expand(-1, 8, 8, 3).clone()
        start = Targets(torch.eye(12), torch.eye(12))
        mix(images, start, mixing, seed=0, epoch=0, step=step, folds=folds)
        assert torch.equal(images[:, 0, 0, 0], torch.from_numpy(folds.astype(np.uint8)))
        assert (images.flatten(1).float().std(dim=1) == 0).all()


def test_each_image_is_judged_by_its_held_out_teacher_and_val_by_all():
    def says(label, probability):
        rest = (1 - probability) / 2
        row = torch.full((3,), rest).index_fill(0, torch.tensor([label]), probability).log() + 5.0
        return lambda inputs: row.expand(len(inputs), 3)

    spec = InputSpec(height=8, width=8)
    teachers = [Teacher(0, says(0, 0.9), spec), Teacher(1, says(1, 0.7), spec)]
    folds = np.array([0, 1, -1, 1, 0], np.int16)
    judge = LiveTeachers(teachers, folds, temperature=1.0)
    rows = np.array([3, 2, 0, 0, 4, 1])
    answers = judge(torch.zeros(6, 8, 8, 3, dtype=torch.uint8), rows).numpy()
    first, second = [0.9, 0.05, 0.05], [0.15, 0.7, 0.15]
    both = np.mean([first, second], axis=0).tolist()
    assert np.allclose(answers, [second, both, first, first, first, second], atol=1e-6)
    softened = dataclasses.replace(judge, temperature=2.0)(torch.zeros(6, 8, 8, 3, dtype=torch.uint8), rows).numpy()
    roots = np.sqrt(answers)
    assert np.allclose(softened, roots / roots.sum(axis=1, keepdims=True), atol=1e-5)


def test_every_head_is_judged_by_its_held_out_teachers():
    task = Task((Head("color", "softmax", ("a", "b")), Head("tags", "sigmoid", ("x",)), Head("size", "regression")))

    def says(*scores):
        return lambda inputs: torch.tensor(scores).expand(len(inputs), 4)

    spec = InputSpec(height=8, width=8)
    teachers = [
        Teacher(0, says(2.0, 0.0, 4.0, 1.0), spec, temperature=2.0, weight=3.0),  # two architectures in fold 0
        Teacher(0, says(0.0, 0.0, 0.0, 5.0), spec, weight=1.0),
        Teacher(1, says(0.0, 6.0, -2.0, -3.0), spec),
    ]
    judge = LiveTeachers(teachers, np.array([0, 1, -1], np.int16), 1.0, task)
    answers = judge(torch.zeros(3, 8, 8, 3, dtype=torch.uint8), np.array([1, 0, 2])).numpy()

    def shares(color, tag, size):
        first, other = np.exp(color) / np.exp(color).sum(), 1 / (1 + np.exp(-tag))
        return np.array([*first, other, size])

    one, two, three = shares([1.0, 0.0], 2.0, 1.0), shares([0.0, 0.0], 0.0, 5.0), shares([0.0, 6.0], -2.0, -3.0)
    assert np.allclose(answers, [three, (3 * one + two) / 4, (3 * one + two + three) / 5], atol=1e-6)
    softened = dataclasses.replace(judge, temperature=2.0)(torch.zeros(1, 8, 8, 3, dtype=torch.uint8), np.array([1]))
    assert np.allclose(softened.numpy(), [shares([0.0, 3.0], -1.0, -3.0)], atol=1e-6)


@pytest.mark.usefixtures("torch_judges")
def test_a_student_with_several_heads_learns_from_live_teachers(heads_dataset, heads_run, tmp_path, monkeypatch):
    asked, real = [], LiveTeachers.__call__

    def judged(self, images, rows):
        asked.append(real(self, images, rows))
        return asked[-1]

    monkeypatch.setattr(LiveTeachers, "__call__", judged)
    run, settings = RunDir(tmp_path), dataclasses.replace(SETTINGS, epochs=1)
    train_student(settings, heads_dataset, run, soft_labels=heads_run.soft_labels, out=run.model, resume=False)
    assert len(read_model(run.model).settings["teachers"]) == 2
    answers = torch.cat(asked)
    assert answers.shape[1] == 6 and torch.allclose(answers[:, :3].sum(dim=1), torch.ones(len(answers)), atol=1e-5)
    assert ((answers[:, 3:5] > 0) & (answers[:, 3:5] < 1)).all()


def test_teachers_see_the_students_pixels_at_their_own_size_and_scale():
    images = torch.from_numpy(generator(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8))
    spec = InputSpec(height=16, width=16, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    assert torch.equal(teacher_view(images, spec), network_input(images, spec))
    flat = torch.full((2, 16, 16, 3), 100, dtype=torch.uint8)
    larger = teacher_view(flat, spec.resized(24))
    assert larger.shape == (2, 3, 24, 24)
    assert torch.allclose(larger, teacher_view(flat, spec)[:, :, :1, :1].expand_as(larger), atol=1e-4)


@pytest.mark.parametrize(("height", "width", "size"), [(40, 40, 32), (300, 300, 96), (101, 67, 32), (24, 24, 40)])
def test_pixels_of_another_size_are_reduced_as_deployed(height, width, size):
    pixels = generator(1).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    spec = InputSpec(height=size, width=size, resize="center-crop", crop_fraction=0.9)
    whole = InputSpec(height=size, width=size)
    deployed = np.stack([prepare(image, whole) for image in pixels])
    ours = at_size(torch.from_numpy(pixels), spec).numpy()
    assert ours.shape == deployed.shape
    assert np.abs(ours - deployed).max() <= 1.01  # 8-bit steps of two roundings, and of OpenCV's fixed-point weights


def test_teachers_see_the_detail_that_they_were_trained_with(tiny_dataset, taught_run, tmp_path, monkeypatch):
    seen, learnt = set(), set()
    real_judge, real_forward = LiveTeachers.__call__, loop.network_input

    def judged(self, images, rows):
        seen.add((images.dtype, *images.shape[1:3]))
        return real_judge(self, images, rows)

    def forwarded(images, spec):
        learnt.add(images.shape[1:3])
        return real_forward(images, spec)

    monkeypatch.setattr(LiveTeachers, "__call__", judged)
    monkeypatch.setattr(loop, "network_input", forwarded)
    run = RunDir(tmp_path)
    settings = dataclasses.replace(SETTINGS, epochs=1, test_size=36, fixres_epochs=1)
    train_student(settings, tiny_dataset, run, soft_labels=taught_run.soft_labels, out=run.model, resume=False)
    assert seen == {(torch.uint8, 40, 40)}  # the teachers' own pixels, before and during FixRes
    assert learnt == {(32, 32), (36, 36)}
    saved = read_model(run.model)
    assert (saved.input_spec.height, saved.settings["view_size"]) == (36, [40, 40])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_the_engine_on_a_cpu_says_what_torch_says(taught_run, capsys):
    loaded = read_model(taught_run.teacher(0) / "model.pt")
    network = open_network(loaded.model, loaded.input_spec, device=CPU, half=False, name="teacher")
    assert type(network).__name__ == "_OpenVinoNetwork"
    for count in (1, 5, 3):
        inputs = torch.randn(count, 3, 40, 40, generator=torch.Generator().manual_seed(count))
        with torch.no_grad():
            assert torch.allclose(network(inputs), loaded.model(inputs), atol=1e-3)

    class Strange(torch.nn.Module):
        """What a trace cannot follow: OpenVINO would answer with the example's numbers."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, inputs):
            return torch.from_numpy(inputs.mean(dim=(2, 3)).detach().numpy().round(2).cumsum(1)) + len(inputs)

    answer = open_network(Strange(), loaded.input_spec, device=CPU, half=False, name="strange.pt")
    assert type(answer).__name__ == "_TorchNetwork"
    assert "strange.pt: torch judges, which is slower" in capsys.readouterr().err


def interrupt_after(checkpoint, writes, done):
    seen: set[int] = set()
    while len(seen) < writes and not done.wait(0.001):
        with contextlib.suppress(FileNotFoundError):  # a finished training removes it
            seen.add(checkpoint.stat().st_mtime_ns)
    if len(seen) >= writes:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_with_live_teachers_resumes_to_the_same_bytes(tiny_dataset, taught_run, tmp_path):
    whole, broken, stops = RunDir(tmp_path / "whole"), RunDir(tmp_path / "broken"), 0
    train_student(SETTINGS, tiny_dataset, whole, soft_labels=taught_run.soft_labels, out=whole.model, resume=False)
    for writes in (4, 10_000):
        done = threading.Event()
        watcher = threading.Thread(
            target=interrupt_after, args=(broken.student / "checkpoint.pt", writes, done), daemon=True
        )
        watcher.start()
        try:
            try:
                train_student(
                    SETTINGS, tiny_dataset, broken, soft_labels=taught_run.soft_labels, out=broken.model, resume=True
                )
            finally:
                done.set()
                watcher.join()
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 1
    assert broken.model.read_bytes() == whole.model.read_bytes()
    saved = read_model(whole.model).settings
    assert saved["live_teachers"] is True
    assert saved["teachers"] == [sha256_file(taught_run.teacher(fold) / "model.pt") for fold in range(2)]
    stored = dataclasses.replace(SETTINGS, live_teachers=False)
    with pytest.raises(ArtifactError, match=r"model.pt: made with live_teachers=True \(now False\)"):
        train_student(stored, tiny_dataset, whole, soft_labels=taught_run.soft_labels, out=whole.model, resume=True)


def test_teachers_that_are_gone_or_saw_the_fold_are_refused(tiny_dataset, taught_run, tmp_path):
    files = find_teachers(taught_run.soft_labels, tiny_dataset)
    assert [(file.fold, file.path) for file in files] == [(k, taught_run.teacher(k) / "model.pt") for k in range(2)]
    elsewhere = tmp_path / "run" / "soft_labels"
    elsewhere.mkdir(parents=True)
    for path in taught_run.soft_labels.iterdir():
        (elsewhere / path.name).write_bytes(path.read_bytes())
    with pytest.raises(ArtifactError, match=r"meta.json: the teacher of fold 0 .* does not lie in .*teacher; give"):
        find_teachers(elsewhere, tiny_dataset)
    for fold in range(2):
        (tmp_path / "run" / "teacher" / f"fold-{fold}").mkdir(parents=True)
        target = tmp_path / "run" / "teacher" / f"fold-{fold}" / "model.pt"
        target.write_bytes((taught_run.teacher(fold) / "model.pt").read_bytes())
    meta = read_json(elsewhere / "meta.json", format="edgedistill-soft-labels")
    meta["teachers"][1]["trained_on"] = ids_hash(tiny_dataset.ids[tiny_dataset.splits == "train"])
    write_json(elsewhere / "meta.json", meta, format="edgedistill-soft-labels")
    with pytest.raises(ArtifactError, match="the teacher of fold 1 did not train on exactly the other folds"):
        find_teachers(elsewhere, tiny_dataset)
    relabelled = dataclasses.replace(tiny_dataset, labels=np.roll(tiny_dataset.labels, 1))
    with pytest.raises(ArtifactError, match=r"model.pt: trained on other classes or another data set"):
        open_teachers(files, relabelled, device=CPU, half=False)


def test_options_that_contradict_each_other_are_told():
    from typer.testing import CliRunner

    from edgedistill import cli

    with pytest.raises(UsageError, match="live_teachers=True, expected --soft-weight above 0"):
        StudentSettings(live_teachers=True, soft_weight=0.0)
    arguments = ["distill", "--data", "nowhere", "--out", "nowhere-run", "--live-teachers", "--no-distillation"]
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, UsageError)
    assert "--no-distillation and --live-teachers contradict each other" in str(result.exception)
