"""How training went: curves of every network, and the quality of the out-of-fold soft labels."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from edgedistill.report.blocks import Block, Callout, Charts, Figure, Heading, Key, Missing, Section, Table, Text
from edgedistill.report.charts import PERCENT, PLAIN, Series, Unit, line_chart
from edgedistill.report.record import Rows, RunRecord
from edgedistill.report.wording import compact, count, duration, finite, model_name, number, percent, rate, shorten

MAX_LINES = 8
DASHES = ("", "6 3", "2 3", "8 3 2 3")
WAIT_LIMIT = 0.05  # a loader that keeps the device waiting longer costs more than it should
STUDENTS = {
    "student": ("distilled student", "student", ""),
    "student-hard-labels": ("hard-label student", "hard", "6 3"),
}
CURVES: tuple[tuple[str, str, Unit, tuple[float, float] | None], ...] = (
    ("train_loss", "Training loss", PLAIN, None),
    ("val_accuracy", "Accuracy on val", PERCENT, None),
    ("val_log_loss", "Log-loss on val (nats)", PLAIN, None),
    ("lr", "Learning rate", PLAIN, None),
    ("images_per_s", "Images a second", PLAIN, None),
    ("wait_fraction", "Waiting for data, share of time", PERCENT, (0.0, WAIT_LIMIT)),
)


def curves_section(record: RunRecord) -> Section:
    teachers = {name: rows for name, rows in record.metrics.items() if name.startswith(("fold-", "teacher-"))}
    students = {name: rows for name, rows in record.metrics.items() if name.startswith("student")}
    blocks: list[Block] = []
    if teachers:
        styles = {
            name: (_teacher_label(name), f"fold{index % 6}", DASHES[index // 6 % len(DASHES)])
            for index, name in enumerate(teachers)
        }
        blocks += [Heading("Teachers"), _charts(teachers, styles), _effort(teachers, styles)]
        if len(teachers) > MAX_LINES:
            blocks.append(Text(f"The charts show the first {MAX_LINES} of {len(teachers)} folds."))
    elif record.trains_teachers:
        blocks.append(Missing("No teacher has finished an epoch", record.command("distill")))
    looks = _student_styles(students)
    if students:
        blocks += [Heading("Students"), _charts(students, looks), _effort(students, looks)]
    else:
        blocks.append(Missing("No student has finished an epoch", record.command("distill")))
    if students and "student-hard-labels" not in students:
        blocks.append(Missing("No hard-label student to compare with", record.command("baseline")))
    waiting = _waiting_callout(record)
    return Section("curves", "Training curves", tuple(blocks if waiting is None else [*blocks, waiting]))


def _teacher_label(name: str) -> str:
    """'fold-0' -> 'fold 0'; of a further architecture, 'teacher-swinb fold-0' -> 'swinb fold 0'."""
    architecture, _, fold = name.removeprefix("teacher-").rpartition("fold-")
    return f"{shorten(architecture, 32)}fold {fold}"


def _student_styles(students: Iterable[str]) -> dict[str, tuple[str, str, str]]:
    """(label, colour, dash) of each; further students take the folds' colours, a hard-label one is dashed."""
    styles = dict(STUDENTS)
    labels: list[str] = []
    for name in (name for name in students if name not in STUDENTS):
        label = name.removeprefix("student-").removesuffix("-hard-labels")
        labels += [label] if label not in labels else []
        kind, dash = ("hard_label_student", "6 3") if name.endswith("-hard-labels") else ("student", "")
        styles[name] = (model_name(f"{kind}-{label}"), f"fold{labels.index(label) % 6}", dash)
    return styles


def oof_section(record: RunRecord) -> Section:
    if record.oof is None:
        missing = Missing("The out-of-fold soft labels are not finished", record.command("distill"))
        none = Text("This run has no teachers of its own, whose answers could be judged here.")
        return Section("oof", "Out-of-fold soft labels", (missing if record.trains_teachers else none,))
    rows = [_quality_row(f"fold {item['fold']}", item) for item in record.oof["folds"][: MAX_LINES * 4]]
    rows.append(_quality_row("all folds", record.oof["all"]))
    columns = ("held-out fold", "images", "accuracy", "macro-F1", "log-loss (nats)", "calibration error (ECE)")
    lead = Text(
        "Each teacher judged only the fold that it never saw; these judgements are the soft labels. Their quality bounds "
        "what the student can learn from them."
    )
    table = Table("Quality of the soft labels on the training images", columns, tuple(rows), strong_row=len(rows) - 1)
    return Section("oof", "Out-of-fold soft labels", (lead, *_architectures(record.oof), table))


def _architectures(oof: dict[str, Any]) -> tuple[Block, ...]:
    """Of several architectures each one's quality and weight, beside their combination's; nothing where there is one."""
    blend = oof.get("blend")
    if not blend:
        return ()
    rows = [
        (*_quality_row(shorten(item["label"], 40), item["all"]), number(weight, 2))
        for item, weight in zip(oof["architectures"], blend["weights"], strict=True)
    ]
    rows.append((*_quality_row("combination", oof["all"]), ""))
    columns = ("teacher", "images", "accuracy", "macro-F1", "log-loss (nats)", "calibration error (ECE)", "weight")
    table = Table(
        "Each architecture out of fold, and their combination", columns, tuple(rows), strong_row=len(rows) - 1
    )
    return (Text(_blend_sentence(blend["settings"])), table)


def _blend_sentence(settings: dict[str, Any]) -> str:
    origin = {
        "oof": "fitted to the least log-loss out of fold, for each fold from the other folds alone",
        "score": "in proportion to the accuracy out of fold, for each fold from the other folds alone",
        "equal": "equal",
    }.get(str(settings["weights"]), "given")
    what = "first choices" if settings["vote"] == "hard" else "probabilities"
    override = (
        f" One decides alone where it is sure enough: {shorten(settings['override'])}." if settings["override"] else ""
    )
    return f"The soft labels are a weighted mean of the architectures' {what}; the weights are {origin}.{override}"


def _quality_row(name: str, item: dict[str, Any]) -> tuple[str, ...]:
    return (
        name,
        count(item["n"]),
        percent(item["accuracy"]),
        percent(item["macro_f1"]),
        number(item["log_loss"]),
        percent(item["ece"]),
    )


def _charts(metrics: dict[str, Rows], styles: dict[str, tuple[str, str, str]]) -> Charts:
    shown = dict(list(metrics.items())[:MAX_LINES])
    figures = []
    for key, title, unit, y_range in CURVES:
        series = []
        for name, rows in shown.items():
            label, color, dash = styles[name]
            points = [(float(at + 1), finite(row.get(key))) for at, row in enumerate(rows)]
            known = [(x, y) for x, y in points if y is not None]
            if known:
                series.append(Series(label, color, tuple(x for x, _ in known), tuple(y for _, y in known), dash))
        if series:
            figures.append(Figure(title, _chart(title, series, shown, unit, y_range)))
    legend = tuple(Key(styles[name][0], styles[name][1], styles[name][2]) for name in shown)
    return Charts(tuple(figures), legend)


def _chart(
    title: str,
    series: Sequence[Series],
    metrics: dict[str, Rows],
    unit: Unit,
    y_range: tuple[float, float] | None,
) -> Any:
    if y_range is not None:
        highest = max(y for line in series for y in line.y)
        y_range = (y_range[0], max(y_range[1], highest))
    return line_chart(series, alt=title, x_label="epoch", unit=unit, y_range=y_range, marks=_phase_marks(metrics))


def _phase_marks(metrics: dict[str, Rows]) -> list[tuple[float, str]]:
    """Where a later phase begins (the last epochs on all data), if all shown networks agree on it."""
    marks = {
        (at + 0.5, str(row.get("phase")))
        for rows in metrics.values()
        for at, row in enumerate(rows)
        if at and row.get("phase") != rows[at - 1].get("phase")
    }
    return sorted(marks)[:2] if len(marks) <= 2 else []


def _effort(metrics: dict[str, Rows], styles: dict[str, tuple[str, str, str]]) -> Table:
    rows, colors = [], []
    for name, epochs in metrics.items():
        seconds = sum(finite(row.get("seconds")) or 0.0 for row in epochs)
        rows.append(
            (
                styles[name][0],
                count(len(epochs)),
                duration(seconds),
                rate(_median(epochs, "images_per_s")),
                percent(_median(epochs, "wait_fraction")),
                compact(epochs[-1].get("train_loss")),
            )
        )
        colors.append(styles[name][1])
    columns = ("network", "epochs", "time", "images/s (median)", "waiting for data (median)", "last training loss")
    return Table("Training effort", columns, tuple(rows), colors=tuple(colors))


def _median(rows: Rows, key: str) -> float | None:
    values = [value for value in (finite(row.get(key)) for row in rows) if value is not None]
    return statistics.median(values) if values else None


def _waiting_callout(record: RunRecord) -> Callout | None:
    """The network that waited longest for its data, if that is above the limit."""
    waits = {name: _median(rows, "wait_fraction") or 0.0 for name, rows in record.metrics.items()}
    name = max(waits, key=lambda key: waits[key], default="")
    if not name or waits[name] <= WAIT_LIMIT:
        return None
    return Callout(
        "note",
        f"Training of {name} waited {percent(waits[name])} of its time for images: more loader workers or smaller "
        f"copies of the images would make it faster.",
    )
