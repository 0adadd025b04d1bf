"""The photographs: how many of each class, how they were split, and the proof that the folds do not leak."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.data.manifest import ALWAYS_TRAINED, SPLITS, Dataset
from edgedistill.errors import ImageError
from edgedistill.images import image_size, read_bytes
from edgedistill.report.blocks import (
    Bar,
    Block,
    Callout,
    Charts,
    Details,
    Figure,
    Key,
    Missing,
    Section,
    Table,
    Text,
)
from edgedistill.report.charts import Box, Point, Series, box_chart, line_chart, size_chart
from edgedistill.report.record import RunRecord, SoftLabelKeys, setting
from edgedistill.report.wording import compact, count, heads_in_words, percent, shorten
from edgedistill.tasks import Head, Values

MAX_CLASSES = 20  # more than these and the tables show the largest and the smallest ten
MAX_FOLD_CLASSES = 8
MAX_FINDINGS = 30
MAX_OPEN_FINDINGS = 6
SIZE_SAMPLE = 64
MAX_COLORS = 10  # classes with a colour of their own in report.css
MAX_HEADS = 12
# By --final-data; a run that has not recorded it may be of either kind.
VAL_WORDS = {
    "train": ", and none on val",
    "train+val": "; the last epochs of each student are on val too (--final-data train+val)",
}

Counts = npt.NDArray[np.int64]


def data_section(record: RunRecord) -> Section:
    dataset = record.dataset
    if dataset is None:
        return Section("data", "Data", (Missing("No frozen manifest dataset.csv", record.command("distill")),))
    counts = {split: np.bincount(dataset.labels[dataset.rows(split)], minlength=_classes(dataset)) for split in SPLITS}
    blocks: list[Block] = [_overview(record, dataset), _split_table(dataset, counts)]
    colors = _class_colors(record.data_report)
    if dataset.task is None:
        blocks.extend(_distribution(dataset.class_names, counts, len(dataset), colors=colors))
    else:
        blocks.extend(_distributions_of_heads(dataset))
    blocks.extend(_shapes(record.data_report, colors))
    blocks.extend(_findings(record))
    return Section("data", "Data", tuple(blocks))


def folds_section(record: RunRecord) -> Section:
    dataset = record.dataset
    if dataset is None or not len(dataset.rows("train")):
        return Section("folds", "Folds", (Missing("No folds", record.command("distill")),))
    return Section("folds", "Folds", (*_proof(dataset, record.soft_labels), *_fold_tables(dataset)))


def _classes(dataset: Dataset) -> int:
    return len(dataset.class_names)


def _overview(record: RunRecord, dataset: Dataset) -> Text:
    report = record.data_report
    groups = dataset.groups[dataset.groups != ""]
    together = f", {count(len(np.unique(groups)))} groups that stay together" if len(groups) else ""
    sizes = _checked_sizes(report) if report is not None else ""
    what = f"of {_classes(dataset):,} classes" if dataset.task is None else f"with {heads_in_words(dataset.task)}"
    return Text(
        f"{len(dataset):,} images {what}{together}. {sizes or _sampled_sizes(dataset)} No network is trained on test, which "
        f"is kept for the final evaluation{VAL_WORDS.get(setting(record.config, 'student', 'final_data'), '')}; folds cover "
        "train only."
    )


def _checked_sizes(report: dict[str, Any]) -> str:
    """Sizes and pixel modes of all images, as check-data found them."""
    sizes = report.get("sizes") or {}
    if not {"width_px", "height_px"} <= set(sizes):
        return ""
    parts = [f"{name} {_range(sizes[key])}" for name, key in (("width", "width_px"), ("height", "height_px"))]
    modes = sorted((report.get("modes") or {}).items(), key=lambda item: -item[1])[:4]
    kinds = ", ".join(f"{shorten(mode, 24)} {count(images)}" for mode, images in modes)
    return f"In pixels: {', '.join(parts)}" + (f"; modes: {kinds}." if kinds else ".")


def _range(values: dict[str, Any]) -> str:
    low, middle, high = (count(values[key]) for key in ("min", "median", "max"))
    return low if low == high else f"{low} to {high} (median {middle})"


def _sampled_sizes(dataset: Dataset) -> str:
    """Image sizes from the headers of an even sample; files that are gone or unreadable are counted, not fatal."""
    rows = np.unique(np.linspace(0, len(dataset) - 1, min(SIZE_SAMPLE, len(dataset))).astype(np.int64))
    sizes = []
    for row in rows:
        try:
            data, name = read_bytes(str(dataset.paths[row]))
            sizes.append(image_size(data, name=name)[:2])
        except ImageError:
            continue
    if not sizes:
        return (
            f"The image files were not at hand when this page was written ({dataset.paths[0]}), so sizes are unknown."
        )
    heights, widths = zip(*sizes, strict=True)
    ranges = (
        _range({"min": min(values), "median": median(values), "max": max(values)}) for values in (widths, heights)
    )
    return "In a sample of {} images: width {}, height {} pixels.".format(len(sizes), *ranges)


def _split_table(dataset: Dataset, counts: dict[str, Counts]) -> Table:
    rows = []
    for split, numbers in counts.items():
        size = int(numbers.sum())
        row: tuple[str, ...] = (split, count(size), percent(size / max(1, len(dataset))))
        if dataset.task is None:
            smallest = (
                f"{count(numbers.min())} ({shorten(dataset.class_names[int(numbers.argmin())], 24)})" if size else "–"
            )
            row += (percent(numbers.max() / size) if size else "–", smallest)
        rows.append(row)
    columns = ("split", "images", "of all", *(("largest class", "smallest class") if dataset.task is None else ()))
    return Table("Splits", columns, tuple(rows))


def _class_colors(report: dict[str, Any] | None) -> dict[str, str]:
    """Of the largest classes, by name: the colours in which check-data's sizes and aspect ratios are drawn."""
    names = [shape["class"] for shape in (report or {}).get("shapes", ()) if shape["class"] is not None]
    return {str(name): f"class{place}" for place, name in enumerate(names[:MAX_COLORS])}


def _distribution(
    names: Sequence[str], counts: dict[str, Counts], images: int, *, of: str = "", colors: dict[str, str] | None = None
) -> list[Block]:
    """How many of ``images`` are of each class: a table, for many classes with a curve above it. ``of``: the head."""
    total = np.sum(list(counts.values()), axis=0)
    order = np.argsort(-total, kind="stable")
    many = len(order) > MAX_CLASSES
    shown = np.concatenate([order[:10], order[-10:]]) if many else order
    most = max(1, int(total.max()))
    rows: tuple[tuple[str | Bar, ...], ...] = tuple(
        (
            shorten(names[index]),
            *(count(counts[split][index]) for split in SPLITS),
            count(total[index]),
            percent(total[index] / max(1, images), 2 if many else 1),
            Bar(float(total[index]) / most),
        )
        for index in shown
    )
    caption = "Class distribution" + (f" of {of}" if of else "")
    if many:
        caption += f": the ten largest and the ten smallest of {len(order):,} classes"
    swatches = tuple((colors or {}).get(names[index], "peer") for index in shown) if colors else ()
    table = Table(caption, ("class", *SPLITS, "all", "share", "images"), rows, colors=swatches)
    if not many:
        return [table]
    ranks = tuple(float(rank + 1) for rank in range(len(order)))
    chart = line_chart(
        [Series("images", "accent", ranks, tuple(float(value) for value in total[order]))],
        alt=f"Images per class over {len(order)} classes, largest first",
        x_label="class, by size",
        y_range=(0, most),
    )
    return [Charts((Figure("Images per class, largest first", chart),)), table]


def _distributions_of_heads(dataset: Dataset) -> list[Block]:
    """For each head of classes its own distribution; for a value how many images have one, and its range."""
    blocks: list[Block] = []
    values_rows = []
    for head, own in _heads_of(dataset):
        if head.kind == "regression":
            there = own[~np.isnan(own[:, 0]), 0]
            range_of = np.percentile(there, [0, 50, 100]) if len(there) else (np.nan,) * 3
            values_rows.append((shorten(head.name, 40), count(len(there)), *(compact(value) for value in range_of)))
            continue
        counts = {split: _head_counts(head, own[dataset.splits == split]) for split in SPLITS}
        known = int((~np.isnan(own)).any(axis=1).sum())
        blocks.extend(_distribution(head.classes, counts, known, of=shorten(head.name, 40)))
    if values_rows:
        columns = ("value", "images that have one", "smallest", "median", "largest")
        blocks.append(Table("Values", columns, tuple(values_rows)))
    return blocks


def _heads_of(dataset: Dataset) -> list[tuple[Head, Values]]:
    """The first MAX_HEADS heads with their columns of the images' labels."""
    if dataset.task is None or dataset.values is None:
        return []
    return [(head, dataset.values[:, columns]) for head, columns in dataset.task.columns()][:MAX_HEADS]


def _head_counts(head: Head, values: Values) -> Counts:
    """int64 [C]: images of each class of a softmax head, or to which each label applies."""
    if head.kind == "sigmoid":
        return (values >= 0.5).sum(axis=0)
    return np.bincount(values[~np.isnan(values[:, 0]), 0].astype(np.int64), minlength=head.width)


def _shapes(report: dict[str, Any] | None, colors: dict[str, str]) -> list[Block]:
    """Sizes and aspect ratios by class, from what check-data measured."""
    shapes = (report or {}).get("shapes", ())[: MAX_COLORS + 1]
    if not shapes:
        return []
    numbers = [int(images) for shape in shapes for *_, images in shape["sizes"]]
    most, spread = max(numbers), 7.0 if len(numbers) < 50 else 2.5
    points: list[Point] = []
    boxes = []
    for shape in shapes:
        name = "the others" if shape["class"] is None else str(shape["class"])
        color = "peer" if shape["class"] is None else colors[name]
        low, first, middle, third, high = map(float, shape["aspect"])
        boxes.append(Box(f"{name}, {count(shape['images'])} images", color, (low, first, middle, third, high)))
        own = [
            Point(float(width), float(height), color, radius=2.5 + spread * (images / most) ** 0.5)
            for width, height, images in shape["sizes"]
        ]
        points = [*own, *points] if shape["class"] is None else [*points, *own]  # the others below
    sizes = size_chart(points, alt=f"Height over width: {'; '.join(box.label for box in boxes)}")
    aspects = box_chart(boxes, alt="Width over height by class", x_label="width / height")
    figures = (
        Figure("Image sizes", sizes, "Dot area: number of images. The most frequent sizes of each class."),
        Figure("Aspect ratio", aspects, "Box: half of the images; line: 5 to 95%."),
    )
    keys = tuple(Key(shorten(name, 40), color) for name, color in colors.items())
    return [Charts(figures, (*keys, *((Key("the others", "peer"),) if shapes[-1]["class"] is None else ())))]


def _findings(record: RunRecord) -> list[Block]:
    report = record.data_report
    if report is None:
        missing = "The images were not checked for damage, duplicates and conflicts"
        return [Missing(missing, record.command("check-data"))]
    errors, warnings = report["errors"], report["warnings"]
    findings = [("error", item) for item in errors] + [("warning", item) for item in warnings]
    if not findings:
        return [Callout("good", "check-data read every image and found nothing to complain about.")]
    rows = tuple(
        (
            level,
            shorten(item["kind"]),
            shorten(item["message"], 200),
            shorten(_files(item.get("paths", ())), 160),
            shorten(item.get("remedy", ""), 200),
        )
        for level, item in findings[:MAX_FINDINGS]
    )
    caption = f"Findings of check-data (errors: {len(errors):,}, warnings: {len(warnings):,})"
    table = Table(caption, ("severity", "finding", "what", "files", "remedy"), rows, numeric=False)
    return [table if len(rows) <= MAX_OPEN_FINDINGS else Details(caption, (table,))]


def _files(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - 2:,} more" if len(paths) > 2 else ""
    return ", ".join(str(path) for path in paths[:2]) + more


def _proof(dataset: Dataset, soft_labels: SoftLabelKeys | None) -> list[Block]:
    """Checked again from the files while the page is written, not copied from what training claims."""
    train, folds = dataset.rows("train"), dataset.fold_count
    always = int((dataset.folds == ALWAYS_TRAINED).sum())
    train_folds = dataset.folds[train]
    train_folds = train_folds[train_folds != ALWAYS_TRAINED]
    outside = np.delete(dataset.folds, train)
    sizes = np.bincount(np.maximum(train_folds, 0), minlength=max(1, folds))
    blocks: list[Block] = []
    partition = bool((train_folds >= 0).all() and (outside == -1).all() and (sizes > 0).all())
    if partition and len(np.unique(dataset.ids)) == len(dataset.ids):
        blocks.append(
            Callout(
                "good",
                f"Checked while this page was written: each of the {len(train_folds):,} training images is in exactly one of "
                f"{folds} folds, and no val or test image is in any."
                + (f" {always:,} more, of small classes, are always trained on." if always else ""),
            )
        )
    else:
        blocks.append(
            Callout("bad", "The folds do not partition the training images: do not trust this run's figures.")
        )
    blocks.extend(_group_proof(dataset))
    if soft_labels is not None:
        blocks.append(_soft_label_proof(dataset, soft_labels))
    return blocks


def _group_proof(dataset: Dataset) -> list[Block]:
    grouped = np.flatnonzero(dataset.groups != "")
    if not len(grouped):
        return []
    names, member = np.unique(dataset.groups[grouped], return_inverse=True)
    split_number = np.argmax(dataset.splits[grouped, None] == np.array(SPLITS)[None, :], axis=1)
    place = split_number * 100_000 + dataset.folds[grouped]
    low, high = np.full(len(names), np.iinfo(np.int64).max), np.full(len(names), np.iinfo(np.int64).min)
    np.minimum.at(low, member, place)
    np.maximum.at(high, member, place)
    crossing = int((low != high).sum())
    if crossing:
        text = (
            f"{crossing:,} of {len(names):,} groups cross splits or folds: the figures of this run are too optimistic."
        )
        return [Callout("bad", text)]
    return [Callout("good", f"None of the {len(names):,} groups crosses splits or folds.")]


def _soft_label_proof(dataset: Dataset, soft_labels: SoftLabelKeys) -> Callout:
    train = dataset.held_out_rows
    expected = train[np.argsort(dataset.ids[train])]
    order = np.argsort(soft_labels.ids)
    same_ids = len(order) == len(expected) and bool((soft_labels.ids[order] == dataset.ids[expected]).all())
    if same_ids and bool((soft_labels.folds[order] == dataset.folds[expected]).all()):
        text = "Every soft label was written by the one teacher that never saw its image (joined by id, compared fold by fold)."
        return Callout("good", text)
    text = "soft_labels/ does not match dataset.csv (ids or folds differ): run 'edgedistill teach' again."
    return Callout("bad", text)


def _fold_tables(dataset: Dataset) -> list[Table]:
    """Of one label per image one table, else one for each head of classes."""
    train = dataset.rows("train")
    folds = dataset.folds[train]
    if dataset.task is None:
        labels, classes = dataset.labels[train], _classes(dataset)
        counts = [np.bincount(labels[folds == fold], minlength=classes) for fold in range(dataset.fold_count)]
        return [_fold_table(dataset.class_names, counts, [int(numbers.sum()) for numbers in counts])]
    images = np.bincount(folds[folds >= 0], minlength=dataset.fold_count).tolist()  # some may be always trained on
    return [
        _fold_table(
            head.classes,
            [_head_counts(head, own[train][folds == fold]) for fold in range(dataset.fold_count)],
            images,
            of=shorten(head.name, 40),
        )
        for head, own in _heads_of(dataset)
        if head.kind != "regression"
    ]


def _fold_table(classes: Sequence[str], counts: Sequence[Counts], images: Sequence[int], *, of: str = "") -> Table:
    """``counts``: int64 [C] of each fold; ``images``: of each fold, whether their class is known or not."""
    few = len(classes) <= MAX_FOLD_CLASSES
    rows = []
    for fold, (numbers, size) in enumerate(zip(counts, images, strict=True)):
        cells = (
            [count(value) for value in numbers]
            if few
            else [count(numbers.min()), compact(np.median(numbers)), count(numbers.max())]
        )
        rows.append((f"fold {fold}", count(size), *cells))
    names = [shorten(name, 24) for name in classes] if few else ["smallest class", "median class", "largest class"]
    caption = "Images per fold" + (" and class" if few else "") + (f" of {of}" if of else "")
    return Table(caption, ("fold", "images", *names), tuple(rows))
