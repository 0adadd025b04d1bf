"""Attributes, several labels and a value beside them, from a CSV file to answers of the exported network."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score
from typer.testing import CliRunner

from edgedistill import task_metrics
from edgedistill.artifacts import RunDir, read_array, read_json, write_array, write_json
from edgedistill.benchmarks.tuner import valset
from edgedistill.benchmarks.tuner.students import find_students
from edgedistill.benchmarks.tuner.valset import open_val
from edgedistill.cli import app
from edgedistill.data.manifest import Dataset, read_dataset
from edgedistill.data.soft_label_store import check_store, parse_store
from edgedistill.errors import ArtifactError, DataError, UsageError
from edgedistill.export.int8_training import find_lesson
from edgedistill.export.network import load_network
from edgedistill.export.prepare import PrepareSettings, prepare_candidates
from edgedistill.export.samples import find_images
from edgedistill.report import write_report
from edgedistill.runtime import Classifier
from edgedistill.student import StudentSettings
from edgedistill.task_metrics import Scored
from edgedistill.tasks import Head, Task, sigmoid, softmax
from edgedistill.teacher import TeacherSettings, read_blend
from edgedistill.training.answers import confidences, scores_of_shares, shares_of
from edgedistill.training.checkpoints import read_model
from edgedistill.training.heads import make_task_targets, read_scores, scores_from, scores_of, task_loss, write_scores
from edgedistill.training.losses import (
    HardLossName,
    LossName,
    LossSettings,
    hard_loss_of,
    label_loss_of,
    ldam_margins,
    make_targets,
)
from edgedistill.training.losses import loss_of as one_head_loss
from edgedistill.training.mixing import Mixing, mix
from edgedistill.training.predict import predict_logits
from edgedistill.training.settings import TrainSettings
from edgedistill.training.soft_labels import ids_hash, read_soft_labels
from edgedistill.training.views import label_pictures, predict_probabilities, views_of

Cli = Callable[..., subprocess.CompletedProcess[str]]
COLORS = {"blue": (220, 60, 40), "green": (40, 200, 40), "red": (40, 40, 220)}
OPTIONS = (
    "--teacher resnet10t --student resnet10t --teacher-weights none --student-weights none --folds 2 --image-size 32"
    " --teacher-epochs 2 --epochs 4 --extra-epochs 1 --batch-size 8 --teacher-batch-size 8 --test-fraction 0.25"
    " --no-baseline --workers 0 --cutmix 0.1 --optimizer adamw --device cpu"
).split()
ATTRIBUTES = "--label-columns color,shape --regression size --missing-labels ignore".split()
TEACHING = (
    "--teacher resnet10t --teacher-weights none --folds 2 --teacher-image-size 32 --teacher-batch-size 8"
    " --test-fraction 0.25 --workers 0 --device cpu"
).split()
VOTING = (
    "--tta flip --class-weights inverse --no-balanced --test-size 40 --epochs 1 --teacher-test-size 40"
    " --teacher resnet10t,test_efficientnet --teacher-override test_efficientnet --soft-label-store float16"
).split()
TASK = Task(
    (
        Head("color", "softmax", ("blue", "green", "red")),
        Head("labels", "sigmoid", ("a", "b")),
        Head("size", "regression", weight=0.5, mean=10.0, std=4.0),
    )
)
VALUES = np.array([[0, 1, 0, 10], [2, 0, np.nan, 18], [np.nan, 1, 1, np.nan]], np.float32)


@pytest.fixture(scope="module")
def photos_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 pictures of a disc or a bar in one of three colours; five colours are not known."""
    root, rng = tmp_path_factory.mktemp("attributes"), np.random.default_rng(0)
    rows = []
    for number in range(120):
        color, shape, size = list(COLORS)[number % 3], ("bar", "disc")[number // 3 % 2], int(rng.integers(8, 22))
        image = rng.integers(0, 60, (48, 48, 3), dtype=np.uint8)
        x, y = (int(v) for v in rng.integers(18, 30, 2))
        if shape == "disc":
            cv2.circle(image, (x, y), size, COLORS[color], -1)
        else:
            cv2.rectangle(image, (x - size, y - 3), (x + size, y + 3), COLORS[color], -1)
        cv2.imwrite(str(root / f"{number:03d}.png"), image)
        labels = [name for name, there in (("disc", shape == "disc"), ("red", color == "red")) if there]
        rows.append(
            {"path": f"{number:03d}.png", "color": "" if number % 24 == 1 else color, "shape": shape, "size": size,
             "label": "|".join(labels) or "|"}
        )  # fmt: skip
    with (root / "photos.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root / "photos.csv"


def call(*arguments: str | Path) -> None:
    """A command in this process: importing torch anew for each would take most of the time."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def attributes(photos_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished, exported run with two attributes and a value."""
    out = tmp_path_factory.mktemp("runs") / "attributes"
    call("distill", "--data", photos_csv, "--out", out, *ATTRIBUTES, *OPTIONS)
    call("export-openvino", out / "model.pt", "--int8", "off")
    return out


@pytest.fixture(scope="module")
def many(photos_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with several labels per image, exported with INT8."""
    out = tmp_path_factory.mktemp("runs") / "many"
    call("distill", "--data", photos_csv, "--out", out, "--multi-label", "--loss", "kl", *OPTIONS)
    call("export-openvino", out / "model.pt", "--int8", "on", "--int8-max-rung", "plain", "--int8-budget", "1")
    return out


# ---- targets and loss ----


def test_the_loss_is_the_sum_of_every_heads_own() -> None:
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    loss = task_loss(logits, make_task_targets(TASK, VALUES), LossSettings(), TASK)
    color = F.cross_entropy(logits[:2, :3], torch.tensor([0, 2]))
    known = torch.tensor([[True, True], [True, False], [True, True]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    labels = F.binary_cross_entropy_with_logits(logits[:, 3:5][known], truth[known])
    size = F.smooth_l1_loss(logits[:2, 5], torch.tensor([0.0, 2.0]))
    assert loss.item() == pytest.approx((color + labels + 0.5 * size).item(), rel=1e-6)


def test_an_image_without_labels_teaches_nothing() -> None:
    logits = torch.randn(2, 6, requires_grad=True)
    values = np.full((2, 4), np.nan, np.float32)
    loss = task_loss(logits, make_task_targets(TASK, values), LossSettings(), TASK)
    loss.backward()
    assert loss.item() == 0 and logits.grad is not None and not logits.grad.any()


def test_one_head_alone_has_the_loss_of_one_label() -> None:
    task, labels = Task.single(("a", "b", "c")), np.array([2, 0, 1], np.int32)
    logits, soft = torch.randn(3, 3), torch.log_softmax(torch.randn(3, 3), dim=1).numpy()
    for settings in (
        LossSettings(),
        LossSettings("ce", 0.3, 2.0),
        LossSettings("kl", 0.5, 2.0),
        LossSettings("js", 0.5),
    ):
        own = make_task_targets(
            task,
            labels[:, None].astype(np.float32),
            soft_scores=soft,
            temperature=settings.temperature,
            label_smoothing=0.1,
        )
        wanted = make_targets(labels, 3, soft_log_probs=soft, temperature=settings.temperature, label_smoothing=0.1)
        assert task_loss(logits, own, settings, task).item() == pytest.approx(
            one_head_loss(logits, wanted, settings).item(), rel=1e-5
        )


def test_soft_targets_keep_the_temperature_and_cutmix_mixes_all_heads() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 6))
    targets = make_task_targets(TASK, VALUES, soft_scores=scores_of(TASK, logits), temperature=2.0)
    np.testing.assert_allclose(targets.soft[:, :3], softmax(logits[:, :3], 2.0), atol=1e-6)
    np.testing.assert_allclose(targets.soft[:, 3:5], sigmoid(logits[:, 3:5], 2.0), atol=1e-6)
    np.testing.assert_allclose(targets.soft[:, 5], logits[:, 5], atol=1e-6)
    images = torch.zeros(3, 8, 8, 3, dtype=torch.uint8)
    _, mixed = mix(images, targets, Mixing(cutmix=1.0), seed=1, epoch=0, step=0)
    known = ~torch.isnan(mixed.hard).any(dim=1)
    assert not torch.equal(mixed.soft, targets.soft) and torch.isnan(mixed.hard[2]).any()
    assert torch.all((mixed.hard[known, :3].sum(dim=1) - 1).abs() < 1e-6)


def test_class_weights_are_each_heads_own() -> None:
    task = Task((TASK.heads[0], Head("shape", "softmax", ("bar", "disc")), TASK.heads[1]))
    values = np.array([[0, 1, 1, 0], [0, 1, 0, 1], [1, 0, 1, 1], [2, 1, 1, 0]], np.float32)
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    settings = TrainSettings(name="x", class_weights="inverse", balanced_sampling=False)
    hard = settings.loss_against_heads(task, values)
    assert hard.class_weights == pytest.approx((4 / 6, 4 / 3, 4 / 3, 2.0, 4 / 6, 1 / 3, 1.0))
    loss = task_loss(logits, make_task_targets(task, values), LossSettings(hard=hard), task)
    truth = torch.from_numpy(values)
    expected = (
        F.cross_entropy(logits[:, :3], truth[:, 0].long(), torch.tensor(hard.class_weights[:3]))
        + F.cross_entropy(logits[:, 3:5], truth[:, 1].long(), torch.tensor(hard.class_weights[3:5]))
        + F.binary_cross_entropy_with_logits(logits[:, 5:], truth[:, 2:], pos_weight=torch.tensor([1 / 3, 1.0]))
    )
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


THREE = Task((TASK.heads[0], Head("shape", "softmax", ("bar", "disc")), TASK.heads[2]))


def test_margins_of_ldam_are_each_heads_own() -> None:
    values = np.array([[0, 1, 10], [0, 0, 14], [1, 1, 6], [2, 1, 10], [np.nan, 1, 10]], np.float32)
    settings = TrainSettings(
        name="x", hard_loss="ldam", classifier="cosine", cutmix_probability=0.0, class_weights="inverse",
        balanced_sampling=False,
    )  # fmt: skip
    settings.refuse_for(THREE)
    hard = settings.loss_against_heads(THREE, values)
    colors, shapes = ldam_margins(np.array([2, 1, 1])), ldam_margins(np.array([1, 4]))
    assert hard.margins == pytest.approx((*colors, *shapes, 0.0)) and len(hard.class_weights) == 6
    logits = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    loss = task_loss(logits, make_task_targets(THREE, values), LossSettings(hard=hard), THREE)
    color, shape = (torch.from_numpy(values[:, column]) for column in (0, 1))
    expected = 0.5 * F.smooth_l1_loss(logits[:, 5], torch.from_numpy((values[:, 2] - 10) / 4))
    for part, truth, margins, weights in (
        (logits[:4, :3], color[:4].long(), colors, hard.class_weights[:3]),
        (logits[:, 3:5], shape.long(), shapes, hard.class_weights[3:5]),
    ):
        moved = part - F.one_hot(truth, part.shape[1]) * torch.tensor(margins)
        expected = expected + F.cross_entropy(moved, truth, torch.tensor(weights))
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["focal", "soft-f1", "bce"])
def test_every_head_of_classes_has_the_hard_loss_that_was_chosen(name: HardLossName) -> None:
    task = Task((*THREE.heads[:2], TASK.heads[1]))
    values = np.array([[0, 1, 1, 0], [0, 1, 0, 1], [1, 0, 1, 1], [2, 1, 0, 0]], np.float32)
    settings = TrainSettings(name="x", hard_loss=name)
    settings.refuse_for(task)
    hard, logits = settings.loss_against_heads(task, values), torch.randn(4, 7)
    truth = torch.from_numpy(values)
    expected = (
        hard_loss_of(logits[:, :3], F.one_hot(truth[:, 0].long(), 3).float(), hard)
        + hard_loss_of(logits[:, 3:5], F.one_hot(truth[:, 1].long(), 2).float(), hard)
        + label_loss_of(logits[:, 5:], truth[:, 2:], hard)
    )
    loss = task_loss(logits, make_task_targets(task, values), LossSettings(hard=hard), task)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("name", ["ce", "kl"])
def test_the_teachers_answer_counts_where_the_label_is_missing(name: LossName) -> None:
    logits, teacher = (torch.randn(3, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    targets = make_task_targets(TASK, VALUES, soft_scores=scores_of(TASK, teacher.numpy()))
    loss = task_loss(logits, targets, LossSettings(name, 0.3), TASK)
    hard = task_loss(logits, make_task_targets(TASK, VALUES), LossSettings(), TASK)

    def soft_ce(soft: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return -(soft * F.log_softmax(own, dim=1)).sum(dim=1).mean() + (
            (soft * soft.log()).sum(dim=1).mean() if name == "kl" else 0.0
        )

    p = torch.sigmoid(teacher[:, 3:5]).reshape(-1)
    z = logits[:, 3:5].reshape(-1)
    soft = (
        soft_ce(F.softmax(teacher[:, :3], dim=1), logits[:, :3])
        + soft_ce(torch.stack([p, 1 - p], 1), torch.stack([z, torch.zeros_like(z)], 1))
        + 0.5 * F.smooth_l1_loss(logits[:, 5], teacher[:, 5])
    )
    assert float(loss) == pytest.approx(float(0.7 * hard + 0.3 * soft), rel=1e-5)
    logits.requires_grad_()
    alone = make_task_targets(TASK, np.full_like(VALUES, np.nan), soft_scores=scores_of(TASK, teacher.numpy()))
    task_loss(logits, alone, LossSettings(name, 0.3), TASK).backward()
    assert logits.grad is not None and torch.isfinite(logits.grad).all() and logits.grad.any(dim=0).all()


def test_what_needs_classes_that_exclude_each_other_is_refused() -> None:
    settings = StudentSettings(hard_loss="soft-f1", live_teachers=True, drop_noisy=0.1)
    settings.refuse_for(TASK)
    settings.refuse_for(None)
    StudentSettings(views=2, unlabelled="folder", drop_noisy=0.1, calibrate_soft_labels=True).refuse_for(TASK)
    margins = TeacherSettings(hard_loss="ldam", classifier="cosine")
    margins.refuse_for(THREE)
    with pytest.raises(
        UsageError, match=r"teacher: --teacher-hard-loss ldam sets a class apart.*'labels' do not exclude"
    ):
        margins.refuse_for(Task((TASK.heads[1],)))


def test_shares_are_the_targets_and_go_back_to_scores() -> None:
    scores = scores_of(TASK, np.random.default_rng(0).normal(size=(3, 6)))
    targets = make_task_targets(TASK, VALUES, soft_scores=scores, temperature=3.0)
    assert torch.allclose(shares_of(TASK, torch.from_numpy(scores), 3.0), targets.soft, atol=1e-6)
    again = scores_of_shares(TASK, shares_of(TASK, torch.from_numpy(scores).double()))
    np.testing.assert_allclose(again.numpy(), scores, atol=1e-5)
    own = shares_of(Task.single(("a", "b", "c")), torch.from_numpy(scores[:, :3]), 2.0)
    assert torch.equal(own, shares_of(None, torch.from_numpy(scores[:, :3]), 2.0))
    certain = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0, 9.0]])
    assert torch.isfinite(scores_of_shares(TASK, certain)).all()
    assert float(confidences(TASK, torch.tensor([[0.7, 0.2, 0.1, 0.9, 0.4, 9.0]]))[0]) == pytest.approx(0.6)


def test_scores_of_a_mean_over_views_have_its_probabilities() -> None:
    probabilities = TASK.probabilities(np.random.default_rng(0).normal(size=(5, 6)))
    again = TASK.probabilities(scores_from(TASK, probabilities))
    np.testing.assert_allclose(again, probabilities, atol=1e-5)
    certain = np.array([[1, 0, 0, 1, 0, 10]], np.float64)
    assert np.isfinite(scores_from(TASK, certain)).all()


# ---- metrics ----


def test_metrics_of_heads_match_sklearn() -> None:
    rng = np.random.default_rng(0)
    values = np.column_stack([rng.integers(0, 3, 200), rng.integers(0, 2, (200, 2)), rng.normal(10, 4, 200)]).astype(
        np.float32
    )
    probabilities = TASK.probabilities(rng.normal(size=(200, 6)))
    found = task_metrics.summary(Scored(TASK, probabilities, values))
    truth, answers = values[:, 1:3], probabilities[:, 3:5] >= 0.5
    heads = found["heads"]
    assert heads["labels"]["map"] == pytest.approx(
        average_precision_score(truth, probabilities[:, 3:5], average="macro")
    )
    assert heads["labels"]["macro_f1"] == pytest.approx(f1_score(truth, answers, average="macro"))
    assert heads["color"]["accuracy"] == pytest.approx((probabilities[:, :3].argmax(1) == values[:, 0]).mean())
    assert heads["size"]["mae"] == pytest.approx(np.abs(probabilities[:, 5] - values[:, 3]).mean())
    right = (probabilities[:, :3].argmax(1) == values[:, 0]) & (answers == truth).all(axis=1)
    assert found["accuracy"] == pytest.approx(right.mean())
    low, high = task_metrics.bootstrap_interval("accuracy", Scored(TASK, probabilities, values))
    assert low < found["accuracy"] < high
    worse = Scored(TASK, TASK.probabilities(rng.normal(size=(200, 6))), values)
    same = task_metrics.paired_difference("accuracy", worse, worse)
    assert same["difference"] == 0 and same["p_value"] == 1


def test_joint_classes_of_attributes_have_sklearns_macro_f1() -> None:
    rng = np.random.default_rng(1)
    values = np.column_stack([rng.integers(0, 3, 90), rng.integers(0, 2, 90), rng.normal(10, 4, 90)]).astype(np.float32)
    values[:5, 0], values[5:9, 1] = np.nan, np.nan
    logits = rng.normal(size=(90, 6))
    logits[np.arange(90), np.nan_to_num(values[:, 0]).astype(int)] += 2
    scored = Scored(THREE, THREE.probabilities(logits), values)
    truth = 2 * values[9:, 0] + values[9:, 1]
    answers = 2 * logits[9:, :3].argmax(axis=1) + logits[9:, 3:5].argmax(axis=1)
    expected = f1_score(truth, answers, average="macro")
    found = task_metrics.summary(scored)
    assert 0 < expected < 1 and found["joint_macro_f1"] == pytest.approx(expected)
    low, high = task_metrics.bootstrap_interval("joint_macro_f1", scored, resamples=200)
    assert low < expected < high
    rare = Scored(THREE, THREE.probabilities(logits), np.where(values == 2, np.nan, values))
    assert 0 < task_metrics.joint_macro_f1(rare) < 1  # a class that no image of the split has
    rng = np.random.default_rng(0)
    assert "joint_macro_f1" not in task_metrics.summary(
        Scored(TASK, TASK.probabilities(rng.normal(size=(3, 6))), VALUES)
    )


def test_missing_labels_count_nowhere() -> None:
    logits = np.array([[9, 0, 0, 9, -9, 0], [0, 0, 9, -9, 9, 2.0], [0, 9, 0, -9, -9, 0]])
    found = task_metrics.summary(Scored(TASK, TASK.probabilities(logits), VALUES))
    assert found["accuracy"] == pytest.approx(2 / 3) and found["heads"]["color"]["n"] == 2
    assert found["heads"]["color"]["accuracy"] == 1 and found["heads"]["size"]["mae"] == pytest.approx(0)
    with pytest.raises(DataError, match="no image has a known label"):
        Scored(TASK, TASK.probabilities(logits), np.full_like(VALUES, np.nan))


def test_one_temperature_makes_overconfident_heads_modest() -> None:
    rng = np.random.default_rng(0)
    values = np.column_stack([rng.integers(0, 3, 300), rng.integers(0, 2, (300, 2)), np.zeros(300)]).astype(np.float32)
    logits = np.concatenate([3 * np.eye(3)[values[:, 0].astype(int)], 6 * values[:, 1:3] - 3, values[:, 3:]], axis=1)
    noisy = logits + rng.normal(0, 2, logits.shape)
    one, ten = (task_metrics.fit_temperature(TASK, scale * noisy, values) for scale in (1.0, 10.0))
    assert ten == pytest.approx(10 * one, rel=1e-3)


def test_heads_that_cannot_be_are_refused() -> None:
    good = TASK.to_dict()
    assert Task.from_dict(json.loads(json.dumps(good))) == TASK
    hostile: tuple[object, ...] = (
        {}, [], [good[2]], [good[0], good[0]], [good[2], good[0]], [good[0] | {"kind": "argmax"}], [good[0] | {"extra": 1}],
        [good[0] | {"classes": ["x"]}], [good[0] | {"classes": ["x", "x"]}], [good[0] | {"name": "a=b"}],
        [good[0], good[2] | {"std": 0.0}], [good[0] | {"weight": float("nan")}], [good[1] | {"threshold": "0.5"}],
        [good[0] | {"weight": 10**400}],
    )  # fmt: skip
    for values in hostile:
        with pytest.raises(ArtifactError):
            Task.from_dict(values)


# ---- the whole job ----


def evaluation_of(run: Path) -> dict[str, object]:
    return read_json(run / "evaluation" / "evaluation.json", format="edgedistill-evaluation")


def dataset_of(run: Path) -> Dataset:
    return read_dataset(run / "dataset.csv")


def test_students_learn_every_attribute(attributes: Path) -> None:
    models = evaluation_of(attributes)["models"]
    assert isinstance(models, dict) and set(models) == {"majority", "teacher", "student"}
    student, majority = models["student"], models["majority"]
    assert student["heads"]["color"]["accuracy"] > majority["heads"]["color"]["accuracy"] + 0.25
    assert student["accuracy"] > majority["accuracy"] + 0.15
    low, high = student["joint_macro_f1_ci95"]
    assert low <= student["joint_macro_f1"] <= high and student["joint_macro_f1"] > majority["joint_macro_f1"]
    dataset, probabilities = dataset_of(attributes), read_array(attributes / "evaluation" / "student.probs.npy")
    values = read_array(attributes / "evaluation" / "test_values.npy")
    assert dataset.values is not None
    np.testing.assert_array_equal(values, dataset.values[dataset.rows("test")])
    assert student["heads"]["size"]["mae"] == pytest.approx(np.abs(probabilities[:, 5] - values[:, 2]).mean(), rel=1e-5)
    assert 5 < probabilities[:, 5].mean() < 25  # in pixels, not in standard deviations


def test_soft_labels_of_heads_are_the_held_out_teachers(attributes: Path) -> None:
    dataset = dataset_of(attributes)
    task = dataset.task
    assert task is not None and dataset.values is not None
    stored = read_soft_labels(attributes / "soft_labels", dataset)
    assert np.isnan(stored[dataset.splits != "train"]).all() and np.isfinite(stored[dataset.splits == "train"]).all()
    rows = np.flatnonzero(dataset.folds == 1)
    teacher = read_model(attributes / "teacher" / "fold-1" / "model.pt")
    assert teacher.task == task and teacher.classes == dataset.outputs
    scores = scores_of(task, predict_logits(teacher.model, dataset.paths[rows], teacher.input_spec))
    np.testing.assert_allclose(stored[rows], scores, atol=1e-4)
    sizes = read_array(attributes / "soft_labels" / "size.values.npy")
    assert sizes.shape == (len(dataset.rows("train")), 1) and 5 < sizes.mean() < 25
    meta = json.loads((attributes / "soft_labels" / "meta.json").read_text())
    assert [head["kind"] for head in meta["heads"].values()] == ["softmax", "softmax", "regression"]


def test_the_runtime_answers_every_head_as_torch_does(attributes: Path) -> None:
    certificate = read_json(
        attributes / "openvino" / "stages" / "resnet10t" / "certificate.json", format="edgedistill-certificate"
    )
    assert certificate["verdict"] == "pass"
    dataset, loaded = dataset_of(attributes), read_model(attributes / "model.pt")
    rows = dataset.rows("test")
    logits = predict_logits(loaded.model, dataset.paths[rows], loaded.input_spec)
    wanted = loaded.task.probabilities(logits, loaded.temperature)
    classifier = Classifier(attributes / "openvino", threads=1, cache_dir=False)
    assert [head.name for head in classifier.heads] == ["color", "shape", "size"]
    for path, row in zip(dataset.paths[rows].tolist(), wanted, strict=True):
        answer = classifier.classify(path)
        np.testing.assert_allclose(answer.probabilities, row, atol=1e-3 * loaded.task.heads[2].std)
        color, shape, size = answer.heads
        assert (color.label, color.index) == (("blue", "green", "red")[row[:3].argmax()], row[:3].argmax())
        assert answer.label == f"{color.label}, {shape.label}" and answer.index == color.index
        assert answer.probability == min(color.probability, shape.probability)
        assert size.value == pytest.approx(row[5], abs=0.01)


def test_several_labels_are_learned_quantised_and_answered(many: Path) -> None:
    models = evaluation_of(many)["models"]
    assert isinstance(models, dict)
    assert models["student"]["heads"]["labels"]["map"] > models["majority"]["heads"]["labels"]["map"] + 0.2
    deploy = json.loads((many / "openvino" / "deploy.json").read_text())
    assert deploy["latency"]["precision"] == "int8"
    classifier = Classifier(many / "openvino", precision="f32", threads=1, cache_dir=False)
    assert classifier.multi_label and classifier.labels == ("disc", "red") and classifier.heads == ()
    loaded, dataset = read_model(many / "model.pt"), dataset_of(many)
    path = str(dataset.paths[0])
    row = sigmoid(predict_logits(loaded.model, np.array([path]), loaded.input_spec)[0], loaded.temperature)
    answer = classifier.classify(path)
    np.testing.assert_allclose(answer.probabilities, row, atol=1e-3)
    assert answer.accepted == tuple(np.flatnonzero(row >= 0.5).tolist())


def test_predict_prints_what_each_head_says(
    attributes: Path, many: Path, photos_csv: Path, cli: Cli, tmp_path: Path
) -> None:
    image = photos_csv.parent / "003.png"
    line = cli("predict", attributes / "openvino", image).stdout.strip().split("\t")
    assert line[0] == str(image) and [part.split("=")[0] for part in line[1:]] == ["color", "shape", "size"]
    answer = Classifier(attributes / "openvino", cache_dir=False).classify(image)
    assert line[1] == f"color={answer.heads[0].label} {answer.heads[0].probability:.4f}"
    assert float(line[3].removeprefix("size=")) == pytest.approx(answer.heads[2].value, rel=1e-3)
    found = json.loads(cli("predict", many / "openvino", image, "--json", "--precision", "f32").stdout)
    accepted = Classifier(many / "openvino", precision="f32", cache_dir=False).classify(image).accepted
    assert found["labels"] == ([("disc", "red")[number] for number in accepted] or ["none"])
    cli("predict", attributes / "openvino", image, "--csv", tmp_path / "answers.csv")
    row = next(csv.reader((tmp_path / "answers.csv").open()).__iter__())
    assert row == ["image", "error", "label", "probability"]


def test_the_report_shows_each_head(attributes: Path, many: Path) -> None:
    for run, words in (
        (attributes, ("color: accuracy", "size: MAE", "joint macro-F1")),
        (many, ("labels: mAP", "average precision")),
    ):
        page = write_report(RunDir(run)).read_text(encoding="utf-8")
        assert "Each head on the test split" in page and all(word in page for word in words)
        assert "could not be understood" not in page


@pytest.fixture(scope="module")
def voted(photos_csv: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    """Two architectures, of which one overrides, two views each, and what else goes with attributes: a larger size for
    testing, class weights, float16."""
    out = tmp_path_factory.mktemp("runs") / "voted"
    call("distill", "--data", photos_csv, "--out", out, *ATTRIBUTES, *OPTIONS, *VOTING)
    return RunDir(out)


def test_the_labels_of_attributes_are_the_blend_of_their_teachers_views(voted: RunDir) -> None:
    dataset = dataset_of(voted.root)
    task, blend = dataset.task, read_blend(voted)
    assert task is not None and blend is not None and blend.task == task and blend.override == (1, None)
    oof = read_json(voted.root / "teacher" / "oof.json", format="edgedistill-oof")
    assert [item["label"] for item in oof["architectures"]] == ["resnet10t", "test_efficientnet"]
    assert all(0 < item["all"]["heads"]["color"]["accuracy"] <= 1 for item in oof["architectures"])
    held_out, members = np.flatnonzero(dataset.folds == 1), []
    for folder in ("", "test_efficientnet"):
        loaded = read_model(voted.teacher(1, folder) / "model.pt")
        paths, spec = dataset.paths[held_out], loaded.input_spec
        members.append(predict_probabilities(loaded.model, paths, spec, views=views_of("flip"), task=task))
        scores = label_pictures(loaded.model, paths, spec, tta="flip", task=task)
        np.testing.assert_allclose(task.probabilities(scores), members[-1], atol=1e-5)
    fold_weights = tuple(oof["blend"]["fold_weights"][1])
    expected = replace(blend, weights=fold_weights)(members)
    stored = read_soft_labels(voted.soft_labels, dataset)
    np.testing.assert_allclose(task.probabilities(stored[held_out]), expected, atol=2e-3)
    assert not np.allclose(expected[:, :5], replace(blend, weights=fold_weights, override=None)(members)[:, :5])
    sizes = read_array(voted.soft_labels / "size.values.npy")
    assert read_array(voted.soft_labels / "color.log_probs.npy").dtype == np.float16 and sizes.dtype == np.float32
    entries = json.loads((voted.soft_labels / "meta.json").read_text())["heads"]
    assert entries["shape"]["store"] == "float16" and "store" not in entries["size"]
    assert 0 <= entries["color"]["loss"]["kl_mean"] < 1e-4


def test_several_teachers_of_attributes_are_evaluated_and_reported(voted: RunDir) -> None:
    models = evaluation_of(voted.root)["models"]
    assert isinstance(models, dict)
    assert {"teacher", "teacher-resnet10t", "teacher-test_efficientnet", "student"} <= models.keys()
    own = [read_array(voted.evaluation / f"teacher-{name}.probs.npy") for name in ("resnet10t", "test_efficientnet")]
    blend = read_blend(voted)
    assert blend is not None
    np.testing.assert_allclose(read_array(voted.evaluation / "teacher.probs.npy"), blend(own), atol=1e-4)
    assert read_model(voted.model).input_spec.height == 40
    dataset = dataset_of(voted.root)
    with (voted.root / "noisy_labels.csv").open(newline="") as file:
        noisy = list(csv.DictReader(file))
    assert {row["id"] for row in noisy} == set(dataset.ids[dataset.rows("train")].tolist())
    assert {row["head"] for row in noisy} <= {"color", "shape"}
    page = write_report(voted).read_text(encoding="utf-8")
    assert "Each architecture out of fold" in page and "could not be understood" not in page


def test_an_architecture_that_saw_what_it_labels_is_found(voted: RunDir, photos_csv: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path / "run")
    shutil.copytree(voted.root, run.root)
    path = run.teacher(1, "test_efficientnet") / "fold.json"
    values = read_json(path, format="edgedistill-teacher-fold")
    write_json(path, values | {"trained_on": ids_hash(dataset_of(run.root).ids)}, format="edgedistill-teacher-fold")
    with pytest.raises(DataError, match="teacher 1 did not train on exactly the other folds"):
        call("distill", "--data", photos_csv, "--out", run.root, *ATTRIBUTES, *OPTIONS, *VOTING, "--resume")


def test_several_teachers_of_many_labels_vote_by_majority(photos_csv: Path, tmp_path: Path) -> None:
    options = "--teacher resnet10t,test_efficientnet --teacher-vote hard --teacher-blend 0.4,0.6 --teacher-epochs 1"
    call("teach", "--data", photos_csv, "--out", tmp_path / "run", "--multi-label", *TEACHING, *options.split())
    run = RunDir(tmp_path / "run")
    dataset = dataset_of(run.root)
    assert dataset.task is not None
    shares = dataset.task.probabilities(read_soft_labels(run.soft_labels, dataset)[dataset.rows("train")])
    distance = np.abs(shares[:, :, None] - [0, 0.4, 0.6, 1]).min(axis=2)
    assert shares.shape[1] == 2 and distance.max() < 2e-3


def test_stores_that_no_head_fits_leave_no_run(photos_csv: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(UsageError, match="the largest head, color, has 3 classes; expected a smaller number"):
        call("teach", "--data", photos_csv, "--out", out, *ATTRIBUTES, *TEACHING, "--soft-label-store", "top-k:3")
    with pytest.raises(
        UsageError, match="top-k:1: keeps the likeliest of classes that exclude each other, and those of"
    ):
        call("teach", "--data", photos_csv, "--out", out, "--multi-label", *TEACHING, "--soft-label-store", "top-k:1")
    assert not (out / "dataset.csv").exists()


@pytest.mark.parametrize("store", ["float32", "float16", "top-k:2"])
def test_soft_labels_of_heads_are_read_as_written(store: str, tmp_path: Path) -> None:
    scores = scores_of(TASK, 5 * np.random.default_rng(0).normal(size=(40, 6)))
    kind = parse_store(store)
    check_store(kind, 0, TASK)
    blocks = [scores[:25], scores[25:]]
    entries = json.loads(json.dumps(write_scores(tmp_path, TASK, lambda: iter(blocks), count=40, kind=kind)))
    dataset = SimpleNamespace(task=TASK)
    found = read_scores(tmp_path, dataset, 40, entries)  # type: ignore[arg-type]
    given, got = TASK.probabilities(scores), TASK.probabilities(found)
    np.testing.assert_allclose(got[:, 3:], given[:, 3:], atol=5e-3 if store == "float16" else 1e-5)
    np.testing.assert_allclose(got[:, 5], given[:, 5], rtol=1e-5)  # in full in every store
    np.testing.assert_allclose(got[:, :3], given[:, :3], atol=5e-3 if store == "float16" else 1e-5)
    if store == "float16":
        p, q = (np.stack([probabilities[:, 3:5], 1 - probabilities[:, 3:5]]) for probabilities in (given, got))
        measured = (p * np.log(p / q)).sum(axis=(0, 2))
        assert entries["labels"]["loss"]["kl_max"] == pytest.approx(measured.max(), rel=0.02)
        assert entries["labels"]["loss"]["top1_changed"] == 0
    else:
        assert [name for name, entry in entries.items() if "store" in entry] == (["color"] if "top-k" in store else [])
    damaged = read_array(tmp_path / "labels.logits.npy").copy()
    damaged[3, 1] = np.nan
    write_array(tmp_path / "labels.logits.npy", damaged)
    with pytest.raises(ArtifactError, match=r"labels.logits.npy: holds values that are not finite"):
        read_scores(tmp_path, dataset, 40, entries)  # type: ignore[arg-type]


def test_candidates_are_prepared_with_every_head_of_val(
    attributes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(valset, "FEWEST", 5)
    settings = PrepareSettings((attributes,), tmp_path / "bundle", with_images=True, int8=False)
    folder = prepare_candidates(settings)
    header = next(csv.reader((folder / "val.csv").open(encoding="utf-8")))
    assert header == ["id", "path", "label", "sha256", "softmax:color", "softmax:shape", "regression@0.1:size"]
    students, dataset = find_students([folder]), dataset_of(attributes)
    val, rows = open_val(students, None), dataset.rows("val")
    assert students[0].task == read_model(attributes / "model.pt").task and dataset.values is not None
    assert list(val.ids) == dataset.ids[rows].tolist()
    np.testing.assert_array_equal(val.truth.values, dataset.values[rows])
    assert all(path.is_relative_to(folder / "val") for path in val.paths)


def test_images_without_a_known_label_are_neither_right_nor_wrong(
    attributes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They would dilute every accuracy of the certificate, and what INT8 may lose of it."""
    shutil.copy(attributes / "model.pt", tmp_path / "model.pt")
    with (attributes / "dataset.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    split, heads = rows[0].index("split"), [n for n, name in enumerate(rows[0]) if name.startswith("softmax:")]
    val = [row for row in rows[1:] if row[split] == "val"]
    for row in val[:3]:
        for column in heads:
            row[column] = ""
    val[3][heads[0]] = ""
    with (tmp_path / "dataset.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    network = replace(load_network(tmp_path / "model.pt", image_size=None), dataset_hash="")
    images = find_images(network, manifest=tmp_path / "dataset.csv", data=None)
    assert len(images.certificate) == len(val) - 3
    assert "3 val images have no known label and are left out" in " ".join(capsys.readouterr().err.split())
    assert network.task.judged(images.certificate.truth).all()


def test_int8_is_trained_on_what_the_student_learned(many: Path) -> None:
    network, manifest = load_network(many / "model.pt", image_size=None), many / "dataset.csv"
    train = find_images(network, manifest=manifest, data=None).calibration
    lesson = find_lesson(network, manifest, train)
    dataset = dataset_of(many)
    rows = dataset.rows("train")
    targets = lesson.targets(np.arange(len(rows)))
    assert dataset.values is not None and lesson.loss.name == "kl" and lesson.loss.soft_weight > 0
    np.testing.assert_array_equal(targets.hard.numpy(), dataset.values[rows])
    stored = read_soft_labels(many / "soft_labels", dataset)[rows]
    np.testing.assert_allclose(targets.soft.numpy(), sigmoid(stored, lesson.loss.temperature), atol=1e-6)
    np.testing.assert_array_equal(lesson.drawn, dataset.sampling_labels[rows])


def test_a_run_of_other_label_columns_is_not_resumed(attributes: Path, photos_csv: Path, cli: Cli) -> None:
    text = (attributes / "dataset.csv").read_text()
    changed = attributes.parent / "changed"
    (changed / "soft_labels").mkdir(parents=True)
    (changed / "dataset.csv").write_text(text.replace("regression@0.1:size", "regression@0.5:size"))
    with pytest.raises(ArtifactError, match="made for another data set"):
        read_soft_labels(attributes / "soft_labels", dataset_of(changed))
