"""Temperature, reliability curves and thresholds come from val and stay with the network that they were fitted for."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score

from edgedistill.artifacts import RunDir
from edgedistill.calibration import (
    BIN_COUNT,
    MIN_POSITIVES,
    Calibration,
    best_threshold,
    bins_of,
    calibration_of,
    fit,
    with_thresholds,
)
from edgedistill.data.manifest import read_dataset
from edgedistill.errors import ArtifactError
from edgedistill.export import ir
from edgedistill.export.metadata import sections
from edgedistill.export.network import load_network
from edgedistill.images import InputSpec
from edgedistill.metrics import expected_calibration_error, softmax
from edgedistill.report.record import read_record
from edgedistill.report.reliability_section import reliability_section
from edgedistill.runtime import Classifier
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


def test_each_threshold_has_the_best_f1_on_val() -> None:
    rng = np.random.default_rng(1)
    truth = rng.random((300, 3)) < [0.5, 0.15, 0.3]
    shares = sigmoid(rng.normal(size=(300, 3)) + 2 * truth - [1.0, 2.5, 0.0]).round(2)
    values = truth.astype(np.float32)
    values[:20, 1] = np.nan
    (head,) = with_thresholds(MANY, shares, values).heads
    for label, threshold in enumerate(head.thresholds):
        known = ~np.isnan(values[:, label])
        found = f1_score(truth[known, label], shares[known, label] >= threshold)
        possible = [f1_score(truth[known, label], shares[known, label] >= t) for t in np.linspace(0.005, 0.995, 100)]
        assert (
            found == pytest.approx(max(possible))
            and found > f1_score(truth[known, label], shares[known, label] >= 0.5) - 1e-9
        )
    assert len(set(head.thresholds)) == 3


def test_labels_of_few_images_keep_their_threshold() -> None:
    shares, few = np.linspace(0, 1, 50), np.zeros(50, bool)
    few[-(MIN_POSITIVES - 1) :] = True
    assert best_threshold(shares, few, otherwise=0.5) == 0.5
    few[-MIN_POSITIVES:] = True
    assert best_threshold(shares, few, otherwise=0.5) == pytest.approx((shares[39] + shares[40]) / 2)
    assert best_threshold(shares, np.ones(50, bool), otherwise=0.4) == 0.4


def test_a_number_stands_for_equal_thresholds() -> None:
    head = Head("labels", "sigmoid", ("x", "y"), threshold=(0.3, 0.3))
    assert head == Head("labels", "sigmoid", ("x", "y"), threshold=0.3) and head.thresholds == (0.3, 0.3)
    each = Task((dataclasses.replace(head, threshold=(0.25, 0.75)),))
    assert Task.from_dict(json.loads(json.dumps(each.to_dict()))) == each
    assert each.answers(np.array([[0.3, 0.7], [0.2, 0.8]])).tolist() == [[1, 0], [0, 1]]
    edges = np.log(np.array([0.25, 0.75]) / np.array([0.75, 0.25]))
    assert each.margins(np.array([[edges[0] + 0.5, edges[1] - 0.2]])) == pytest.approx([0.2])


def test_model_and_ir_carry_curve_and_thresholds(tmp_path: Path, photos: Path) -> None:
    """Through model.pt, the IR's metadata and the Python runtime."""
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
    thresholds = fitted.task.heads[0].thresholds
    assert len(set(thresholds)) == 3
    common: dict[str, Any] = {
        "architecture": "resnet10t", "model_kwargs": model_kwargs_for("resnet10t", class_count=3, image_size=32),
        "classes": MANY.outputs, "input_spec": spec, "dataset_hash": "", "settings": {}, "temperature": fitted.temperature,
        "task": fitted.task,
    }  # fmt: skip
    write_model(tmp_path / "model.pt", model, calibration=fitted.calibration, **common)
    write_model(tmp_path / "older.pt", model, **common)
    assert read_calibration(tmp_path / "older.pt") is None and read_model(tmp_path / "older.pt").calibration is None
    loaded = read_model(tmp_path / "model.pt")
    assert loaded.task == fitted.task and loaded.calibration is not None and fitted.calibration is not None
    assert loaded.calibration.curves[0].after.count == fitted.calibration.curves[0].after.count
    network = load_network(tmp_path / "model.pt", image_size=None)
    said = sections(network)
    assert json.loads(said["edgedistill"]["thresholds"]) == list(thresholds)
    assert json.loads(said["edgedistill"]["calibration"]) == loaded.calibration.to_dict()
    # Model API knows no temperature: its threshold is met by the same logits.
    threshold, middle = float(said["model_info"]["confidence_threshold"]), sorted(thresholds)[1]
    assert abs(fitted.temperature - 1) > 0.01 and threshold != middle
    met = sigmoid(logits) >= threshold
    np.testing.assert_array_equal(met, sigmoid(logits, fitted.temperature) >= middle)
    assert met.any() and not met.all()
    converted, _ = ir.convert(network.module, spec, onnx_file=tmp_path / "none.onnx")
    ir.describe(converted, network)
    ir.save(converted, tmp_path / "model.xml")
    classifier = Classifier(tmp_path / "model.xml", precision="f32", threads=1, cache_dir=False)
    shares = sigmoid(logits, fitted.temperature)
    sure = np.abs(shares - thresholds).min(axis=1) > 1e-3
    for path, row in zip(paths[sure].tolist(), shares[sure], strict=True):
        assert classifier.classify(path).accepted == tuple(np.flatnonzero(row >= thresholds).tolist())
    assert sure.sum() > len(paths) / 2


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
