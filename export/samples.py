"""Which images calibrate, and which ones the certificate is made on."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill import console, shard_members
from edgedistill.data.manifest import Dataset, read_dataset
from edgedistill.data.sources import Source, open_source
from edgedistill.errors import ArtifactError, DataError, UsageError
from edgedistill.export.network import Network
from edgedistill.images import DecodeMode, ImageU8, InputSpec, load_image
from edgedistill.tasks import Values


@dataclass(frozen=True, eq=False)
class Samples:
    """N images with their labels (int32, index into the network's classes). ``source``: 'val', 'test' or 'folder'.
    ``values``: float32 [N, V] for a network with several heads."""

    source: str
    ids: tuple[str, ...]
    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int32]
    values: Values | None = None

    @property
    def truth(self) -> Values:
        """float32 [N, V] as ``tasks`` has it, whatever the task."""
        return self.labels[:, None].astype(np.float32) if self.values is None else self.values

    def __len__(self) -> int:
        return len(self.paths)

    def thinned(self, count: int) -> Samples:
        """At most ``count`` of them, the same ones every time."""
        if len(self) <= count:
            return self
        return self.take(np.sort(np.random.default_rng(0).permutation(len(self))[:count]))

    def take(self, rows: npt.NDArray[np.int64]) -> Samples:
        return Samples(
            self.source,
            tuple(self.ids[r] for r in rows),
            tuple(self.paths[r] for r in rows),
            self.labels[rows],
            None if self.values is None else self.values[rows],
        )


@dataclass(frozen=True, eq=False)
class ExportImages:
    """``calibration``: train images for INT8. ``certificate``: val images. ``missing``: why there are none, or ''."""

    calibration: Samples
    certificate: Samples
    missing: str = ""


def manifest_of(model: Path) -> Path:
    """dataset.csv beside the model or, for a teacher (teacher/fold-K/model.pt), up to two folders above; else where it
    would lie."""
    folders = (model.parent, *list(model.absolute().parents)[1:3])
    found = (folder / "dataset.csv" for folder in folders if (folder / "dataset.csv").is_file())
    return next(found, model.with_name("dataset.csv"))


def find_images(network: Network, *, manifest: Path, data: str | None, split: str = "val") -> ExportImages:
    """Images by the manifest beside model.pt where there is one; with ``data`` they are looked for there.

    Without a manifest, ``data`` gives train and val by its own splits; where it has none, half of it (by a hash of the
    id) calibrates and the other half certifies. Raises ArtifactError for a manifest of another data set and DataError
    for class names that the network does not know.
    """
    if network.heads is not None and data is not None:
        return _with_heads(network, manifest, Path(data), split)
    if not manifest.is_file():
        if data is None:
            return _nothing(f"no {manifest.name} beside the model; give --data")
        return _from_source(network, open_source(data))
    dataset = read_dataset(manifest)
    if data is not None:
        source = open_source(data)
        paths = {item.id: item.path for item in source.items}
        if not set(dataset.ids.tolist()) <= set(paths):
            return _from_source(network, source)
        return _from_dataset(network, dataset, [paths[id] for id in dataset.ids.tolist()], split)
    _check_dataset(network, dataset, manifest)
    paths_there = [Path(path) for path in dataset.paths.tolist()]
    rows = dataset.rows(split)
    if len(rows) and not shard_members.exists(paths_there[int(rows[0])]):
        return _nothing(f"{paths_there[int(rows[0])]} of {manifest.name} is not on this machine; give --data")
    return _from_dataset(network, dataset, paths_there, split)


def _with_heads(network: Network, manifest: Path, data: Path, split: str) -> ExportImages:
    """Images under ``data`` by the manifest, which alone says which column is which head's."""
    if not manifest.is_file():
        raise UsageError(f"--data {data}: a network with several heads needs {manifest}, which holds its labels")
    dataset = read_dataset(manifest, data_root=data if data.is_dir() else data.parent)
    _check_dataset(network, dataset, manifest)
    return _from_dataset(network, dataset, [Path(path) for path in dataset.paths.tolist()], split)


def load_pixels(paths: Sequence[Path], spec: InputSpec, *, decode: DecodeMode = "reduced") -> ImageU8:
    """uint8 [N, H, W, 3] BGR, by the deployable transform. Raises ImageError that names the first unreadable file."""
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        images = list(pool.map(lambda path: load_image(path, spec, decode=decode), paths))
    return np.stack(images) if images else np.zeros((0, spec.height, spec.width, 3), np.uint8)


def _nothing(reason: str) -> ExportImages:
    empty = Samples("none", (), (), np.zeros(0, np.int32))
    return ExportImages(empty, empty, reason)


def _check_dataset(network: Network, dataset: Dataset, manifest: Path) -> None:
    if dataset.outputs != network.classes:
        raise ArtifactError(
            f"{manifest}: classes {list(dataset.outputs)}, but the model has {list(network.classes)};"
            " give --data with the model's own data set"
        )
    if network.dataset_hash and dataset.hash != network.dataset_hash:
        raise ArtifactError(
            f"{manifest}: data set {dataset.hash[:12]}, but the model was trained on {network.dataset_hash[:12]};"
            " put the manifest of its own run beside it, or give --data"
        )


def _from_dataset(network: Network, dataset: Dataset, paths: Sequence[Path], split: str) -> ExportImages:
    def chosen(name: str) -> Samples:
        rows = dataset.rows(name)
        ids = tuple(dataset.ids[rows].tolist())
        values = None if dataset.values is None else dataset.values[rows]
        return Samples(name, ids, tuple(paths[row] for row in rows.tolist()), dataset.labels[rows], values)

    if dataset.outputs != network.classes:
        raise DataError(f"classes {list(dataset.outputs)} in the data, but the model has {list(network.classes)}")
    found = chosen(split)
    if not len(found):
        return ExportImages(chosen("train"), found, f"the data set has no {split} images")
    if dataset.task is not None and found.values is not None:
        known = dataset.task.judged(found.values)
        if not known.all():  # nothing that is said of them is right or wrong: they would dilute every loss
            console.note(f"{int((~known).sum())} {split} images have no known label and are left out")
            found = found.take(np.flatnonzero(known))
    return ExportImages(chosen("train"), found, "" if len(found) else f"no {split} image has a known label")


def _from_source(network: Network, source: Source) -> ExportImages:
    number_of = {name: number for number, name in enumerate(network.classes)}
    unknown = sorted({item.label for item in source.items} - set(number_of))
    if unknown:
        raise DataError(
            f"{source.root}: classes {unknown[:5]} that the model does not have; expected some of"
            f" {list(network.classes)[:20]}; rename the folders or give the model's own data"
        )
    split_of = [item.split or _half(item.id) for item in source.items]
    certifies = next((name for name in ("val", "test", "folder") if name in split_of), "none")

    def chosen(name: str, *splits: str) -> Samples:
        items = [item for item, split in zip(source.items, split_of, strict=True) if split in splits]
        labels = np.array([number_of[item.label] for item in items], np.int32)
        return Samples(name, tuple(item.id for item in items), tuple(item.path for item in items), labels)

    found = chosen(certifies, certifies)
    missing = "" if len(found) else f"{source.root}: no val or test images in it"
    return ExportImages(chosen("train", "train", "calibration"), found, missing)


def _half(id: str) -> str:
    return "calibration" if hashlib.sha256(id.encode()).digest()[0] < 128 else "folder"
