"""Grad-CAM sheets show the answers that they name; the report shows a student before and after its temperature."""

import dataclasses

import cv2
import numpy as np
import pytest
import torch

from edgedistill.artifacts import RunDir, read_json, write_array
from edgedistill.data.manifest import Dataset, write_dataset
from edgedistill.errors import ArtifactError, ModelError
from edgedistill.images import InputSpec
from edgedistill.metrics import expected_calibration_error, softmax
from edgedistill.report import write_report
from edgedistill.report.explain import choose, last_feature_map, write_explanations
from edgedistill.report.wording import percent
from edgedistill.training.checkpoints import read_model, write_model
from edgedistill.training.evaluation import evaluate_test
from edgedistill.training.models import create_model, model_kwargs_for
from edgedistill.training.predict import predict_logits

SPEC = InputSpec(height=64, width=64)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """An untrained network of temperature 2.5 and its evaluation on 40 files."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("explained")
    rng = np.random.default_rng(0)
    labels = (np.arange(44) % 2).astype(np.int32)
    ids = np.array([f"im{row:02d}.png" for row in range(44)])
    for name in ids:
        cv2.imwrite(str(root / name), rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
    dataset = Dataset(
        ids=ids,
        paths=np.array([str(root / name) for name in ids]),
        sha256=np.array([f"{row:064x}" for row in range(44)]),
        labels=labels,
        groups=np.array([""] * 44),
        splits=np.array(["train"] * 4 + ["test"] * 40),
        folds=np.where(np.arange(44) < 4, np.arange(44) % 2, -1).astype(np.int16),
        class_names=("a", "b"),
    )
    run = RunDir(root / "run")
    write_dataset(dataset, run.dataset)
    torch.manual_seed(0)
    model = create_model("mobilenetv3_small_050", class_count=2, image_size=64)
    torch.nn.init.normal_(model.get_classifier().weight, std=3.0)
    write_model(
        run.model,
        model,
        architecture="mobilenetv3_small_050",
        model_kwargs=model_kwargs_for("mobilenetv3_small_050", class_count=2, image_size=64),
        classes=dataset.class_names,
        input_spec=SPEC,
        dataset_hash=dataset.hash,
        settings={},
        temperature=2.5,
    )
    evaluate_test(run, dataset, {"student": [run.model]}, device="cpu")
    return run, dataset


def test_the_sheet_shows_right_and_wrong_answers(run):
    folder, dataset = run
    sheet = cv2.imread(str(write_explanations(folder)))
    values = read_json(folder.evaluation / "explain.json", format="edgedistill-explain")
    probabilities = dict(
        zip(dataset.ids[dataset.splits == "test"], np.load(folder.evaluation / "student.probs.npy"), strict=True)
    )
    label_of = dict(zip(dataset.ids.tolist(), dataset.labels.tolist(), strict=True))
    assert {item["right"] for item in values["images"]} == {True, False}
    for item in values["images"]:
        assert item["predicted"] == "ab"[probabilities[item["id"]].argmax()]
        assert item["probability"] == pytest.approx(probabilities[item["id"]].max())
        assert item["right"] == (label_of[item["id"]] == probabilities[item["id"]].argmax())
    assert sheet.shape == (4 * 152, 6 * 152, 3)
    image = cv2.imread(str(dataset.paths[np.flatnonzero(dataset.ids == values["images"][0]["id"])[0]]))
    assert np.array_equal(sheet[:144, :144], cv2.resize(image, (144, 144), interpolation=cv2.INTER_LINEAR))
    heat = sheet[152:296, :144].astype(int)
    assert np.abs(heat - sheet[:144, :144]).mean() > 5  # the overlay is no copy
    html = write_report(folder).read_text(encoding="utf-8")
    assert html.count('<img class="sheet" src="data:image/png;base64,') == 1
    assert values["images"][-1]["id"] in html


def test_the_report_shows_the_student_before_its_temperature(run):
    folder, dataset = run
    rows = dataset.rows("test")
    before = softmax(predict_logits(read_model(folder.model).model, dataset.paths[rows], SPEC))
    error = percent(expected_calibration_error(before, dataset.labels[rows]))
    html = write_report(folder).read_text(encoding="utf-8")
    assert f"Distilled student before its temperature (2.50), calibration error {error}" in html


def test_rows_are_chosen_by_how_sure_they_are():
    probabilities = np.array([[0.9, 0.1], [0.6, 0.4], [0.8, 0.2], [0.3, 0.7], [0.45, 0.55]], np.float32)
    labels = np.array([0, 1, 0, 1, 0])
    assert choose(probabilities, labels, columns=3) == ([1, 4], [0, 3, 2])  # right: one class, then the other
    assert choose(probabilities, probabilities.argmax(axis=1), columns=2) == ([], [0, 3])


def test_layers_are_found_in_networks_of_every_kind():
    convolutional = create_model("test_efficientnet", class_count=2, image_size=64)
    assert last_feature_map(convolutional, SPEC).channels_last is False
    tiny = InputSpec(height=32, width=32)
    found = last_feature_map(create_model("mobilenetv3_small_050", class_count=2, image_size=32), tiny)
    assert found.name.startswith("blocks.4")  # the last blocks see 1 x 1
    swin = create_model("swin_tiny_patch4_window7_224", class_count=2, image_size=64)
    assert last_feature_map(swin, SPEC).channels_last is True
    with pytest.raises(ModelError, match="no layer keeps a map of the image"):
        last_feature_map(create_model("test_vit", class_count=2, image_size=16), InputSpec(height=16, width=16))


def test_an_evaluation_that_does_not_fit_is_refused(run, tmp_path):
    folder, dataset = run
    with pytest.raises(ArtifactError, match=r"evaluation.json: cannot be read"):
        write_explanations(RunDir(tmp_path))
    copy = RunDir(tmp_path)
    (tmp_path / "model.pt").write_bytes(folder.model.read_bytes())
    evaluate_test(copy, dataset, {"student": [folder.model]}, device="cpu")
    write_dataset(dataclasses.replace(dataset, ids=np.char.add("x", dataset.ids)), copy.dataset)
    with pytest.raises(ArtifactError, match=r"is not in dataset\.csv"):
        write_explanations(copy)
    write_array(copy.evaluation / "test_ids.npy", dataset.ids[:3])
    with pytest.raises(ArtifactError, match="its arrays differ in length"):
        write_explanations(copy)
