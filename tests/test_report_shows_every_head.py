"""Tasks with several heads get what one label gets in the report: curves, mistakes, heat maps and counts of each head."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from edgedistill.artifacts import RunDir, read_array, read_json
from edgedistill.calibration import bins_of, confidences, fit
from edgedistill.data.manifest import ALWAYS_TRAINED, Dataset, write_dataset
from edgedistill.images import InputSpec
from edgedistill.report import write_report
from edgedistill.report.data_sections import folds_section
from edgedistill.report.explain import answers_of_heads, write_explanations
from edgedistill.report.quality_sections import mistakes_section
from edgedistill.report.record import read_record
from edgedistill.report.reliability_section import reliability_section
from edgedistill.report.summary_sections import lead_sentence
from edgedistill.report.wording import percent
from edgedistill.tasks import Head, Task
from edgedistill.training.checkpoints import write_model
from edgedistill.training.evaluation import evaluate_test
from edgedistill.training.models import create_model, model_kwargs_for
from edgedistill.training.predict import predict_logits

TASK = Task(
    (
        Head("color", "softmax", ("blue", "green", "red")),
        Head("labels", "sigmoid", ("big", "dark")),
        Head("size", "regression", mean=10.0, std=4.0),
    )
)
SPEC = InputSpec(height=64, width=64)
COUNT = 64


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, Dataset]:
    """A random network with temperature, curves and thresholds from 24 val images, and its evaluation on 36."""
    torch.set_num_threads(1)
    root, rng = tmp_path_factory.mktemp("heads"), np.random.default_rng(0)
    values = np.column_stack(
        [rng.integers(0, 3, COUNT), rng.integers(0, 2, (COUNT, 2)), rng.normal(10, 4, COUNT)]
    ).astype(np.float32)
    values[5, 0] = values[9, 1] = values[12, 3] = np.nan
    names = sorted({TASK.joint_label(row) for row in values})
    ids = np.array([f"im{row:02d}.png" for row in range(COUNT)])
    for name in ids:
        cv2.imwrite(str(root / name), rng.integers(0, 256, (64, 80, 3), dtype=np.uint8))
    dataset = Dataset(
        ids=ids,
        paths=np.array([str(root / name) for name in ids]),
        sha256=np.array([f"{row:064x}" for row in range(COUNT)]),
        labels=np.array([names.index(TASK.joint_label(row)) for row in values], np.int32),
        groups=np.array([""] * COUNT),
        splits=np.array(["train"] * 4 + ["val"] * 24 + ["test"] * 36),
        folds=np.where(np.arange(COUNT) < 4, np.arange(COUNT) % 2, -1).astype(np.int16),
        class_names=tuple(names),
        task=TASK,
        values=values,
    )
    assert dataset.task is not None and dataset.values is not None
    run = RunDir(root / "run")
    write_dataset(dataset, run.dataset)
    torch.manual_seed(0)
    network = {"class_count": TASK.width, "image_size": 64}
    model = create_model("mobilenetv3_small_050", **network)
    torch.nn.init.normal_(model.get_classifier().weight, std=3.0)
    val = dataset.rows("val")
    fitted = fit(dataset.task, predict_logits(model, dataset.paths[val], SPEC), dataset.values[val])
    write_model(
        run.model, model, architecture="mobilenetv3_small_050", input_spec=SPEC, dataset_hash=dataset.hash, settings={},
        model_kwargs=model_kwargs_for("mobilenetv3_small_050", **network), classes=dataset.outputs,
        temperature=fitted.temperature, task=fitted.task, calibration=fitted.calibration,
    )  # fmt: skip
    evaluate_test(run, dataset, {"student": [run.model]}, device="cpu")
    return run, dataset


def test_every_head_has_its_curves(run: tuple[RunDir, Dataset]) -> None:
    record = read_record(run[0])
    assert record.main_task is not None and record.calibration is not None
    (charts,) = [block for block in reliability_section(record).blocks if block.kind == "charts"]
    titles = [figure.title for figure in charts.figures]
    outputs, values = read_array(run[0].evaluation / "student.probs.npy"), run[1].values
    assert values is not None
    test = values[run[1].rows("test")]
    for head, own, truth in list(TASK.parts(outputs, test))[:2]:
        error = bins_of(*confidences(head, own, truth)).error
        assert f"{head.name} on test, calibration error {percent(error)}" in titles
        stored = next(curve for curve in record.calibration.curves if curve.head == head.name)
        assert (
            f"{head.name.capitalize()} on val, temperature 1.00, calibration error {percent(stored.before.error)}"
            in titles
        )
    assert len(titles) == 6 and not any(title.lower().startswith("size") for title in titles)


def test_mistakes_of_every_head_are_shown_the_surest_first(run: tuple[RunDir, Dataset]) -> None:
    record = read_record(run[0])
    galleries = [block for block in mistakes_section(record).blocks if block.kind == "gallery"]
    color, labels = galleries
    outputs, test = record.outputs["student"], record.test_values
    assert test is not None and record.main_task is not None
    rows = {str(name): row for row, name in enumerate(record.test_ids if record.test_ids is not None else ())}
    shares = [picture.predicted_probability for picture in color.pictures]
    assert shares == sorted(shares, reverse=True) and len(shares) > 3
    for picture in color.pictures:
        own, true = outputs[rows[picture.name], :3], int(test[rows[picture.name], 0])
        assert TASK.heads[0].classes[own.argmax()] == picture.predicted != picture.true == TASK.heads[0].classes[true]
        assert picture.predicted_probability == pytest.approx(own.max()) and picture.data.startswith("data:image/jpeg")
    thresholds = record.main_task.heads[1].thresholds
    for picture in labels.pictures:
        place = ("big", "dark").index(picture.true.removeprefix("not "))
        row = rows[picture.name]
        assert (outputs[row, 3 + place] >= np.float32(thresholds[place])) == (not picture.predicted.startswith("not "))
        assert (test[row, 1 + place] == 1) == (
            not picture.true.startswith("not ")
        ) and picture.true != picture.predicted


def test_heat_maps_are_drawn_of_every_head_of_classes(run: tuple[RunDir, Dataset]) -> None:
    sheet = cv2.imread(str(write_explanations(run[0])))
    images = read_json(run[0].evaluation / "explain.json", format="edgedistill-explain")["images"]
    kinds = list(dict.fromkeys((item["head"], item["right"]) for item in images))
    assert kinds == [("color", False), ("color", True), ("labels", False), ("labels", True)]
    assert sheet.shape == (2 * 4 * 152, 6 * 152, 3)
    html = write_report(run[0]).read_text(encoding="utf-8")
    assert "The wrong answers of color, from left to right" in html
    assert "The right answers of labels, from left to right" in html and "could not be understood" not in html


def test_right_answers_of_labels_are_labels_that_were_given() -> None:
    head = Task((Head("labels", "sigmoid", ("big", "dark"), threshold=(0.5, 0.2)),))
    shares = np.array([[0.9, 0.1], [0.8, 0.3], [0.4, 0.05], [0.1, 0.15], [0.7, 0.6]], np.float32)
    truth = np.array([[1, 0], [1, 1], [1, 0], [np.nan, 1], [0, 1]], np.float32)
    wrong, right = answers_of_heads(head, shares, truth, columns=3)
    assert [(one.row, one.predicted, one.true, one.applies) for one in wrong] == [
        (3, "not dark", "dark", False), (4, "big", "not big", True), (2, "not big", "big", False),
    ]  # fmt: skip
    assert [one.probability for one in wrong] == pytest.approx([0.85, 0.7, 0.6])
    # Each label in turn: the surest of big, of dark, then the second of big.
    assert [(one.row, one.output) for one in right] == [(0, 0), (4, 1), (1, 0)]
    assert all(one.predicted == one.true for one in right)


def test_the_page_begins_with_what_is_asked_of_an_image(run: tuple[RunDir, Dataset]) -> None:
    sentence = lead_sentence(read_record(run[0]))
    assert "64 images with color (3 classes)" in sentence and "2 labels, each for itself" in sentence, sentence


def test_counts_are_shown_of_each_head(run: tuple[RunDir, Dataset]) -> None:
    html = write_report(run[0]).read_text(encoding="utf-8")
    assert "color (3 classes), labels (2 labels, each for itself), size (a value)" in html
    values = run[1].values
    assert values is not None
    for caption in (
        "Class distribution of color",
        "Class distribution of labels",
        "Images per fold and class of color",
    ):
        assert caption in html
    blue = int((values[:, 0] == 0).sum())
    known = int((~np.isnan(values[:, 0])).sum())
    row = html[html.index("Class distribution of color") :]
    row = row[row.index(">blue</th>") : row.index("</tr>", row.index(">blue</th>"))]
    assert f"<td>{blue}</td><td>{percent(blue / known)}</td>" in row
    assert f"<td>{COUNT - 1}</td>" in html[html.index("images that have one") :]
    assert run[1].class_names[0] not in html[html.index('id="data"') : html.index('id="curves"')]


def test_images_that_every_teacher_saw_leave_the_folds_shown(run: tuple[RunDir, Dataset]) -> None:
    record = read_record(run[0])
    folds = np.where(np.arange(COUNT) == 1, ALWAYS_TRAINED, run[1].folds).astype(np.int16)
    blocks = folds_section(dataclasses.replace(record, dataset=dataclasses.replace(run[1], folds=folds))).blocks
    assert any("Images per fold and class of color" in str(block) for block in blocks)


def test_a_model_without_curves_is_still_shown(run: tuple[RunDir, Dataset], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("dataset.csv", "evaluation"):
        (tmp_path / "run" / name).symlink_to(run[0].root / name)
    record = read_record(RunDir(tmp_path / "run"))
    assert record.calibration is None
    (charts,) = [block for block in reliability_section(record).blocks if block.kind == "charts"]
    assert [figure.title.split(",")[0] for figure in charts.figures] == ["color on test", "labels on test"]
