"""The networks to choose from: every stage of the bundles and runs that were named."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from edgedistill.artifacts import RunDir, read_json
from edgedistill.benchmarks.tuner.space import Student
from edgedistill.errors import ArtifactError, DataError, EdgedistillError, ModelError, UsageError
from edgedistill.runtime.bundle import (
    DEPLOY_FORMAT,
    Bundle,
    ModelMetadata,
    int8_path,
    model_sha256,
    read_deploy,
    read_ir,
    read_metadata,
)
from edgedistill.tasks import MANY, Head, Task

CANDIDATES_FORMAT = "edgedistill-candidates"
CANDIDATES = "candidates.json"
BEFORE = "deploy.before-tune.json"
PREPARE_HINT = "'edgedistill tune --prepare' on the training machine writes a folder with candidates and val.csv"


def bundle_folder(path: Path) -> Path:
    """The openvino/ folder of a run, or the folder itself. Raises UsageError for what is neither."""
    if not path.exists():
        raise UsageError(f"{path}: no such file or folder; give an openvino/ folder or a run")
    if path.is_file():
        if path.name != "deploy.json":
            raise UsageError(f"{path}: expected an openvino/ folder, a run or a deploy.json")
        return path.parent
    for folder in (path, path / "openvino"):
        if (folder / "deploy.json").is_file() or (folder / CANDIDATES).is_file():
            return folder
    raise UsageError(f"{path}: no deploy.json in it; run export-openvino first")


def _folders(path: Path) -> list[Path]:
    """``bundle_folder``; of a run also the exports of its further students, openvino-NAME/."""
    first = bundle_folder(path)
    if path.is_file() or first == path:
        return [first]
    others = sorted(folder for folder in path.glob("openvino-*") if (folder / "deploy.json").is_file())
    return [first, *(folder for folder in others if not folder.name.endswith("-failed"))]


def find_students(paths: Sequence[Path]) -> list[Student]:
    """All stages of all folders, the ones of the first deploy.json in front; names are made unique.

    Raises UsageError for a path that cannot be a bundle, ArtifactError or ModelError for a damaged one, and DataError
    when two students have different classes or heads.
    """
    students: list[Student] = []
    for folder in dict.fromkeys(folder for path in paths for folder in _folders(path)):
        for student in _students_of(folder):
            twin = next((place for place, other in enumerate(students) if other.sha256 == student.sha256), None)
            if twin is None:
                students.append(dataclasses.replace(student, name=_unique(student.name, students)))
            elif (
                students[twin].int8_sha256 is None and student.int8_sha256 is not None
            ):  # a copy made before it had INT8
                students[twin] = dataclasses.replace(student, name=students[twin].name)
    first = students[0]
    for other in students[1:]:
        if other.labels != first.labels:
            raise DataError(
                f"{other.root / other.model}: classes {list(other.labels)[:8]}, but {first.root / first.model} has "
                f"{list(first.labels)[:8]}; tune networks of one data set together"
            )
        if other.task.layout != first.task.layout:
            raise DataError(
                f"{other.root / other.model}: its heads are others than those of {first.root / first.model} (kind or scale); "
                "tune networks of one data set and one task together"
            )
    return students


def _unique(name: str, students: Sequence[Student]) -> str:
    taken, found, number = {student.name for student in students}, name, 2
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    return found


def _students_of(folder: Path) -> Iterator[Student]:
    """Those of deploy.json first, then what else lies in stages/. Hashes that a file of the folder names must hold.

    Where a tuner has written deploy.json, the one before it comes first: the first student is what everything is compared
    with, and a second tuning has to start where the first one did.
    """
    models = _exported_first(folder)
    if (folder / "deploy.json").is_file():
        models += [stage.model for stage in Bundle.load(folder).config.stages]
    models += sorted(path.relative_to(folder).as_posix() for path in folder.glob("stages/*/model.xml"))
    if not models:
        raise UsageError(f"{folder}: no network in it; {PREPARE_HINT}")
    known = _known_hashes(folder)
    for model in dict.fromkeys(models):
        yield _read_student(folder, model, known)


def _exported_first(folder: Path) -> list[str]:
    try:
        stages = read_deploy(folder / BEFORE).stages
    except ArtifactError:
        return []
    return [stage.model for stage in stages if (folder / stage.model).is_file()]


def _known_hashes(folder: Path) -> dict[str, str]:
    """sha256 by path inside the folder, as candidates.json, deploy.json and the deploy.json of before say, in this order:
    where another export was copied over a tuned folder, the last one speaks of networks that are gone."""
    entries: list[Any] = []
    for name, format in ((CANDIDATES, CANDIDATES_FORMAT), ("deploy.json", DEPLOY_FORMAT), (BEFORE, DEPLOY_FORMAT)):
        if (folder / name).is_file():
            values = read_json(folder / name, format=format)
            listed = values.get("students" if name == CANDIDATES else "stages")
            entries += listed if isinstance(listed, list) else []
    found: dict[str, str] = {}
    for entry in entries:
        if isinstance(entry, dict) and isinstance(entry.get("model"), str):
            for key, path in (("sha256", entry["model"]), ("int8_sha256", _int8_name(entry["model"]))):
                if isinstance(entry.get(key), str):
                    found.setdefault(path, entry[key])
    return found


def _int8_name(model: str) -> str:
    return int8_path(Path(model)).as_posix()


def _read_student(folder: Path, model: str, known: dict[str, str]) -> Student:
    path = folder / model
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ArtifactError(f"{path}: leads outside {folder}; export the model again")
    metadata = read_metadata(read_ir(path), str(path))
    int8 = int8_path(path)
    student = Student(
        name=path.parent.name if path.parent != folder else path.stem,
        root=folder,
        model=model,
        spec=metadata.input_spec,
        sha256=model_sha256(path),
        int8_sha256=model_sha256(int8) if int8.is_file() else None,
        labels=metadata.labels,
        temperature=metadata.temperature,
        dataset_hash=metadata.dataset_hash,
        architecture=metadata.architecture,
        heads=_heads(metadata),
    )
    for name, got in ((model, student.sha256), (_int8_name(model), student.int8_sha256)):
        if got is not None and got != known.get(name, got):
            raise ArtifactError(
                f"{folder / name}: sha256 {got[:12]}..., expected {known[name][:12]}...: it is damaged or from another "
                "export; copy or export it again"
            )
    if not metadata.own:
        raise ModelError(f"{path}: was not exported by edgedistill; the tuner needs its own metadata; export it again")
    return student


def _heads(metadata: ModelMetadata) -> Task | None:
    """None where every image gets one label."""
    if metadata.multi_label:
        return Task((Head(MANY, "sigmoid", metadata.labels, threshold=metadata.threshold),))
    return metadata.heads


def run_of(student: Student) -> Path | None:
    """The run that a student belongs to: the nearest folder above it, up to three, with a dataset.csv or config.json."""
    folders = list(student.root.resolve().parents)[:3]
    return next((f for f in folders if (f / "dataset.csv").is_file() or (f / "config.json").is_file()), None)


def trained_on_val(student: Student) -> Path | None:
    """The file that says so, or None: then nothing is known against using val."""
    marked = student.root / CANDIDATES
    if marked.is_file() and read_json(marked, format=CANDIDATES_FORMAT).get("final_data") == "train+val":
        return marked
    run = run_of(student)
    if run is None:
        return None
    try:
        final_data = RunDir(run).settings().get("student", {}).get("final_data")
    except EdgedistillError:  # of some other program
        return None
    return RunDir(run).config if final_data == "train+val" else None
