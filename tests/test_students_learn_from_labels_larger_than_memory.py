"""Targets, doubtful labels and the identity of a student are the same whether or not the soft labels lie in memory."""

import dataclasses
import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch

from edgedistill.artifacts import RunDir, read_json, write_array, write_json
from edgedistill.data import soft_label_store
from edgedistill.data.soft_label_store import HeldRows, open_store, parse_store, row_blocks, write_store
from edgedistill.errors import ArtifactError
from edgedistill.student import StudentSettings, distil, train_student, unlabelled
from edgedistill.student.calibration import CalibratedRows, calibrated
from edgedistill.student.unlabelled import ScoredTargets, Unlabelled, choose, joined, unlabelled_targets
from edgedistill.tasks import Head, Task
from edgedistill.training import losses
from edgedistill.training.checkpoints import read_model
from edgedistill.training.heads import scores_of
from edgedistill.training.losses import (
    CodedTargets,
    HardLoss,
    LossSettings,
    Targets,
    ldam_margins,
    loss_of,
    make_targets,
    targets_of,
)
from edgedistill.training.mixing import Mixing, mix
from edgedistill.training.noisy_labels import find_noisy_labels, rows_to_drop
from edgedistill.training.soft_labels import (
    SoftLabels,
    StoredTable,
    check_soft_labels,
    read_soft_labels,
    soft_labels_hash,
)

CLASSES = 12


def log_probs(count, seed=0):
    logits = np.random.default_rng(seed).normal(size=(count, CLASSES)) * 3
    return torch.log_softmax(torch.from_numpy(logits), dim=1).float().numpy()


def labels_of(count):
    return np.random.default_rng(1).integers(CLASSES, size=count).astype(np.int32)


def stored(folder, count, store):
    """Soft labels on the disk for the first ``count`` of count + 9 images; the others have none."""
    table = log_probs(count)
    entry = write_store(folder, "label", [table], shape=table.shape, kind=parse_store(store))
    row_of = np.concatenate([np.random.default_rng(2).permutation(count), np.full(9, -1)])
    return SoftLabels(open_store(folder, "label", entry, count=count, class_count=CLASSES), row_of)


def one_hot_formula(labels, soft, temperature, smoothing):
    """Targets of all images at once, as float32 tables [N, C]."""
    hard = torch.nn.functional.one_hot(torch.from_numpy(labels.astype(np.int64)), CLASSES).float()
    tempered = torch.softmax(torch.from_numpy(soft) / temperature, dim=1)
    smooth = hard * (1 - smoothing) + smoothing / CLASSES if smoothing else hard
    return smooth, torch.where(torch.isnan(tempered), hard, tempered)


@pytest.mark.parametrize("store", ["float32", "float16", "top-k:4"])
@pytest.mark.parametrize(("temperature", "smoothing"), [(1.0, 0.0), (2.5, 0.1)])
def test_targets_of_a_batch_are_those_made_beforehand(tmp_path, monkeypatch, store, temperature, smoothing):
    labels, soft = labels_of(209), stored(tmp_path, 200, store)
    whole = soft.rows(np.arange(209))
    options = {"temperature": temperature, "label_smoothing": smoothing}
    before = make_targets(labels, CLASSES, soft_log_probs=whole, **options)
    hard, tempered = one_hot_formula(labels, whole, temperature, smoothing)
    assert torch.equal(before.hard, hard) and torch.equal(before.soft, tempered)
    assert isinstance(targets_of(labels, CLASSES, soft=soft, **options), Targets)
    monkeypatch.setattr(losses, "WHOLE_TARGETS", 208 * CLASSES)
    per_batch = targets_of(labels, CLASSES, soft=soft, **options)
    assert isinstance(per_batch, CodedTargets) and len(per_batch) == 209
    some = np.array([204, 3, 77, 3, 199, 208, 0])
    for rows in (some, np.arange(209)):
        taken = per_batch.to(torch.device("cpu")).take(rows)
        assert torch.equal(taken.hard, before.hard[rows]) and torch.equal(taken.soft, before.soft[rows])
    shifted = targets_of(labels[some], CLASSES, soft=soft, soft_rows=some, **options)
    assert torch.equal(shifted.take(np.array([5, 2])).soft, before.soft[[208, 77]])
    alone = CodedTargets(torch.from_numpy(labels.astype(np.int64)), CLASSES, None, np.arange(209)).take(some)
    assert torch.equal(alone.hard, make_targets(labels, CLASSES).take(some).soft)


HARD_LOSSES = (
    HardLoss(),
    HardLoss(class_weights=tuple(np.linspace(0.5, 2, CLASSES))),
    HardLoss("ldam", margins=ldam_margins(np.arange(1, CLASSES + 1))),
)


@pytest.mark.parametrize("name", ["ce", "kl", "js"])
@pytest.mark.parametrize("hard", HARD_LOSSES, ids=["plain", "weights", "ldam"])
def test_losses_of_mixed_batches_do_not_notice(tmp_path, name, hard):
    labels, soft, rows = labels_of(69), stored(tmp_path, 60, "top-k:4"), np.array([3, 68, 12, 59, 30, 7])
    whole = make_targets(labels, CLASSES, soft_log_probs=soft.rows(np.arange(69)), temperature=2.0)
    coded = CodedTargets(torch.from_numpy(labels.astype(np.int64)), CLASSES, soft, np.arange(69), 2.0)
    found = []
    for source in (whole, coded):
        images = torch.arange(6 * 64 * 3, dtype=torch.uint8).reshape(6, 8, 8, 3)
        _, targets = mix(images, source.take(rows), Mixing(cutmix=0.5, mixup=0.5), seed=1, epoch=0, step=2)
        logits = torch.linspace(-2, 2, 6 * CLASSES).reshape(6, CLASSES).requires_grad_()
        loss = loss_of(logits, targets, LossSettings(name, 0.4, 2.0, hard))
        loss.backward()
        found.append((loss.item(), logits.grad))
    assert found[0][0] == found[1][0] > 0
    assert torch.equal(found[0][1], found[1][1])


def test_unlabelled_images_follow_labels_that_stay_on_the_disk(tmp_path):
    labels, soft = labels_of(20), stored(tmp_path, 11, "float16")
    coded = CodedTargets(torch.from_numpy(labels.astype(np.int64)), CLASSES, soft, np.arange(20), 2.0)
    second = Targets(torch.rand(5, CLASSES), torch.rand(5, CLASSES))
    wanted, both, rows = joined(coded.whole(), second), joined(coded, second), np.array([22, 4, 24, 19, 20, 0])
    assert len(both) == len(wanted) == 25
    for some in (rows, rows[[1, 3]], rows[[0, 2]]):
        taken = both.to(torch.device("cpu")).take(some)
        assert torch.equal(taken.hard, wanted.hard[some]) and torch.equal(taken.soft, wanted.soft[some])


SEVERAL = Task(
    (
        Head("a", "softmax", ("x", "y", "z")),
        Head("b", "softmax", ("p", "q", "r", "s")),
        Head("tag", "sigmoid", ("t", "u", "v", "w")),
        Head("value", "regression"),
    )
)


@pytest.mark.parametrize("task", [None, SEVERAL])
def test_photographs_without_labels_are_chosen_and_learned_from_by_blocks(tmp_path, monkeypatch, task):
    scores = log_probs(90)
    if task is not None:
        scores = scores_of(task, scores * 2).astype(np.float32)
    write_array(tmp_path / "scores.npy", scores)
    names = np.array([f"{number:02d}.jpg" for number in range(len(scores))])
    held = Unlabelled(names, names.astype("S64"), scores)
    options = {"min_confidence": 0.4, "class_cap": 1.0, "seed": 3, "task": task}
    expected = choose(held, **options)
    whole = unlabelled_targets(expected, 2.0, task)
    assert isinstance(whole, Targets) and 10 < len(expected) < 80
    monkeypatch.setattr(soft_label_store, "BLOCK_VALUES", 5 * CLASSES)
    monkeypatch.setattr(unlabelled, "WHOLE_TARGETS", 1)
    stored = Unlabelled(names, names.astype("S64"), StoredTable(tmp_path / "scores.npy"))
    assert max(len(block) for block in stored.blocks()) == 5
    chosen = choose(stored, **options)
    assert chosen.paths.tolist() == expected.paths.tolist() and chosen.hash == expected.hash
    assert hashlib.sha256(held.sha256.tobytes() + scores.tobytes()).hexdigest() == stored.hash  # as runs before had it
    some = np.array([7, 0, len(chosen) - 1, 3])
    lazy = unlabelled_targets(chosen, 2.0, task).to(torch.device("cpu"))
    assert isinstance(lazy, ScoredTargets) and len(lazy) == len(whole)
    taken = lazy.take(some)
    assert torch.equal(taken.hard, whole.hard[some]) and torch.equal(taken.soft, whole.soft[some])
    assert not torch.equal(taken.hard, taken.soft)


def all_at_once(dataset, soft):
    """Confident learning on the whole table [N, C]: (rows, suggested, self-confidence, margin, suspects)."""
    rows = dataset.rows("train")
    probabilities, labels, everyone = np.exp(soft[rows].astype(np.float64)), dataset.labels[rows], np.arange(len(rows))
    own = probabilities[everyone, labels]
    counts, sums = np.bincount(labels, minlength=3), np.bincount(labels, weights=own, minlength=3)
    thresholds = np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
    others = probabilities.copy()
    others[everyone, labels] = -1.0
    confident = np.where(others >= thresholds, others, -1.0)
    suspects = (confident.max(axis=1) >= 0) & (confident.max(axis=1) > own)
    suggested = np.where(suspects, confident.argmax(axis=1), others.argmax(axis=1))
    margin = own - probabilities[everyone, suggested]
    order = np.lexsort((margin, ~suspects))
    return rows[order], suggested[order], own[order], margin[order], suspects[order]


@pytest.mark.parametrize("values", [1, 21, 2**21])
def test_doubtful_labels_are_found_block_by_block(tiny_dataset, monkeypatch, values):
    monkeypatch.setattr(soft_label_store, "BLOCK_VALUES", values)
    logits = np.random.default_rng(3).normal(size=(len(tiny_dataset), 3)) * 2
    soft = torch.log_softmax(torch.from_numpy(logits), dim=1).float().numpy()
    wanted = all_at_once(tiny_dataset, soft)
    for given in (soft, HeldRows(soft)):
        noisy = find_noisy_labels(tiny_dataset, given)
        found = (noisy.rows, noisy.suggested, noisy.self_confidence, noisy.margin, noisy.suspects)
        for got, want in zip(found, wanted, strict=True):
            assert np.array_equal(got, want)
    assert 0 < noisy.suspects.sum() < len(noisy.rows)
    assert 0 < len(rows_to_drop(noisy, tiny_dataset, 0.1)) <= 3


def test_an_identity_is_the_hash_of_the_whole_table(tiny_dataset, taught_run, monkeypatch):
    monkeypatch.setattr(soft_label_store, "BLOCK_VALUES", 13)
    assert [len(part) for part in row_blocks(np.arange(9), 3)] == [4, 4, 1]
    soft = distil.soft_rows(taught_run.soft_labels, tiny_dataset)
    whole = read_soft_labels(taught_run.soft_labels, tiny_dataset)
    assert np.isnan(whole).any()
    assert soft_labels_hash(soft, tiny_dataset) == hashlib.sha256(whole.tobytes()).hexdigest()
    folds, temperatures = tiny_dataset.folds, {0: 0.7, 1: 1.9}
    logits = np.random.default_rng(4).normal(size=whole.shape).astype(np.float32)
    sharp = np.where(np.isnan(whole), whole, logits)
    wanted = hashlib.sha256(calibrated(sharp, folds, temperatures).tobytes()).hexdigest()
    assert soft_labels_hash(CalibratedRows(HeldRows(sharp), folds, temperatures), tiny_dataset) == wanted


SETTINGS = StudentSettings(
    name="test_efficientnet",
    weights="none",
    image_size=32,
    epochs=1,
    extra_epochs=1,
    batch_size=8,
    workers=0,
    soft_weight=0.5,
    soft_temperature=2.0,
    loss="kl",
)


@pytest.mark.parametrize(
    "changes", [{}, {"distillation": False}, {"calibrate_soft_labels": True, "label_smoothing": 0.1}]
)
def test_a_student_of_stored_labels_is_the_student_of_held_ones(
    tiny_dataset, taught_run, tmp_path, monkeypatch, changes
):
    settings, weights, kinds, make = dataclasses.replace(SETTINGS, **changes), [], [], distil._targets

    def watched(*given):
        kinds.append(type(make(*given)))
        return make(*given)

    monkeypatch.setattr(distil, "_targets", watched)
    for number, limit in enumerate((losses.WHOLE_TARGETS, 0)):
        monkeypatch.setattr(losses, "WHOLE_TARGETS", limit)
        run = RunDir(tmp_path / str(number))
        options = {"soft_labels": taught_run.soft_labels, "out": run.model, "resume": False}
        train_student(settings, tiny_dataset, run, **options)
        weights.append(read_model(run.model))
    assert kinds == [Targets, CodedTargets]
    assert weights[0].settings == weights[1].settings
    states = [loaded.model.state_dict() for loaded in weights]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_damaged_labels_are_refused_before_anything_is_trained(tiny_dataset, taught_run, tmp_path):
    folder = tmp_path / "soft_labels"
    folder.mkdir()
    for path in taught_run.soft_labels.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    check_soft_labels(folder, tiny_dataset)
    table = np.load(folder / "label.log_probs.npy")
    table[-1] = 0.0
    write_array(folder / "label.log_probs.npy", table)
    run = RunDir(tmp_path)
    with pytest.raises(ArtifactError, match="rows are not log-probabilities"):
        check_soft_labels(folder, tiny_dataset)
    with pytest.raises(ArtifactError, match="rows are not log-probabilities"):
        train_student(SETTINGS, tiny_dataset, run, soft_labels=folder, out=run.model, resume=False)
    assert not run.student.exists()


def test_no_table_of_all_images_and_classes_ever_lies_in_memory(tmp_path):
    """100,000 x 1,000: float32 takes 400 MB, a one-hot of int64 800. The labels are drawn, but form a valid store."""
    rows, classes, k = 100_000, 1000, 10
    first = np.random.default_rng(0).integers(classes, size=rows)[:, None]
    write_array(tmp_path / "label.indices.npy", ((first + np.arange(k)) % classes).astype(np.uint16))
    write_array(tmp_path / "label.log_probs.npy", np.full((rows, k), np.log(0.09), np.float32))
    write_array(tmp_path / "label.rest.npy", np.full(rows, np.log(0.1 / (classes - k)), np.float32))
    entry = {"kind": "softmax", "store": f"top-k:{k}", "temperature": 1.0, "views": 1}
    plan = {"rows": rows, "classes": classes, "entry": entry, "batches": 20}
    write_json(tmp_path / "plan.json", plan, format="edgedistill-soft-label-scale-student")
    command = [
        sys.executable,
        "-m",
        "edgedistill.benchmarks.soft_label_scale",
        "--part",
        "student",
        tmp_path / "plan.json",
    ]
    subprocess.run([*command, "--out", tmp_path / "out.json"], check=True, timeout=240)
    figures = read_json(tmp_path / "out.json", format="edgedistill-soft-label-scale-student")
    assert figures["batches"] == 20 and figures["dropped"] == 1000 and len(figures["soft_labels"]) == 64
    assert figures["mean_loss"] > 1
    assert figures["peak_rss_bytes"] - figures["data_set_rss_bytes"] < 200e6
