"""One head's soft labels on disk, written and read block by block: a million images x a thousand classes never lie in
memory together.

'float32' and 'float16' store log-probabilities [N, C]. 'top-k:K' stores each image's K most likely classes and the mean
log-probability of all others, which share the rest of the mass evenly. What a store loses is measured while it is
written: the Kullback-Leibler divergence of what is read back from what was given.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.artifacts import atomic_path, read_array
from edgedistill.errors import ArtifactError, UsageError

BLOCK_ROWS = 4096
LEAST_LOG_PROB = float(np.log(np.finfo(np.float32).tiny))

LogProbs = npt.NDArray[np.float32]


@dataclass(frozen=True)
class StoreKind:
    """``name``: 'float32', 'float16' or 'top-k'; ``k``: classes kept by the last."""

    name: str
    k: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.k}" if self.k else self.name


def parse_store(text: str) -> StoreKind:
    """Raises UsageError for anything but float32, float16 and top-k:N."""
    if text in ("float32", "float16"):
        return StoreKind(text)
    name, _, number = text.partition(":")
    if name != "top-k" or not number.isdecimal() or not 1 <= int(number) <= 65_535:
        raise UsageError(f"--soft-label-store {text}: expected float32, float16 or top-k:N with N of 1 or more")
    return StoreKind(name, int(number))


def check_store(kind: StoreKind, classes: int) -> None:
    """Raises UsageError for a 'top-k' that would keep all classes."""
    if kind.k >= classes:
        raise UsageError(
            f"--soft-label-store {kind}: the data set has {classes} classes; expected a smaller number, or float16"
        )


@dataclass(frozen=True)
class StoreLoss:
    """What a store costs, in nats per image, and on how many images it changes the most likely class."""

    kl_mean: float
    kl_max: float
    top1_changed: int


def write_store(
    folder: Path, head: str, blocks: Iterable[LogProbs], *, shape: tuple[int, int], kind: StoreKind
) -> dict[str, Any]:
    """Write ``blocks`` (float32 [n, C] log-probabilities, N rows in all) and return the head's entry for meta.json.

    Files: HEAD.log_probs.npy, for 'top-k' also HEAD.indices.npy and HEAD.rest.npy. All are whole or absent. Raises
    ArtifactError on a full disk or when the blocks hold other than ``shape``.
    """
    count, classes = shape
    check_store(kind, classes)
    columns = _columns(kind, classes)
    start, kl_sum, kl_max, changed = 0, 0.0, 0.0, 0
    with contextlib.ExitStack() as stack:
        files = {part: stack.enter_context(atomic_path(folder / f"{head}.{part}.npy")) for part in columns}
        offsets = {part: _write_header(files[part], dtype, (count, *tail)) for part, (dtype, tail) in columns.items()}
        for block in blocks:
            if start + len(block) > count or block.shape[1:] != (classes,):
                raise ArtifactError(f"{folder}: soft labels {block.shape} at row {start}, expected {shape} in all")
            parts = _encode(block, kind)
            for part, (dtype, tail) in columns.items():
                _write_rows(files[part], parts[part].astype(dtype), offsets[part], start, tail)
            divergence, other = _loss(block, _decode(parts, classes, kind))
            kl_sum, kl_max, changed = kl_sum + divergence.sum(), max(kl_max, divergence.max(initial=0)), changed + other
            start += len(block)
        if start != count:
            raise ArtifactError(f"{folder}: {start} soft labels, expected {count}")
    for stale in {"indices", "rest"} - columns.keys():
        (folder / f"{head}.{stale}.npy").unlink(missing_ok=True)
    loss = StoreLoss(float(kl_sum / max(1, count)), float(kl_max), int(changed))
    entry: dict[str, Any] = {"kind": "softmax", "file": f"{head}.log_probs.npy", "temperature": 1.0, "views": 1}
    return entry if kind.name == "float32" else entry | {"store": str(kind), "loss": vars(loss)}


@dataclass(frozen=True, eq=False)
class SoftLabelStore:
    """A head's files, mapped, not loaded. Thread-safe: reading changes nothing."""

    folder: Path
    head: str
    kind: StoreKind
    count: int
    class_count: int

    def rows(self, rows: npt.NDArray[np.integer[Any]]) -> LogProbs:
        """float32 [n, C] log-probabilities of the given rows of the store. Raises ArtifactError for damaged ones."""
        parts = {part: np.asarray(array[rows]) for part, array in self._arrays().items()}
        return self._checked(_decode(parts, self.class_count, self.kind), parts)

    def blocks(self, size: int = BLOCK_ROWS) -> Iterator[LogProbs]:
        """All rows in order, ``size`` at a time."""
        for start in range(0, self.count, size):
            yield self.rows(np.arange(start, min(start + size, self.count)))

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Mapped anew for each call: pages that were read go when the map does."""
        arrays = {}
        for part, (dtype, tail) in _columns(self.kind, self.class_count).items():
            path = self.folder / f"{self.head}.{part}.npy"
            array = read_array(path, mmap=True)
            expected = (self.count, *tail)
            if array.shape != expected or array.dtype != dtype:
                raise ArtifactError(
                    f"{path}: {array.dtype} {array.shape}, expected {np.dtype(dtype)} {expected}; make it again"
                )
            arrays[part] = array
        return arrays

    def _checked(self, decoded: LogProbs, parts: dict[str, npt.NDArray[Any]]) -> LogProbs:
        path = self.folder / f"{self.head}.log_probs.npy"
        if "indices" in parts and parts["indices"].size and parts["indices"].max() >= self.class_count:
            raise ArtifactError(f"{self.folder / f'{self.head}.indices.npy'}: names classes beyond {self.class_count}")
        sums = np.exp(decoded.astype(np.float64)).sum(axis=1)
        tolerance = 1e-3 if self.kind.name == "float32" else 2e-2
        if not np.all(np.abs(sums - 1) < tolerance):  # also true of NaN
            raise ArtifactError(f"{path}: rows are not log-probabilities (their exponentials do not sum to 1)")
        if self.kind.name == "float32":
            return decoded
        return (decoded - np.log(sums)[:, None]).astype(np.float32)


def open_store(folder: Path, head: str, entry: dict[str, Any], *, count: int, class_count: int) -> SoftLabelStore:
    """``entry``: what write_store returned. Raises ArtifactError for an entry of another kind."""
    try:
        kind = parse_store(str(entry.get("store", "float32")))
    except UsageError as error:
        raise ArtifactError(
            f"{folder / 'meta.json'}: store {entry.get('store')!r}, expected float32, float16 or top-k:N"
        ) from error
    if kind.k >= class_count:
        raise ArtifactError(f"{folder / 'meta.json'}: store {kind} of {class_count} classes; train the teachers again")
    return SoftLabelStore(folder, head, kind, count, class_count)


def _columns(kind: StoreKind, classes: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Of each file, its type and the shape of a row."""
    if kind.name != "top-k":
        return {"log_probs": (np.dtype(kind.name), (classes,))}
    index = np.uint16 if classes <= 65_536 else np.uint32
    return {
        "log_probs": (np.dtype(np.float32), (kind.k,)),
        "indices": (np.dtype(index), (kind.k,)),
        "rest": (np.dtype(np.float32), ()),
    }


def _encode(block: LogProbs, kind: StoreKind) -> dict[str, npt.NDArray[Any]]:
    if kind.name != "top-k":
        return {"log_probs": block.astype(kind.name)}
    kept = np.argpartition(-block, kind.k - 1, axis=1)[:, : kind.k]
    kept = np.take_along_axis(kept, np.argsort(-np.take_along_axis(block, kept, axis=1), axis=1, kind="stable"), axis=1)
    others = np.exp(block.astype(np.float64))
    np.put_along_axis(others, kept, 0.0, axis=1)
    share = others.sum(axis=1) / (block.shape[1] - kind.k)
    return {
        "log_probs": np.take_along_axis(block, kept, axis=1),
        "indices": kept,
        "rest": np.maximum(np.log(np.maximum(share, np.finfo(np.float64).tiny)), LEAST_LOG_PROB).astype(np.float32),
    }


def _decode(parts: dict[str, npt.NDArray[Any]], classes: int, kind: StoreKind) -> LogProbs:
    if kind.name != "top-k":
        return parts["log_probs"].astype(np.float32)
    rest = parts["rest"].astype(np.float32)
    decoded = np.repeat(rest[:, None], classes, axis=1)
    np.put_along_axis(decoded, np.minimum(parts["indices"], classes - 1).astype(np.int64), parts["log_probs"], axis=1)
    return decoded


def _loss(block: LogProbs, decoded: LogProbs) -> tuple[npt.NDArray[np.float64], int]:
    """KL(given || read back) of each row, in nats, and in how many the most likely class differs."""
    given, got = np.maximum(block, LEAST_LOG_PROB).astype(np.float64), decoded.astype(np.float64)
    got -= np.log(np.exp(got).sum(axis=1, keepdims=True))
    divergence = np.maximum((np.exp(given) * (given - got)).sum(axis=1), 0.0)
    return divergence, int((block.argmax(axis=1) != decoded.argmax(axis=1)).sum())


def _write_header(path: Path, dtype: Any, shape: tuple[int, ...]) -> int:
    """An .npy header and room for the rows; returns where they begin.

    The room is taken now: on a full disk this is an error, where writing through a map would kill the process.
    """
    with path.open("wb") as file:
        descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
        np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
        start = file.tell()
        file.flush()
        room = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        os.posix_fallocate(file.fileno(), 0, start + max(1, room))
        file.truncate(start + room)
    return start


def _write_rows(path: Path, values: npt.NDArray[Any], offset: int, start: int, tail: tuple[int, ...]) -> None:
    """Through a map of these rows alone, so that written pages do not stay in the process."""
    if not values.size:
        return
    row_bytes = int(np.prod(tail, dtype=np.int64)) * values.dtype.itemsize
    mapped = np.memmap(path, values.dtype, mode="r+", offset=offset + start * row_bytes, shape=values.shape)
    mapped[:] = values
    mapped.flush()
