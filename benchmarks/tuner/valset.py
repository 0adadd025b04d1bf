"""The validation images that everything is judged on: never test, never what a student was trained on, every file checked."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill import console, shard_members
from edgedistill.artifacts import atomic_path
from edgedistill.benchmarks.tuner.space import Student
from edgedistill.benchmarks.tuner.students import PREPARE_HINT, run_of, trained_on_val
from edgedistill.benchmarks.tuner.truth import Truth
from edgedistill.data.label_columns import DEFAULT_WEIGHT, LabelColumns
from edgedistill.data.manifest import Dataset, hash_files, read_dataset
from edgedistill.data.sources import Source, open_source
from edgedistill.data.task_columns import cells, column_names
from edgedistill.errors import ArtifactError, DataError
from edgedistill.tasks import SINGLE, Head, Task, Values

VAL_CSV = "val.csv"
# Where images have more than one label, ``label`` is their joint one and dataset.csv's own columns follow.
COLUMNS = ("id", "path", "label", "sha256")
FEWEST = 20


@dataclass(frozen=True, eq=False)
class ValSet:
    """N images. ``truth``: what is true of them, for the students' task. ``source``: where they come from, in words."""

    ids: tuple[str, ...]
    paths: tuple[Path, ...]
    truth: Truth
    source: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def labels(self) -> npt.NDArray[np.int32]:
        """int32 [N], index into the students' classes, where every image has one label; else of the first head."""
        return self.truth.codes[:, 0].astype(np.int32)

    @property
    def columns(self) -> tuple[str, ...]:
        """Of val.csv."""
        return (*COLUMNS, *(() if self.truth.task.is_single else column_names(self.truth.task)))

    @property
    def cells(self) -> list[tuple[str, ...]]:
        """What the label columns say of each image, as ``dataset.csv`` has it."""
        return list(zip(*cells(self.truth.task, self.truth.values), strict=True))

    @property
    def hash(self) -> str:
        """sha256 over (id, label) in order: two sets of the same hash are judged alike."""
        if self.truth.task.is_single:
            texts = [str(label) for label in self.labels.tolist()]
        else:
            texts = ["\0".join(row) for row in self.cells]
        lines = (f"{id}\0{text}\n" for id, text in zip(self.ids, texts, strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def drawn(self, count: int, *, seed: int) -> ValSet:
        """At most ``count`` of them, the same ones for a seed."""
        if len(self) <= count:
            return self
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[:count])
        ids, paths = (tuple(column[row] for row in rows.tolist()) for column in (self.ids, self.paths))
        return ValSet(ids, paths, self.truth.take(rows), f"{count} of {self.source}")

    @property
    def in_shards(self) -> bool:
        return any(shard_members.member_of(path) for path in self.paths)

    def unpacked(self, folder: Path) -> ValSet:
        """Members of shards as files in ``folder``: what is measured reads files."""
        paths = tuple(shard_members.as_file(path, folder, number) for number, path in enumerate(self.paths))
        return dataclasses.replace(self, paths=paths)


@dataclass(frozen=True)
class _Row:
    """One image as a list names it. ``cells``: its label columns, as ``task_columns.cells`` writes them; ``sha256``: ''
    where the list does not say."""

    id: str
    path: Path
    cells: tuple[str, ...]
    sha256: str = ""


def open_val(students: Sequence[Student], data: str | None) -> ValSet:
    """The val images of the first student's bundle or run, or those of ``data``.

    val.csv of the bundle comes first (its images under ``data``, else in val/ beside it), then the run's dataset.csv
    (its images under ``data``, else where they were), then ``data`` alone: images that dataset.csv does not know.
    Raises DataError when val was trained on, when labels are not the students', when images are missing or changed;
    each names the file and the remedy.
    """
    for student in students:
        if (said := trained_on_val(student)) is not None:
            raise DataError(
                f"{said}: {student.name} was trained on val (--final-data train+val), so val says nothing about it; tune "
                "a run that was trained with --final-data train"
            )
    rows, source, checked = _listed(students, data)
    task = students[0].task
    values = _values([row.cells for row in rows], task, source)
    known = _known(values, task)
    if not known.all():
        console.warn(f"{source}: {int((~known).sum())} val images have no known label and are left out")
    rows, values = [row for row, there in zip(rows, known.tolist(), strict=True) if there], values[known]
    if len(rows) < FEWEST:
        raise DataError(f"{source}: {len(rows)} val images, expected {FEWEST} or more; {PREPARE_HINT}")
    _check_files(rows, source, data)
    if not checked:
        console.warn(
            f"{source}: no list says which of these images were kept out of training; what was trained on makes every "
            f"figure too good. {PREPARE_HINT}"
        )
    return ValSet(tuple(row.id for row in rows), tuple(row.path for row in rows), Truth(task, values), source)


def _values(rows: Sequence[tuple[str, ...]], task: Task, source: str) -> Values:
    """float32 [N, V] of the label columns of N images; NaN where a cell is empty. Raises DataError for what the task does
    not know."""
    columns = [[row[number] for row in rows] for number in range(task.column_count)]
    found = np.full((len(rows), task.column_count), np.nan, np.float32)
    for head, part in task.columns():
        for number in range(part.start, part.stop):
            found[:, number] = _column(head, columns[number], source)
    return found


def _column(head: Head, column: Sequence[str], source: str) -> list[float]:
    if head.kind == "softmax":
        number_of = {name: float(number) for number, name in enumerate(head.classes)}
        unknown = sorted(set(column) - set(number_of) - {""})
        if unknown:
            of = "" if head.name == SINGLE else f" of {head.name!r}"
            raise DataError(
                f"{source}: labels{of} {unknown[:5]} that the model does not have; it has {list(number_of)[:20]}; give the "
                "data set that it was trained on"
            )
        return [number_of.get(cell, math.nan) for cell in column]
    try:
        values = [float(cell) if cell else math.nan for cell in column]
    except ValueError as error:
        raise DataError(f"{source}: column of {head.name!r}: {error}; expected numbers") from error
    if head.kind == "sigmoid" and any(value < 0 or value > 1 for value in values):
        raise DataError(f"{source}: column of {head.name!r}: a value outside 0 to 1; a label applies with 1, else 0")
    return values


def _known(values: Values, task: Task) -> npt.NDArray[np.bool_]:
    """bool [N]: without a label of a class no answer is right or wrong; a number beside it does not make it so."""
    of_classes = sum(head.column_count for head in task.class_heads)
    return np.any(~np.isnan(values[:, :of_classes]), axis=1)


def _listed(students: Sequence[Student], data: str | None) -> tuple[list[_Row], str, bool]:
    """(rows, where from, whether a list of ours says that they are val)."""
    listed = students[0].root / VAL_CSV
    if listed.is_file():
        return _from_val_csv(listed, data, students[0].task), str(listed), True
    if data is not None and _is_val_csv(Path(data)):
        return _from_val_csv(Path(data), None, students[0].task), data, True
    run = run_of(students[0])
    manifest = run / "dataset.csv" if run else None
    if manifest is not None and manifest.is_file():
        rows = _from_manifest(manifest, students, data)
        if rows is not None:
            return rows, f"the val split of {manifest}", True
    if data is None:
        raise DataError(
            f"{students[0].root}: no validation images: no {VAL_CSV} in it and no dataset.csv beside it; give --data, or "
            f"bring them: {PREPARE_HINT}"
        )
    return _from_source(_opened(data, students[0].task), students[0].task), data, False


def _is_val_csv(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return tuple(next(csv.reader(file), ()))[: len(COLUMNS)] == COLUMNS
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def _from_val_csv(listed: Path, data: str | None, task: Task) -> list[_Row]:
    """Paths are relative to ``data``, else to val/ beside the list, else to the list's own folder."""
    beside = listed.parent / "val"
    root = Path(data) if data is not None else beside if beside.is_dir() else listed.parent
    rows = []
    try:
        with listed.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            places = _places(header, task, listed)
            for row in reader:
                if len(row) != len(header) or not all(row[:3]):
                    raise ArtifactError(f"{listed}: line {reader.line_num}: expected {','.join(header)}")
                cells = tuple("" if place is None else row[place] for place in places)
                rows.append(_Row(row[0], root / row[1], cells, row[3]))
    except OSError as error:
        raise ArtifactError(f"{listed}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{listed}: not a UTF-8 CSV file ({error}); {PREPARE_HINT}") from error
    return rows


def _places(header: Sequence[str], task: Task, listed: Path) -> list[int | None]:
    """Where the task's columns stand in val.csv; None: of values that no answer is judged by, and that are not there."""
    if task.is_single:
        if tuple(header) != COLUMNS:
            raise ArtifactError(f"{listed}: line 1: expected the columns {','.join(COLUMNS)}; {PREPARE_HINT}")
        return [COLUMNS.index("label")]
    place_of = {name: place for place, name in enumerate(header)}
    judged = sum(head.column_count for head in task.class_heads)
    wanted = column_names(task)
    missing = [name for name in wanted[:judged] if name not in place_of]
    if tuple(header[: len(COLUMNS)]) != COLUMNS or missing:
        raise ArtifactError(
            f"{listed}: line 1: expected the columns {','.join((*COLUMNS, *wanted))}, got {','.join(header)}; {PREPARE_HINT}"
        )
    return [place_of.get(name) for name in wanted]


def _from_manifest(manifest: Path, students: Sequence[Student], data: str | None) -> list[_Row] | None:
    """The val split; None when ``data`` is another data set. Raises DataError or UsageError where it cannot be opened."""
    dataset = read_dataset(manifest)
    for student in students:
        if student.dataset_hash and student.dataset_hash != dataset.hash:
            raise DataError(
                f"{student.root / student.model}: trained on data set {student.dataset_hash[:12]}, but {manifest} is "
                f"{dataset.hash[:12]}; tune students of one data set together"
            )
        _check_same_split(student, manifest, set(dataset.ids[dataset.rows("val")].tolist()))
    _check_same_task(dataset, students[0].task, manifest)
    rows = [
        _Row(str(dataset.ids[row]), Path(str(dataset.paths[row])), label, dataset.sha256[row].decode())
        for row, label in zip(dataset.rows("val").tolist(), _labels_of(dataset, "val"), strict=True)
    ]
    if data is None:
        return rows
    given = _images_of(data, rows, dataset, manifest)
    return [dataclasses.replace(row, path=given.get(row.id, row.path)) for row in rows] if given else None


def _check_same_task(dataset: Dataset, task: Task, manifest: Path) -> None:
    """One label per image is compared by its texts, image for image."""
    theirs = None if dataset.task is None else [(head.kind, head.classes) for head in dataset.task.heads]
    if theirs != (None if task.is_single else [(head.kind, head.classes) for head in task.heads]):
        raise DataError(
            f"{manifest}: its label columns are {', '.join(dataset.outputs[:8])}, but the model answers "
            f"{', '.join(task.outputs[:8])}; give the data set that it was trained on"
        )


def _labels_of(dataset: Dataset, split: str) -> list[tuple[str, ...]]:
    """The label columns of each image of the split."""
    rows = dataset.rows(split)
    if dataset.task is None or dataset.values is None:
        return [(dataset.class_names[label],) for label in dataset.labels[rows].tolist()]
    return list(zip(*cells(dataset.task, dataset.values[rows]), strict=True))


def truth_of(dataset: Dataset, split: str, task: Task) -> tuple[npt.NDArray[np.int64], Truth]:
    """(rows of the split that have a known label, what is true of them). Raises DataError for another task's labels."""
    source = f"the {split} split"
    _check_same_task(dataset, task, Path("dataset.csv"))
    rows = dataset.rows(split)
    values = _values(_labels_of(dataset, split), task, source)
    known = _known(values, task)
    return rows[known], Truth(task, values[known])


def _images_of(data: str, rows: Sequence[_Row], dataset: Dataset, manifest: Path) -> dict[str, Path]:
    """Where ``data`` has the images of the rows, by id: found by their ids, else by their content; empty where it holds
    none of them. Raises DataError when it holds none and images of another split."""
    root = Path(data)
    found = {row.id: root / row.id for row in rows if (root / row.id).is_file()} if root.is_dir() else {}
    if found:
        return found
    items = _opened(data, dataset.task).items
    ids = {row.id for row in rows}
    found = {item.id: item.path for item in items if item.id in ids}
    if found:
        return found
    paths = [item.path for item in items]
    of_content = dict(zip(hash_files(paths).tolist(), paths, strict=True))
    other = sum(digest in of_content for digest in dataset.sha256[dataset.splits != "val"].tolist())
    found = {row.id: of_content[row.sha256.encode()] for row in rows if row.sha256.encode() in of_content}
    if other and not found:
        raise DataError(
            f"{data}: {other} of its images are in the train or test split of {manifest} and none in val; give images that "
            "the run does not know, or leave --data away"
        )
    return found


def _check_same_split(student: Student, manifest: Path, val_ids: set[str]) -> None:
    """A student of another run may have been trained on this run's val images."""
    run = run_of(student)
    other = run / "dataset.csv" if run else None
    if other is None or not other.is_file():
        console.warn(
            f"{student.root}: no dataset.csv says which images {student.name} was trained on; if the val images of {manifest} "
            "were among them, its accuracy is too good"
        )
        return
    if other.samefile(manifest):
        return
    theirs = read_dataset(other)
    trained = set(theirs.ids[theirs.rows("train")].tolist())
    seen = len(val_ids & trained)
    if seen:
        raise DataError(
            f"{other}: {student.name} was trained on {seen} of the {len(val_ids)} val images of {manifest}; tune students "
            "of one split together (distill them with the same --seed, --test-fraction and --val-fraction)"
        )


def _opened(data: str, task: Task | None) -> Source:
    """``--data``; a CSV file with the label columns that the task's heads are named after."""
    if task is None or task.is_single or not data.lower().endswith(".csv"):
        return open_source(data)
    return open_source(data, labels=_label_columns(task, _header(Path(data))))


def _label_columns(task: Task, header: Sequence[str]) -> LabelColumns:
    """Several labels per image stand in the column label, or else in columns of their own. What a row does not know is
    not judged, and values need not be there: no answer is judged by them."""
    values = [head for head in task.heads if head.kind == "regression" and head.name in header]
    names = tuple(head.name for head in task.heads if head.kind == "softmax")
    many = next((head for head in task.heads if head.kind == "sigmoid"), None)
    attributes = () if names == (SINGLE,) else names
    if not (attributes or many or values):
        return LabelColumns()
    return LabelColumns(
        attributes=attributes,
        multi_label=many is not None and SINGLE in header,
        one_hot=many.classes if many is not None and SINGLE not in header else (),
        regression=tuple(head.name for head in values),
        regression_weight=values[0].weight if values else DEFAULT_WEIGHT,
        missing="ignore",
    )


def _header(path: Path) -> list[str]:
    """Of a CSV file; what cannot be read is refused where it is read whole."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return [name.strip().lower() for name in next(csv.reader(file), [])]
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def _from_source(source: Source, task: Task) -> list[_Row]:
    """The source's own val split where it has splits, else everything in it."""
    splits = {item.split for item in source.items if item.split}
    if splits and "val" not in splits:
        raise DataError(
            f"{source.root}: has {' and '.join(sorted(splits))} images but no val; the tuner never looks at test, and "
            "train images say nothing; give val images"
        )
    return [
        _Row(item.id, item.path, label)
        for item, label in zip(source.items, _labels_in(source, task), strict=True)
        if not splits or item.split == "val"
    ]


def _labels_in(source: Source, task: Task) -> list[tuple[str, ...]]:
    """The label columns of each item, in the order of the task's. A label that the source never has applies to none of
    the images whose labels are known. Raises DataError for other labels than the task's."""
    wanted = column_names(task)
    if source.task is None:
        column_of = {f"softmax:{SINGLE}": [item.label for item in source.items]}
    else:
        column_of = dict(zip(column_names(source.task), cells(source.task, source.values), strict=True))
    unknown = [name for name in column_of if name not in wanted]
    if unknown:
        raise DataError(
            f"{source.root}: label columns {', '.join(unknown[:5])} that the model does not have; it answers "
            f"{', '.join(wanted[:20])}; give images with the labels that it was trained on"
        )
    first = next(iter(column_of.values()))
    absent = {False: [""] * len(first), True: ["" if cell == "" else "0" for cell in first]}
    return list(zip(*(column_of.get(name, absent[name.startswith("sigmoid:")]) for name in wanted), strict=True))


def _check_files(rows: Sequence[_Row], source: str, data: str | None) -> None:
    missing = [row for row in rows if not shard_members.exists(row.path)]
    if missing:
        where = f"under --data {data}" if data is not None else "on this machine"
        raise DataError(
            f"{source}: {len(missing)} of {len(rows)} val images are not {where}, first {missing[0].path}; copy them "
            "(val-images.txt of 'tune --prepare' lists them) and give their folder with --data"
        )
    named = [row for row in rows if row.sha256]
    digests = hash_files([row.path for row in named])
    changed = [row for row, digest in zip(named, digests.tolist(), strict=True) if digest.decode() != row.sha256]
    if changed:
        raise DataError(
            f"{source}: {len(changed)} of {len(rows)} val images are not what they were (sha256), first "
            f"{changed[0].path}; copy them again"
        )


def write_val(folder: Path, rows: Sequence[Sequence[str]], *, columns: Sequence[str] = COLUMNS) -> None:
    """val.csv and val-images.txt (for ``rsync --files-from``) of ``--prepare``; rows are (id, path, label, sha256, and
    the cells of a task's ``columns``)."""
    with atomic_path(folder / VAL_CSV) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    with atomic_path(folder / "val-images.txt") as temporary:
        temporary.write_text("".join(f"{row[1]}\n" for row in rows), encoding="utf-8")
