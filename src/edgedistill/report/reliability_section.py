"""How far the networks' probabilities can be believed: reliability curves on val, as stored with the model, and on test."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgedistill.calibration import BIN_COUNT, Bins, bins_of, confidences
from edgedistill.metrics import expected_calibration_error, softmax
from edgedistill.report.blocks import Charts, Figure, Missing, Section, Text
from edgedistill.report.charts import ReliabilityBin, reliability_chart
from edgedistill.report.quality_sections import COLORS, MAX_HEADS
from edgedistill.report.record import Predictions, RunRecord
from edgedistill.report.wording import finite, model_name, number, percent, shorten

Z_95 = 1.959964
FITTED_ON_VAL = " The temperature was fitted on val; test says what it is worth on images that nobody has seen."


def reliability_section(record: RunRecord) -> Section:
    title = "Reliability"
    figures = _val_figures(record)
    figures += _figures_of_heads(record) if "heads" in (record.evaluation or {}) else _figures_of_models(record)
    if not figures:
        return Section("reliability", title, (Missing("No test probabilities", record.command("distill")),))
    lead = Text(
        "A calibrated network is right as often as it says: points on the dashed line. Below the line it is too sure, "
        "above it too modest. Whiskers are 95% intervals; faint points rest on fewer than ten images."
        + (FITTED_ON_VAL if record.calibration is not None else "")
    )
    return Section("reliability", title, (lead, Charts(tuple(figures))))


def _figures_of_models(record: RunRecord) -> list[Figure]:
    """On test: the student without its temperature, then every network as it is."""
    labels = record.test_labels
    shown = [name for name in ("student", "hard_label_student", "teacher") if name in record.predictions]
    if not shown or labels is None:
        return []
    figures = _untempered_figure(record, labels)
    for name in shown:
        bins = reliability_bins(record.predictions[name], labels)
        error = (record.evaluation or {}).get("models", {}).get(name, {}).get("ece")
        chart = reliability_chart(bins, alt=f"Reliability of the {model_name(name)}", color=COLORS[name])
        label = model_name(name)
        figures.append(Figure(f"{label[:1].upper()}{label[1:]}, calibration error {percent(error)}", chart))
    return figures


def _figures_of_heads(record: RunRecord) -> list[Figure]:
    """On test: the main model's heads of classes; of labels that may apply together all answers in one figure."""
    task, values, outputs = record.main_task, record.test_values, record.outputs.get(record.main_model)
    if task is None or values is None or outputs is None:
        return []
    figures = []
    for head, own, truth in list(task.parts(outputs, values))[:MAX_HEADS]:
        if head.kind == "regression":
            continue
        bins = bins_of(*confidences(head, own, truth))
        title = f"{shorten(head.name, 40)} on test, calibration error {percent(bins.error)}"
        note = (
            "Every label of every image: its probability, and how often it applies." if head.kind == "sigmoid" else ""
        )
        chart = reliability_chart(_with_intervals(bins), alt=f"Reliability of {head.name}", color=_main_color(record))
        figures.append(Figure(title, chart, note))
    return figures


def _val_figures(record: RunRecord) -> list[Figure]:
    """What the model's file says of itself: val at temperature 1 and at its own."""
    calibration = record.calibration
    if calibration is None:
        return []
    figures = []
    for curve in calibration.curves[:MAX_HEADS]:
        of = "" if len(calibration.curves) == 1 else f"{shorten(curve.head, 40)} "
        for bins, temperature, color in ((curve.before, 1.0, "peer"), (curve.after, calibration.temperature, "")):
            if temperature == 1.0 and not color:
                continue  # the same as before it
            title = f"{of}on {shorten(calibration.split, 20)}, temperature {number(temperature, 2)}"
            error = f"calibration error {percent(bins.error)}"
            alt = f"Reliability {title}"
            chart = reliability_chart(_with_intervals(bins), alt=alt, color=color or _main_color(record))
            note = "Stored with the model."
            figures.append(Figure(f"{title[:1].upper()}{title[1:]}, {error}", chart, note))
    return figures


def _main_color(record: RunRecord) -> str:
    return COLORS.get(record.main_model, "peer")


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
    return _with_intervals(bins_of(predictions.confidence, predictions.predicted == labels))


def _with_intervals(bins: Bins) -> list[ReliabilityBin]:
    figures = zip(bins.confidence, bins.accuracy, bins.count, strict=True)
    return [
        ReliabilityBin(place / BIN_COUNT, (place + 1) / BIN_COUNT, images, sure, share, *_wilson(share, images))
        for place, (sure, share, images) in enumerate(figures)
    ]


def _wilson(share: float, images: int) -> tuple[float, float]:
    if not images:
        return 0.0, 1.0
    scale = 1 + Z_95**2 / images
    centre = (share + Z_95**2 / (2 * images)) / scale
    half = Z_95 / scale * (share * (1 - share) / images + Z_95**2 / (4 * images**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)
