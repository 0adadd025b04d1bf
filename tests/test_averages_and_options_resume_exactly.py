"""EMA, SWA, Lookahead, mixing, sampling and new classifiers: a run that was broken off ends with the same bytes."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from edgedistill.artifacts import RunDir, read_json
from edgedistill.errors import UsageError
from edgedistill.student import StudentSettings, train_student
from edgedistill.teacher import TeacherSettings, train_teachers
from edgedistill.training import loop
from edgedistill.training.checkpoints import read_model
from edgedistill.training.classifier import ClassifierSettings, classifier_of
from edgedistill.training.loader import Draw
from edgedistill.training.optimizers import make_phases, update_average

COMMON = {
    "name": "test_efficientnet",
    "weights": "none",
    "image_size": 32,
    "batch_size": 8,
    "workers": 0,
    "device": "cpu",
    "checkpoint_minutes": 0.0,
    "tensorboard": False,
}
STUDENT = StudentSettings(**COMMON, epochs=4, extra_epochs=0, distillation=False)
KINDS = {
    "ema": {"ema_decay": 0.9, "optimizer": "ranger", "mixup_probability": 0.5, "plain_epochs": 1, "pool": "gem"},
    "swa": {
        "swa_start": 0.5,
        "balanced_sampling": False,
        "oversample": ("b=2",),
        "hard_loss": "focal",
        "classifier_dropout": 0.5,
        "dropout_samples": 2,
        "auto_augment": "augmix",
        "gridmask": 0.5,
    },
    "ldam": {
        "hard_loss": "ldam",
        "classifier": "cosine",
        "cutmix_probability": 0.0,
        "balanced_sampling": False,
        "class_weights": "class-balanced",
        "defer_weights": 0.5,
        "schedule": "exponential",
        "lr_decay": 0.5,
        "hidden_units": 12,
    },
}


def break_off(monkeypatch, after):
    """The training stops as if killed when it is about to take its step number ``after``."""
    step, taken = loop.train_step, []

    def limited(*arguments, **options):
        if len(taken) == after:
            raise KeyboardInterrupt
        taken.append(1)
        return step(*arguments, **options)

    monkeypatch.setattr(loop, "train_step", limited)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_run_ends_with_the_same_bytes(kind, tiny_dataset, tmp_path, monkeypatch):
    settings = dataclasses.replace(STUDENT, **KINDS[kind])
    whole, broken = RunDir(tmp_path / "whole"), RunDir(tmp_path / "broken")
    train_student(settings, tiny_dataset, whole, soft_labels=None, out=whole.model, resume=False)
    for after in (3, 8):  # within the first epoch, and after the averages began
        with monkeypatch.context() as patch:
            break_off(patch, after)
            with pytest.raises(KeyboardInterrupt):
                train_student(settings, tiny_dataset, broken, soft_labels=None, out=broken.model, resume=True)
    train_student(settings, tiny_dataset, broken, soft_labels=None, out=broken.model, resume=True)
    assert broken.model.read_bytes() == whole.model.read_bytes()
    plain = RunDir(tmp_path / "plain")
    train_student(STUDENT, tiny_dataset, plain, soft_labels=None, out=plain.model, resume=False)
    assert plain.model.read_bytes() != whole.model.read_bytes()


def test_the_exponential_average_is_its_formula():
    model = torch.nn.Linear(1, 1, bias=False)
    average, expected = AveragedModel(model), 0.0
    for n in range(30):
        model.weight.data.fill_(float(n * n))
        update_average(average, model, decay=0.8)
        decay = min(0.8, (1 + n) / (10 + n))
        expected = float(n * n) if n == 0 else decay * expected + (1 - decay) * n * n
        assert average.module.weight.item() == pytest.approx(expected, rel=1e-5)


def test_swa_averages_the_last_share_of_the_epochs_at_a_constant_rate():
    draw = Draw(np.arange(40), np.zeros(40, np.int32), 8, balanced=False, seed=0)
    settings = TeacherSettings(epochs=8, swa_start=0.75, swa_lr=0.25, lr=1.0)
    main, swa = make_phases("teacher", settings, draw)
    assert (main.epochs, main.lr, main.final_lr, main.average) == (6, 1.0, 0.25, False)
    assert (swa.epochs, swa.lr, swa.final_lr, swa.average) == (2, 0.25, 0.25, True)
    (only,) = make_phases("teacher", TeacherSettings(epochs=8), draw)
    assert (only.epochs, only.final_lr) == (8, pytest.approx(1e-5))


def test_nothing_is_mixed_in_the_plain_epochs(tiny_dataset, tmp_path, monkeypatch):
    mixed, mix = [], loop.mix
    monkeypatch.setattr(loop, "mix", lambda *a, **k: mixed.append(k["epoch"]) or mix(*a, **k))
    run = RunDir(tmp_path)
    settings = dataclasses.replace(STUDENT, plain_epochs=3)
    train_student(settings, tiny_dataset, run, soft_labels=None, out=run.model, resume=False)
    assert set(mixed) == {0}


def test_teachers_average_too_and_label_with_what_they_became(tiny_dataset, tmp_path):
    run = RunDir(tmp_path)
    settings = TeacherSettings(**COMMON, epochs=2, extra_epochs=1, pool="gem", hard_loss="bce", optimizer="adam")
    train_teachers(settings, tiny_dataset, run, resume=False)
    for fold in range(2):
        values = read_json(run.teacher(fold) / "fold.json", format="edgedistill-teacher-fold")
        assert values["epochs_planned"] == values["epochs_done"] == 3
        assert classifier_of(read_model(run.teacher(fold) / "model.pt").model) == ClassifierSettings("gem")
    assert train_teachers(settings, tiny_dataset, run, resume=True) == run.soft_labels


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ema_decay": 0.9, "extra_epochs": 2}, "each average the weights; leave one of them above 0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0, expected 0"),
        ({"swa_start": 0.01}, "swa_start=0.01, expected 0"),
        ({"swa_start": math.nan, "extra_epochs": 0}, "swa_start=nan, expected 0"),
        ({"cutmix_alpha": math.inf}, "cutmix_alpha=inf, expected a number above 0, at most 1000"),
        ({"mixup_alpha": math.nan}, "mixup_alpha=nan, expected a number above 0, at most 1000"),
        ({"swa_start": 0.5, "warmup_epochs": 2.5}, "warmup_epochs=2.5"),
        ({"plain_epochs": 5}, "plain_epochs=5, expected 0 to all epochs"),
    ],
)
def test_averages_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        dataclasses.replace(STUDENT, **wrong)


def test_a_class_that_is_not_there_is_told(tiny_dataset, tmp_path):
    settings = dataclasses.replace(STUDENT, balanced_sampling=False, oversample=("d=2",))
    run = RunDir(tmp_path)
    with pytest.raises(UsageError, match=r"--oversample 'd': no such class"):
        train_student(settings, tiny_dataset, run, soft_labels=None, out=run.model, resume=False)
