"""How good the networks are on the test split: comparison, confusion, calibration and the most confident mistakes."""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgedistill.errors import ImageError
from edgedistill.image_headers import DEFAULT_MAX_PIXELS
from edgedistill.images import InputSpec, image_size, load_image, read_bytes
from edgedistill.report.blocks import (
    Block,
    Callout,
    Charts,
    Details,
    Figure,
    Gallery,
    Heading,
    Matrix,
    MatrixCell,
    Missing,
    Picture,
    Section,
    Sentences,
    Table,
    Text,
)
from edgedistill.report.charts import PERCENT, POINTS, Interval, interval_chart
from edgedistill.report.record import RunRecord
from edgedistill.report.wording import (
    METRIC_NAMES,
    count,
    difference_sentence,
    level,
    model_name,
    number,
    percent,
    percent_interval,
    points,
    shorten,
)
from edgedistill.tasks import Floats, Head, Values, answers_of

MODEL_ORDER = ("majority", "hard_label_student", "student", "teacher")
COLORS = {"majority": "majority", "hard_label_student": "hard", "student": "student", "teacher": "teacher"}
MAX_MODELS = 12
MAX_MATRIX_CLASSES = 14
MAX_PAIRS = 24
MAX_PICTURES = 24
MAX_HEADS = 8  # that have curves and galleries of their own
THUMBNAIL_PX = 176
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
    joint = "joint_macro_f1" in next(iter(models.values()), {})
    columns = ["network", *(["joint macro-F1"] if joint else [])]
    for head, kind in heads:
        columns += [f"{shorten(head, 30)}: {title}" for _, title, _ in HEAD_FIGURES[kind]]
    rows = tuple(
        (
            model_name(name),
            *([percent(models[name].get("joint_macro_f1"))] if joint else []),
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
        among = np.zeros(len(folded), np.int64)  # taken for another of the others, whose own cell is of right answers
        among[-1] = errors[np.ix_(rest, rest)].sum()
        confusion = np.column_stack([folded[:, worst], folded[:, rest].sum(1) - among, among])
        names = [*(names[index] for index in worst), others, f"another of these {len(rest):,}"]
    rows = []
    for true, name in enumerate(names[: len(confusion)]):
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


def mistakes_section(record: RunRecord) -> Section:
    title = "Most confident mistakes"
    if "heads" in (record.evaluation or {}):
        return Section("mistakes", title, _mistakes_of_heads(record))
    student, labels, ids = record.predictions.get(record.main_model), record.test_labels, record.test_ids
    if student is None or labels is None or ids is None:
        return Section("mistakes", title, (Missing("No test predictions of the student", record.command("distill")),))
    wrong = np.flatnonzero(student.predicted != labels)
    if not len(wrong):
        return Section("mistakes", title, (Callout("good", f"The student got all {len(labels):,} test images right."),))
    worst = wrong[np.argsort(-student.confidence[wrong], kind="stable")][:MAX_PICTURES]
    names = record.class_names
    mistakes = [
        Mistake(
            str(ids[row]),
            names[int(student.predicted[row])],
            float(student.confidence[row]),
            names[int(labels[row])],
            float(student.probs[row, int(labels[row])]),
        )
        for row in worst
    ]
    lead = Text(
        f"{len(wrong):,} of {len(labels):,} test images are wrong; these are the {len(mistakes)} of which the student "
        f"was surest. Look here first for wrong labels and for classes that overlap."
    )
    return Section("mistakes", title, (lead, _gallery(record, mistakes)))


def _mistakes_of_heads(record: RunRecord) -> tuple[Block, ...]:
    """A gallery for each head of classes."""
    task, values, ids = record.main_task, record.test_values, record.test_ids
    outputs = record.outputs.get(record.main_model)
    if task is None or values is None or ids is None or outputs is None:
        return (Missing("No test predictions of the student", record.command("distill")),)
    parts = [part for part in task.parts(outputs, values) if part[0].kind != "regression"][:MAX_HEADS]
    most = max(6, MAX_PICTURES // len(parts))
    blocks: list[Block] = []
    for head, own, truth in parts:
        mistakes, wrong, known = (_wrong_labels if head.kind == "sigmoid" else _wrong_classes)(head, own, truth, ids)
        kind = "labels" if head.kind == "sigmoid" else "test images"
        name = shorten(head.name, 40)
        if not wrong:
            blocks.append(Callout("good", f"{name}: the student got all {known:,} {kind} right."))
            continue
        shown = mistakes[:most]
        lead = f"{wrong:,} of {known:,} known {kind} are wrong; these are the {len(shown)} of which the student was surest."
        blocks += [Heading(name), Text(lead), _gallery(record, shown)]
    return tuple(blocks)


@dataclass(frozen=True)
class Mistake:
    """What the network said of an image and how sure it was, what is true and what it gave to that."""

    image_id: str
    said: str
    said_probability: float
    true: str
    true_probability: float


def _wrong_classes(
    head: Head, probabilities: Floats, values: Values, ids: npt.NDArray[np.str_]
) -> tuple[list[Mistake], int, int]:
    """(the MAX_PICTURES surest mistakes, how many there are, of how many images whose class is known)."""
    known = np.flatnonzero(~np.isnan(values[:, 0]))
    own, labels = probabilities[known], values[known, 0].astype(np.int64)
    predicted = own.argmax(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    worst = wrong[np.argsort(-own[wrong].max(axis=1, initial=0.0), kind="stable")][:MAX_PICTURES]
    mistakes = []
    for row in worst:
        said, true = int(predicted[row]), int(labels[row])
        shares = float(own[row, said]), float(own[row, true])
        mistakes.append(Mistake(str(ids[known[row]]), head.classes[said], shares[0], head.classes[true], shares[1]))
    return mistakes, len(wrong), len(known)


def _wrong_labels(
    head: Head, probabilities: Floats, values: Values, ids: npt.NDArray[np.str_]
) -> tuple[list[Mistake], int, int]:
    """As ``_wrong_classes``, each label of each image for itself."""
    given, truth, known = answers_of(head, probabilities).astype(bool), values >= 0.5, ~np.isnan(values)
    rows, labels = np.nonzero(known & (given != truth))
    sure = np.where(given, probabilities, 1 - probabilities)[rows, labels]
    mistakes = []
    for place in np.argsort(-sure, kind="stable")[:MAX_PICTURES]:
        label, applies = head.classes[labels[place]], bool(given[rows[place], labels[place]])
        said, true = (label, f"not {label}") if applies else (f"not {label}", label)
        mistakes.append(Mistake(str(ids[rows[place]]), said, float(sure[place]), true, float(1 - sure[place])))
    return mistakes, len(rows), int(known.sum())


def _gallery(record: RunRecord, mistakes: list[Mistake]) -> Gallery:
    paths = paths_of(record, [mistake.image_id for mistake in mistakes])
    pictures = []
    for mistake in mistakes:
        data, problem = thumbnail(paths.get(mistake.image_id))
        pictures.append(
            Picture(
                data=data,
                name=shorten(mistake.image_id, 60),
                predicted=shorten(mistake.said, 40),
                predicted_probability=mistake.said_probability,
                true=shorten(mistake.true, 40),
                true_probability=mistake.true_probability,
                problem=problem,
            )
        )
    return Gallery(tuple(pictures))


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
