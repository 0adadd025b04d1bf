"""The photographs: how many of each class, how they were split, and the proof that the folds do not leak."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.data.manifest import SPLITS, Dataset
from edgedistill.errors import ImageError
from edgedistill.images import image_size, read_bytes
from edgedistill.report.blocks import Bar, Block, Callout, Charts, Details, Figure, Missing, Section, Table, Text
from edgedistill.report.charts import Series, line_chart
from edgedistill.report.record import RunRecord, SoftLabelKeys
from edgedistill.report.wording import compact, count, percent, shorten

MAX_CLASSES = 20  # more than these and the tables show the largest and the smallest ten
MAX_FOLD_CLASSES = 8
MAX_FINDINGS = 30
MAX_OPEN_FINDINGS = 6
SIZE_SAMPLE = 64


def data_section(record: RunRecord) -> Section:
    dataset = record.dataset
    if dataset is None:
        return Section("data", "Data", (Missing("No frozen manifest dataset.csv", record.command("distill")),))
    counts = {split: np.bincount(dataset.labels[dataset.rows(split)], minlength=_classes(dataset)) for split in SPLITS}
    total = np.sum(list(counts.values()), axis=0)
    blocks: list[Block] = [_overview(dataset, record.data_report), _split_table(dataset, counts)]
    blocks.extend(_distribution(dataset, counts, total))
    blocks.extend(_findings(record))
    return Section("data", "Data", tuple(blocks))


def folds_section(record: RunRecord) -> Section:
    dataset = record.dataset
    if dataset is None or not len(dataset.rows("train")):
        return Section("folds", "Folds", (Missing("No folds", record.command("distill")),))
    return Section("folds", "Folds", (*_proof(dataset, record.soft_labels), _fold_table(dataset)))


def _classes(dataset: Dataset) -> int:
    return len(dataset.class_names)


def _overview(dataset: Dataset, report: dict[str, Any] | None) -> Text:
    groups = dataset.groups[dataset.groups != ""]
    together = f", {count(len(np.unique(groups)))} groups that stay together" if len(groups) else ""
    sizes = _checked_sizes(report) if report is not None else ""
    return Text(
        f"{len(dataset):,} images of {_classes(dataset):,} classes{together}. {sizes or _sampled_sizes(dataset)} The test "
        f"split was cut first and is read once, by the final evaluation; nobody trains on val; folds cover train only."
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


def _split_table(dataset: Dataset, counts: dict[str, npt.NDArray[np.int64]]) -> Table:
    rows = []
    for split, numbers in counts.items():
        size = int(numbers.sum())
        smallest = (
            f"{count(numbers.min())} ({shorten(dataset.class_names[int(numbers.argmin())], 24)})" if size else "–"
        )
        largest = percent(numbers.max() / size) if size else "–"
        rows.append((split, count(size), percent(size / max(1, len(dataset))), largest, smallest))
    return Table("Splits", ("split", "images", "of all", "largest class", "smallest class"), tuple(rows))


def _distribution(
    dataset: Dataset, counts: dict[str, npt.NDArray[np.int64]], total: npt.NDArray[np.int64]
) -> list[Block]:
    order = np.argsort(-total, kind="stable")
    many = len(order) > MAX_CLASSES
    shown = np.concatenate([order[:10], order[-10:]]) if many else order
    most = max(1, int(total.max()))
    rows: tuple[tuple[str | Bar, ...], ...] = tuple(
        (
            shorten(dataset.class_names[index]),
            *(count(counts[split][index]) for split in SPLITS),
            count(total[index]),
            percent(total[index] / max(1, len(dataset)), 2 if many else 1),
            Bar(float(total[index]) / most),
        )
        for index in shown
    )
    caption = (
        f"Class distribution: the ten largest and the ten smallest of {len(order):,} classes"
        if many
        else "Class distribution"
    )
    table = Table(caption, ("class", *SPLITS, "all", "share", "images"), rows)
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
    train_folds = dataset.folds[train]
    outside = np.delete(dataset.folds, train)
    sizes = np.bincount(np.maximum(train_folds, 0), minlength=max(1, folds))
    blocks: list[Block] = []
    partition = bool((train_folds >= 0).all() and (outside == -1).all() and (sizes > 0).all())
    if partition and len(np.unique(dataset.ids)) == len(dataset.ids):
        blocks.append(
            Callout(
                "good",
                f"Checked while this page was written: each of the {len(train):,} training images is in exactly one of "
                f"{folds} folds, and no val or test image is in any.",
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
    train = dataset.rows("train")
    expected = train[np.argsort(dataset.ids[train])]
    order = np.argsort(soft_labels.ids)
    same_ids = len(order) == len(expected) and bool((soft_labels.ids[order] == dataset.ids[expected]).all())
    if same_ids and bool((soft_labels.folds[order] == dataset.folds[expected]).all()):
        text = "Every soft label was written by the one teacher that never saw its image (joined by id, compared fold by fold)."
        return Callout("good", text)
    text = "soft_labels/ does not match dataset.csv (ids or folds differ): run 'edgedistill teach' again."
    return Callout("bad", text)


def _fold_table(dataset: Dataset) -> Table:
    train = dataset.rows("train")
    classes = _classes(dataset)
    few = classes <= MAX_FOLD_CLASSES
    rows = []
    for fold in range(dataset.fold_count):
        numbers = np.bincount(dataset.labels[train][dataset.folds[train] == fold], minlength=classes)
        cells = (
            [count(value) for value in numbers]
            if few
            else [count(numbers.min()), compact(np.median(numbers)), count(numbers.max())]
        )
        rows.append((f"fold {fold}", count(numbers.sum()), *cells))
    names = (
        [shorten(name, 24) for name in dataset.class_names]
        if few
        else ["smallest class", "median class", "largest class"]
    )
    return Table("Images per fold" + (" and class" if few else ""), ("fold", "images", *names), tuple(rows))
