"""Distilled and hard-label students get one budget; averaging, batch-norm, temperature and model.pt are as promised."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch

from edgedistill.artifacts import RunDir, read_array, read_json
from edgedistill.errors import ArtifactError, DataError, UsageError
from edgedistill.images import InputSpec, load_image, normalize
from edgedistill.metrics import accuracy, macro_f1
from edgedistill.student import StudentSettings, train_student
from edgedistill.timm_import import import_timm
from edgedistill.training.checkpoints import read_model
from edgedistill.training.evaluation import comparison_table, evaluate_test
from edgedistill.training.models import create_model
from edgedistill.training.predict import network_input, predict_logits, reestimate_batch_norm
from edgedistill.training.soft_labels import FoldResult, ids_hash, write_soft_labels

SETTINGS = StudentSettings(
    name="test_efficientnet",
    weights="none",
    image_size=32,
    epochs=6,
    extra_epochs=2,
    batch_size=10,
    lr=0.01,
    workers=0,
    device="cpu",
    tensorboard=False,
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, dataset_of):
    """60 train, 15 val and 15 test images of three colours: easy to tell apart, unequal in number."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    numbers = np.arange(90)
    labels = np.where(numbers % 5 < 3, 0, numbers % 5 - 2).astype(np.int32)
    paths = [str(root / f"im{n:03d}.png") for n in numbers]
    for path, label in zip(paths, labels, strict=True):
        pixels = rng.integers(0, 150, (44, 40, 3), dtype=np.uint8)
        pixels[:, :, label] += 90
        cv2.imwrite(path, pixels)
    return dataset_of(
        paths,
        labels,
        splits=np.where(numbers < 60, "train", np.where(numbers < 75, "val", "test")),
        folds=np.where(numbers < 60, numbers % 2, -1),
    )


@pytest.fixture(scope="module")
def soft_labels(dataset, tmp_path_factory):
    """Labels of a teacher that is right and fairly sure."""
    results = []
    for fold in range(2):
        own = np.flatnonzero(dataset.folds == fold)
        others = np.flatnonzero((dataset.splits == "train") & (dataset.folds != fold))
        probabilities = np.full((len(own), 3), 0.1)
        probabilities[np.arange(len(own)), dataset.labels[own]] = 0.8
        log_probs = np.log(probabilities).astype(np.float32)
        trained_on = ids_hash(dataset.ids[others])
        results.append(FoldResult(fold, dataset.ids[own], log_probs, trained_on, 1, 1, "x", "0" * 64))
    return write_soft_labels(tmp_path_factory.mktemp("soft"), dataset, results)


@pytest.fixture(scope="module")
def trained(dataset, soft_labels, tmp_path_factory):
    """A run with both students."""
    torch.set_num_threads(1)
    run = RunDir(tmp_path_factory.mktemp("run"))
    train_student(SETTINGS, dataset, run, soft_labels=soft_labels, out=run.model, resume=False)
    hard = dataclasses.replace(SETTINGS, distillation=False)
    out = run.hard_label_student / "model.pt"
    train_student(hard, dataset, run, soft_labels=None, out=out, resume=False)
    return run


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_both_students_learn_under_the_same_budget(dataset, trained):
    soft, hard = rows_of(trained.student), rows_of(trained.hard_label_student)
    for rows in (soft, hard):
        assert [row["phase"] for row in rows] == ["student"] * 6 + ["average"] * 2
        assert [row["epoch"] for row in rows] == list(range(1, 9))
        assert all(0 <= row["wait_fraction"] <= 1 and row["images_per_s"] > 0 for row in rows)
        assert all(
            {"train_loss", "lr", "seconds", "val_accuracy", "val_macro_f1", "val_log_loss"} <= row.keys()
            for row in rows
        )
        assert rows[-1]["val_accuracy"] > 0.8
    assert [row["lr"] for row in soft] == [row["lr"] for row in hard]
    assert soft[-1]["lr"] == pytest.approx(0.001)
    # The mixture's entropy is above the hard labels': the soft labels were really used.
    assert soft[-1]["train_loss"] > hard[-1]["train_loss"]


def test_model_pt_gives_in_plain_timm_what_predict_says(dataset, trained):
    saved = torch.load(trained.model, weights_only=True)
    model = import_timm().create_model(saved["architecture"], **saved["model_kwargs"])
    model.load_state_dict(saved["state_dict"])
    spec = InputSpec.from_dict(saved["input_spec"])
    paths = dataset.paths[dataset.rows("test")]
    pixels = np.stack([load_image(path, spec) for path in paths])
    with torch.no_grad():
        plain = model.eval()(torch.from_numpy(normalize(pixels, spec))).numpy()
    loaded = read_model(trained.model)
    ours = predict_logits(loaded.model, paths, spec, batch_size=4)
    assert np.allclose(plain, ours, atol=1e-4)
    assert saved["temperature"] != 1.0
    assert saved["classes"] == ["a", "b", "c"]
    assert saved["dataset_hash"] == dataset.hash
    assert saved["settings"]["lr"] == 0.01


def test_network_input_is_normalize():
    spec = InputSpec(height=8, width=12, mean=(1.0, 2.0, 3.0), std=(4.0, 5.0, 6.0))
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    images = network_input(torch.from_numpy(pixels).flip(-1), spec)
    assert np.array_equal(images.numpy(), normalize(pixels, spec))
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_is_measured_on_clean_images(dataset):
    torch.manual_seed(0)
    model = create_model("test_efficientnet", class_count=3, drop_rate=0.5)
    spec = InputSpec(height=32, width=32)
    paths = dataset.paths[:20]
    weights = {name: value.clone() for name, value in model.named_parameters()}
    assert reestimate_batch_norm(model, paths, spec, batch_size=10, limit=1000, seed=0) > 5
    pixels = np.stack([load_image(path, spec) for path in paths])
    with torch.no_grad():
        first = model.conv_stem(torch.from_numpy(normalize(pixels, spec)))
    assert torch.allclose(model.bn1.running_mean, first.mean(dim=(0, 2, 3)), atol=1e-5)
    assert not model.training
    assert model.bn1.momentum == 0.1
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())


def test_batch_norm_is_measured_in_batches_that_mix_what_a_folder_sorts(tmp_path):
    paths = []
    for number in range(64):
        value = 20 if number < 32 else 235  # the first class dark, the second bright
        paths.append(str(tmp_path / f"{number:02d}.png"))
        cv2.imwrite(paths[-1], np.full((32, 32, 3), value, np.uint8))
    model = create_model("test_efficientnet", class_count=2)
    spec = InputSpec(height=32, width=32)
    reestimate_batch_norm(model, np.array(paths), spec, batch_size=8, limit=1000, seed=0)
    pixels = np.stack([load_image(path, spec) for path in paths])
    with torch.no_grad():
        first = model.conv_stem(torch.from_numpy(normalize(pixels, spec)))
    ratio = model.bn1.running_var / first.var(dim=(0, 2, 3))
    assert (ratio > 0.7).all() and (ratio < 1.3).all()


def test_final_data_with_val_fits_no_temperature(dataset, soft_labels, tmp_path, capsys):
    run = RunDir(tmp_path)
    settings = dataclasses.replace(SETTINGS, epochs=1, extra_epochs=1, final_data="train+val")
    train_student(settings, dataset, run, soft_labels=soft_labels, out=run.model, resume=False)
    assert read_model(run.model).temperature == 1.0
    assert "not fitted: the last epochs trained on val" in capsys.readouterr().err
    unvalidated = dataclasses.replace(dataset, splits=np.where(dataset.splits == "val", "test", dataset.splits))
    settings = dataclasses.replace(SETTINGS, epochs=1, extra_epochs=0, distillation=False)
    out = run.hard_label_student / "model.pt"
    train_student(settings, unvalidated, run, soft_labels=None, out=out, resume=False)
    assert read_model(out).temperature == 1.0
    assert "the data set has no val split" in capsys.readouterr().err
    assert "val_accuracy" not in rows_of(run.hard_label_student)[0]


def test_misuse_is_told_before_anything_is_trained(dataset, soft_labels, trained, tmp_path):
    run = RunDir(tmp_path)
    with pytest.raises(UsageError, match="distillation needs soft labels"):
        train_student(SETTINGS, dataset, run, soft_labels=None, out=run.model, resume=False)
    relabelled = dataclasses.replace(dataset, labels=np.roll(dataset.labels, 1))
    with pytest.raises(ArtifactError, match="made for another data set"):
        train_student(SETTINGS, relabelled, run, soft_labels=soft_labels, out=run.model, resume=False)
    with pytest.raises(UsageError, match=r"model.pt: exists already; go on with --resume"):
        train_student(SETTINGS, dataset, trained, soft_labels=soft_labels, out=trained.model, resume=False)
    before = trained.model.stat().st_mtime_ns
    train_student(SETTINGS, dataset, trained, soft_labels=soft_labels, out=trained.model, resume=True)
    assert trained.model.stat().st_mtime_ns == before
    other = dataclasses.replace(SETTINGS, soft_weight=0.5)
    with pytest.raises(ArtifactError, match=r"model.pt: made with soft_weight=0.2 \(now 0.5\)"):
        train_student(other, dataset, trained, soft_labels=soft_labels, out=trained.model, resume=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"student: loss='mse', expected ce, kl or js"):
        dataclasses.replace(SETTINGS, loss="mse")
    with pytest.raises(UsageError, match="no network called"):
        train_student(
            dataclasses.replace(SETTINGS, name="nonet", distillation=False),
            dataset,
            run,
            soft_labels=None,
            out=run.model,
            resume=False,
        )


def test_the_test_split_is_read_once_for_all_models(dataset, trained):
    hard = trained.hard_label_student / "model.pt"
    models = {"student": [trained.model], "hard_label_student": [hard], "teacher": [trained.model, hard]}
    path = evaluate_test(trained, dataset, models, device="cpu", batch_size=4)
    result = read_json(path, format="edgedistill-evaluation")
    rows = dataset.rows("test")
    labels = dataset.labels[rows]
    assert read_array(trained.evaluation / "test_ids.npy").tolist() == dataset.ids[rows].tolist()
    assert read_array(trained.evaluation / "test_labels.npy").tolist() == labels.tolist()
    assert set(result["models"]) == {"majority", "student", "hard_label_student", "teacher"}
    probabilities = {name: read_array(trained.evaluation / f"{name}.probs.npy") for name in result["models"]}
    for name, values in result["models"].items():
        assert probabilities[name].dtype == np.float32
        assert np.allclose(probabilities[name].sum(axis=1), 1, atol=1e-5)
        assert values["accuracy"] == pytest.approx(accuracy(probabilities[name], labels))
        assert values["macro_f1"] == pytest.approx(macro_f1(probabilities[name], labels))
        assert values["accuracy_ci95"][0] <= values["accuracy"] <= values["accuracy_ci95"][1]
        assert np.sum(values["confusion"]) == len(rows)
    assert result["models"]["majority"]["accuracy"] == pytest.approx(np.mean(labels == 0))
    mean = (probabilities["student"] + probabilities["hard_label_student"]) / 2
    assert np.allclose(probabilities["teacher"], mean, atol=1e-6)
    pairs = {(pair["a"], pair["b"], pair["metric"]): pair for pair in result["paired"]}
    assert len(pairs) == 6
    over_majority = pairs["student", "majority", "accuracy"]
    difference = result["models"]["student"]["accuracy"] - result["models"]["majority"]["accuracy"]
    assert over_majority["difference"] == pytest.approx(difference)
    assert 0 <= over_majority["p_value"] <= 1
    assert pairs["student", "majority", "macro_f1"]["p_value"] is None
    assert comparison_table(result).row_count == 4


def test_models_of_other_data_are_not_evaluated(dataset, trained, tmp_path):
    relabelled = dataclasses.replace(dataset, labels=np.roll(dataset.labels, 1))
    with pytest.raises(ArtifactError, match=r"model.pt: trained on other classes or another data set"):
        evaluate_test(RunDir(tmp_path), relabelled, {"student": [trained.model]}, device="cpu")
    untested = dataclasses.replace(dataset, splits=np.where(dataset.splits == "test", "val", dataset.splits))
    with pytest.raises(DataError, match="no test split"):
        evaluate_test(RunDir(tmp_path), untested, {}, device="cpu")
    assert not list(tmp_path.iterdir())
