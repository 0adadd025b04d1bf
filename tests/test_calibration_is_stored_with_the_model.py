"""Temperature and reliability curves come from val and stay with the network that they were fitted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edgedistill.artifacts import RunDir
from edgedistill.calibration import (
    BIN_COUNT,
    Calibration,
    bins_of,
    calibration_of,
    fit,
)
from edgedistill.data.manifest import read_dataset
from edgedistill.errors import ArtifactError
from edgedistill.export.metadata import sections
from edgedistill.export.network import load_network
from edgedistill.images import InputSpec
from edgedistill.metrics import expected_calibration_error, softmax
from edgedistill.report.record import read_record
from edgedistill.report.reliability_section import reliability_section
from edgedistill.tasks import Head, Task, sigmoid
from edgedistill.training.checkpoints import read_calibration, read_model, write_model
from edgedistill.training.models import create_model, model_kwargs_for
from edgedistill.training.predict import predict_logits

ONE = Task.single(("a", "b", "c"))
MANY = Task((Head("labels", "sigmoid", ("x", "y", "z")),))


def overconfident(rows: int = 400) -> tuple[np.ndarray, np.ndarray]:
    """Logits float32 [N, 3] of a network that is too sure by a factor of two, and the labels."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, rows)
    logits = rng.normal(size=(rows, 3)) + 1.5 * np.eye(3)[labels]
    return (3 * logits).astype(np.float32), labels


def test_the_curve_is_what_confidence_was_worth() -> None:
    logits, labels = overconfident()
    fitted = fit(ONE, logits, labels[:, None].astype(np.float32))
    assert fitted.calibration is not None and 1.5 < fitted.temperature < 2.5
    (curve,) = fitted.calibration.curves
    for bins, temperature in ((curve.before, 1.0), (curve.after, fitted.temperature)):
        shares = softmax(logits, temperature)
        assert bins.error == pytest.approx(expected_calibration_error(shares, labels, bins=BIN_COUNT), abs=1e-9)
        rows = (shares.max(axis=1) >= 0.9) & (shares.max(axis=1) <= 1)
        assert bins.count[9] == rows.sum() and sum(bins.count) == len(labels)
        assert bins.accuracy[9] == pytest.approx((shares.argmax(axis=1) == labels)[rows].mean())
        assert bins.confidence[9] == pytest.approx(shares.max(axis=1)[rows].mean())
    assert curve.after.error < 0.5 * curve.before.error


def test_of_several_labels_every_answer_counts_and_missing_ones_do_not() -> None:
    logits = np.array([[2.0, -3.0, 0.5], [-1.0, 4.0, 0.5]])
    values = np.array([[1, 0, np.nan], [0, 1, 1]], np.float32)
    curve = calibration_of(MANY, logits, values, temperature=2.0, split="val").curves[0]
    known = ~np.isnan(values)
    assert curve.after == bins_of(sigmoid(logits, 2.0)[known], values[known] >= 0.5) and sum(curve.before.count) == 5


def test_stored_curves_come_back_and_others_are_refused() -> None:
    logits, labels = overconfident()
    one = fit(ONE, logits, labels[:, None].astype(np.float32)).calibration
    assert one is not None
    stored = json.loads(json.dumps(one.to_dict()))
    back = Calibration.from_dict(stored)
    assert back.curves[0].after.count == one.curves[0].after.count and back.temperature == one.temperature
    assert back.curves[0].after.accuracy == pytest.approx(one.curves[0].after.accuracy, abs=1e-4)
    assert len(json.dumps(stored)) < 800
    bins = stored["heads"][0]["after"]
    hostile: tuple[Any, ...] = (
        [], {}, {**stored, "temperature": 0}, {**stored, "temperature": float("nan")}, {**stored, "images": -1},
        {**stored, "heads": [{"name": "a"}]},
        *({**stored, "heads": [stored["heads"][0] | {"after": {**bins, key: value}}]} for key, value in (
            ("count", [1]), ("count", [-1] * 10), ("count", ["x"] * 10), ("accuracy", [1.5] * 10),
            ("confidence", [float("nan")] * 10), ("count", [float("inf")] * 10), ("accuracy", 3),
        )),
    )  # fmt: skip
    for values in hostile:
        with pytest.raises(ArtifactError):
            Calibration.from_dict(values)


def test_model_and_ir_carry_the_curve(tmp_path: Path, photos: Path) -> None:
    torch.manual_seed(0)
    model, spec = create_model("resnet10t", class_count=3, image_size=32).eval(), InputSpec(32, 32)
    paths = np.array([str(path) for path in sorted(photos.rglob("*.jpg"))])
    torch.nn.init.normal_(model.get_classifier().weight)
    logits = predict_logits(model, paths, spec)
    with torch.no_grad():
        model.get_classifier().bias -= torch.from_numpy(np.median(logits, axis=0))
    logits = predict_logits(model, paths, spec)
    rng = np.random.default_rng(0)
    values = (
        logits + rng.normal(0, 0.3, logits.shape) > np.quantile(logits, [0.3, 0.5, 0.7], axis=0).diagonal()
    ).astype(np.float32)
    fitted = fit(MANY, logits, values)
    common: dict[str, Any] = {
        "architecture": "resnet10t", "model_kwargs": model_kwargs_for("resnet10t", class_count=3, image_size=32),
        "classes": MANY.outputs, "input_spec": spec, "dataset_hash": "", "settings": {}, "temperature": fitted.temperature,
        "task": MANY,
    }  # fmt: skip
    write_model(tmp_path / "model.pt", model, calibration=fitted.calibration, **common)
    write_model(tmp_path / "older.pt", model, **common)
    assert read_calibration(tmp_path / "older.pt") is None and read_model(tmp_path / "older.pt").calibration is None
    loaded = read_model(tmp_path / "model.pt")
    assert loaded.calibration is not None and fitted.calibration is not None
    assert loaded.calibration.curves[0].after.count == fitted.calibration.curves[0].after.count
    network = load_network(tmp_path / "model.pt", image_size=None)
    said = sections(network)
    assert json.loads(said["edgedistill"]["calibration"]) == loaded.calibration.to_dict()


def test_a_finished_run_has_val_beside_test(tiny_run: Path) -> None:
    """Through the whole job: model.pt says what its own outputs on val were worth, and the report draws it."""
    loaded, dataset = read_model(tiny_run / "model.pt"), read_dataset(tiny_run / "dataset.csv")
    val = dataset.rows("val")
    logits = predict_logits(loaded.model, dataset.paths[val], loaded.input_spec)
    assert loaded.calibration is not None and loaded.calibration.images == len(val)
    assert loaded.calibration.temperature == loaded.temperature
    shares = softmax(logits, loaded.temperature)
    error = expected_calibration_error(shares, dataset.labels[val], bins=BIN_COUNT)
    assert loaded.calibration.curves[0].after.error == pytest.approx(error, abs=2e-3)
    record = read_record(RunDir(tiny_run))
    (charts,) = [block for block in reliability_section(record).blocks if block.kind == "charts"]
    assert any(figure.title.startswith("On val, temperature") for figure in charts.figures)
