"""The user's photographs as a list of labelled items, whatever form they come in. Needs numpy and OpenCV only.

- a folder of class folders:          photos/cat/1.jpg
- split folders of class folders:     photos/train/cat/1.jpg, photos/val/..., photos/test/...
- a CSV file with columns path,label and optionally group and split; other label columns by ``LabelColumns``
- WebDataset shards:                  'shards/*.tar', one .tar, or a folder of them
- built-in names: ``elpv``, ``elpv-4class``, ``fashion-mnist``, ``fashion-mnist:FOLDER``
"""

from __future__ import annotations

import csv
import dataclasses
import importlib.util
import itertools
import os
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.data import fashion_mnist
from edgedistill.data.label_columns import LabelColumns, check_header, read_labels
from edgedistill.data.shards import find_shards, read_shards
from edgedistill.errors import DataError, UsageError
from edgedistill.images import IMAGE_SUFFIXES
from edgedistill.tasks import Head, Task, Values, unfit_label

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
# Photographs that look like images to their owner and that no decoder here reads; left out silently they would be missed.
UNREADABLE_SUFFIXES = frozenset(
    {".heic", ".heif", ".avif", ".gif", ".jp2", ".jxl", ".svg", ".psd", ".eps", ".pdf",
     ".raw", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf"}
)  # fmt: skip
UNSUPPORTED = "photograph in a format that is not read"
OUTSIDE = "image outside the class folders"
NOT_UTF8, BROKEN_LINK = "file name is not valid UTF-8", "broken symbolic link"
JUNK_NAMES = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
BUILT_IN = ("elpv", "elpv-4class", "fashion-mnist", "fashion-mnist:FOLDER")
CSV_COLUMNS = ("path", "label", "group", "split")
SINGLE_LABEL = LabelColumns()


@dataclass(frozen=True, slots=True)
class Item:
    """One labelled image. ``id``: NFC-normalised POSIX path relative to the source's root; ``split``: '' where the data
    do not say, else train, val or test; ``group``: images of one group never part; ``stratum``: balanced in every split
    beside the label. ``values``: what is true of it, V numbers as ``tasks`` has them, where the source has a task; then
    ``label`` is their joint label."""

    id: str
    path: Path
    label: str
    group: str = ""
    split: str = ""
    stratum: str = ""
    values: tuple[float, ...] = ()


@dataclass(frozen=True)
class Source:
    """``items`` in the order of their ids; ``skipped``: (path, reason) of every file that is not used. ``task``: None
    where every image has one label."""

    name: str
    root: Path
    items: tuple[Item, ...]
    skipped: tuple[tuple[str, str], ...] = ()
    task: Task | None = None

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(sorted({item.label for item in self.items}))

    @property
    def values(self) -> Values:
        """float32 [N, V], in the order of ``items``; V is 0 without a task."""
        return np.asarray([item.values for item in self.items], np.float32).reshape(len(self.items), -1)

    @property
    def truth(self) -> Values:
        """``values``, or without a task the number of the label, float32 [N, 1]."""
        if self.task is not None:
            return self.values
        number = {name: float(number) for number, name in enumerate(self.class_names)}
        return np.asarray([[number[item.label]] for item in self.items], np.float32)

    def difference(self, one: Item, other: Item) -> tuple[str, str]:
        """What is said of each of two images that contradict one another: 'cat' and 'dog', 'age 3' and 'age 4'."""
        if self.task is None:
            return one.label, other.label
        a, b = np.array(one.values), np.array(other.values)
        column = int(np.flatnonzero((a < b) | (a > b))[0])
        head, columns = next(found for found in self.task.columns() if column < found[1].stop)
        return _said(head, column - columns.start, a[column]), _said(head, column - columns.start, b[column])


def _said(head: Head, column: int, value: float) -> str:
    if head.kind == "softmax":
        return f"{head.name} {head.classes[int(value)]}"
    return f"{head.classes[column] if head.classes else head.name} {value:g}"


def without_classes(source: Source, rows: npt.NDArray[np.int64], gone: npt.NDArray[np.bool_]) -> Source:
    """The images ``rows`` of the source, none of which has one of the classes ``gone``, bool [C]: of its class names, or
    of its task's marks. Raises DataError where a head is left without a choice."""
    items = [source.items[row] for row in rows]
    if source.task is None:
        if len({item.label for item in items}) < 2:
            raise DataError(f"{source.root}: --small-classes drop leaves fewer than two classes; add images")
        return dataclasses.replace(source, items=tuple(items))
    heads: list[Head] = []
    columns: list[Values] = []
    left, values, start = ~gone, source.values[rows], 0
    for head, part in source.task.columns():
        if head.kind == "regression":
            heads.append(head)
            columns.append(values[:, part])
            continue
        keep = left[start : start + head.width]
        start += head.width
        if keep.sum() < (2 if head.kind == "softmax" else 1):
            raise DataError(f"{source.root}: --small-classes drop leaves {head.name!r} without a choice; add images")
        heads.append(dataclasses.replace(head, classes=tuple(np.asarray(head.classes, object)[keep].tolist())))
        columns.append(_renumbered(values[:, part], keep) if head.kind == "softmax" else values[:, part][:, keep])
    task, values = Task(tuple(heads)), np.concatenate(columns, axis=1)
    labelled = (
        dataclasses.replace(item, label=task.joint_label(row), values=tuple(row.tolist()))
        for item, row in zip(items, values, strict=True)
    )
    return dataclasses.replace(source, items=tuple(labelled), task=task)


def _renumbered(values: Values, keep: npt.NDArray[np.bool_]) -> Values:
    """Class numbers [N, 1] where only the classes ``keep`` are left; NaN stays."""
    numbers = np.append(np.cumsum(keep) - 1, np.nan).astype(np.float32)
    return numbers[np.where(np.isnan(values), len(keep), values).astype(np.int64)]


def open_source(data: str, *, cache: Path | None = None, labels: LabelColumns = SINGLE_LABEL) -> Source:
    """The labelled images behind ``--data``; nothing is decoded. ``cache``: where built-in data sets are unpacked
    (default: $EDGEDISTILL_CACHE or ~/.cache/edgedistill). ``labels``: the label columns of a CSV file.

    Raises UsageError when nothing of that name exists and DataError when it cannot be read as labelled images; both
    name the file or folder and the remedy.
    """
    data = str(data)
    if labels and not data.lower().endswith(".csv"):
        raise UsageError(
            f"--data {data}: label columns are read from a CSV file only; give one with path and the columns"
        )
    if data in ("elpv", "elpv-4class"):
        return _checked(_elpv(data))
    if data == "fashion-mnist" or data.startswith("fashion-mnist:"):
        return _checked(_fashion_mnist(data, cache))
    path = Path(data).expanduser()
    if os.fsencode(path).decode(errors="replace") != str(path):
        raise DataError(
            f"{os.fsencode(path).decode(errors='replace')}: the folder's name is not valid UTF-8; rename it"
        )
    shards = find_shards(data)
    if shards is not None:
        return _checked(_shards(shards))
    if path.is_dir():
        return _checked(_folder(path))
    if path.is_file() and path.suffix.lower() == ".csv":
        return _checked(_csv(path, labels))
    if path.exists():
        raise DataError(
            f"{path}: neither a folder nor a .csv or .tar file; give a folder of class folders, a CSV path,label or shards"
        )
    raise UsageError(f"--data {data}: no such folder or file, and not a built-in name ({', '.join(BUILT_IN)})")


def _checked(source: Source) -> Source:
    """What holds for every form: unique ids, at least two classes; items sorted by id."""
    items = sorted(source.items, key=lambda item: item.id)
    for one, other in itertools.pairwise(items):
        if one.id == other.id:
            raise DataError(
                f"{one.path} and {other.path}: the same name once Unicode is normalised (NFC); rename one of them"
            )
    strange = next((item for item in items if "\r" in item.id + item.group), None)
    if strange is not None:
        raise DataError(
            f"{source.root}: {strange.id!r}, group {strange.group!r}: a carriage return in the name; rename it"
        )
    labels = {item.label for item in items}
    for label in sorted(labels) if source.task is None else source.task.outputs:
        if wrong := unfit_label(label):
            raise DataError(f"{source.root}: class {label[:60]!r}: {wrong}; rename it")
    if len(labels) < 2:
        names = ", ".join(sorted(labels)) or "none"
        raise DataError(
            f"{source.root}: {len(items)} images of {len(labels)} class ({names}), expected at least two classes: "
            "one folder per class (photos/cat/1.jpg, photos/dog/2.jpg) or a CSV file with columns path,label"
        )
    return Source(source.name, source.root, tuple(items), source.skipped, source.task)


def _id(path: str) -> str:
    return unicodedata.normalize("NFC", path)


# ---- folders ----


@dataclass
class _Found:
    """What one walk over folders collects."""

    root: Path
    items: list[Item] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def _folder(root: Path) -> Source:
    found = _Found(root)
    folders, images = _listing(root, found)
    if _is_split_layout(root, folders, images):
        found.skipped += [(str(path), OUTSIDE) for path in images]
        given: dict[str, Path] = {}
        for folder in folders:
            split = SPLIT_NAMES.get(folder.name.lower())
            if split is None:
                found.skipped.append((str(folder), "folder beside train, val and test"))
                continue
            if split in given:
                raise DataError(f"{given[split]} and {folder}: two folders for split {split}; merge or rename one")
            given[split] = folder
            _split_folder(folder, split, found)
        _check_split_classes(root, found.items)
    else:
        _class_folders(root, folders, images, "", found)
    return Source(root.name or str(root), root, tuple(found.items), tuple(found.skipped))


def _is_split_layout(root: Path, folders: Sequence[Path], images: Sequence[Path]) -> bool:
    """train/ with class folders inside. A class may be called 'train' too: then images lie right in it."""
    named = {SPLIT_NAMES[folder.name.lower()]: folder for folder in folders if folder.name.lower() in SPLIT_NAMES}
    if not named:
        return False
    quiet = _Found(root)
    if "train" in named:
        inner, inner_images = _listing(named["train"], quiet)
        if inner:
            return True
        if inner_images and len(named) == len(folders):
            raise DataError(
                f"{named['train']}: images lie right in the folder; expected class folders, {named['train']}/CLASS/image.jpg"
            )
        return False
    if len(named) == len(folders) and not images:
        raise DataError(
            f"{root}: {', '.join(sorted(f.name for f in folders))} but no train folder; add {root}/train/CLASS"
        )
    return False


def _split_folder(folder: Path, split: str, found: _Found) -> None:
    folders, images = _listing(folder, found)
    _class_folders(folder, folders, images, split, found)


def _class_folders(root: Path, folders: Sequence[Path], images: Sequence[Path], split: str, found: _Found) -> None:
    if not folders and images:
        raise DataError(
            f"{root}: {len(images)} images lie right in the folder, so nothing says their classes; "
            f"move them into one folder per class ({root}/CLASS/{images[0].name}) or give a CSV file with columns path,label"
        )
    if not folders:
        raise DataError(f"{root}: no images and no class folders; expected {root}/CLASS/image.jpg")
    found.skipped += [(str(path), OUTSIDE) for path in images]
    for folder in folders:
        nested, inside = _listing(folder, found)
        holder = next((path for path in nested if _holds_images(path)), None)
        if holder is not None:
            _nested_error(root, folder, holder, only=len(folders) == 1 and not inside)
        for path in nested:
            _skip_all(path, found)
        if not inside:
            found.skipped.append((str(folder), "class folder without images"))
        label = _id(folder.name)
        for path in inside:
            found.items.append(Item(_id(path.relative_to(found.root).as_posix()), path, label, split=split))


def _nested_error(root: Path, folder: Path, holder: Path, *, only: bool) -> None:
    remedy = (
        f"if the classes are the folders inside it, give --data {folder}"
        if only
        else "move the images up into the class folders, or give a CSV file with columns path,label[,group]"
    )
    raise DataError(f"{folder}: class folders are nested ({holder} holds images), so the class is not clear; {remedy}")


def _skip_all(folder: Path, found: _Found) -> None:
    """To ``skipped`` with every file below, none of which is an image that is read. Links below are not followed."""
    for inner in _listing(folder, found)[0]:
        if inner.is_symlink():
            found.skipped.append((str(inner), "link to a folder inside a class folder"))
        else:
            _skip_all(inner, found)


def _check_split_classes(root: Path, items: Iterable[Item]) -> None:
    classes: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    for item in items:
        classes[item.split or "train"].add(item.label)
    for split in ("val", "test"):
        unknown = sorted(classes[split] - classes["train"])
        if unknown:
            raise DataError(
                f"{root}: class {unknown[0]!r} is in {split} and not in train ({', '.join(sorted(classes['train']))}); "
                "add training images for it, or rename the folder as in train"
            )


def _listing(folder: Path, found: _Found) -> tuple[list[Path], list[Path]]:
    """(folders, images) right inside, sorted by name; what is neither goes to ``skipped``."""
    folders, images = [], []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error
    for entry in entries:
        path = Path(entry.path)
        kind = _kind(entry, found.root)
        if kind == "folder":
            folders.append(path)
        elif kind == "image":
            images.append(path)
        elif kind:
            found.skipped.append((os.fsencode(entry.path).decode(errors="replace"), kind))
    return folders, images


def _kind(entry: os.DirEntry[str], root: Path) -> str:
    """'folder', 'image', '' for the leftovers of other programs, or the reason why the entry is skipped."""
    if _is_junk(entry.name):
        return ""
    try:
        entry.name.encode()
    except UnicodeEncodeError:
        return NOT_UTF8
    try:
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            loop = entry.is_symlink() and Path(os.path.realpath(root)).is_relative_to(real)
            return "symbolic link to a folder above it" if loop else "folder"
        if not entry.is_file():
            return BROKEN_LINK if entry.is_symlink() else "not a regular file"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    suffix = Path(entry.name).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return f"{UNSUPPORTED} ({suffix})" if suffix in UNREADABLE_SUFFIXES else "not an image file"


def files_below(folder: Path) -> list[Path]:
    """All files, however deep and through symbolic links, without those of hidden folders and the leftovers of other
    programs; each folder once, so that loops end. Sorted."""
    found, seen = [], set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_junk(name))
        found += [Path(parent, name) for name in names if not _is_junk(name)]
    return sorted(path for path in found if path.is_file())


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK_NAMES


def _holds_images(folder: Path) -> bool:
    """Whether an image lies anywhere below; symbolic links below are not followed, so loops end."""
    for _, _, names in os.walk(folder):
        if any(not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
            return True
    return False


# ---- shards ----


def _shards(paths: Sequence[Path]) -> Source:
    """id = SHARD/KEY with the image's suffix; the shards' own folder is the root."""
    samples, skipped = read_shards(paths)
    items = [
        Item(
            _id(f"{sample.shard}/{sample.key}{Path(sample.path).suffix}"), Path(sample.path), sample.label, sample.group
        )
        for sample in samples
    ]
    root = paths[0].absolute().parent
    return Source(root.name, root, tuple(items), tuple(skipped))


# ---- CSV ----


def _csv(path: Path, labels: LabelColumns) -> Source:
    folder = os.path.abspath(path.parent)  # noqa: PTH100 (strings here: a Path costs five times more on long lists)
    lines: dict[str, int] = {}
    rows: list[tuple[str, str, str, str]] = []
    kept: list[tuple[int, dict[str, str]]] = []
    for line, row in _csv_rows(path, labels):
        where = f"{path}: line {line}"
        file = os.path.normpath(os.path.join(folder, row["path"].strip()))  # noqa: PTH118
        label = "" if labels else _id(row["label"].strip())
        split = row.get("split", "").strip().lower()
        _check_csv_row(where, row["path"], file, label if not labels else None, split)
        key = _id(file)
        if key in lines:
            raise DataError(f"{where}: {row['path']!r} stands on line {lines[key]} already; keep one of the two rows")
        lines[key] = line
        rows.append((file, label, row.get("group", "").strip(), SPLIT_NAMES.get(split, "")))
        if labels:
            kept.append((line, row))
    if not rows:
        raise DataError(f"{path}: no rows below the header; expected one row per image")
    root = _common_root(folder, [row[0] for row in rows])
    prefix = len(root.rstrip(os.sep)) + 1
    items = [
        Item(_id(file[prefix:].replace(os.sep, "/")), Path(file), label, group, split)
        for file, label, group, split in rows
    ]
    task = None
    if labels:
        task, items = _with_labels(path, items, kept, labels)
    elif any(item.split == "train" for item in items):
        _check_split_classes(path, items)
    return Source(path.stem, Path(root), tuple(items), (), task)


def _with_labels(
    path: Path, items: Sequence[Item], rows: Sequence[tuple[int, dict[str, str]]], labels: LabelColumns
) -> tuple[Task, list[Item]]:
    """The items with their values and joint label."""
    task, values = read_labels(path, rows, labels)
    if any(item.split == "train" for item in items):
        _check_split_values(path, task, values, np.asarray([item.split for item in items]))
    labelled = (
        dataclasses.replace(item, label=task.joint_label(row), values=tuple(row.tolist()))
        for item, row in zip(items, values, strict=True)
    )
    return task, list(labelled)


def _check_split_values(path: Path, task: Task, values: Values, splits: npt.NDArray[np.str_]) -> None:
    """Every class of val and test is learned: it is in train too."""
    marks = task.marks(values)
    learned = marks[(splits == "train") | (splits == "")].any(axis=0)
    for split in ("val", "test"):
        unknown = np.flatnonzero(marks[splits == split].any(axis=0) & ~learned)
        if len(unknown):
            raise DataError(
                f"{path}: {task.mark_names[unknown[0]]} is in {split} and not in train; add training images for it"
            )


def _csv_rows(path: Path, labels: LabelColumns) -> Iterator[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = [name.strip().lower() for name in next(reader, [])]
            if labels:
                unread = check_header(path, header, labels)
                if unread:
                    console.note(f"{path}: columns that are not read: {', '.join(unread)}")
            else:
                _check_header(path, header)
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise DataError(
                        f"{path}: line {reader.line_num}: {len(row)} columns, the header has {len(header)}; "
                        "put a value that holds a comma in double quotes"
                    )
                yield reader.line_num, dict(zip(header, row, strict=True))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text ({error}); save it as 'CSV UTF-8'") from error
    except csv.Error as error:
        raise DataError(f"{path}: not a CSV file ({error}); expected columns path,label[,group][,split]") from error


def _check_header(path: Path, header: Sequence[str]) -> None:
    unknown = [name for name in header if name not in CSV_COLUMNS]
    missing = [name for name in ("path", "label") if name not in header]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if unknown or missing or repeated:
        problems = (("missing", missing), ("unknown", unknown), ("repeated", repeated))
        parts = [f"{word} {', '.join(map(repr, names))}" for word, names in problems if names]
        hint = next((f" (separated by {mark!r}?)" for mark in ";\t|" if any(mark in name for name in header)), "")
        raise DataError(
            f"{path}: line 1: columns {'; '.join(parts)}{hint}; expected path,label and, if there are any, group and split, "
            "separated by commas; rename or remove the others"
        )


def _check_csv_row(where: str, given: str, file: str, label: str | None, split: str) -> None:
    """``label`` None: labels are in other columns, which are checked as a whole."""
    if not given.strip():
        raise DataError(f"{where}: the path is empty; write the image's path or delete the row")
    if label == "":
        raise DataError(f"{where}: the label of {given!r} is empty; write it or delete the row")
    if split and split not in SPLIT_NAMES:
        raise DataError(f"{where}: split {split!r}, expected train, val, test or nothing")
    if not os.path.isfile(file):  # noqa: PTH113 (a Path costs 5x on long lists)
        hint = "; write folders with '/'" if "\\" in given else "; paths are relative to the CSV file's folder"
        raise DataError(f"{where}: {given!r}: no such file ({file}){hint}")


def _common_root(folder: str, files: Sequence[str]) -> str:
    """The CSV file's folder, or what all files have in common when some lie outside it: ids are relative to it."""
    inside = folder.rstrip(os.sep) + os.sep
    if all(file.startswith(inside) for file in files):
        return folder
    return os.path.commonpath([os.path.dirname(file) for file in files])  # noqa: PTH120


# ---- built-in data sets ----

ELPV_CLASSES = {0.0: "functional", 1 / 3: "probably-functional", 2 / 3: "probably-defective", 1.0: "defective"}


def _elpv(name: str) -> Source:
    """2,624 electroluminescence images of solar cells; class by defect probability, stratum = mono or poly."""
    spec = importlib.util.find_spec("elpv_dataset")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"--data {name}: the package elpv-dataset is not installed; run: pip install elpv-dataset")
    root = Path(next(iter(spec.submodule_search_locations))) / "data"
    return read_elpv(root, four_classes=name == "elpv-4class")


def read_elpv(root: Path, *, four_classes: bool = False) -> Source:
    """ELPV's own folder: labels.csv with 'images/cell0001.png  1.0  mono' on each line. Two classes: defective if the
    probability is above 0.5. Raises DataError that names the line."""
    table = root / "labels.csv"
    try:
        lines = table.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{table}: cannot be read ({error}); install it again: pip install elpv-dataset") from error
    items = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words:
            continue
        try:
            file, probability, cell = words[0], float(words[1]), words[2]
            label = next(label for value, label in ELPV_CLASSES.items() if abs(value - probability) < 0.01)
        except (ValueError, IndexError, StopIteration):
            raise DataError(
                f"{table}: line {number}: {line!r}, expected 'images/NAME.png PROBABILITY TYPE', probability 0, 1/3, 2/3 or 1"
            ) from None
        if not four_classes:
            label = "defective" if probability > 0.5 else "functional"
        items.append(Item(_id(file), root / file, label, stratum=cell))
    return Source("elpv-4class" if four_classes else "elpv", root, tuple(items))


def _fashion_mnist(data: str, cache: Path | None) -> Source:
    folder = Path(data.partition(":")[2] or fashion_mnist.DEFAULT_FOLDER).expanduser()
    root, rows = fashion_mnist.unpack(folder, cache)
    items = [Item(id, root / id, label, split=id.partition("/")[0]) for id, label in rows]
    return Source("fashion-mnist", root, tuple(items))
