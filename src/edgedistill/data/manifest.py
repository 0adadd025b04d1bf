"""dataset.csv: the frozen manifest that every stage reads. Needs numpy only.

Columns: id, path, sha256, label, group, split, fold. ``id`` is the NFC-normalised relative POSIX path; ``split`` is
train, val or test; ``fold`` is 0..K-1 on train and -1 elsewhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Dataset:
    """N images of C classes; all arrays are [N] and in the manifest's order.

    ``labels``: int32, index into ``class_names`` (sorted by code point). ``groups``: str, '' where the image stands
    alone. ``splits``: one of SPLITS. ``folds``: int16, -1 outside train.
    """

    ids: npt.NDArray[np.str_]
    paths: npt.NDArray[np.str_]
    sha256: npt.NDArray[np.str_]
    labels: npt.NDArray[np.int32]
    groups: npt.NDArray[np.str_]
    splits: npt.NDArray[np.str_]
    folds: npt.NDArray[np.int16]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.ids)

    def rows(self, split: str) -> npt.NDArray[np.int64]:
        """Row numbers of one split, ascending."""
        return np.flatnonzero(self.splits == split)

    @property
    def fold_count(self) -> int:
        return int(self.folds.max()) + 1

    @cached_property
    def hash(self) -> str:
        """sha256 over the sorted (id, sha256, label) triples: what soft labels and models are tied to."""
        digest = hashlib.sha256()
        names = self.class_names
        for row in np.argsort(self.ids, kind="stable"):
            digest.update(f"{self.ids[row]}\0{self.sha256[row]}\0{names[self.labels[row]]}\n".encode())
        return digest.hexdigest()


def write_dataset(dataset: Dataset, path: Path) -> None:
    raise NotImplementedError


def read_dataset(path: Path, *, data_root: Path | None = None) -> Dataset:
    raise NotImplementedError
