"""A network that answers one yes-or-no question has one output; export and runtime take it as they take many labels."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from edgedistill.artifacts import read_json
from edgedistill.data.manifest import Dataset, write_dataset
from edgedistill.errors import ModelError
from edgedistill.export.export import ExportSettings, export_openvino
from edgedistill.export.network import Network
from edgedistill.images import InputSpec
from edgedistill.runtime import Classifier, Engine
from edgedistill.tasks import Head, Task, sigmoid
from edgedistill.training.checkpoints import read_model, write_model
from edgedistill.training.models import create_model, model_kwargs_for
from edgedistill.training.predict import predict_logits

TASK = Task((Head("labels", "sigmoid", ("disc",)),))


@pytest.fixture(scope="module")
def run(tiny_dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Dataset]:
    """A random network of one output, its logits around zero, beside the manifest of 44 images."""
    root = tmp_path_factory.mktemp("one")
    there = tiny_dataset.labels == 0
    dataset = dataclasses.replace(
        tiny_dataset, class_names=("disc", "none"), labels=np.where(there, 0, 1).astype(np.int32), task=TASK,
        values=there[:, None].astype(np.float32),
    )  # fmt: skip
    write_dataset(dataset, root / "dataset.csv")
    torch.manual_seed(0)
    model, spec = create_model("resnet10t", class_count=1, image_size=32).eval(), InputSpec(32, 32)
    torch.nn.init.normal_(model.get_classifier().weight)
    logits = predict_logits(model, dataset.paths, spec)
    with torch.no_grad():
        model.get_classifier().bias -= float(np.median(logits))
    write_model(
        root / "model.pt", model, architecture="resnet10t", model_kwargs=model_kwargs_for("resnet10t", class_count=1, image_size=32),
        classes=TASK.outputs, input_spec=spec, dataset_hash=dataset.hash, settings={}, temperature=1.5, task=TASK,
    )  # fmt: skip
    settings = ExportSettings(model=root / "model.pt", int8="on", int8_max_rung="plain", int8_max_drop=1.0, threads=1)
    export_openvino(settings)
    return root, dataset


def test_the_runtime_says_whether_the_one_label_applies(run: tuple[Path, Dataset]) -> None:
    root, dataset = run
    loaded = read_model(root / "model.pt")
    share = sigmoid(predict_logits(loaded.model, dataset.paths, loaded.input_spec), loaded.temperature)[:, 0]
    assert 5 < (share >= 0.5).sum() < len(share) - 5
    classifier = Classifier(root / "openvino", precision="f32", threads=1, cache_dir=False)
    for path, wanted in zip(dataset.paths.tolist(), share, strict=True):
        answer = classifier.classify(path)
        assert answer.accepted == ((0,) if wanted >= 0.5 else ()) and answer.label == "disc"
        assert answer.probability == pytest.approx(wanted, abs=1e-3)
    with Engine(root / "openvino", precision="f32", cache_dir=False) as engine:
        found = [answer.accepted for answer in engine.map(dataset.paths[:8].tolist())]
    assert found == [((0,) if wanted >= 0.5 else ()) for wanted in share[:8]]


def test_its_export_is_certified_and_quantised(run: tuple[Path, Dataset]) -> None:
    stage = run[0] / "openvino" / "stages" / "resnet10t"
    certificate = read_json(stage / "certificate.json", format="edgedistill-certificate")
    assert certificate["verdict"] == "pass" and certificate["n"] == 6
    assert (stage / "model-int8.xml").exists()
    assert "ir-int8" in [column["name"] for column in certificate["columns"]]


def test_a_softmax_of_one_class_is_still_refused() -> None:
    with pytest.raises(ModelError, match="1 classes, a classifier needs at least 2"):
        Network(
            module=torch.nn.Identity(), architecture="resnet10t", classes=("disc",), spec=InputSpec(32, 32),
            temperature=1.0, dataset_hash="", weights_hash="",
        )  # fmt: skip
