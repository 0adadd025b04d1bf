"""Soft labels are out-of-fold by proof, find their image by id, and belong to one data set."""

import dataclasses
import json

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from edgedistill.artifacts import RunDir, read_json, write_array
from edgedistill.cli import app
from edgedistill.data.manifest import ALWAYS_TRAINED, Dataset
from edgedistill.errors import ArtifactError, DataError, UsageError
from edgedistill.images import load_image, normalize
from edgedistill.metrics import accuracy, log_loss
from edgedistill.report import write_report
from edgedistill.teacher import TeacherSettings, teach, train_teachers
from edgedistill.training.checkpoints import read_model
from edgedistill.training.losses import make_targets
from edgedistill.training.noisy_labels import find_noisy_labels
from edgedistill.training.predict import predict_logits
from edgedistill.training.soft_labels import (
    FoldResult,
    ids_hash,
    prove_out_of_fold,
    read_folds,
    read_soft_labels,
    write_soft_labels,
)

SETTINGS = TeacherSettings(
    name="test_efficientnet",
    weights="none",
    image_size=32,
    epochs=1,
    batch_size=8,
    workers=0,
    device="cpu",
    tensorboard=False,
)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_dataset(count=24, folds=2, groups=None):
    """Train images 0..., then four of val and four of test; no files."""
    numbers = np.arange(count + 8)
    split = np.where(numbers < count, "train", np.where(numbers < count + 4, "val", "test"))
    return Dataset(
        ids=np.array([f"im{n:03d}.png" for n in numbers]),
        paths=np.array([f"/nowhere/im{n:03d}.png" for n in numbers]),
        sha256=np.array([f"{n:064x}" for n in numbers]),
        labels=(numbers % 3).astype(np.int32),
        groups=np.array([""] * len(numbers) if groups is None else groups),
        splits=split,
        folds=np.where(numbers < count, numbers % folds, -1).astype(np.int16),
        class_names=("a", "b", "c"),
    )


def make_results(dataset, seed=0):
    """What honest teachers would leave: log-probabilities that name their image by its number."""
    rng = np.random.default_rng(seed)
    table = torch.log_softmax(torch.from_numpy(rng.normal(size=(len(dataset), 3)).astype(np.float32)), dim=1).numpy()
    results = []
    for fold in range(dataset.fold_count):
        own = np.flatnonzero(dataset.folds == fold)
        others = np.flatnonzero((dataset.splits == "train") & (dataset.folds != fold))
        results.append(
            FoldResult(
                fold=fold,
                ids=dataset.ids[own],
                log_probs=table[own],
                trained_on=ids_hash(dataset.ids[others]),
                epochs_planned=3,
                epochs_done=3,
                architecture="x",
                model_sha256="0" * 64,
            )
        )
    return results, table


def shuffled(dataset, seed=1):
    order = np.random.default_rng(seed).permutation(len(dataset))
    arrays = ("ids", "paths", "sha256", "labels", "groups", "splits", "folds")
    return dataclasses.replace(dataset, **{name: getattr(dataset, name)[order] for name in arrays}), order


def test_shuffling_the_images_changes_no_labels_owner(tmp_path):
    dataset = make_dataset()
    results, table = make_results(dataset)
    folder = write_soft_labels(tmp_path / "soft_labels", dataset, results)
    train = dataset.rows("train")
    joined = read_soft_labels(folder, dataset)
    assert np.array_equal(joined[train], table[train])
    assert np.isnan(joined[dataset.splits != "train"]).all()
    other, order = shuffled(dataset)
    assert np.array_equal(read_soft_labels(folder, other), joined[order], equal_nan=True)
    # Written from the shuffled data set: the same files.
    again = write_soft_labels(tmp_path / "again", other, reversed(make_results(dataset)[0]))
    for name in ("ids.npy", "fold.npy", "label.log_probs.npy", "meta.json"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def change(results, fold, **values):
    return [dataclasses.replace(result, **values) if result.fold == fold else result for result in results]


def test_every_kind_of_leak_is_refused_before_anything_is_written(tmp_path):
    dataset = make_dataset()
    results, _ = make_results(dataset)
    prove_out_of_fold(dataset, results)
    everything = ids_hash(dataset.ids[dataset.rows("train")])
    cases = [
        (results[:1], "12 training images have none"),
        ([results[0], results[0]], "labelled by two teachers"),
        (change(results, 1, trained_on=everything), "teacher 1 did not train on exactly the other folds"),
        (change(results, 0, epochs_done=2), "teacher 0 stopped after 2 of 3 epochs"),
        (change(results, 0, ids=np.append(results[0].ids[:-1], "im030.png")), "belong to no training image"),
        (
            [dataclasses.replace(results[0], ids=results[1].ids), dataclasses.replace(results[1], ids=results[0].ids)],
            "labelled images of other folds",
        ),
    ]
    for number, (wrong, message) in enumerate(cases):
        with pytest.raises(DataError, match=message):
            write_soft_labels(tmp_path / str(number), dataset, wrong)
        assert not (tmp_path / str(number)).exists()
    grouped = make_dataset(groups=["person"] * 2 + [""] * 30)
    with pytest.raises(DataError, match="group 'person' lies in two folds"):
        prove_out_of_fold(grouped, make_results(grouped)[0])


def test_labels_of_another_data_set_are_refused(tmp_path):
    dataset = make_dataset()
    folder = write_soft_labels(tmp_path, dataset, make_results(dataset)[0])
    more = dataclasses.replace(dataset, class_names=("a", "b", "c", "d"))
    with pytest.raises(ArtifactError, match=r"meta.json: 3 classes, but the data set has 4; train the teachers again"):
        read_soft_labels(folder, more)
    renamed = dataclasses.replace(dataset, class_names=("a", "b", "z"))
    with pytest.raises(ArtifactError, match=r"classes a, b, c, but the data set has a, b, z"):
        read_soft_labels(folder, renamed)
    relabelled = dataclasses.replace(dataset, labels=np.roll(dataset.labels, 1))
    with pytest.raises(ArtifactError, match="made for another data set"):
        read_soft_labels(folder, relabelled)
    splits = dataset.splits.copy()
    splits[[0, -1]] = ["test", "train"]
    with pytest.raises(ArtifactError, match="labels of images that are now held out would leak"):
        read_soft_labels(folder, dataclasses.replace(dataset, splits=splits))


def test_damaged_soft_labels_are_refused(tmp_path):
    dataset = make_dataset()
    folder = write_soft_labels(tmp_path, dataset, make_results(dataset)[0])
    path = folder / "label.log_probs.npy"
    good = np.load(path)
    for wrong, message in (
        (good[:-1], "expected float32"),
        (good.astype(np.float64), "float64"),
        (np.exp(good), "not log-probabilities"),
        (np.where(np.arange(24)[:, None] == 5, np.nan, good).astype(np.float32), "not log-probabilities"),
    ):
        write_array(path, wrong)
        with pytest.raises(ArtifactError, match=message):
            read_soft_labels(folder, dataset)
    path.write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"label.log_probs.npy: damaged"):
        read_soft_labels(folder, dataset)
    (folder / "meta.json").write_text(json.dumps({"format": "other", "version": 1}))
    with pytest.raises(ArtifactError, match=r"meta.json: format 'other'"):
        read_soft_labels(folder, dataset)


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Two tiny teachers on 24 real files, trained one fold per call as on a cluster."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("taught")
    dataset = make_dataset()
    rng = np.random.default_rng(0)
    paths = [str(root / name) for name in dataset.ids]
    for path, label in zip(paths, dataset.labels, strict=True):
        pixels = rng.integers(0, 120, (40, 40, 3), dtype=np.uint8)
        pixels[:, :, label] += 100
        cv2.imwrite(path, pixels)
    dataset = dataclasses.replace(dataset, paths=np.array(paths))
    run = RunDir(root / "run")
    first = train_teachers(dataclasses.replace(SETTINGS, fold=1), dataset, run, resume=False)
    assert first == run.teacher(1)
    assert not run.soft_labels.exists()
    return dataset, run, train_teachers(dataclasses.replace(SETTINGS, fold=0), dataset, run, resume=False)


def test_a_fold_that_another_process_has_trained_meanwhile_is_not_trained_again(taught, tmp_path, monkeypatch):
    dataset, run = taught[0], RunDir(tmp_path / "run")
    trained, train_fold = [], teach._train_fold

    def beside(shared, run, fold, *, resume):
        trained.append(fold)
        if fold == 0:
            train_teachers(dataclasses.replace(SETTINGS, fold=1), dataset, run, resume=True)
        train_fold(shared, run, fold, resume=resume)

    monkeypatch.setattr(teach, "_train_fold", beside)
    assert train_teachers(SETTINGS, dataset, run, resume=False) == run.soft_labels
    assert trained == [0, 1]


def test_soft_labels_are_what_the_held_out_teacher_says(taught):
    dataset, run, folder = taught
    assert folder == run.soft_labels
    joined = read_soft_labels(folder, dataset)
    for fold in range(2):
        loaded = read_model(run.teacher(fold) / "model.pt")
        held_out = np.flatnonzero(dataset.folds == fold)
        logits = predict_logits(loaded.model, dataset.paths[held_out], loaded.input_spec)
        assert np.allclose(joined[held_out], torch.log_softmax(torch.from_numpy(logits), dim=1).numpy(), atol=1e-5)
        assert not (run.teacher(fold) / "checkpoint.pt").exists()


def test_the_quality_of_the_labels_is_written_down(taught):
    dataset, run, folder = taught
    quality = read_json(run.root / "teacher" / "oof.json", format="edgedistill-oof")
    train = dataset.rows("train")
    probabilities = np.exp(read_soft_labels(folder, dataset)[train])
    assert quality["all"]["n"] == len(train)
    assert quality["all"]["accuracy"] == pytest.approx(accuracy(probabilities, dataset.labels[train]))
    assert quality["all"]["log_loss"] == pytest.approx(log_loss(probabilities, dataset.labels[train]), abs=1e-5)
    assert [values["n"] for values in quality["folds"]] == [12, 12]
    assert set(quality["folds"][0]) == {"fold", "n", "accuracy", "macro_f1", "log_loss", "ece"}


def test_finished_teachers_are_kept_and_other_settings_are_refused(taught):
    dataset, run, folder = taught
    before = {path: path.stat().st_mtime_ns for path in run.root.rglob("model.pt")}
    assert train_teachers(SETTINGS, dataset, run, resume=True) == folder
    assert {path: path.stat().st_mtime_ns for path in run.root.rglob("model.pt")} == before
    with pytest.raises(UsageError, match="holds work already; go on with --resume, or choose another --out"):
        train_teachers(SETTINGS, dataset, run, resume=False)
    with pytest.raises(ArtifactError, match=r"fold.json: made with lr=0.001 \(now 0.002\)"):
        train_teachers(dataclasses.replace(SETTINGS, lr=0.002), dataset, run, resume=True)
    relabelled = dataclasses.replace(dataset, labels=np.roll(dataset.labels, 1))
    with pytest.raises(ArtifactError, match="dataset_hash"):
        train_teachers(SETTINGS, relabelled, run, resume=True)


def test_wrong_folds_and_settings_are_usage_errors(taught, tmp_path, monkeypatch):
    dataset, _, _ = taught
    run = RunDir(tmp_path)
    with pytest.raises(UsageError, match=r"--fold 2: the data set has folds 0 to 1"):
        train_teachers(dataclasses.replace(SETTINGS, fold=2), dataset, run, resume=False)
    unfolded = dataclasses.replace(dataset, folds=np.minimum(dataset.folds, 0))
    with pytest.raises(DataError, match="teachers need 2 or more"):
        train_teachers(SETTINGS, unfolded, run, resume=False)
    with pytest.raises(UsageError, match=r"epochs=0, expected 1 or more; lr=-1, expected a number above 0"):
        dataclasses.replace(SETTINGS, epochs=0, lr=-1)
    with pytest.raises(UsageError, match="finds no CUDA device" if not torch.cuda.is_available() else "unknown"):
        train_teachers(
            dataclasses.replace(SETTINGS, device="nonsense" if torch.cuda.is_available() else "cuda"),
            dataset,
            run,
            resume=False,
        )
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UsageError, match=r"RANK, MASTER_ADDR, MASTER_PORT missing.* a fold of its own with --fold"):
        train_teachers(SETTINGS, dataset, run, resume=False)


@pytest.mark.parametrize("cutmix", [0.0, 1.0])
def test_teachers_that_saw_mixed_images_end_with_the_statistics_of_clean_ones(tiny_dataset, tmp_path, cutmix):
    """Of the folds that it trained on, never of the one that it labels."""
    run, others = RunDir(tmp_path), (tiny_dataset.splits == "train") & (tiny_dataset.folds != 0)
    settings = dataclasses.replace(SETTINGS, batch_size=int(others.sum()), cutmix_probability=cutmix, fold=0)
    train_teachers(settings, tiny_dataset, run, resume=False)
    loaded = read_model(run.teacher(0) / "model.pt")
    pixels = np.stack([load_image(path, loaded.input_spec) for path in tiny_dataset.paths[others]])
    network = loaded.model
    with torch.no_grad():
        first = network.conv_stem(torch.from_numpy(normalize(pixels, loaded.input_spec)))
    clean = torch.allclose(network.bn1.running_mean, first.mean(dim=(0, 2, 3)), atol=1e-4)
    assert clean == (cutmix > 0)


def test_images_of_small_classes_are_in_every_training_and_have_their_hard_label(tmp_path):
    dataset = make_dataset()
    labels, dealt = dataset.labels.copy(), dataset.folds.copy()
    labels[[3, 8]], dealt[[3, 8]] = 3, ALWAYS_TRAINED
    dataset = dataclasses.replace(dataset, labels=labels, folds=dealt, class_names=("a", "b", "c", "rare"))
    results, table = make_results(dataset)
    table = np.concatenate([table, np.full((len(table), 1), -50, np.float32)], axis=1)
    rows = [np.flatnonzero(dataset.folds == result.fold) for result in results]
    results = [dataclasses.replace(result, log_probs=table[own]) for result, own in zip(results, rows, strict=True)]
    write_soft_labels(tmp_path, dataset, results)
    entry = read_json(tmp_path / "meta.json", format="edgedistill-soft-labels")["always_trained"]
    assert entry == {"n": 2, "soft_label": "the hard label, without smoothing"}
    soft = read_soft_labels(tmp_path, dataset)
    assert np.isnan(soft[[3, 8]]).all() and np.isfinite(soft[np.concatenate(rows)]).all()
    assert read_folds(tmp_path, dataset)[[3, 8]].tolist() == [ALWAYS_TRAINED] * 2
    targets = make_targets(dataset.labels, 4, soft_log_probs=soft, label_smoothing=0.1)
    whole = targets.take(np.arange(len(dataset)))
    assert whole.soft[[3, 8]].tolist() == [[0, 0, 0, 1]] * 2 and whole.hard[3, 3] < 1
    noisy = find_noisy_labels(dataset, soft)
    assert len(noisy.rows) == 22 and not np.isin([3, 8], noisy.rows).any()
    careless = ids_hash(dataset.ids[(dataset.folds >= 0) & (dataset.folds != 0)])
    with pytest.raises(DataError, match="teacher 0 did not train on exactly the other folds"):
        prove_out_of_fold(dataset, [dataclasses.replace(results[0], trained_on=careless), results[1]])
    asked = dataclasses.replace(results[0], ids=np.append(results[0].ids, dataset.ids[3]))
    with pytest.raises(DataError, match="belong to no training image"):
        prove_out_of_fold(dataset, [asked, results[1]])


def test_a_job_with_a_class_of_one_image_runs_resumes_and_lends_its_soft_labels(make_photos, tmp_path, tiny_options):
    photos = make_photos(tmp_path / "photos")
    (photos / "ring").mkdir()
    (photos / "bar" / "000.jpg").rename(photos / "ring" / "000.jpg")
    options = [*tiny_options, "--workers", "0", "--no-baseline", "--no-tensorboard", "--small-classes", "train-only"]

    def call(*more):
        command = ["distill", "--data", str(photos), *options, *map(str, more)]
        result = CliRunner().invoke(app, command, catch_exceptions=False)
        assert result.exit_code == 0, result.output

    with pytest.raises(UsageError, match="every teacher trained on 1 images"):
        call("--out", tmp_path / "live", "--live-teachers")
    one, two = tmp_path / "one", tmp_path / "two"
    for out, more in ((one, ()), (two, ("--soft-labels", one / "soft_labels"))):
        call("--out", out, *more)
        evaluation = read_json(out / "evaluation" / "evaluation.json", format="edgedistill-evaluation")
        assert evaluation["classes"] == ["bar", "disc", "ring"] and 0 < evaluation["models"]["student"]["macro_f1"] <= 1
    (one / "model.pt").unlink()
    call("--out", one, "--resume")
    assert read_model(one / "model.pt").classes == ("bar", "disc", "ring")
    page = write_report(RunDir(one)).read_text(encoding="utf-8")
    assert "1 more, of small classes, are always trained on" in page and "do not trust" not in page
