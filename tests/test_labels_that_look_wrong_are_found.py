"""Held-out teachers point at labels that look wrong, and the clearest can be left out; temperatures fit each teacher."""

import csv
import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from edgedistill import task_metrics
from edgedistill.artifacts import RunDir, write_array
from edgedistill.data.soft_label_store import HeldRows
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.metrics import fit_temperature, log_loss, softmax
from edgedistill.report.noisy_section import noisy_section
from edgedistill.student import StudentSettings
from edgedistill.student.calibration import calibrated, calibrated_rows, teacher_temperatures
from edgedistill.student.distil import _lesson
from edgedistill.student.live_teachers import TeacherFile, find_teachers
from edgedistill.training.checkpoints import read_model
from edgedistill.training.heads import scores_from, scores_of
from edgedistill.training.noisy_labels import (
    COLUMNS,
    HEAD_COLUMNS,
    find_noisy_labels,
    rows_to_drop,
    write_noisy_labels,
)
from edgedistill.training.predict import predict_logits
from edgedistill.training.seeds import generator
from edgedistill.training.views import predict_probabilities, views_of

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


@pytest.fixture
def doubtful_heads(heads_dataset):
    """Scores that know every head, against two wrong colours and one wrong tag; tags of image 9 are not known."""
    task, truth = heads_dataset.task, np.nan_to_num(heads_dataset.values)
    color = np.full((len(truth), 3), 0.05)
    color[np.arange(len(truth)), truth[:, 0].astype(int)] = 0.9
    shares = np.column_stack([color, np.where(truth[:, 1:3] > 0.5, 0.9, 0.1), truth[:, 3]])
    scores = scores_from(task, shares)
    scores[heads_dataset.splits != "train"] = np.nan
    values = heads_dataset.values.copy()
    values[[3, 10], 0] = (values[[3, 10], 0] + 1) % 3
    values[20, 2] = 1 - values[20, 2]
    values[9, 1:3] = np.nan
    return dataclasses.replace(heads_dataset, values=values), scores


def test_each_head_is_asked_whether_its_label_looks_wrong(doubtful_heads, tmp_path):
    data, scores = doubtful_heads
    assert write_noisy_labels(tmp_path / "noisy.csv", data, scores) == 3
    with (tmp_path / "noisy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == HEAD_COLUMNS
    colors = data.task.heads[0].classes
    expected = {
        (f"im{n:03d}.png", "color", colors[int(data.values[n, 0])], colors[int(data.values[n, 0] - 1) % 3])
        for n in (3, 10)
    } | {("im020.png", "tags", "late", "not late")}
    found = {(row["id"], row["head"], row["label"], row["suggested"]) for row in rows if row["suspect"] == "1"}
    assert found == expected
    assert [row["suspect"] for row in rows[:4]] == ["1", "1", "1", "0"]
    assert sorted(row["id"] for row in rows) == sorted(data.ids[data.rows("train")].tolist())  # one line for each image


def test_images_with_a_wrong_head_are_left_out_up_to_the_share_and_half_of_a_class(doubtful_heads):
    data, scores = doubtful_heads
    noisy = find_noisy_labels(data, scores)
    assert rows_to_drop(noisy, data, 0.5).tolist() == [3, 10, 20]
    assert len(rows_to_drop(noisy, data, 1 / 32)) == 1
    train = data.rows("train")
    wrong = np.tile(np.array([[0.02, 0.96, 0.02, 0.9, 0.9, 10.0]]), (len(data), 1))
    dropped = rows_to_drop(find_noisy_labels(data, scores_from(data.task, wrong)), data, 0.5)
    assert len(dropped) >= 4
    for column, classes in ((0, 3), (1, 2), (2, 2)):
        for label in range(classes):
            assert (data.values[dropped, column] == label).sum() <= (data.values[train, column] == label).sum() / 2


def test_the_report_names_the_head(doubtful_heads, tmp_path):
    data, scores = doubtful_heads
    write_noisy_labels(tmp_path / "noisy_labels.csv", data, scores)
    record = SimpleNamespace(run=RunDir(tmp_path), dataset=data)
    lead, gallery = noisy_section(record).blocks
    assert lead.text.startswith("3 labels of training images look like another class")
    assert {(picture.true.split(": ")[0], picture.name) for picture in gallery.pictures} == {
        ("color", "im003.png"),
        ("color", "im010.png"),
        ("tags", "im020.png"),
    }


def test_scores_of_heads_are_scaled_and_values_stay(heads_dataset):
    task = heads_dataset.task
    scores = scores_of(task, generator(0).normal(size=(6, 6)) * 4)
    folds = np.array([0, 1, 0, 1, -1, 0], np.int16)
    found = calibrated(scores, folds, {0: 2.0, 1: 0.5}, task=task)
    expected = task.probabilities(scores, 2.0)[folds == 0]
    assert np.allclose(task.probabilities(found)[folds == 0], expected, atol=1e-6)
    assert np.allclose(np.exp(found[:, :3]).sum(axis=1), 1, atol=1e-5)
    assert np.array_equal(found[:, 5], scores[:, 5]) and np.array_equal(found[4], scores[4])


def logits_on_val(run, data):
    """What fold 0's teacher says of val; networks that are made for a test are the same whatever the labels."""
    loaded = read_model(run.teacher(0) / "model.pt")
    return predict_logits(loaded.model, data.paths[data.rows("val")], loaded.input_spec)


def test_a_teacher_of_several_heads_gets_one_temperature(heads_dataset, heads_run, teach_run, tmp_path):
    rows, logits = heads_dataset.rows("val"), logits_on_val(heads_run, heads_dataset)
    values = heads_dataset.values.copy()  # five of six as the teacher says: else no temperature is modest enough
    values[rows[:5], :3] = heads_dataset.task.answers(heads_dataset.task.probabilities(logits))[:5]
    data = dataclasses.replace(heads_dataset, values=values)
    labels = teach_run(data, tmp_path / "taught").soft_labels
    files, device = find_teachers(labels, data), torch.device("cpu")
    found = teacher_temperatures(files, data, cache=tmp_path / "t.json", device=device)
    wanted = task_metrics.fit_temperature(data.task, logits, data.values[rows])
    assert found[files[0].sha256] == pytest.approx(wanted, rel=1e-3) and 0.2 < wanted < 10
    settings = StudentSettings(calibrate_soft_labels=True, drop_noisy=0.1)
    lesson = _lesson(settings, data, labels, device=device, cache=tmp_path)
    assert lesson.temperatures == found and lesson.soft.rows(np.arange(len(data))).shape == (len(data), 6)


def test_temperatures_fit_the_mean_over_the_views_that_labelled(tiny_dataset, taught_run, teach_run, tmp_path):
    rows, labels = tiny_dataset.rows("val"), tiny_dataset.labels.copy()
    labels[rows[:5]] = logits_on_val(taught_run, tiny_dataset).argmax(axis=1)[:5]
    data = dataclasses.replace(tiny_dataset, labels=labels)
    run = teach_run(data, tmp_path / "run", settings={"tta": "flip,five-crop"})
    files = find_teachers(run.soft_labels, data)
    options = {"cache": tmp_path / "t.json", "device": torch.device("cpu")}
    found = teacher_temperatures(files, data, **options)
    loaded, views = read_model(files[0].path), views_of("flip,five-crop")
    mean = predict_probabilities(loaded.model, data.paths[rows], loaded.input_spec, views=views)
    expected = fit_temperature(np.log(mean), labels[rows])
    assert found[files[0].sha256] == pytest.approx(expected, rel=1e-3) and 0.2 < expected < 10
    one = teacher_temperatures(files, data, one_view=True, **options)
    assert one[files[0].sha256] == pytest.approx(fit_temperature(logits_on_val(run, data), labels[rows]), rel=1e-3)
    assert one != found and teacher_temperatures(files, data, **options) == found


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
        calibration, "label_pictures", lambda model, paths, *others, **views: asked.append(list(paths)) or logits
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


@pytest.mark.parametrize("several_heads", [False, True])
def test_several_teachers_are_calibrated_each_and_mixed_anew(tiny_dataset, heads_dataset, tmp_path, several_heads):
    data = heads_dataset if several_heads else tiny_dataset
    task, width, rng = data.task, len(data.outputs), generator(3)
    folds = np.where(data.splits == "train", data.folds, -1).astype(np.int16)
    files, said, temperatures = [], {}, {"a0": 0.5, "b0": 2.0, "a1": 3.0, "b1": 1.0}
    for fold in (0, 1):
        ids = data.ids[folds == fold]
        for name, weight in (("a", 0.25), ("b", 0.75)):
            folder = tmp_path / f"{name}{fold}"
            logits = rng.normal(size=(len(ids), width)) * 3
            scores = np.log(softmax(logits)).astype(np.float32) if task is None else scores_of(task, logits)
            order = rng.permutation(len(ids))
            write_array(folder / "held_out_ids.npy", np.append(ids[order], "of another data set").astype(str))
            write_array(folder / "held_out.log_probs.npy", np.concatenate([scores[order], scores[:1]]))
            files.append(TeacherFile(fold, folder / "model.pt", folder.name, weight))
            said[folder.name] = scores
    source = HeldRows(rng.normal(size=(len(data), width)).astype(np.float32))
    mixed = calibrated_rows(source, folds, files, temperatures, data)
    found = mixed.rows(np.arange(len(data)))
    for fold in (0, 1):
        shares = {
            name: softmax(said[name], temperatures[name]) if task is None
            else task.probabilities(said[name], temperatures[name])
            for name in (f"a{fold}", f"b{fold}")
        }  # fmt: skip
        expected = 0.25 * shares[f"a{fold}"] + 0.75 * shares[f"b{fold}"]
        own = found[folds == fold]
        assert np.allclose(np.exp(own) if task is None else task.probabilities(own), expected, atol=1e-5)
    assert np.array_equal(found[folds < 0], source.table[folds < 0])
    some = np.array([5, 1, 30, 1])
    assert np.array_equal(mixed.rows(some), found[some])
    write_array(files[0].path.parent / "held_out_ids.npy", np.array(["x"] * (len(ids) + 1)))
    with pytest.raises(ArtifactError, match="a0: not its teacher's answers for all of fold 1; train it again"):
        calibrated_rows(source, folds, files, temperatures, data)
