"""Held-out teachers point at labels that look wrong, and the clearest can be left out; temperatures fit each teacher."""

import csv
import dataclasses

import numpy as np
import pytest
import torch

from edgedistill.errors import UsageError
from edgedistill.metrics import fit_temperature, log_loss, softmax
from edgedistill.student import StudentSettings
from edgedistill.student.calibration import calibrated, teacher_temperatures
from edgedistill.student.distil import _lesson
from edgedistill.student.live_teachers import find_teachers
from edgedistill.training.noisy_labels import COLUMNS, find_noisy_labels, rows_to_drop, write_noisy_labels
from edgedistill.training.seeds import generator

WRONG = (3, 10, 20)  # rows whose labels were moved to the next class


@pytest.fixture
def doubtful(tiny_dataset):
    """The data set with three wrong labels, and soft labels that know better; two images are hard, not wrong."""
    labels = tiny_dataset.labels.copy()
    truth = labels.copy()
    labels[list(WRONG)] = (labels[list(WRONG)] + 1) % 3
    probabilities = np.full((len(tiny_dataset), 3), 0.05)
    probabilities[np.arange(len(tiny_dataset)), truth] = 0.9
    probabilities[[5, 6]] = 1 / 3
    probabilities[tiny_dataset.splits != "train"] = np.nan
    return dataclasses.replace(tiny_dataset, labels=labels), np.log(probabilities).astype(np.float32)


def test_moved_labels_come_first_and_hard_images_are_not_suspected(doubtful):
    noisy = find_noisy_labels(*doubtful)
    assert set(noisy.rows[noisy.suspects].tolist()) == set(WRONG)
    assert set(noisy.rows[:3].tolist()) == set(WRONG)
    assert set(noisy.rows[3:5].tolist()) == {5, 6}
    assert np.allclose(noisy.margin[:3], 0.05 - 0.9, atol=1e-4)
    assert np.array_equal(noisy.suggested[:3], (doubtful[0].labels[noisy.rows[:3]] - 1) % 3)
    assert sorted(noisy.rows.tolist()) == doubtful[0].rows("train").tolist()


def test_the_file_names_image_label_and_suggestion(doubtful, tmp_path):
    data, soft = doubtful
    assert write_noisy_labels(tmp_path / "noisy_labels.csv", data, soft) == 3
    with (tmp_path / "noisy_labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert len(rows) == len(data.rows("train"))
    assert {row["id"] for row in rows[:3]} == {f"im{n:03d}.png" for n in WRONG}
    assert [row["suspect"] for row in rows[:4]] == ["1", "1", "1", "0"]
    first = rows[0]
    assert first["label"] == data.class_names[data.labels[data.ids.tolist().index(first["id"])]]
    assert first["suggested"] != first["label"]
    assert float(first["suggested_probability"]) == pytest.approx(0.9, abs=1e-4)


def test_at_most_the_share_and_half_of_a_class_are_left_out(doubtful):
    data, soft = doubtful
    noisy = find_noisy_labels(data, soft)
    assert rows_to_drop(noisy, data, 0.5).tolist() == sorted(WRONG)
    assert len(rows_to_drop(noisy, data, 2 / 32)) == 2
    assert not len(rows_to_drop(noisy, data, 0.0))
    everything_wrong = np.log(np.tile([0.02, 0.96, 0.02], (len(data), 1))).astype(np.float32)
    unlearnt = find_noisy_labels(data, everything_wrong)
    dropped = rows_to_drop(unlearnt, data, 0.5)
    train = data.rows("train")
    for label in range(3):
        assert (data.labels[dropped] == label).sum() <= (data.labels[train] == label).sum() / 2


def test_each_folds_labels_are_scaled_by_its_own_temperature():
    log_probs = np.log(softmax(generator(0).normal(size=(6, 3)) * 4)).astype(np.float32)
    folds = np.array([0, 1, 0, 1, -1, 0], np.int16)
    found = calibrated(log_probs, folds, {0: 2.0, 1: 0.5})
    assert np.allclose(np.exp(found).sum(axis=1), 1, atol=1e-5)
    assert np.allclose(np.exp(found[folds == 0]), softmax(log_probs[folds == 0], 2.0), atol=1e-6)
    assert np.allclose(np.exp(found[folds == 1]), softmax(log_probs[folds == 1], 0.5), atol=1e-6)
    assert np.array_equal(found[4], log_probs[4])


def test_temperatures_are_fitted_on_val_once(tiny_dataset, taught_run, tmp_path, monkeypatch):
    from edgedistill.student import calibration

    asked = []
    logits = generator(0).normal(size=(len(tiny_dataset.rows("val")), 3)).astype(np.float32) * 6
    monkeypatch.setattr(
        calibration, "predict_logits", lambda model, paths, spec, title: asked.append(list(paths)) or logits
    )
    files = find_teachers(taught_run.soft_labels, tiny_dataset)
    options = {"cache": tmp_path / "temperatures.json", "device": torch.device("cpu")}
    found = teacher_temperatures(files, tiny_dataset, **options)
    val = tiny_dataset.rows("val")
    assert asked == [tiny_dataset.paths[val].tolist()] * 2
    expected = fit_temperature(logits, tiny_dataset.labels[val])
    assert set(found.values()) == {expected}
    better = log_loss(softmax(logits, expected), tiny_dataset.labels[val])
    assert better < log_loss(softmax(logits), tiny_dataset.labels[val])
    assert teacher_temperatures(files, tiny_dataset, **options) == found
    assert len(asked) == 2
    unseen = dataclasses.replace(
        tiny_dataset, splits=np.where(tiny_dataset.splits == "val", "test", tiny_dataset.splits)
    )
    with pytest.raises(UsageError, match="no val split; freeze it again with --val-fraction"):
        teacher_temperatures(files, unseen, **options)


def test_a_student_is_told_what_was_calibrated_and_left_out(tiny_dataset, taught_run, tmp_path, capsys):
    settings = StudentSettings(calibrate_soft_labels=True, drop_noisy=0.1)
    cache, device = tmp_path / "temperatures.json", torch.device("cpu")
    lesson = _lesson(settings, tiny_dataset, taught_run.soft_labels, device=device, cache=cache)
    assert set(lesson.temperatures) == {file.sha256 for file in lesson.teachers}
    assert cache.exists()
    assert (
        "--drop-noisy: 0 of 32 training images are left out" in capsys.readouterr().err
    )  # uniform labels accuse nobody
    with pytest.raises(UsageError, match=r"drop_noisy=0.7, expected a share of the training images"):
        StudentSettings(drop_noisy=0.7)
