"""check-data: everything that would stop or spoil a training, found before it starts, each with the file and the remedy."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.artifacts import atomic_path
from edgedistill.data import duplicates, sources
from edgedistill.data.deal import SplitSettings, deal_splits
from edgedistill.data.folds import plan_deal, small_class_remark
from edgedistill.data.sources import Source
from edgedistill.errors import DataError, ImageError
from edgedistill.image_headers import DEFAULT_MAX_PIXELS, ImageHeader, read_header
from edgedistill.shard_members import read_file
from edgedistill.tasks import Task, Values

IMBALANCE_RATIO = 10
COLORED_CLASSES = 10
SHOWN_SIZES = 60
ASPECT_PERCENTILES = (5, 25, 50, 75, 95)
SMALL_SIDE_PX = 32
LONG_ASPECT = 4.0
ODD_SIZE_RATIO = 8.0
KNOWN_STARTS = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM", b"II", b"MM")
SUFFIXES = {
    "jpeg": (".jpg", ".jpeg"), "png": (".png",), "webp": (".webp",), "bmp": (".bmp",), "tiff": (".tif", ".tiff"),
}  # fmt: skip
PNG_MODES = {0: "grey", 2: "colour", 3: "palette", 4: "grey with alpha", 6: "colour with alpha"}


@dataclass(frozen=True)
class Finding:
    """``kind``: a few words, the same for all findings of this sort; ``message``: what is wrong, with figures;
    ``paths``: every file concerned, '' only for findings about the whole; errors stop a training, warnings do not."""

    severity: Literal["error", "warning"]
    kind: str
    message: str
    remedy: str
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class DataReport:
    """What ``check_data`` found. Arrays are in the order of ``source.items``: ``sizes`` int32 [N, 2] (height, width in
    pixels, upright; 0 where unreadable), ``labels`` int64 [N] index into ``class_names``, ``sha256`` bytes [N],
    ``near_pairs`` int64 [M, 2] rows of near-duplicates, None where they were not looked for. ``heads``: where images
    carry several labels, the images of each class by head (of a regression head only those with a value); labels and
    ``class_names`` are then joint ones."""

    name: str
    class_names: tuple[str, ...]
    labels: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int32]
    modes: dict[str, int]
    sha256: npt.NDArray[np.bytes_]
    near_pairs: duplicates.Pairs | None
    findings: tuple[Finding, ...]
    heads: dict[str, dict[str, int]] | None = None

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == "warning")

    @property
    def class_counts(self) -> dict[str, int]:
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        return dict(zip(self.class_names, counts.tolist(), strict=True))

    def shapes(self) -> list[dict[str, Any]]:
        """Sizes and aspect ratios of the COLORED_CLASSES largest classes, then of all the others together (class None):
        ``sizes`` the most frequent [width, height, images], ``aspect`` the ASPECT_PERCENTILES of width / height."""
        found = []
        for _, name, rows in _largest(self):
            sizes = self.sizes[rows][:, ::-1]
            unique, counts = np.unique(sizes, axis=0, return_counts=True)
            # Of equally frequent ones any: the order of the sizes would show the small ones alone.
            anyhow = np.random.default_rng(0).permutation(len(unique))
            often = np.lexsort((anyhow, -counts))[:SHOWN_SIZES]
            found.append(
                {
                    "class": name,
                    "images": len(rows),
                    "aspect": np.round(_aspect(self.sizes[rows]), 4).tolist(),
                    "sizes": np.column_stack([unique, counts])[often].tolist(),
                }
            )
        return found

    def summary(self) -> str:
        """One line: the first error in full, and how many more."""
        if not self.errors:
            return f"{len(self.labels)} images, no errors, {len(self.warnings)} warnings"
        first = self.errors[0]
        files = f" ({first.paths[0]})" if first.paths else ""
        more = f", and {len(self.errors) - 1} more kinds of error" if len(self.errors) > 1 else ""
        return f"{first.message}{files}{more}"

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(severity, kind, message, first files, remedy) of each finding, errors first: a table's rows."""
        return [
            (f.severity, f.kind, f.message, _shown(f.paths), f.remedy) for f in (*self.errors, *self.warnings)
        ]  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, every file of every finding named."""
        known = self.sizes[self.sizes[:, 0] > 0]
        ranges = {
            name: dict(
                zip(
                    ("min", "median", "max"),
                    np.percentile(column, [0, 50, 100]).round().astype(int).tolist(),
                    strict=True,
                )
            )
            for name, column in (("height_px", known[:, 0]), ("width_px", known[:, 1]))
            if len(known)
        }
        return {
            "name": self.name,
            "images": len(self.labels),
            "classes": self.class_counts,
            **({} if self.heads is None else {"heads": self.heads}),
            "modes": self.modes,
            "sizes": ranges,
            "shapes": self.shapes(),
            "errors": [_finding_dict(finding) for finding in self.errors],
            "warnings": [_finding_dict(finding) for finding in self.warnings],
        }


def _finding_dict(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind, "message": finding.message, "remedy": finding.remedy, "paths": list(finding.paths),
    }  # fmt: skip


def _shown(paths: Sequence[str], limit: int = 3) -> str:
    more = f" and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(paths[:limit]) + more


# ---- one image ----


@dataclass(frozen=True)
class _Image:
    """One file looked at; ``problem``: (kind, message) where it cannot be used."""

    sha256: str = ""
    size: tuple[int, int] = (0, 0)
    mode: str = ""
    format: str = ""
    problem: tuple[str, str] | None = None
    hash: int = 0
    thumbnail: duplicates.Thumbnails | None = None


def _look_at(path: Path, max_pixels: int) -> _Image:
    """Never raises for what is in the file."""
    try:
        data = read_file(path)
    except OSError as error:
        return _Image(problem=("unreadable", error.strerror or str(error)))
    sha256 = hashlib.sha256(data).hexdigest()
    if not data:
        return _Image(sha256, problem=("empty", "0 bytes"))
    try:
        header = read_header(data, str(path))
    except ImageError as error:
        kind = "damaged" if data.startswith(KNOWN_STARTS) else "unsupported format"
        return _Image(sha256, problem=(kind, str(error)))
    size = header.upright_size
    if size[0] * size[1] > max_pixels:
        return _Image(sha256, size, problem=("too large", f"{size[1]}x{size[0]} pixels, the limit is {max_pixels}"))
    try:
        value, thumbnail = duplicates.fingerprint(path, max_pixels=max_pixels)
    except ImageError as error:
        return _Image(sha256, size, problem=("damaged", str(error)))
    return _Image(sha256, size, _mode(data, header), header.kind, None, value, thumbnail)


def _mode(data: bytes, header: ImageHeader) -> str:
    """Pixel mode from the header alone, in words."""
    if header.kind == "jpeg":
        return {1: "grey", 4: "CMYK"}.get(header.jpeg_components, "colour")
    if header.kind == "png":
        depth = "16-bit " if data[24] == 16 else ""
        return depth + PNG_MODES.get(data[25], "colour")
    if header.kind == "webp":
        return "colour with alpha" if data[12:16] == b"VP8X" and data[20] & 0x10 else "colour"
    return header.kind.upper()  # BMP and TIFF: many modes, all read; not told apart here


# ---- the whole ----

REMEDIES = {
    "unreadable": "check its permissions and the disk, or remove it",
    "empty": "copy it again or remove it",
    "damaged": "copy it again or remove it",
    "unsupported format": "convert to JPEG or PNG, or remove",
    "too large": "scale it down, remove it, or raise --max-pixels",
}


def check_data(
    source: Source,
    *,
    folds: int = 5,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    near_duplicates: bool = True,
    settings: SplitSettings | None = None,
) -> DataReport:
    """Decodes every image and deals the folds on trial. ``settings``: the split to try, default ``SplitSettings(folds)``.

    Raises nothing for bad data: that is what the report is for.
    """
    settings = settings or SplitSettings(folds=folds, near_duplicates=near_duplicates)
    images, hashes, thumbnails = _look_at_all(source, max_pixels, keep=settings.near_duplicates)
    code = {name: number for number, name in enumerate(source.class_names)}
    labels = np.fromiter((code[item.label] for item in source.items), np.int64, len(source.items))
    digests = np.asarray([image.sha256 for image in images], "S64")
    good = np.asarray([image.problem is None for image in images])
    findings = _image_findings(source, images) + _skipped_findings(source)
    near, near_findings = duplicates.NO_PAIRS, list[Finding]()
    if settings.near_duplicates:
        near, near_findings = _near_duplicates(source, digests, good, hashes, thumbnails)
    findings += _mode_findings(source, images) + _size_findings(source, images)
    findings += _copies(source, digests, good) + near_findings
    if source.task is None:
        findings += _imbalance(source, labels) + _several_in_one(source)
    else:
        findings += _head_findings(source, source.task)
    findings += _trial(source, digests, near, good, settings)
    return DataReport(
        name=source.name,
        class_names=source.class_names,
        labels=labels,
        sizes=np.asarray([image.size for image in images], np.int32).reshape(-1, 2),
        modes=dict(Counter(image.mode for image in images if image.mode)),
        sha256=digests,
        near_pairs=near if settings.near_duplicates else None,
        findings=tuple(findings),
        heads=None if source.task is None else head_counts(source.task, source.values),
    )


def _look_at_all(
    source: Source, max_pixels: int, *, keep: bool
) -> tuple[list[_Image], duplicates.Hashes, duplicates.Thumbnails]:
    """Images without their thumbnails, which lie in one array [N, 64, 64] ([0, 64, 64] where they are not kept)."""
    count = len(source.items)
    kept = count if keep and count <= duplicates.MAX_IMAGES else 0
    images: list[_Image] = []
    hashes = np.zeros(kept, np.uint64)
    thumbnails = np.zeros((kept, duplicates.THUMBNAIL_PX, duplicates.THUMBNAIL_PX), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool, console.progress("checking images", count) as bar:
        for row, image in enumerate(pool.map(lambda item: _look_at(item.path, max_pixels), source.items)):
            if kept and image.thumbnail is not None:
                hashes[row], thumbnails[row] = image.hash, image.thumbnail
            images.append(_Image(image.sha256, image.size, image.mode, image.format, image.problem))
            bar.update(bar.task_ids[0], advance=1)
    return images, hashes, thumbnails


def _image_findings(source: Source, images: Sequence[_Image]) -> list[Finding]:
    findings = []
    for kind, remedy in REMEDIES.items():
        rows = [row for row, image in enumerate(images) if image.problem is not None and image.problem[0] == kind]
        if rows:
            detail = images[rows[0]].problem
            first = detail[1] if detail is not None else ""
            message = f"{len(rows)} images are {kind}: {first}" if kind != "unsupported format" else first
            findings.append(Finding("error", kind, message, remedy, tuple(source.items[row].id for row in rows)))
    return findings


def _skipped_findings(source: Source) -> list[Finding]:
    findings = []
    reasons = dict.fromkeys(reason for _, reason in source.skipped)
    for reason in reasons:
        paths = tuple(path for path, other in source.skipped if other == reason)
        if reason.startswith(sources.UNSUPPORTED):
            message, remedy = f"{len(paths)} files: {reason}", REMEDIES["unsupported format"]
            findings.append(Finding("error", "unsupported format", message, remedy, paths))
        elif reason in (sources.BROKEN_LINK, sources.NOT_UTF8):
            findings.append(Finding("error", "unreadable", f"{len(paths)} files: {reason}", "mend or remove it", paths))
        else:
            message = f"{len(paths)} left out: {reason}"
            findings.append(
                Finding("warning", "left out", message, "remove them, or move images into a class folder", paths)
            )
    return findings


def _mode_findings(source: Source, images: Sequence[_Image]) -> list[Finding]:
    findings = []
    usual = {"grey", "colour", "BMP", "TIFF", "palette"}
    for mode in dict.fromkeys(image.mode for image in images if image.mode and image.mode not in usual):
        paths = tuple(item.id for item, image in zip(source.items, images, strict=True) if image.mode == mode)
        effect = "CMYK is converted" if mode == "CMYK" else "alpha is dropped and 16 bits are cut to 8"
        message = f"{len(paths)} images are {mode}"
        findings.append(
            Finding("warning", "odd mode", message, f"{effect}; convert them yourself for another result", paths)
        )
    grey = tuple(i.id for i, image in zip(source.items, images, strict=True) if image.mode.endswith("grey"))
    colour = sum(image.mode == "colour" for image in images)
    if grey and colour:
        rare = min(len(grey), colour) / (len(grey) + colour)
        message = f"{len(grey)} grey images among {colour} colour ones ({rare:.1%} are the rarer sort)"
        remedy = "nothing to do unless colour tells the classes apart by accident"
        findings.append(Finding("warning", "mixed modes", message, remedy, grey))
    lying = tuple(
        item.id
        for item, image in zip(source.items, images, strict=True)
        if image.format and item.path.suffix.lower() not in SUFFIXES[image.format]
    )
    if lying:
        message = f"{len(lying)} files are of another format than their name says"
        findings.append(
            Finding("warning", "wrong extension", message, "they are read all the same; rename them", lying)
        )
    return findings


def _size_findings(source: Source, images: Sequence[_Image]) -> list[Finding]:
    sizes = np.asarray([image.size if image.problem is None else (0, 0) for image in images]).reshape(-1, 2)
    known = sizes[:, 0] > 0
    if not known.any():
        return []
    short, long = sizes.min(axis=1), np.maximum(sizes.max(axis=1), 1)
    median = float(np.median(np.sqrt(sizes[known].prod(axis=1).astype(float))))
    scale = np.sqrt(sizes.prod(axis=1).astype(float)) / median
    kinds = (
        (known & (short < SMALL_SIDE_PX) & (median >= SMALL_SIDE_PX), f"have a side shorter than {SMALL_SIDE_PX} px",
         "look whether they are thumbnails or broken downloads"),
        (known & (long > LONG_ASPECT * short), f"are more than {LONG_ASPECT:g} times as long as wide",
         "crop them: squashed to the network's input they look unlike the others"),
        (known & ((scale > ODD_SIZE_RATIO) | (scale < 1 / ODD_SIZE_RATIO)),
         f"are over {ODD_SIZE_RATIO:g} times larger or smaller than the median ({median:.0f} px)",
         "look whether they belong here"),
    )  # fmt: skip
    return [
        Finding("warning", "odd size", f"{mask.sum()} images {what}", remedy, _ids(source, np.flatnonzero(mask)))
        for mask, what, remedy in kinds
        if mask.any()
    ]


def _ids(source: Source, rows: npt.NDArray[np.integer[Any]]) -> tuple[str, ...]:
    return tuple(source.items[row].id for row in rows)


def _copies(source: Source, digests: npt.NDArray[np.bytes_], good: npt.NDArray[np.bool_]) -> list[Finding]:
    """Byte-equal files: an error where labels that both have differ, else a warning."""
    usable = np.flatnonzero(good)
    contrary, pairs = (usable[rows] for rows in duplicates.contradictions(digests[usable], source.truth[usable]))
    findings = []
    if len(pairs):
        one, other = source.difference(*(source.items[row] for row in pairs[0]))
        message, remedy = f"{one} and {other} hold the same image byte for byte", "keep the right one, remove the other"
        findings.append(Finding("error", "conflicting labels", message, remedy, _ids(source, contrary)))
    agreeing = usable[~np.isin(usable, contrary)]
    rows = np.unique(agreeing[duplicates.same_value_pairs(digests[agreeing])])
    if len(rows):
        message = f"{len(rows)} images are byte-equal copies of one another; each set stays in one split and fold"
        findings.append(Finding("warning", "copies", message, "remove all but one of each", _ids(source, rows)))
    return findings


def _near_duplicates(
    source: Source,
    digests: npt.NDArray[np.bytes_],
    good: npt.NDArray[np.bool_],
    hashes: duplicates.Hashes,
    thumbnails: duplicates.Thumbnails,
) -> tuple[duplicates.Pairs, list[Finding]]:
    if not len(hashes):
        message = f"near-duplicates are not looked for among more than {duplicates.MAX_IMAGES} images"
        return duplicates.NO_PAIRS, [Finding("warning", "near-duplicates", message, "give groups in a CSV file")]
    rows = np.unique(digests, return_index=True)[1]
    rows = np.sort(rows[good[rows]])
    pairs = duplicates.near_duplicate_pairs(hashes[rows], thumbnails[rows])
    if pairs is None:
        return duplicates.NO_PAIRS, [Finding("warning", "near-duplicates", duplicates.TOO_MANY_PAIRS, "remove copies")]
    pairs = rows[pairs]
    if not len(pairs):
        return pairs, []
    label, truth = np.asarray([item.label for item in source.items]), source.truth
    one, other = truth[pairs[:, 0]], truth[pairs[:, 1]]
    contrary = ((one < other) | (one > other)).any(axis=1)  # what is missing, NaN, contradicts nothing
    conflict = pairs[contrary & (label[pairs[:, 0]] != label[pairs[:, 1]])]
    members = np.unique(pairs)
    groups = len(np.unique(duplicates.components(len(digests), pairs)[members]))
    message = (
        f"{len(members)} images look the same as another, in {groups} groups; each group stays in one split and fold, "
        "except for pairs that another line names"
    )
    remedy = "nothing to do; remove bursts to save time"
    findings = [Finding("warning", "near-duplicates", message, remedy, _ids(source, members))]
    if len(conflict):
        message = f"{len(conflict)} pairs of images look the same and have different labels"
        rows = conflict.ravel()
        findings.append(
            Finding("warning", "doubtful labels", message, "look at each pair and mend the labels", _ids(source, rows))
        )
    return pairs, findings


def _imbalance(source: Source, labels: npt.NDArray[np.int64]) -> list[Finding]:
    counts = np.bincount(labels, minlength=len(source.class_names))
    most, least = int(counts.argmax()), int(counts.argmin())
    if counts[most] < IMBALANCE_RATIO * counts[least]:
        return []
    names = source.class_names
    message = f"{names[most]!r} has {counts[most]} images, {names[least]!r} {counts[least]}"
    return [
        Finding(
            "warning", "class imbalance", message, "balanced sampling is the default; judge by macro-F1, not accuracy"
        )
    ]


def _several_in_one(source: Source) -> list[Finding]:
    """Class names such as 'cat|dog': several labels of one image, which were read as one."""
    joined = [name for name in source.class_names if "|" in name]
    if not joined:
        return []
    shown = f"{len(joined)} of {len(source.class_names)} classes have a | in their name, such as {joined[0]!r}"
    message = f"{shown}, and count as one label"
    return [Finding("warning", "one label or several", message, "--multi-label reads a|b as two labels of one image")]


def head_counts(task: Task, values: Values) -> dict[str, dict[str, int]]:
    """Images of each class, by head; of a regression head those that have a value; 'missing' where labels are missing."""
    counts: dict[str, dict[str, int]] = {}
    for head, columns in task.columns():
        own = values[:, columns]
        missing = np.isnan(own).any(axis=1)
        if head.kind == "softmax":
            numbers = np.bincount(own[~missing, 0].astype(np.int64), minlength=head.width).tolist()
        elif head.kind == "sigmoid":
            numbers = (own >= 0.5).sum(axis=0).tolist()
        else:
            numbers = [int((~missing).sum())]
        counts[head.name] = dict(zip(head.classes or ("values",), numbers, strict=True))
        if missing.any():
            counts[head.name]["missing"] = int(missing.sum())
    return counts


def _head_findings(source: Source, task: Task) -> list[Finding]:
    """Missing labels, and classes far rarer than others, of each head."""
    findings = []
    counts = head_counts(task, source.values)
    for head, columns in task.columns():
        missing = np.isnan(source.values[:, columns]).any(axis=1)
        if missing.any():
            message = f"{missing.sum()} images have no label in {head.name!r}; its loss leaves them out"
            findings.append(
                Finding("warning", "missing labels", message, "fill them in", _ids(source, np.flatnonzero(missing)))
            )
        of_classes = {name: counts[head.name][name] for name in head.classes}
        if not of_classes:
            continue
        most, least = max(of_classes, key=of_classes.__getitem__), min(of_classes, key=of_classes.__getitem__)
        if of_classes[most] >= IMBALANCE_RATIO * of_classes[least]:
            message = f"{head.name}: {most!r} has {of_classes[most]} images, {least!r} {of_classes[least]}"
            findings.append(Finding("warning", "class imbalance", message, "judge by macro-F1, not by accuracy"))
    return findings


def _trial(
    source: Source,
    digests: npt.NDArray[np.bytes_],
    near: duplicates.Pairs,
    good: npt.NDArray[np.bool_],
    settings: SplitSettings,
) -> list[Finding]:
    """Whether the images that can be read can be dealt to splits and folds; what the deal will not enforce."""
    keep = np.flatnonzero(good)
    place = np.cumsum(good) - 1
    rest = Source(source.name, source.root, tuple(source.items[row] for row in keep), task=source.task)
    gone = sorted(set(source.class_names) - set(rest.class_names)) if source.task is None else []
    if gone or not len(keep):
        which = f"of class {gone[0]!r} " if gone else ""
        return [Finding("error", "missing class", f"no image {which}can be read", "add images or remove the class")]
    try:
        rest, plan, _ = plan_deal(rest, digests[keep], place[near], settings)
    except DataError as error:
        if "different labels" in str(error):
            return []  # found above, with all its files
        return [Finding("error", "splits", str(error), "see the message")]
    remarks = [Finding("warning", *remark) for remark in plan.remarks()]
    try:
        _, dealt = deal_splits(plan.table, settings, rest.class_names)
    except DataError as error:
        message, _, remedy = str(error).partition("; ")
        return [Finding("error", "class too small", message, remedy), *remarks]
    set_apart = small_class_remark(plan, dealt, rest.class_names)
    return [*([Finding("warning", "small classes", set_apart, "add images of them")] if set_apart else []), *remarks]


def _largest(report: DataReport) -> list[tuple[int, str | None, npt.NDArray[np.int64]]]:
    """(place by size, class, its rows of known size) of the COLORED_CLASSES largest classes, then those of all others
    with the class None."""
    known = (report.sizes > 0).all(axis=1)
    order = np.argsort(-np.bincount(report.labels, minlength=len(report.class_names)), kind="stable")
    found: list[tuple[int, str | None, npt.NDArray[np.int64]]] = [
        (place, report.class_names[index], np.flatnonzero(known & (report.labels == index)))
        for place, index in enumerate(order[:COLORED_CLASSES])
    ]
    others = np.flatnonzero(known & ~np.isin(report.labels, order[:COLORED_CLASSES]))
    return [each for each in [*found, (COLORED_CLASSES, None, others)] if len(each[2])]


# ---- the picture ----


def plot_data(report: DataReport, path: Path) -> Path:
    """A PNG with the images of each class, their sizes and their aspect ratios; a colour for each of the COLORED_CLASSES
    largest classes, the same in all three. Returns ``path``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = min(len(report.class_names), 30)
    figure = Figure(figsize=(17, max(4.2, 1.2 + 0.32 * shown)), dpi=120, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    bars, scatter, boxes = figure.subplots(1, 3, width_ratios=(1, 1.15, 1))
    _plot_classes(report, bars, shown)
    _plot_sizes(report, scatter)
    _plot_aspects(report, boxes)
    title = f"{_plain(report.name)}: {len(report.labels):,} images, {len(report.class_names)} classes"
    figure.suptitle(title, fontsize=14, fontweight="bold", x=0.01, ha="left")
    with atomic_path(Path(path)) as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a script that matplotlib's font lacks shows as boxes
        figure.savefig(temporary, format="png")
    return Path(path)


INK, GRID, OTHERS = "#222b38", "#e3e7ec", "#a9b0ba"
# Tableau's ten, the grey among them replaced: it stands for the classes without a colour of their own.
COLORS = (
    "#4e79a7", "#f28e2b", "#e15759", "#76b7b2", "#59a14f", "#edc948", "#b07aa1", "#ff9da7", "#9c755f", "#3a3f47",
)  # fmt: skip


def _color(place: int) -> str:
    """Of the class at that place by size."""
    return COLORS[place] if place < COLORED_CLASSES else OTHERS


def _short(name: str) -> str:
    return _plain(name if len(name) <= 24 else name[:23] + "…")


def _plain_axes(axes: Any, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    axes.tick_params(length=0, colors=INK, labelsize=9)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)


def _plain(name: str) -> str:
    """A name that matplotlib does not take for a formula."""
    return name.replace("$", r"\$")


def _plot_classes(report: DataReport, axes: Any, shown: int) -> None:
    ordered = sorted(report.class_counts.items(), key=lambda pair: -pair[1])
    names = [_short(name) for name, _ in ordered[:shown]]
    counts = [count for _, count in ordered[:shown]]
    drawn = axes.barh(range(shown), counts, color=[_color(place) for place in range(shown)], height=0.72)
    few = ["  (few)" if count * IMBALANCE_RATIO <= counts[0] else "" for count in counts]
    labels = [f"{count:,}{note}" for count, note in zip(counts, few, strict=True)]
    axes.bar_label(drawn, labels=labels, padding=4, fontsize=9, color=INK)
    axes.set_yticks(range(shown), names)
    axes.set_ylim(shown - 0.4, -0.6)
    axes.set_xlim(0, max(counts) * 1.16)
    more = f" (the {shown} largest of {len(ordered)})" if len(ordered) > shown else ""
    _plain_axes(axes, f"Images of each class{more}")
    axes.grid(visible=False, axis="y")


def _logarithmic(axes: Any) -> None:
    """Both axes, with ticks a person reads: 20, 50, 100, 200."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def _plot_sizes(report: DataReport, axes: Any) -> None:
    """A dot for each size that occurs in a class, its area by how often; logarithmic where sizes differ much."""
    known = report.sizes[(report.sizes > 0).all(axis=1)]
    _plain_axes(axes, "Image sizes (dot area: number of images)")
    axes.set_xlabel("width, px", color=INK)
    axes.set_ylabel("height, px", color=INK)
    if not len(known):
        return
    sizes, counts = np.unique(known, axis=0, return_counts=True)
    most, spread = counts.max(), min(200.0, 40_000 / len(sizes))
    # The classes of more images below, so that the others are not hidden.
    for place, _, rows in _largest(report):
        own, own_counts = np.unique(report.sizes[rows], axis=0, return_counts=True)
        area = 18 + 700 * own_counts / most if len(sizes) < 50 else 10 + spread * np.sqrt(own_counts / most)
        below = 1 if place == COLORED_CLASSES else 2
        axes.scatter(
            own[:, 1], own[:, 0], s=area, color=_color(place), alpha=0.55, linewidth=0.6, edgecolor="white", zorder=below
        )  # fmt: skip
    low, high = float(sizes.min()), float(sizes.max())
    if high > 6 * low:
        _logarithmic(axes)
        limits = (low / 1.4, high * 1.4)
    else:
        limits = (max(0.0, low - 0.2 * high), 1.2 * high)
    axes.plot(limits, limits, color=GRID, linewidth=1.5, zorder=0)
    axes.set_xlim(limits)
    axes.set_ylim(limits)
    if len(sizes) <= 6:
        for (height, width), count in zip(sizes.tolist(), counts.tolist(), strict=True):
            axes.annotate(
                f"{width}x{height}: {count:,}",
                (width, height),
                xytext=(20, 10),
                textcoords="offset points",
                fontsize=9,
                color=INK,
            )


def _plot_aspects(report: DataReport, axes: Any) -> None:
    """A box for each class that has a colour, and one for the others together."""
    _plain_axes(axes, "Aspect ratio (box: half of the images, line: 5 to 95%)")
    axes.set_xlabel("width / height", color=INK)
    groups = _largest(report)
    if not groups:
        return
    quantiles = np.array([_aspect(report.sizes[rows]) for _, _, rows in groups])
    low, first, middle, third, high = quantiles.T
    places = np.arange(len(groups))
    axes.barh(places, third - first, left=first, height=0.6, color=[_color(place) for place, _, _ in groups], alpha=0.8)
    axes.hlines(places, low, high, color=INK, linewidth=0.9)
    axes.vlines(middle, places - 0.3, places + 0.3, color=INK, linewidth=1.8)
    axes.axvline(1.0, color=GRID, linewidth=1.5, zorder=0)
    axes.set_yticks(places, [_short("the others" if name is None else name) for _, name, _ in groups])
    axes.set_ylim(len(groups) - 0.4, -0.6)
    if high.max() > 6 * low.min():
        axes.set_xscale("log")
        axes.set_xlim(min(low.min(), 1.0) / 1.15, max(high.max(), 1.0) * 1.15)
    else:
        margin = max(0.05, 0.06 * (high.max() - low.min()))
        axes.set_xlim(min(low.min(), 1.0) - margin, max(high.max(), 1.0) + margin)
    axes.grid(visible=False, axis="y")


def _aspect(sizes: npt.NDArray[np.int32]) -> npt.NDArray[np.float64]:
    """Percentiles of width / height; ``sizes``: int32 [N, 2], height and width."""
    return np.percentile(sizes[:, 1] / sizes[:, 0], ASPECT_PERCENTILES)
