"""M augmented views per image: labelled once by the held-out teacher, and exactly those pixels reach the student."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from edgedistill.artifacts import RunDir, read_array
from edgedistill.cli import app
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.images import InputSpec
from edgedistill.student import LIVE_DEFAULTS, StudentSettings, train_student, views
from edgedistill.student.live_teachers import LiveTeachers, Teacher
from edgedistill.tasks import sigmoid, softmax
from edgedistill.training import loop
from edgedistill.training.checkpoints import read_model
from edgedistill.training.loader import Draw, Schedule, Views, batches, open_store, prepared_spec
from edgedistill.training.loop import Job, seen_targets
from edgedistill.training.losses import LossSettings, Targets, make_targets
from edgedistill.training.optimizers import Phase
from edgedistill.training.predict import network_input
from edgedistill.training.processes import Part

SPEC = InputSpec(height=32, width=32)
CPU = torch.device("cpu")
SETTINGS = StudentSettings(
    name="test_efficientnet",
    weights="none",
    image_size=32,
    epochs=2,
    extra_epochs=1,
    batch_size=8,
    workers=0,
    device="cpu",
    tensorboard=False,
    checkpoint_minutes=0.0,
    views=3,
    **LIVE_DEFAULTS,
)


def means(images):
    """A teacher whose logits are the means of the three channels of what it sees."""
    return images.mean(dim=(2, 3)) * 4


@pytest.fixture
def opened(tiny_dataset, tmp_path):
    """Views of the training images by two teachers that answer in opposite ways; store, augmentation, folder."""
    rows = tiny_dataset.rows("train")
    store = open_store(tiny_dataset.paths[rows], prepared_spec(SPEC), cache_gib=None)
    augment = SETTINGS.augmentation(SPEC)
    teachers = [Teacher(0, means, SPEC), Teacher(1, lambda images: -means(images), SPEC)]
    judge = LiveTeachers(teachers, tiny_dataset.folds[rows], 1.0)
    options = {"count": 3, "seed": 5, "wanted": {"images": "abc"}, "root": tmp_path, "device": CPU}
    return views.open_views(store, augment, lambda: judge, **options), store, augment, judge, options


def test_each_view_is_labelled_by_the_teacher_that_never_saw_its_image(tiny_dataset, opened):
    found, store, augment, judge, _ = opened
    assert found.seeds.shape == (32, 3) and found.log_probs.shape == (32, 3, 3)
    assert found.log_probs.dtype == np.float16
    for row, number in itertools.product((0, 7, 20), range(3)):
        pixels = torch.from_numpy(views.view(store, augment, row, found.seeds[row, number]))[None]
        sign = 1 if judge.folds[row] == 0 else -1
        expected = torch.softmax(sign * means(network_input(pixels, SPEC)), dim=1)[0].numpy()
        assert np.allclose(np.exp(found.log_probs[row, number].astype(np.float32)), expected, atol=2e-3)


def test_batches_show_stored_views_and_their_own_labels(opened):
    found, store, augment, *_ = opened
    draw = Draw(np.arange(32), np.zeros(32, np.int32), 8, balanced=False, seed=0)
    seen = set()
    for batch in batches(store, Schedule([draw] * 4), augment, spec=SPEC, seed=9, workers=0, views=found):
        for place, (row, number) in enumerate(zip(batch.rows, batch.views, strict=True)):
            assert np.array_equal(batch.images[place], views.view(store, augment, row, found.seeds[row, number]))
            seen.add((int(row), int(number)))
        job = make_job(store, augment, found)
        targets = seen_targets(job, batch, job.targets.take(batch.rows))
        log_probs = torch.from_numpy(found.log_probs[batch.rows, batch.views].astype(np.float32))
        assert torch.allclose(targets.soft, torch.softmax(log_probs / 2, dim=1))
        assert torch.equal(targets.hard, job.targets.hard[torch.from_numpy(batch.rows)])
    assert len(seen) > 60  # over epochs an image shows several of its views


def test_processes_share_a_batch_of_stored_views(opened):
    found, store, augment, *_ = opened
    schedule = Schedule([Draw(np.arange(32), np.zeros(32, np.int32), 8, balanced=False, seed=0)])
    options = {"spec": SPEC, "seed": 9, "workers": 0, "views": found}
    parts = [batches(store, schedule, augment, part=Part(rank, 2), **options) for rank in range(2)]
    for whole, *shares in zip(batches(store, schedule, augment, **options), *parts, strict=True):
        for rank, share in enumerate(shares):
            assert np.array_equal(share.rows, whole.rows[rank::2])
            assert np.array_equal(share.views, whole.views[rank::2])
            assert np.array_equal(share.images, whole.images[rank::2])


def make_job(store, augment, found):
    draw = Draw(np.arange(32), np.zeros(32, np.int32), 8, balanced=False, seed=0)
    return Job(
        title="test",
        folder=None,
        settings=SETTINGS,
        identity={},
        store=store,
        targets=make_targets(np.zeros(32, np.int32), 3),
        phases=(Phase("student", 1, draw, 1e-3, 1e-5),),
        loss=LossSettings("kl", 1.0, 2.0),
        spec=SPEC,
        augment=augment,
        views=found,
    )


def test_labelling_goes_on_where_it_was_killed_and_is_not_repeated(opened, tmp_path, monkeypatch):
    found, store, augment, judge, options = opened
    monkeypatch.setattr(views, "PART_IMAGES", 8)
    asked = []

    class Counting:
        folds = judge.folds

        def __call__(self, images, rows):
            asked.append(len(rows))
            if len(asked) == 3:
                raise KeyboardInterrupt
            return judge(images, rows)

    again = options | {"root": tmp_path / "again"}
    with pytest.raises(KeyboardInterrupt):
        views.open_views(store, augment, Counting, **again)
    other = views.open_views(store, augment, Counting, **again)
    assert asked == [24] * 5  # four parts, the one under way at the kill twice
    assert np.array_equal(other.log_probs, found.log_probs)
    assert views.open_views(store, augment, None, **again).seeds.tolist() == found.seeds.tolist()
    assert not list(tmp_path.rglob("part-*"))
    changed = views.open_views(store, augment, lambda: judge, **(again | {"seed": 6}))
    assert not np.array_equal(changed.seeds, found.seeds)
    folder = next(path.parent for path in (tmp_path / "again").rglob("seeds.npy"))
    np.save(folder / "seeds.npy", read_array(folder / "seeds.npy") + 1)
    with pytest.raises(ArtifactError, match="holds other views than its name says; delete the folder"):
        for seed in (5, 6):
            views.open_views(store, augment, lambda: judge, **(again | {"seed": seed}))


def test_a_student_on_views_resumes_to_the_same_bytes(tiny_dataset, taught_run, tmp_path, monkeypatch):
    whole, broken = RunDir(tmp_path / "whole"), RunDir(tmp_path / "broken")
    train_student(SETTINGS, tiny_dataset, whole, soft_labels=taught_run.soft_labels, out=whole.model, resume=False)
    assert read_model(whole.model).settings["views"] == 3
    steps = itertools.count()
    real = Views.chosen

    def stop_at_six(self, seed, step):
        if next(steps) == 12:  # asked for twice a step
            raise KeyboardInterrupt
        return real(self, seed, step)

    options = {"soft_labels": taught_run.soft_labels, "out": broken.model, "resume": True}
    monkeypatch.setattr(Views, "chosen", stop_at_six)
    with pytest.raises(KeyboardInterrupt):
        train_student(SETTINGS, tiny_dataset, broken, **options)
    assert (broken.student / "checkpoint.pt").exists()
    train_student(SETTINGS, tiny_dataset, broken, **options)
    assert broken.model.read_bytes() == whole.model.read_bytes()


def test_whole_pictures_at_the_test_size_have_the_stored_labels(tiny_dataset, taught_run, tmp_path, monkeypatch):
    shown = {}
    real = loop.train_step

    def watched(job, state, batch, targets, **more):
        shown.setdefault(job.folder.name, set()).add(batch.views is not None)
        return real(job, state, batch, targets, **more)

    monkeypatch.setattr(loop, "train_step", watched)
    run = RunDir(tmp_path)
    settings = dataclasses.replace(SETTINGS, epochs=1, test_size=40, checkpoint_minutes=5.0)
    train_student(settings, tiny_dataset, run, soft_labels=taught_run.soft_labels, out=run.model, resume=False)
    assert shown == {"student": {True}, "fixres": {False}}


def test_options_that_contradict_each_other_are_told():
    arguments = ["distill", "--data", "nowhere", "--out", "nowhere-run", "--no-distillation"]
    for flag, value in (("--views", "2"), ("--unlabelled", "folder")):
        result = CliRunner().invoke(app, [*arguments, flag, value])
        assert isinstance(result.exception, UsageError)
        assert f"--no-distillation and {flag} contradict each other" in str(result.exception)


@pytest.mark.usefixtures("torch_judges")
def test_views_of_several_heads_keep_what_each_head_said(heads_dataset, heads_run, tmp_path):
    run, settings = RunDir(tmp_path), dataclasses.replace(SETTINGS, epochs=1, extra_epochs=0)
    train_student(settings, heads_dataset, run, soft_labels=heads_run.soft_labels, out=run.model, resume=False)
    folder = next(path.parent for path in (tmp_path / "views").rglob("seeds.npy"))
    found = Views(read_array(folder / "seeds.npy"), read_array(folder / "log_probs.npy"))
    rows = heads_dataset.rows("train")
    assert found.log_probs.shape == (len(rows), 3, 6)
    spec = InputSpec(height=40, width=40)  # the teachers', larger than the student's
    store = open_store(heads_dataset.paths[rows], prepared_spec(spec), cache_gib=None)
    teachers = [read_model(heads_run.teacher(fold) / "model.pt") for fold in range(2)]
    for row, number in itertools.product((0, 7, 20), range(3)):
        pixels = views.view(store, settings.augmentation(spec), row, found.seeds[row, number])[None]
        teacher = teachers[heads_dataset.folds[rows[row]]]
        with torch.no_grad():
            scores = teacher.model(network_input(torch.from_numpy(pixels), teacher.input_spec))
        said = heads_dataset.task.probabilities(found.log_probs[row, number][None].astype(np.float32))
        assert np.allclose(said, heads_dataset.task.probabilities(scores.numpy()), atol=4e-3)
    draw = Draw(np.arange(32), np.zeros(32, np.int32), 8, balanced=False, seed=0)
    augment = settings.augmentation(spec)
    batch = next(batches(store, Schedule([draw]), augment, spec=spec, seed=9, workers=0, views=found))
    hard = torch.zeros(8, 6)
    job = dataclasses.replace(make_job(store, augment, found), task=heads_dataset.task)
    soft = seen_targets(job, batch, Targets(hard, hard)).soft
    chosen = found.log_probs[batch.rows, batch.views].astype(np.float32)
    assert np.allclose(soft[:, :3], softmax(chosen[:, :3], 2.0), atol=1e-6)
    assert np.allclose(soft[:, 3:5], sigmoid(chosen[:, 3:5], 2.0), atol=1e-6)
    assert np.array_equal(soft[:, 5], chosen[:, 5])


def test_views_and_live_teachers_exclude_each_other():
    with pytest.raises(UsageError, match="--live-teachers judge every view anew and --views 3 fixes them"):
        dataclasses.replace(SETTINGS, live_teachers=True)
    with pytest.raises(UsageError, match="--soft-weight above 0"):
        dataclasses.replace(SETTINGS, soft_weight=0.0)
