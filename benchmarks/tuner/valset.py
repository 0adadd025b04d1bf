"""The validation images that everything is judged on: never test, never what a student was trained on, every file checked."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill import console, shard_members
from edgedistill.artifacts import atomic_path
from edgedistill.benchmarks.tuner.space import Student
from edgedistill.benchmarks.tuner.students import PREPARE_HINT, run_of, trained_on_val
from edgedistill.data.manifest import Dataset, hash_files, read_dataset
from edgedistill.data.sources import Source, open_source
from edgedistill.errors import ArtifactError, DataError

VAL_CSV = "val.csv"
COLUMNS = ("id", "path", "label", "sha256")
FEWEST = 20


@dataclass(frozen=True, eq=False)
class ValSet:
    """N images. ``labels``: int32, index into the students' classes. ``source``: where they come from, in words."""

    ids: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int32]
    source: str

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def hash(self) -> str:
        """sha256 over (id, label) in order: two sets of the same hash are judged alike."""
        lines = (f"{id}\0{label}\n" for id, label in zip(self.ids, self.labels.tolist(), strict=True))
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def drawn(self, count: int, *, seed: int) -> ValSet:
        """At most ``count`` of them, the same ones for a seed."""
        if len(self) <= count:
            return self
        rows = np.sort(np.random.default_rng(seed).permutation(len(self))[:count]).tolist()
        source = f"{count} of {self.source}"
        return ValSet(tuple(self.ids[r] for r in rows), tuple(self.paths[r] for r in rows), self.labels[rows], source)

    @property
    def in_shards(self) -> bool:
        return any(shard_members.member_of(path) for path in self.paths)

    def unpacked(self, folder: Path) -> ValSet:
        """Members of shards as files in ``folder``: what is measured reads files."""
        paths = list(self.paths)
        for number, path in enumerate(paths):
            if shard_members.member_of(path):
                folder.mkdir(parents=True, exist_ok=True)
                paths[number] = folder / f"{number:06d}{path.suffix}"
                paths[number].write_bytes(shard_members.read_file(path))
        return dataclasses.replace(self, paths=tuple(paths))


@dataclass(frozen=True)
class _Row:
    """One image as a list names it. ``sha256``: '' where the list does not say."""

    id: str
    path: Path
    label: str
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
    if len(rows) < FEWEST:
        raise DataError(f"{source}: {len(rows)} val images, expected {FEWEST} or more; {PREPARE_HINT}")
    number_of = {label: number for number, label in enumerate(students[0].labels)}
    unknown = sorted({row.label for row in rows} - set(number_of))
    if unknown:
        raise DataError(
            f"{source}: labels {unknown[:5]} that the model does not have; it has {list(number_of)[:20]}; give the data "
            "set that it was trained on"
        )
    _check_files(rows, source, data)
    if not checked:
        console.warn(
            f"{source}: no list says which of these images were kept out of training; what was trained on makes every "
            f"figure too good. {PREPARE_HINT}"
        )
    labels = np.array([number_of[row.label] for row in rows], np.int32)
    return ValSet(tuple(row.id for row in rows), tuple(row.path for row in rows), labels, source)


def _listed(students: Sequence[Student], data: str | None) -> tuple[list[_Row], str, bool]:
    """(rows, where from, whether a list of ours says that they are val)."""
    listed = students[0].root / VAL_CSV
    if listed.is_file():
        return _from_val_csv(listed, data), str(listed), True
    if data is not None and _is_val_csv(Path(data)):
        return _from_val_csv(Path(data), None), data, True
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
    return _from_source(open_source(data)), data, False


def _is_val_csv(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return tuple(next(csv.reader(file), ())) == COLUMNS
    except (OSError, UnicodeDecodeError, csv.Error):
        return False


def _from_val_csv(listed: Path, data: str | None) -> list[_Row]:
    """Paths are relative to ``data``, else to val/ beside the list, else to the list's own folder."""
    beside = listed.parent / "val"
    root = Path(data) if data is not None else beside if beside.is_dir() else listed.parent
    rows = []
    try:
        with listed.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file, strict=True)
            if tuple(next(reader, ())) != COLUMNS:
                raise ArtifactError(f"{listed}: line 1: expected the columns {','.join(COLUMNS)}; {PREPARE_HINT}")
            for row in reader:
                if len(row) != len(COLUMNS) or not all(row[:3]):
                    raise ArtifactError(f"{listed}: line {reader.line_num}: expected {','.join(COLUMNS)}")
                rows.append(_Row(row[0], root / row[1], row[2], row[3]))
    except OSError as error:
        raise ArtifactError(f"{listed}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ArtifactError(f"{listed}: not a UTF-8 CSV file ({error}); {PREPARE_HINT}") from error
    return rows


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
    rows = []
    for row in dataset.rows("val").tolist():
        id, path = str(dataset.ids[row]), Path(str(dataset.paths[row]))
        rows.append(_Row(id, path, dataset.class_names[int(dataset.labels[row])], dataset.sha256[row].decode()))
    if data is None:
        return rows
    given = _images_of(data, rows, dataset, manifest)
    return [dataclasses.replace(row, path=given.get(row.id, row.path)) for row in rows] if given else None


def _images_of(data: str, rows: Sequence[_Row], dataset: Dataset, manifest: Path) -> dict[str, Path]:
    """Where ``data`` has the images of the rows, by id: found by their ids, else by their content; empty where it holds
    none of them. Raises DataError when it holds none and images of another split."""
    root = Path(data)
    found = {row.id: root / row.id for row in rows if (root / row.id).is_file()} if root.is_dir() else {}
    if found:
        return found
    items = open_source(data).items
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


def _from_source(source: Source) -> list[_Row]:
    """The source's own val split where it has splits, else everything in it."""
    splits = {item.split for item in source.items if item.split}
    if splits and "val" not in splits:
        raise DataError(
            f"{source.root}: has {' and '.join(sorted(splits))} images but no val; the tuner never looks at test, and "
            "train images say nothing; give val images"
        )
    items = [item for item in source.items if not splits or item.split == "val"]
    return [_Row(item.id, item.path, item.label) for item in items]


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


def write_val(folder: Path, rows: Sequence[tuple[str, str, str, str]]) -> None:
    """val.csv and val-images.txt (for ``rsync --files-from``) of ``--prepare``; rows are (id, path, label, sha256)."""
    with atomic_path(folder / VAL_CSV) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    with atomic_path(folder / "val-images.txt") as temporary:
        temporary.write_text("".join(f"{row[1]}\n" for row in rows), encoding="utf-8")
