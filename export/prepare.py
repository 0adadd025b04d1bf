"""`edgedistill tune --prepare`: on the training machine, everything that tuning needs on another one, in one folder.

OUT/stages/NAME/     FP32 IR, INT8 where accuracy allows, certificate of each candidate
OUT/deploy.json      the first candidate in FP32: the folder works before it is tuned
OUT/candidates.json  their names and hashes, what they were trained on
OUT/val.csv          id, path, label, sha256 of the val images, and a column for each head where they have more than one
                     label; val-images.txt: their paths, for rsync --files-from
OUT/val/             the images themselves, with ``with_images`` or where they are members of shards
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from edgedistill import console
from edgedistill.artifacts import sha256_file, write_json
from edgedistill.benchmarks.machine import machine_record, package_versions
from edgedistill.benchmarks.tuner.students import CANDIDATES, CANDIDATES_FORMAT, find_students, trained_on_val
from edgedistill.benchmarks.tuner.valset import ValSet, open_val, write_val
from edgedistill.errors import DataError, UsageError
from edgedistill.export.export import ExportSettings, export_openvino
from edgedistill.export.folder import building, check_target, put_in_place
from edgedistill.runtime.bundle import Bundle, DeployConfig, write_deploy


@dataclass(frozen=True)
class PrepareSettings:
    """``models``: model.pt files or runs (then all their students). ``out``: the folder to write. ``data``: as for export.

    ``int8_max_drop``: INT8 forms that lose more on val are left out; whether one pays is measured on the target.
    Raises UsageError for what cannot be.
    """

    models: tuple[Path, ...]
    out: Path | None
    data: str | None = None
    with_images: bool = False
    int8: bool = True
    int8_max_drop: float = 0.02

    def __post_init__(self) -> None:
        if self.out is None:
            raise UsageError("--prepare: name a folder to write with --out")
        if not self.models:
            raise UsageError("--prepare: name model.pt files or runs")


def prepare_candidates(settings: PrepareSettings) -> Path:
    """The folder; whole, or the one that was there. Raises DataError when val was trained on, when the models are of
    different data sets or splits, or when val images are missing; ModelError when a certificate fails."""
    if settings.out is None:
        raise UsageError("--prepare: name a folder to write with --out")
    out = settings.out.absolute()
    check_target(out)
    models = [model for target in settings.models for model in _models(target)]
    with building(out) as folder, tempfile.TemporaryDirectory(prefix="edgedistill-prepare-", dir=out.parent) as scratch:
        bundles = [_export(settings, model, Path(scratch)) for model in models]
        val = _val(settings, bundles)
        with_images = settings.with_images or val.in_shards  # else there are no files to copy
        val = val.unpacked(Path(scratch) / "val")
        _gather(bundles, folder)
        root = _write_val(val, folder)
        if with_images:
            _copy_images(val, root, folder / "val")
        put_in_place(folder, out)
    console.note(
        f"copy {out} to the target"
        + ("" if with_images else f", the images of val-images.txt from {root} too")
        + f"; there: edgedistill tune {out.name}"
        + ("" if with_images else " --data IMAGES")
        + " --fps-target N"
    )
    return out


def _models(target: Path) -> list[Path]:
    """A model.pt, or every distinct student of a run."""
    if target.is_file():
        return [target]
    found = [path for path in (target / "model.pt", *sorted(target.glob("model-*.pt"))) if path.is_file()]
    if not found:
        raise UsageError(f"{target}: no model.pt; give a model.pt or a finished run")
    return list({sha256_file(path): path for path in reversed(found)}.values())[::-1]


def _export(settings: PrepareSettings, model: Path, scratch: Path) -> Path:
    """openvino/ of one model in a stand-in for its run, so that what lies beside the model is found beside the export."""
    console.note(f"exporting {model}")
    run = scratch / f"{len(list(scratch.iterdir())):02d}-{model.parent.resolve().name}"
    run.mkdir()
    for name in ("dataset.csv", "config.json"):
        beside = model.with_name(name)
        if beside.is_file():
            shutil.copyfile(beside, run / name)
    return export_openvino(
        ExportSettings(
            model=model,
            out=run / "openvino",
            data=settings.data,
            int8="on" if settings.int8 else "off",
            int8_max_drop=settings.int8_max_drop,
            # Beyond it each rung costs minutes for every model, whether or not the target gains from INT8 at all.
            int8_max_rung="float-layers",
        )
    )


def _val(settings: PrepareSettings, bundles: Sequence[Path]) -> ValSet:
    """The val images, after all the checks that tuning makes."""
    students = find_students(bundles)
    for student in students:
        if trained_on_val(student) is not None:
            raise DataError(
                f"{student.name}: was trained on val (--final-data train+val), so nothing is left to tune on; train with "
                "--final-data train"
            )
    return open_val(students, settings.data)


def _gather(bundles: Sequence[Path], folder: Path) -> None:
    """All stages under names of their own, deploy.json, labels.txt and candidates.json."""
    entries, first = [], Bundle.load(bundles[0])
    config: DeployConfig | None = None
    for path in bundles:
        for stage in Bundle.load(path).config.stages:
            name, number = Path(stage.model).parent.name, 2
            while (folder / "stages" / name).exists():
                name, number = f"{Path(stage.model).parent.name}-{number}", number + 1
            shutil.copytree((path / stage.model).parent, folder / "stages" / name)
            model = f"stages/{name}/model.xml"
            entries.append({"name": name, "model": model, "sha256": stage.sha256, "int8_sha256": stage.int8_sha256})
            if config is None:
                # FP32 until it is tuned: what is fast here says nothing about the target.
                config = DeployConfig(stages=first.config.stages, cpu="", versions=package_versions())
    if config is not None:
        write_deploy(folder / "deploy.json", config)
    shutil.copyfile(bundles[0] / "labels.txt", folder / "labels.txt")
    record = {"students": entries, "final_data": "train", "classes": list(first.labels), "made_on": machine_record()}
    write_json(folder / CANDIDATES, record, format=CANDIDATES_FORMAT)


def _write_val(val: ValSet, folder: Path) -> Path:
    """val.csv and val-images.txt; returns the folder that their paths are relative to."""
    parents = {str(path.parent.absolute()) for path in val.paths}
    root = Path(os.path.commonpath(sorted(parents)))
    rows = []
    for row, (id, path, cells) in enumerate(zip(val.ids, val.paths, val.cells, strict=True)):
        label = val.truth.task.joint_label(val.truth.values[row])
        more = () if val.truth.task.is_single else cells
        rows.append((id, path.absolute().relative_to(root).as_posix(), label, sha256_file(path), *more))
    write_val(folder, rows, columns=val.columns)
    return root


def _copy_images(val: ValSet, root: Path, folder: Path) -> None:
    with console.progress("copying val images", len(val)) as bar:
        for path in val.paths:
            target = folder / path.absolute().relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            bar.update(bar.task_ids[0], advance=1)
