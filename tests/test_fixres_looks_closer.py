"""Testing at a higher resolution: only the last layers learn there, and everything downstream sees that resolution."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch

from edgedistill.artifacts import RunDir, read_jsonl
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.student import StudentSettings, train_student
from edgedistill.teacher import TeacherSettings, train_teachers
from edgedistill.training import fixres, loop
from edgedistill.training.checkpoints import load_tensors, read_model, read_settings
from edgedistill.training.fixres import only_last_layers_learn
from edgedistill.training.models import create_model
from edgedistill.training.predict import predict_logits
from edgedistill.training.settings import identity, refuse_other_settings
from edgedistill.training.soft_labels import read_soft_labels

COMMON = {
    "name": "test_efficientnet",
    "weights": "none",
    "image_size": 32,
    "test_size": 48,
    "fixres_epochs": 2,
    "epochs": 1,
    "batch_size": 8,
    "workers": 0,
    "device": "cpu",
    "tensorboard": False,
}
STUDENT = StudentSettings(**COMMON, extra_epochs=1, distillation=False, checkpoint_minutes=0.0)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, dataset_of):
    root = tmp_path_factory.mktemp("pictures")
    rng, numbers = np.random.default_rng(0), np.arange(40)
    paths = [str(root / f"im{n:02d}.png") for n in numbers]
    for path, number in zip(paths, numbers, strict=True):
        pixels = rng.integers(0, 120, (60, 60, 3), dtype=np.uint8)
        pixels[:, :, number % 2] += 100
        cv2.imwrite(path, pixels)
    return dataset_of(
        paths,
        (numbers % 2).astype(np.int32),
        splits=np.where(numbers < 24, "train", np.where(numbers < 32, "val", "test")),
        folds=np.where(numbers < 24, numbers // 2 % 2, -1),
        class_names=("a", "b"),
    )


def train(dataset, root, settings=STUDENT, resume=False):
    run = RunDir(root)
    return train_student(settings, dataset, run, soft_labels=None, out=run.model, resume=resume)


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    torch.set_num_threads(1)
    return train(dataset, tmp_path_factory.mktemp("whole") / "run")


def test_only_the_last_layers_learn():
    model = create_model("test_efficientnet", class_count=2, image_size=32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with only_last_layers_learn(model):
        model.train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(2):
            model(torch.randn(4, 3, 48, 48)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert {key.rsplit(".", 1)[0] for key in moved} == {"bn2", "classifier"}
    assert {"bn2.running_mean", "bn2.weight", "classifier.weight", "classifier.bias"} <= moved
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.train()
    assert all(module.training for module in model.modules())


def test_the_student_is_deployed_at_the_test_size(dataset, whole):
    loaded = read_model(whole)
    assert (loaded.input_spec.height, loaded.input_spec.width) == (48, 48)
    assert loaded.settings["image_size"] == 32 and loaded.settings["test_size"] == 48
    assert sorted(path.name for path in (whole.parent / "student-hard-labels").iterdir()) == ["metrics.jsonl"]
    rows = read_jsonl(whole.parent / "student-hard-labels" / "metrics.jsonl")
    assert [row["phase"] for row in rows] == ["student", "average"]


def test_a_stop_while_fine_tuning_changes_nothing(dataset, whole, tmp_path, monkeypatch):
    real, steps = loop.train_step, []

    def interrupted(job, *rest, **more):
        if job.folder.name == "fixres":
            steps.append(1)
            if len(steps) == 4:
                raise KeyboardInterrupt
        return real(job, *rest, **more)

    monkeypatch.setattr(loop, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, tmp_path / "run")
    assert (tmp_path / "run" / "student-hard-labels" / "fixres" / "checkpoint.pt").exists()
    model = train(dataset, tmp_path / "run", resume=True)
    assert len(steps) == 4 + 3  # six steps in two epochs; the stopped one again
    ours, theirs = (load_tensors(path, format="edgedistill-model") for path in (model, whole))
    assert all(torch.equal(ours["state_dict"][key], theirs["state_dict"][key]) for key in theirs["state_dict"])
    assert ours["temperature"] == theirs["temperature"]


def test_teachers_label_at_the_test_size(dataset, tmp_path):
    run = RunDir(tmp_path / "run")
    train_teachers(TeacherSettings(**COMMON), dataset, run, resume=False)
    loaded = read_model(run.teacher(1) / "model.pt")
    assert loaded.input_spec.height == 48
    held_out = np.flatnonzero(dataset.folds == 1)
    logits = torch.from_numpy(predict_logits(loaded.model, dataset.paths[held_out], loaded.input_spec))
    stored = read_soft_labels(run.soft_labels, dataset)[held_out]
    assert np.allclose(stored, torch.log_softmax(logits, dim=1).numpy(), atol=1e-5)
    assert not (run.teacher(1) / "fixres").exists()


def test_a_size_that_cannot_be_is_told_first(dataset, tmp_path):
    with pytest.raises(UsageError, match="test_size=8, expected 16 to 2048 pixels"):
        StudentSettings(test_size=8)
    swin = StudentSettings(**COMMON | {"name": "swint"}, distillation=False)
    with pytest.raises(UsageError, match="--test-size 48: swint is built for the size that it trains at"):
        train(dataset, tmp_path / "run", settings=swin)
    assert not (tmp_path / "run").exists()


def test_older_work_knows_nothing_of_it():
    """Runs from before the option have no such field: at its default it must not be asked of them."""
    old = {k: v for k, v in identity(TeacherSettings()).items() if k not in ("test_size", "fixres_epochs", "tta")}
    refuse_other_settings("fold.json", old, identity(TeacherSettings()), TeacherSettings)
    with pytest.raises(ArtifactError, match="tta='' \\(now 'flip'\\)"):
        refuse_other_settings("fold.json", old, identity(TeacherSettings(tta="flip")), TeacherSettings)
    assert fixres.deployed_spec(StudentSettings(), "as it is") == "as it is"


def test_after_fixed_views_the_last_layers_learn_from_the_stored_labels(dataset, teach_run, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(fixres, "train", lambda job, model, resume: seen.append(job) or model)
    settings = dataclasses.replace(STUDENT, distillation=True, views=2, extra_epochs=0)
    run, labels = RunDir(tmp_path / "run"), teach_run(dataset, tmp_path / "taught").soft_labels
    train_student(settings, dataset, run, soft_labels=labels, out=run.model, resume=False)
    targets = seen[0].targets.take(np.arange(len(dataset.rows("train"))))
    assert seen[0].views is None and np.allclose(targets.soft.numpy(), 0.5, atol=1e-6)  # theirs, of two classes
    assert sorted(np.unique(targets.hard.numpy())) == [0, 1]
    assert read_settings(run.model)["fine_tuned_on"] == "soft labels"


def test_what_mixes_and_averages_is_over_when_the_last_layers_are_tuned(dataset, tmp_path):
    settings = dataclasses.replace(
        STUDENT,
        extra_epochs=0,
        ema_decay=0.5,
        mixup_probability=0.5,
        balanced_sampling=False,
        class_weights="inverse",
        defer_weights=0.5,
    )
    loaded = read_model(train(dataset, tmp_path / "run", settings=settings))
    assert loaded.input_spec.height == 48
