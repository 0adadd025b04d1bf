"""dataset.csv: the frozen manifest that every stage reads. Needs numpy only.

Columns: id, path, sha256, label, group, split, fold. ``id`` is the NFC-normalised relative POSIX path; ``split`` is
train, val or test; ``fold`` is 0..K-1 on train and -1 elsewhere; -2 on train marks images of a class too small to be dealt:
every teacher trains on them and none is asked about them, so that their hard labels stand in for soft ones. Where images carry several labels, ``label`` is their
joint label and further columns hold each of them (see task_columns).
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.artifacts import atomic_path, sha256_file
from edgedistill.data import stratify, task_columns
from edgedistill.errors import ArtifactError, DataError
from edgedistill.shard_members import exists, member_of, read_file
from edgedistill.tasks import Task, Values

SPLITS = ("train", "val", "test")
COLUMNS = ("id", "path", "sha256", "label", "group", "split", "fold")
CHUNK_ROWS = 2_048  # more rows at once and Python's garbage collector doubles the time
HEXADECIMAL = re.compile("[0-9a-f]*")
MAX_FOLDS = 1000
ALWAYS_TRAINED = -2  # the fold of train images that no fold holds out
# Of a joint label, or balanced sampling would draw a handful of images all the time.
MIN_JOINT_IMAGES = 8
REMEDY = "make it again with a new run folder, or restore it from a copy"


@dataclass(frozen=True, eq=False)
class Dataset:
    """N images of C classes; all arrays are [N] and in the manifest's order.

    ``labels``: int32, index into ``class_names`` (sorted by code point). ``groups``: str, '' where the image stands
    alone. ``splits``: one of SPLITS. ``folds``: int16, -1 outside train, ALWAYS_TRAINED for train images that no fold
    holds out. ``sha256``: 64 hexadecimal digits as bytes
    (str costs four times the memory: 256 MB for a million images); str is converted. ``task`` and ``values``, float32
    [N, V] as ``tasks`` has them: where images carry several labels; ``labels`` are then their joint labels. Mean and
    standard deviation of a task's regression heads are taken from the train rows.
    Raises ArtifactError when the arrays are not of one length.
    """

    ids: npt.NDArray[np.str_]
    paths: npt.NDArray[np.str_]
    sha256: npt.NDArray[np.bytes_]
    labels: npt.NDArray[np.int32]
    groups: npt.NDArray[np.str_]
    splits: npt.NDArray[np.str_]
    folds: npt.NDArray[np.int16]
    class_names: tuple[str, ...]
    task: Task | None = None
    values: Values | None = None

    def __post_init__(self) -> None:
        kinds: dict[str, Any] = {"sha256": "S64", "labels": np.int32, "folds": np.int16}
        for name in ("ids", "paths", "sha256", "labels", "groups", "splits", "folds"):
            column = np.asarray(getattr(self, name), dtype=kinds.get(name, np.str_))
            if column.shape != (len(self.ids),):
                raise ArtifactError(
                    f"data set: {name} has shape {column.shape}, expected ({len(self.ids)},) as ids has"
                )
            object.__setattr__(self, name, column)
        if len(self) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.class_names):
            raise ArtifactError(f"data set: labels outside 0..{len(self.class_names) - 1}, the class names' indices")
        if self.task is not None:
            values = np.zeros((0, 0), np.float32) if self.values is None else np.asarray(self.values, np.float32)
            if values.shape != (len(self), self.task.column_count):
                raise ArtifactError(
                    f"data set: values have shape {values.shape}, expected {(len(self), self.task.column_count)}"
                )
            object.__setattr__(self, "values", values)
            object.__setattr__(self, "task", task_columns.standardised(self.task, values, self.splits == "train"))

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Row numbers of one split, ascending."""
        return np.flatnonzero(self.splits == split)

    @property
    def held_out_rows(self) -> npt.NDArray[np.int64]:
        """Row numbers of the train images that a fold holds out, ascending: those that get soft labels."""
        return np.flatnonzero((self.splits == "train") & (self.folds >= 0))

    @property
    def fold_count(self) -> int:
        return int(self.folds.max(initial=-1)) + 1

    @property
    def outputs(self) -> tuple[str, ...]:
        """A name for each output of a network that learns it: the class names where every image has one label."""
        return self.class_names if self.task is None else self.task.outputs

    @cached_property
    def sampling_labels(self) -> npt.NDArray[np.int32]:
        """int32 [N]: what balanced sampling draws equally often."""
        if self.task is None or self.values is None:
            return self.labels
        joint = self.labels.astype(np.int64)
        return stratify.sampling_codes(self.task, self.values, joint, least=MIN_JOINT_IMAGES)

    @cached_property
    def hash(self) -> str:
        """sha256 over the sorted (id, sha256, label) triples: what soft labels and models are tied to. With a task, each
        label column counts too."""
        digest = hashlib.sha256()
        order = np.argsort(self.ids, kind="stable")
        for start in range(0, len(order), CHUNK_ROWS):
            part = order[start : start + CHUNK_ROWS]
            columns = zip(self.ids[part].tolist(), self.sha256[part].tolist(), self.labels[part].tolist(), strict=True)
            lines = (f"{id}\0{sha.decode()}\0{self.class_names[label]}\n" for id, sha, label in columns)
            digest.update("".join(lines).encode())
        if self.task is not None and self.values is not None:
            digest.update("\0".join(task_columns.column_names(self.task)).encode())
            for column in task_columns.cells(self.task, self.values[order]):
                digest.update("\0".join(column).encode())
        return digest.hexdigest()


def hash_files(paths: Sequence[Path] | Sequence[str] | npt.NDArray[np.str_]) -> npt.NDArray[np.bytes_]:
    """sha256 of every file, read by a thread pool: bytes [N] of 64 hexadecimal digits.

    Raises DataError that names the first file that cannot be read.
    """
    block = 64
    blocks = [paths[start : start + block] for start in range(0, len(paths), block)]
    digests = np.zeros(len(paths), "S64")
    workers = min(16, 2 * (os.cpu_count() or 1))
    with ThreadPoolExecutor(workers) as pool, console.progress("hashing images", len(paths)) as bar:
        for number, result in enumerate(pool.map(_hash_block, blocks)):
            digests[number * block : number * block + len(result)] = result
            bar.update(bar.task_ids[0], advance=len(result))
    return digests


def _hash_block(paths: Sequence[Path]) -> list[str]:
    try:
        return [_sha256(path) for path in paths]
    except OSError as error:
        raise DataError(
            f"{error.filename}: cannot be read ({error.strerror}); 'edgedistill check-data' lists every such file"
        ) from error


def _sha256(path: Path | str) -> str:
    return sha256_file(Path(path)) if member_of(path) is None else hashlib.sha256(read_file(path)).hexdigest()


def write_dataset(dataset: Dataset, path: Path) -> None:
    """dataset.csv, whole or not at all. Raises ArtifactError when it cannot be written."""
    names = np.asarray(dataset.class_names, dtype=object)
    more = [] if dataset.task is None else task_columns.column_names(dataset.task)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*COLUMNS, *more])
        for start in range(0, len(dataset), CHUNK_ROWS):
            part = slice(start, start + CHUNK_ROWS)
            values = None if dataset.values is None else dataset.values[part]
            columns = (
                dataset.ids[part].tolist(),
                dataset.paths[part].tolist(),
                [digest.decode() for digest in dataset.sha256[part].tolist()],
                names[dataset.labels[part]].tolist(),
                dataset.groups[part].tolist(),
                dataset.splits[part].tolist(),
                dataset.folds[part].tolist(),
                *([] if dataset.task is None or values is None else task_columns.cells(dataset.task, values)),
            )
            writer.writerows(zip(*columns, strict=True))


def read_dataset(path: Path, data_root: Path | None = None) -> Dataset:
    """The manifest with its checks. With ``data_root``, a row whose path is not there is looked for at data_root/id.

    Raises ArtifactError that names the line: wrong header or number of columns, empty id or label, unknown split, fold
    that does not fit the split, sha256 that is none, id that stands twice, fold without images.
    """
    path = Path(path)
    columns, more = _read_columns(path)
    task, values = task_columns.read_task(list(more), list(more.values()), path) if more else (None, None)
    class_names, labels = _label_codes(columns.pop("label"))
    dataset = Dataset(
        ids=_joined(columns, "id"),
        paths=_joined(columns, "path"),
        sha256=_joined(columns, "sha256"),
        labels=labels,
        groups=_joined(columns, "group"),
        splits=_joined(columns, "split"),
        folds=_joined(columns, "fold"),
        class_names=class_names,
        task=task,
        values=values,
    )
    _check_ids_and_folds(dataset, path)
    return dataset if data_root is None else _relocated(dataset, Path(data_root))


def _read_columns(path: Path) -> tuple[dict[str, list[npt.NDArray[Any]]], dict[str, list[str]]]:
    """(COLUMNS as lists of chunks: a million Python rows at once would be gigabytes; the label columns of a task)."""
    more: dict[str, list[str]] = {}
    columns: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in COLUMNS}
    names: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            width = len(COLUMNS)
            if tuple(header[:width]) != COLUMNS or len(set(header)) != len(header):
                raise ArtifactError(f"{path}: line 1: columns {','.join(header)!r}, expected {','.join(COLUMNS)!r}")
            more = {name: [] for name in header[width:]}
            for lines, rows in _chunks(reader):
                if more:
                    _check_widths(rows, lines, path, width=len(header))
                    for number, cells in enumerate(more.values(), start=width):
                        cells.extend(row[number] for row in rows)
                    rows = [row[:width] for row in rows]
                for name, column in zip(COLUMNS, _checked_columns(rows, lines, path), strict=True):
                    if name == "label":
                        column = np.fromiter((names.setdefault(str(x), len(names)) for x in column), np.int32)
                    columns[name].append(column)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{path}: not a UTF-8 CSV file ({error}); {REMEDY}") from error
    if not names:
        raise ArtifactError(f"{path}: no images; {REMEDY}")
    columns["label"].append(np.asarray(list(names)))  # last: the names by code
    return columns, more


def _chunks(reader: Any) -> Iterator[tuple[list[int], list[list[str]]]]:
    numbered = ((reader.line_num, row) for row in reader)
    while chunk := list(itertools.islice(numbered, CHUNK_ROWS)):
        yield [line for line, _ in chunk], [row for _, row in chunk]


def _checked_columns(rows: list[list[str]], lines: list[int], path: Path) -> list[Any]:
    """Seven columns of one chunk in the types of Dataset; labels stay a list of str.

    Whole columns are checked at once; the line is looked for only when something is wrong.
    """
    _check_widths(rows, lines, path, width=len(COLUMNS))
    ids, paths, digests, labels, groups, splits, folds = zip(*rows, strict=True)
    for name, column in (("id", ids), ("path", paths), ("label", labels)):
        if not all(column):
            raise ArtifactError(f"{path}: line {lines[column.index('')]}: the {name} is empty; {REMEDY}")
    if HEXADECIMAL.fullmatch("".join(digests)) is None or set(map(len, digests)) != {64}:
        line, digest = next(
            (n, d) for n, d in zip(lines, digests, strict=True) if not HEXADECIMAL.fullmatch(d) or len(d) != 64
        )
        raise ArtifactError(f"{path}: line {line}: sha256 {digest!r}, expected 64 hexadecimal digits; {REMEDY}")
    pairs = list(zip(splits, folds, strict=True))
    for split, fold in set(pairs):
        problem = _fold_problem(split, fold)
        if problem:
            raise ArtifactError(f"{path}: line {lines[pairs.index((split, fold))]}: {problem}; {REMEDY}")
    types = (np.str_, np.str_, "S64", None, np.str_, np.str_, np.int16)
    columns = (ids, paths, digests, labels, groups, splits, folds)
    return [list(c) if t is None else np.asarray(c, t) for c, t in zip(columns, types, strict=True)]


def _check_widths(rows: list[list[str]], lines: list[int], path: Path, *, width: int) -> None:
    if set(map(len, rows)) != {width}:
        line, row = next((line, row) for line, row in zip(lines, rows, strict=True) if len(row) != width)
        raise ArtifactError(f"{path}: line {line}: {len(row)} columns, expected {width}; {REMEDY}")


def _fold_problem(split: str, fold: str) -> str:
    if split not in SPLITS:
        return f"split {split!r}, expected one of {', '.join(SPLITS)}"
    if split != "train":
        return "" if fold == "-1" else f"fold {fold!r} in split {split}, expected -1"
    if fold == str(ALWAYS_TRAINED):
        return ""
    if fold.isascii() and fold.isdecimal() and len(fold) < 5 and int(fold) < MAX_FOLDS:
        return ""
    return f"fold {fold!r} in split train, expected 0 to the number of folds - 1, or {ALWAYS_TRAINED}"


def _label_codes(chunks: list[npt.NDArray[Any]]) -> tuple[tuple[str, ...], npt.NDArray[np.int32]]:
    """Codes in order of appearance to codes in the order of the sorted names."""
    names = chunks.pop()
    order = np.argsort(names, kind="stable")
    rank = np.empty(len(names), np.int32)
    rank[order] = np.arange(len(names), dtype=np.int32)
    return tuple(names[order].tolist()), rank[np.concatenate(chunks)]


def _joined(columns: dict[str, list[npt.NDArray[Any]]], name: str) -> npt.NDArray[Any]:
    return np.concatenate(columns.pop(name))


def _check_ids_and_folds(dataset: Dataset, path: Path) -> None:
    order = np.argsort(dataset.ids, kind="stable")
    ordered = dataset.ids[order]
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(repeated):
        first, second = order[repeated[0]] + 2, order[repeated[0] + 1] + 2
        raise ArtifactError(
            f"{path}: id {str(ordered[repeated[0]])!r} stands twice (rows {first} and {second}, the header is row 1); {REMEDY}"
        )
    sizes = np.bincount(dataset.folds[dataset.folds >= 0], minlength=dataset.fold_count)
    if (sizes == 0).any():
        empty = int(np.argmin(sizes))
        raise ArtifactError(f"{path}: fold {empty} of 0..{len(sizes) - 1} has no images; {REMEDY}")


def _below(data_root: Path, path: str, id: str) -> str:
    """Where the image would lie in ``data_root``: under its id, a member in a shard of the same name."""
    member = member_of(path)
    return str(
        data_root / id if member is None else member._replace(shard=str(data_root / Path(member.shard).name)).path
    )


def _relocated(dataset: Dataset, data_root: Path) -> Dataset:
    moved, missing = [], []
    for path, id in zip(dataset.paths.tolist(), dataset.ids.tolist(), strict=True):
        found = path if exists(path) else _below(data_root, path, id)
        moved.append(found)
        if found != path and not exists(found):
            missing.append(id)
    if missing:
        raise ArtifactError(
            f"{data_root}: {len(missing)} of {len(dataset)} images of the manifest are not there, first {missing[0]!r}; "
            "name the folder that the data set was first read from"
        )
    return dataclasses.replace(dataset, paths=np.asarray(moved))
