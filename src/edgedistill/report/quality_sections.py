"""How good the networks are on the test split: comparison, confusion, calibration and the most confident mistakes."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgedistill.errors import ImageError
from edgedistill.image_headers import DEFAULT_MAX_PIXELS
from edgedistill.images import InputSpec, image_size, load_image, read_bytes
from edgedistill.metrics import expected_calibration_error, softmax
from edgedistill.report.blocks import (
    Block,
    Callout,
    Charts,
    Details,
    Figure,
    Gallery,
    Matrix,
    MatrixCell,
    Missing,
    Picture,
    Section,
    Sentences,
    Table,
    Text,
)
from edgedistill.report.charts import PERCENT, POINTS, Interval, ReliabilityBin, interval_chart, reliability_chart
from edgedistill.report.record import Predictions, RunRecord
from edgedistill.report.wording import (
    METRIC_NAMES,
    count,
    difference_sentence,
    finite,
    level,
    model_name,
    number,
    percent,
    percent_interval,
    points,
    shorten,
)

MODEL_ORDER = ("majority", "hard_label_student", "student", "teacher")
COLORS = {"majority": "majority", "hard_label_student": "hard", "student": "student", "teacher": "teacher"}
MAX_MODELS = 12
MAX_MATRIX_CLASSES = 14
MAX_PAIRS = 24
BIN_COUNT = 10
MAX_PICTURES = 24
THUMBNAIL_PX = 176
Z_95 = 1.959964
ONE_LABEL_ONLY = "Drawn for networks that give one label per image; the comparison above has the figures of each head."
# Of a head of each kind: its figures in evaluation.json, their titles, and how they are shown.
HEAD_FIGURES: dict[str, tuple[tuple[str, str, Callable[[Any], str]], ...]] = {
    "softmax": (("accuracy", "accuracy", percent), ("macro_f1", "macro-F1", percent)),
    "sigmoid": (("map", "mAP", percent), ("macro_f1", "macro-F1 at the threshold", percent)),
    "regression": (("mae", "MAE", number),),
}


def comparison_section(record: RunRecord) -> Section:
    if record.evaluation is None:
        missing = Missing("The networks have not been compared on the test split", record.command("distill"))
        return Section("comparison", "Comparison on the test split", (missing,))
    models, images = record.evaluation["models"], int(record.evaluation["n"])
    names = ordered_models(models)
    pairs = [pair for pair in record.evaluation.get("paired", ()) if isinstance(pair, dict)][:MAX_PAIRS]
    blocks: list[Block] = [
        Text(
            f"All on the same {images:,} test images, which no network was trained, stopped or chosen on. Intervals are "
            f"95% bootstrap intervals over these images; they say nothing about another training seed."
        ),
        _comparison_table(models, names, record.main_model),
        *head_blocks(record.evaluation, models, names, record.main_model),
        Charts(_comparison_figures(models, names, pairs)),
    ]
    if pairs:
        blocks.append(Sentences(tuple((level(pair), difference_sentence(pair, images)) for pair in pairs)))
    return Section("comparison", "Comparison on the test split", tuple(blocks))


def ordered_models(models: dict[str, Any]) -> list[str]:
    """The four usual models first, in the order in which a reader compares them."""
    known = [name for name in MODEL_ORDER if name in models]
    return (known + sorted(name for name in models if name not in MODEL_ORDER))[:MAX_MODELS]


def _comparison_table(models: dict[str, Any], names: list[str], strong: str) -> Table:
    rows = tuple(
        (
            model_name(name),
            percent(models[name]["accuracy"]),
            percent_interval(models[name].get("accuracy_ci95")),
            percent(models[name]["macro_f1"]),
            percent_interval(models[name].get("macro_f1_ci95")),
            number(models[name].get("log_loss")),
            percent(models[name].get("ece")),
        )
        for name in names
    )
    columns = (
        "network",
        "accuracy",
        "95% interval",
        "macro-F1",
        "95% interval",
        "log-loss (nats)",
        "calibration error (ECE)",
    )
    return Table(
        "Test split",
        columns,
        rows,
        colors=tuple(COLORS.get(name, "peer") for name in names),
        strong_row=names.index(strong) if strong in names else None,
    )


def head_blocks(evaluation: dict[str, Any], models: dict[str, Any], names: list[str], strong: str) -> tuple[Block, ...]:
    """What accuracy means where a network answers several heads, and a table with the figures of each head."""
    heads = [(str(head["name"]), str(head["kind"])) for head in evaluation.get("heads", ())]
    if not heads:
        return ()
    columns = ["network"]
    for head, kind in heads:
        columns += [f"{shorten(head, 30)}: {title}" for _, title, _ in HEAD_FIGURES[kind]]
    rows = tuple(
        (
            model_name(name),
            *(
                show(models[name]["heads"][head].get(figure))
                for head, kind in heads
                for figure, _, show in HEAD_FIGURES[kind]
            ),
        )
        for name in names
    )
    table = Table(
        "Each head on the test split",
        tuple(columns),
        rows,
        colors=tuple(COLORS.get(name, "peer") for name in names),
        strong_row=names.index(strong) if strong in names else None,
    )
    lead = (
        "Accuracy above is the joint score: the share of images on which every known label is right. Macro-F1 is the mean "
        "over heads of classes, log-loss their sum. Errors of values (MAE) are in their own units."
    )
    return (Text(lead), table)


def _comparison_figures(models: dict[str, Any], names: list[str], pairs: list[dict[str, Any]]) -> tuple[Figure, ...]:
    figures = []
    for metric, title in (("accuracy", "Accuracy"), ("macro_f1", "Macro-F1")):
        rows = []
        for name in names:
            value = float(models[name][metric])
            low, high = models[name].get(f"{metric}_ci95") or (value, value)
            rows.append(Interval(model_name(name), COLORS.get(name, "peer"), value, low, high, percent(value)))
        chart = interval_chart(
            rows,
            alt=f"{title} with 95% intervals",
            unit=PERCENT,
            x_label=f"{METRIC_NAMES[metric]}, 95% interval",
        )
        figures.append(Figure(title, chart))
    if pairs:
        rows = [
            Interval(
                f"{METRIC_NAMES.get(pair['metric'], pair['metric'])}: {model_name(pair['a'])} − {model_name(pair['b'])}",
                COLORS.get(pair["a"], "peer"),
                float(pair["difference"]),
                float(pair["ci95"][0]),
                float(pair["ci95"][1]),
                points(pair["difference"]),
            )
            for pair in pairs
        ]
        note = "Left of zero: worse. Right of zero: better. An interval that holds zero decides nothing."
        chart = interval_chart(
            rows, alt="Paired differences with 95% intervals", unit=POINTS, x_label="difference, points", zero=True
        )
        figures.append(Figure("Paired differences", chart, note))
    return tuple(figures)


def confusion_section(record: RunRecord) -> Section:
    title = "Confusion matrix"
    evaluation = record.evaluation
    model = (evaluation or {}).get("models", {}).get(record.main_model)
    if evaluation is not None and model is not None and "heads" in evaluation:
        return Section("confusion", title, _head_details(model["heads"], model_name(record.main_model)))
    if evaluation is None or model is None or not model.get("confusion"):
        return Section("confusion", title, (Missing("No test predictions of the student", record.command("distill")),))
    confusion = np.asarray(model["confusion"], np.int64)
    names = [str(name) for name in evaluation["classes"]]
    if confusion.shape != (len(names), len(names)):
        raise ValueError(f"confusion matrix {list(confusion.shape)} for {len(names)} classes")
    blocks: list[Block] = [_matrix(confusion, names, model_name(record.main_model))]
    if len(names) > 2:
        blocks.append(_pairs_table(confusion, names))
    blocks.append(_class_table(confusion, names))
    return Section("confusion", title, tuple(blocks))


def _head_details(heads: dict[str, Any], model: str) -> tuple[Block, ...]:
    """A matrix for each attribute, a table for each head of labels."""
    blocks: list[Block] = []
    for name, figures in heads.items():
        head = shorten(str(name), 40)
        if figures.get("confusion"):
            names = [str(label) for label in figures["classes"]]
            blocks.append(_matrix(np.asarray(figures["confusion"], np.int64), names, f"{model}, {head},"))
        elif figures["kind"] == "sigmoid":
            rows = tuple(
                (shorten(str(label), 40), count(positives), percent(precision))
                for label, positives, precision in zip(
                    figures["classes"], figures["positives"], figures["average_precision"], strict=True
                )
            )
            columns = ("label", "images to which it applies", "average precision")
            blocks.append(Table(f"The {model} on test: {head}", columns, rows))
    return tuple(blocks)


def _matrix(confusion: npt.NDArray[np.int64], names: list[str], model: str) -> Matrix:
    caption = f"The {model} on test: images, and share of the true class"
    if len(names) > MAX_MATRIX_CLASSES:
        errors = confusion - np.diag(np.diag(confusion))
        worst = np.sort(np.argsort(-(errors.sum(0) + errors.sum(1)), kind="stable")[: MAX_MATRIX_CLASSES - 1])
        rest = np.setdiff1d(np.arange(len(names)), worst)
        folded = np.vstack([confusion[worst], confusion[rest].sum(0)])
        others = f"the other {len(rest):,}"
        caption += f"; the {len(worst)} most confused of {len(names):,} classes"
        confusion = np.column_stack([folded[:, worst], folded[:, rest].sum(1)])
        names = [names[index] for index in worst] + [others]
    rows = []
    for true, name in enumerate(names):
        total = int(confusion[true].sum())
        shares = confusion[true] / max(1, total)
        cells = tuple(
            MatrixCell(int(number), float(share), float(share if true == column else share**0.5), true == column)
            for column, (number, share) in enumerate(zip(confusion[true], shares, strict=True))
        )
        rows.append((shorten(name, 40), total, cells))
    return Matrix(caption, tuple(shorten(name, 40) for name in names), tuple(rows))


def _pairs_table(confusion: npt.NDArray[np.int64], names: list[str]) -> Table:
    errors = confusion - np.diag(np.diag(confusion))
    totals = np.maximum(1, confusion.sum(1))
    worst = [divmod(int(flat), len(names)) for flat in np.argsort(-errors, axis=None, kind="stable")[:10]]
    rows = tuple(
        (
            f"{shorten(names[true])} → {shorten(names[predicted])}",
            count(errors[true, predicted]),
            percent(errors[true, predicted] / totals[true]),
        )
        for true, predicted in worst
        if errors[true, predicted]
    )
    return Table("The most frequent confusions", ("true class → taken for", "images", "of the true class"), rows)


def _class_table(confusion: npt.NDArray[np.int64], names: list[str]) -> Details:
    hits, true, predicted = np.diag(confusion), confusion.sum(1), confusion.sum(0)
    f1 = 2 * hits / np.maximum(1, true + predicted)
    order = np.argsort(f1, kind="stable")[:30]
    rows = tuple(
        (
            shorten(names[index]),
            count(true[index]),
            percent(hits[index] / true[index]) if true[index] else "–",
            percent(hits[index] / predicted[index]) if predicted[index] else "–",
            percent(f1[index]),
        )
        for index in order
    )
    caption = "Recall, precision and F1 of each class, the worst first"
    if len(names) > len(rows):
        caption = f"Recall, precision and F1 of the {len(rows)} worst of {len(names):,} classes"
    return Details(caption, (Table(caption, ("class", "images", "recall", "precision", "F1"), rows),))


def reliability_section(record: RunRecord) -> Section:
    title = "Reliability"
    if "heads" in (record.evaluation or {}):
        return Section("reliability", title, (Text(ONE_LABEL_ONLY),))
    shown = [name for name in ("student", "hard_label_student", "teacher") if name in record.predictions]
    if not shown or record.test_labels is None:
        return Section("reliability", title, (Missing("No test probabilities", record.command("distill")),))
    figures = _untempered_figure(record, record.test_labels)
    for name in shown:
        bins = reliability_bins(record.predictions[name], record.test_labels)
        error = (record.evaluation or {}).get("models", {}).get(name, {}).get("ece")
        chart = reliability_chart(bins, alt=f"Reliability of the {model_name(name)}", color=COLORS[name])
        label = model_name(name)
        figures.append(Figure(f"{label[:1].upper()}{label[1:]}, calibration error {percent(error)}", chart))
    lead = Text(
        "A calibrated network is right as often as it says: points on the dashed line. Below the line it is too sure, "
        "above it too modest. Whiskers are 95% intervals; faint points rest on fewer than ten images."
    )
    return Section("reliability", title, (lead, Charts(tuple(figures))))


def _untempered_figure(record: RunRecord, labels: npt.NDArray[np.integer]) -> list[Figure]:
    """The student as it was before its temperature, beside the calibrated one that follows; [] where it has none."""
    name = record.main_model
    temperature = finite((record.evaluation or {}).get("models", {}).get(name, {}).get("temperature"))
    if temperature is None or temperature <= 0 or temperature == 1 or name not in record.predictions:
        return []
    # softmax(z / T) ** T is softmax(z) up to a constant per image.
    logs = np.log(np.maximum(np.asarray(record.predictions[name].probs), np.finfo(np.float32).tiny))
    before = softmax(logs, 1 / temperature).astype(np.float32)
    bins = reliability_bins(Predictions(before, before.argmax(axis=1), before.max(axis=1)), labels)
    error = percent(expected_calibration_error(before, labels))
    title = (
        f"{model_name(name).capitalize()} before its temperature ({number(temperature, 2)}), calibration error {error}"
    )
    return [Figure(title, reliability_chart(bins, alt=f"Reliability of the {model_name(name)} at T=1", color="peer"))]


def reliability_bins(predictions: Predictions, labels: npt.NDArray[np.integer]) -> list[ReliabilityBin]:
    """Ten bins of equal width over the largest probability; accuracy bounds are Wilson's 95% score interval."""
    right = predictions.predicted == labels
    index = np.clip((predictions.confidence * BIN_COUNT).astype(np.int64), 0, BIN_COUNT - 1)
    bins = []
    for number_ in range(BIN_COUNT):
        rows = index == number_
        images = int(rows.sum())
        share = float(right[rows].mean()) if images else 0.0
        confidence = float(predictions.confidence[rows].mean()) if images else 0.0
        low, high = _wilson(share, images)
        bins.append(
            ReliabilityBin(
                number_ / BIN_COUNT, (number_ + 1) / BIN_COUNT, images, min(1.0, confidence), share, low, high
            )
        )
    return bins


def _wilson(share: float, images: int) -> tuple[float, float]:
    if not images:
        return 0.0, 1.0
    scale = 1 + Z_95**2 / images
    centre = (share + Z_95**2 / (2 * images)) / scale
    half = Z_95 / scale * (share * (1 - share) / images + Z_95**2 / (4 * images**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def mistakes_section(record: RunRecord) -> Section:
    title = "Most confident mistakes"
    if "heads" in (record.evaluation or {}):
        return Section("mistakes", title, (Text(ONE_LABEL_ONLY),))
    student, labels, ids = record.predictions.get(record.main_model), record.test_labels, record.test_ids
    if student is None or labels is None or ids is None:
        return Section("mistakes", title, (Missing("No test predictions of the student", record.command("distill")),))
    wrong = np.flatnonzero(student.predicted != labels)
    if not len(wrong):
        return Section("mistakes", title, (Callout("good", f"The student got all {len(labels):,} test images right."),))
    worst = wrong[np.argsort(-student.confidence[wrong], kind="stable")][:MAX_PICTURES]
    paths = paths_of(record, [str(ids[row]) for row in worst])
    names = record.class_names
    pictures = []
    for row in worst:
        image_id, predicted, true = str(ids[row]), int(student.predicted[row]), int(labels[row])
        data, problem = thumbnail(paths.get(image_id))
        pictures.append(
            Picture(
                data=data,
                name=shorten(image_id, 60),
                predicted=shorten(names[predicted], 40),
                predicted_probability=float(student.confidence[row]),
                true=shorten(names[true], 40),
                true_probability=float(student.probs[row, true]),
                problem=problem,
            )
        )
    lead = Text(
        f"{len(wrong):,} of {len(labels):,} test images are wrong; these are the {len(pictures)} of which the student "
        f"was surest. Look here first for wrong labels and for classes that overlap."
    )
    return Section("mistakes", title, (lead, Gallery(tuple(pictures))))


def paths_of(record: RunRecord, ids: list[str]) -> dict[str, str]:
    if record.dataset is None:
        return {}
    rows = np.flatnonzero(np.isin(record.dataset.ids, ids))
    return {str(record.dataset.ids[row]): str(record.dataset.paths[row]) for row in rows}


def thumbnail(path: str | None) -> tuple[str, str]:
    """(JPEG data URI, '') with the picture's own aspect, never enlarged; ('', why) where it cannot be shown."""
    if path is None:
        return "", "not in dataset.csv"
    try:
        data, name = read_bytes(path)
        height, width, _ = image_size(data, name=name, max_pixels=DEFAULT_MAX_PIXELS)
        scale = min(1.0, THUMBNAIL_PX / max(height, width))
        spec = InputSpec(height=max(8, round(height * scale)), width=max(8, round(width * scale)))
        encoded, jpeg = cv2.imencode(".jpg", load_image(data, spec), [cv2.IMWRITE_JPEG_QUALITY, 85])
    except ImageError:
        return "", "the file is missing or cannot be read any more"
    if not encoded:
        return "", "the picture could not be encoded"
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.tobytes()).decode("ascii"), ""
