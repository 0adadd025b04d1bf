"""model.pt holds tensors and plain values: three lines of timm load it, and nothing hostile gets through."""

import errno

import pytest
import torch

from edgedistill.errors import ArtifactError
from edgedistill.images import InputSpec
from edgedistill.timm_import import import_timm
from edgedistill.training import checkpoints
from edgedistill.training.checkpoints import load_tensors, read_model, save_tensors, write_model
from edgedistill.training.models import create_model

timm = import_timm()  # plain timm, where PyPI's torchvision and a CPU-only torch disagree too


@pytest.fixture
def written(tmp_path):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = create_model("test_efficientnet", class_count=3, drop_rate=0.2).eval()
    path = tmp_path / "model.pt"
    write_model(
        path,
        model,
        architecture="test_efficientnet",
        model_kwargs={"num_classes": 3, "drop_rate": 0.2},
        classes=("a", "b c", "ü"),
        input_spec=InputSpec(height=32, width=48),
        dataset_hash="f" * 64,
        settings={"lr": 0.1, "name": "test_efficientnet"},
        temperature=1.5,
    )
    return path, model


def test_three_lines_of_plain_timm_give_the_same_logits(written):
    path, model = written
    saved = torch.load(path, weights_only=True)
    again = timm.create_model(saved["architecture"], **saved["model_kwargs"])
    again.load_state_dict(saved["state_dict"])
    images = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        assert torch.allclose(again.eval()(images), model(images), atol=1e-5)


def test_reading_gives_back_all_that_was_written(written):
    path, model = written
    loaded = read_model(path)
    assert loaded.classes == ("a", "b c", "ü")
    assert loaded.input_spec == InputSpec(height=32, width=48)
    assert loaded.temperature == 1.5
    assert loaded.dataset_hash == "f" * 64
    assert loaded.settings["lr"] == 0.1
    assert not loaded.model.training
    assert all(torch.equal(loaded.model.state_dict()[key], value) for key, value in model.state_dict().items())


def test_equal_models_give_equal_files(written, tmp_path):
    path, _ = written
    values = load_tensors(path, format=checkpoints.MODEL_FORMAT)
    save_tensors(tmp_path / "again.pt", values, format=checkpoints.MODEL_FORMAT)
    assert (tmp_path / "again.pt").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architecture": "hf-hub:somebody/model"}, "architecture 'hf-hub:somebody/model' is not one of timm"),
        ({"architecture": 7}, "architecture 7 is not one of timm"),
        ({"model_kwargs": {"num_classes": 3, "checkpoint_path": "/etc/passwd"}}, "checkpoint_path not allowed"),
        ({"model_kwargs": {"num_classes": 4}}, "weights and its architecture do not fit"),
        ({"classes": ["a", "b"]}, "2 class names for 3 logits"),
        ({"temperature": float("nan")}, "temperature"),
        ({"input_spec": {"height": 5}}, "input spec"),
        ({"version": 99}, "version 99, expected 'edgedistill-model' version 1"),
        ({"format": "other"}, "format 'other'"),
        ({"state_dict": []}, "do not fit"),
    ],
)
def test_a_strange_model_is_refused_with_its_reason(written, tmp_path, change, message):
    path = tmp_path / "strange.pt"
    torch.save(torch.load(written[0], weights_only=True) | change, path)
    with pytest.raises(ArtifactError, match=message):
        read_model(path)


def test_missing_fields_missing_files_and_damage_are_named(written, tmp_path):
    values = torch.load(written[0], weights_only=True)
    del values["classes"], values["temperature"]
    torch.save(values, tmp_path / "less.pt")
    with pytest.raises(ArtifactError, match=r"less.pt: classes, temperature missing"):
        read_model(tmp_path / "less.pt")
    with pytest.raises(ArtifactError, match=r"nowhere.pt: cannot be read"):
        read_model(tmp_path / "nowhere.pt")
    data = written[0].read_bytes()
    for name, damaged in {"cut.pt": data[: len(data) // 2], "empty.pt": b"", "text.pt": b"hello"}.items():
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ArtifactError, match=name):
            read_model(tmp_path / name)


def test_a_pickle_inside_is_refused_and_not_executed(tmp_path):
    witness = tmp_path / "executed"

    class Hostile:
        def __reduce__(self):
            return open, (str(witness), "w")

    torch.save({"format": checkpoints.MODEL_FORMAT, "version": 1, "classes": Hostile()}, tmp_path / "hostile.pt")
    with pytest.raises(ArtifactError, match="more than tensors and plain values"):
        read_model(tmp_path / "hostile.pt")
    assert not witness.exists()


def test_a_full_disk_leaves_the_old_file(written, monkeypatch):
    path, _ = written
    before = path.read_bytes()

    def full(values, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ArtifactError, match="the disk is full"):
        save_tensors(path, {}, format=checkpoints.MODEL_FORMAT)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]
