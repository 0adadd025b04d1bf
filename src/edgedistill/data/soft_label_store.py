"""One head's soft labels on disk, written and read block by block: a million images x a thousand classes never lie in
memory together.

'float32' and 'float16' store log-probabilities [N, C]. 'top-k:K' stores each image's K most likely classes and the mean
log-probability of all others, which share the rest of the mass evenly. What a store loses is measured while it is
written: the Kullback-Leibler divergence of what is read back from what was given.

A sigmoid head has logits, each label a coin of its own: no other label's share can stand in for one that is left out, so
there is no top-k of them. A regression head has values, one for each image: four bytes that are worth keeping.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from edgedistill.artifacts import atomic_path, read_array
from edgedistill.errors import ArtifactError, UsageError
from edgedistill.tasks import Head, Task, sigmoid

BLOCK_ROWS = 4096
BLOCK_VALUES = 2**21  # read at once where float64 is computed of them: 16 MB
LEAST_LOG_PROB = float(np.log(np.finfo(np.float32).tiny))

LogProbs = npt.NDArray[np.float32]


class SoftRows(Protocol):
    """Soft labels of a data set's images, wherever they lie. ``rows``: float32 [n, C] log-probabilities at T=1 of rows
    int64 [n] of the data set; NaN where an image has none."""

    def rows(self, rows: npt.NDArray[np.integer[Any]]) -> LogProbs: ...


@dataclass(frozen=True, eq=False)
class HeldRows:
    """SoftRows that lie in memory: ``table`` is float32 [N, C]."""

    table: LogProbs

    def rows(self, rows: npt.NDArray[np.integer[Any]]) -> LogProbs:
        return self.table[rows]


def row_blocks(rows: npt.NDArray[np.int64], width: int) -> Iterator[npt.NDArray[np.int64]]:
    """``rows`` in order, as many at a time as have BLOCK_VALUES values in ``width`` columns."""
    size = max(1, BLOCK_VALUES // max(1, width))
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


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


def check_store(kind: StoreKind, classes: int, task: Task | None = None) -> None:
    """Raises UsageError for a 'top-k' that would keep all classes; of several heads, ``task``, all of each head."""
    if task is None:
        if kind.k >= classes:
            raise UsageError(
                f"--soft-label-store {kind}: the data set has {classes} classes; expected a smaller number, or float16"
            )
        return
    if not kind.k:
        return
    softmax = [head for head in task.heads if head.kind == "softmax"]
    if not softmax:
        heads = ", ".join(head.name for head in task.heads)
        raise UsageError(
            f"--soft-label-store {kind}: keeps the likeliest of classes that exclude each other, and those of {heads} "
            "each apply or not; give float16"
        )
    largest = max(softmax, key=lambda head: head.width)
    if kind.k >= largest.width:
        raise UsageError(
            f"--soft-label-store {kind}: the largest head, {largest.name}, has {largest.width} classes; expected a "
            "smaller number, or float16"
        )


def kind_for(head: Head, kind: StoreKind) -> StoreKind:
    """How a head of several is stored where ``kind`` is asked for: 'top-k' holds softmax heads of more classes, and
    'float16' whatever is no value."""
    fits = {"softmax": kind.k < head.width, "sigmoid": kind.name == "float16", "regression": False}[head.kind]
    return kind if fits else StoreKind("float32")


@dataclass(frozen=True)
class StoreLoss:
    """What a store costs, in nats per image, and on how many images it changes the most likely class (of a sigmoid
    head: any label)."""

    kl_mean: float
    kl_max: float
    top1_changed: int


# What a head of each kind stores, and how its file's name ends: HEAD.log_probs.npy.
SUFFIXES = {"softmax": "log_probs", "sigmoid": "logits", "regression": "values"}


def write_store(
    folder: Path,
    head: str,
    blocks: Iterable[LogProbs],
    *,
    shape: tuple[int, int],
    kind: StoreKind,
    head_kind: str = "softmax",
) -> dict[str, Any]:
    """Write ``blocks`` (float32 [n, C] log-probabilities, N rows in all) and return the head's entry for meta.json.

    ``head_kind``: 'softmax'; the blocks of 'sigmoid' hold logits, those of 'regression' values. Files:
    HEAD.log_probs.npy (HEAD.logits.npy, HEAD.values.npy), for 'top-k' also HEAD.indices.npy and HEAD.rest.npy. All are
    whole or absent. Raises ArtifactError on a full disk or when the blocks hold other than ``shape``.
    """
    count, classes = shape
    check_store(kind, classes)
    suffix, columns = SUFFIXES[head_kind], _columns(kind, classes)
    start, kl_sum, kl_max, changed = 0, 0.0, 0.0, 0
    with contextlib.ExitStack() as stack:
        files = {part: stack.enter_context(atomic_path(folder / _file_of(head, part, suffix))) for part in columns}
        offsets = {part: _write_header(files[part], dtype, (count, *tail)) for part, (dtype, tail) in columns.items()}
        for block in blocks:
            if start + len(block) > count or block.shape[1:] != (classes,):
                raise ArtifactError(f"{folder}: soft labels {block.shape} at row {start}, expected {shape} in all")
            parts = _encode(block, kind)
            for part, (dtype, tail) in columns.items():
                _write_rows(files[part], parts[part].astype(dtype), offsets[part], start, tail)
            divergence, other = LOSSES[head_kind](block, _decode(parts, classes, kind))
            kl_sum, kl_max, changed = kl_sum + divergence.sum(), max(kl_max, divergence.max(initial=0)), changed + other
            start += len(block)
        if start != count:
            raise ArtifactError(f"{folder}: {start} soft labels, expected {count}")
    for stale in {"indices", "rest"} - columns.keys():
        (folder / _file_of(head, stale, suffix)).unlink(missing_ok=True)
    loss = StoreLoss(float(kl_sum / max(1, count)), float(kl_max), int(changed))
    entry: dict[str, Any] = {
        "kind": head_kind,
        "file": _file_of(head, "log_probs", suffix),
        "temperature": 1.0,
        "views": 1,
    }
    return entry if kind.name == "float32" else entry | {"store": str(kind), "loss": vars(loss)}


def write_blocks(
    path: Path, blocks: Iterable[npt.NDArray[Any]], *, shape: tuple[int, ...], dtype: npt.DTypeLike = np.float32
) -> None:
    """One .npy file of ``blocks``, [n, C] each and N rows in all: whole or absent, and never whole in memory.

    Raises ArtifactError on a full disk or when the blocks hold other than ``shape``.
    """
    start = 0
    with atomic_path(path) as temporary:
        offset = _write_header(temporary, dtype, shape)
        for block in blocks:
            if start + len(block) > shape[0] or block.shape[1:] != shape[1:]:
                raise ArtifactError(f"{path}: {block.shape} at row {start}, expected {shape} in all")
            _write_rows(temporary, block.astype(dtype), offset, start, shape[1:])
            start += len(block)
        if start != shape[0]:
            raise ArtifactError(f"{path}: {start} rows, expected {shape[0]}")


@dataclass(frozen=True, eq=False)
class SoftLabelStore:
    """A head's files, mapped, not loaded. Thread-safe: reading changes nothing. ``head_kind``: as write_store has it."""

    folder: Path
    head: str
    kind: StoreKind
    count: int
    class_count: int
    head_kind: str = "softmax"

    def rows(self, rows: npt.NDArray[np.integer[Any]]) -> LogProbs:
        """float32 [n, C] log-probabilities, logits or values of the given rows of the store. Raises ArtifactError for
        damaged ones."""
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
            path = self.folder / _file_of(self.head, part, SUFFIXES[self.head_kind])
            array = read_array(path, mmap=True)
            expected = (self.count, *tail)
            if array.shape != expected or array.dtype != dtype:
                raise ArtifactError(
                    f"{path}: {array.dtype} {array.shape}, expected {np.dtype(dtype)} {expected}; make it again"
                )
            arrays[part] = array
        return arrays

    def _checked(self, decoded: LogProbs, parts: dict[str, npt.NDArray[Any]]) -> LogProbs:
        path = self.folder / f"{self.head}.{SUFFIXES[self.head_kind]}.npy"
        if self.head_kind != "softmax":
            if not np.isfinite(decoded).all():
                raise ArtifactError(f"{path}: holds values that are not finite; make it again")
            return decoded
        if "indices" in parts and parts["indices"].size and parts["indices"].max() >= self.class_count:
            raise ArtifactError(f"{self.folder / f'{self.head}.indices.npy'}: names classes beyond {self.class_count}")
        sums = _mass(parts, self.class_count, self.kind)
        tolerance = 1e-3 if self.kind.name == "float32" else 2e-2
        if not np.all(np.abs(sums - 1) < tolerance):  # also true of NaN
            raise ArtifactError(f"{path}: rows are not log-probabilities (their exponentials do not sum to 1)")
        if self.kind.name == "float32":
            return decoded
        return _decode(_less(parts, np.log(sums)), self.class_count, self.kind)


def open_store(
    folder: Path, head: str, entry: dict[str, Any], *, count: int, class_count: int, head_kind: str = "softmax"
) -> SoftLabelStore:
    """``entry``: what write_store returned. Raises ArtifactError for an entry of another kind."""
    try:
        kind = parse_store(str(entry.get("store", "float32")))
    except UsageError as error:
        raise ArtifactError(
            f"{folder / 'meta.json'}: store {entry.get('store')!r}, expected float32, float16 or top-k:N"
        ) from error
    if kind.k >= class_count:
        raise ArtifactError(f"{folder / 'meta.json'}: store {kind} of {class_count} classes; train the teachers again")
    return SoftLabelStore(folder, head, kind, count, class_count, head_kind)


def _file_of(head: str, part: str, suffix: str) -> str:
    """``part``: of ``_columns``; the main one's name says what is in it."""
    return f"{head.replace('/', '%2F')}.{suffix if part == 'log_probs' else part}.npy"


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


def label_bytes(kind: StoreKind, classes: int, task: Task | None = None) -> int:
    """What the soft label of one image takes on the disk; of several heads, ``task``, all of them."""
    heads = [(kind, classes)] if task is None else [(kind_for(head, kind), head.width) for head in task.heads]
    columns = [column for own, width in heads for column in _columns(own, width).values()]
    return sum(dtype.itemsize * int(np.prod(tail, dtype=np.int64)) for dtype, tail in columns)


def _encode(block: LogProbs, kind: StoreKind) -> dict[str, npt.NDArray[Any]]:
    if kind.name != "top-k":
        if kind.name == "float16":  # it has nothing beyond 65504, and infinity is no label
            block = np.clip(block, -65504, 65504)
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


def _mass(parts: dict[str, npt.NDArray[Any]], classes: int, kind: StoreKind) -> npt.NDArray[np.float64]:
    """What the probabilities of each row sum to. Of 'top-k' exponentials are taken before they are spread over all
    classes: of ten and a thousand, a hundredth of the work, which each batch of a student pays."""
    if kind.name != "top-k":
        return np.exp(parts["log_probs"].astype(np.float32).astype(np.float64)).sum(axis=1)
    kept, rest = (np.exp(parts[part].astype(np.float64)) for part in ("log_probs", "rest"))
    likely = np.repeat(rest[:, None], classes, axis=1)
    np.put_along_axis(likely, parts["indices"].astype(np.int64), kept, axis=1)
    return likely.sum(axis=1)


def _less(parts: dict[str, npt.NDArray[Any]], total: npt.NDArray[np.float64]) -> dict[str, npt.NDArray[Any]]:
    """All logarithms of a row less its ``total``; in the arrays that are stored, for the same reason."""
    logs = {part: values.astype(np.float32) for part, values in parts.items() if part != "indices"}
    return parts | {part: (values.T - total).T.astype(np.float32) for part, values in logs.items()}


def _loss(block: LogProbs, decoded: LogProbs) -> tuple[npt.NDArray[np.float64], int]:
    """KL(given || read back) of each row, in nats, and in how many the most likely class differs."""
    given, got = np.maximum(block, LEAST_LOG_PROB).astype(np.float64), decoded.astype(np.float64)
    got -= np.log(np.exp(got).sum(axis=1, keepdims=True))
    divergence = np.maximum((np.exp(given) * (given - got)).sum(axis=1), 0.0)
    return divergence, int((block.argmax(axis=1) != decoded.argmax(axis=1)).sum())


def _loss_of_coins(block: LogProbs, decoded: LogProbs) -> tuple[npt.NDArray[np.float64], int]:
    """The same for logits: the sum over labels of the divergence between two coins."""
    given, got = block.astype(np.float64), decoded.astype(np.float64)
    # log sigmoid(z) = -log(1 + exp(-z)), which logaddexp has without overflow
    divergence = np.zeros(len(block))
    for sign in (1, -1):
        change = np.logaddexp(0, -sign * got) - np.logaddexp(0, -sign * given)
        divergence += (sigmoid(sign * given) * change).sum(axis=1)
    return np.maximum(divergence, 0.0), int(((block >= 0) != (decoded >= 0)).any(axis=1).sum())


def _no_loss(block: LogProbs, decoded: LogProbs) -> tuple[npt.NDArray[np.float64], int]:
    """Values are stored as they are."""
    return np.zeros(len(block)), 0


LOSSES = {"softmax": _loss, "sigmoid": _loss_of_coins, "regression": _no_loss}


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
