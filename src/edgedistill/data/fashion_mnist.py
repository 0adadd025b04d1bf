"""Fashion-MNIST: IDX files, unpacked once into a folder of PNG images. Needs numpy and OpenCV only."""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.artifacts import OWNER, hold, is_left, temporary_prefix
from edgedistill.errors import DataError

DEFAULT_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
# The official names; 'T-shirt/top' without its slash, so that every name can be a folder's.
CLASSES = (
    "T-shirt-top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
SPLIT_PREFIX = {"train": "train", "test": "t10k"}
IMAGES_MAGIC, LABELS_MAGIC = 0x803, 0x801
MAX_BYTES = 2 << 30


def unpack(folder: Path, cache: Path | None = None) -> tuple[Path, list[tuple[str, str]]]:
    """(root, [(id, label)]): PNG images under root/train and root/test, ids like 'test/00001.png'.

    Written on the first call, to a temporary folder that is then renamed, so an interrupted call leaves nothing that
    looks whole; what a killed one left is removed by the next. The cache's name holds the hash of the IDX files. Raises
    DataError for missing or damaged IDX files.
    """
    files = {
        (split, kind): _find(folder, f"{prefix}-{kind}")
        for split, prefix in SPLIT_PREFIX.items()
        for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")
    }
    digest = hashlib.sha256()
    for file in files.values():
        digest.update(hashlib.sha256(_bytes(file)).digest())
    root = _cache_folder(cache) / f"fashion-mnist-{digest.hexdigest()[:16]}"
    _sweep(root.parent)
    if not (root / "labels.csv").is_file():
        try:
            _write(root, files)
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "the disk is full; free some space" if full else f"cannot be written ({error.strerror})"
            raise DataError(f"{root}: {reason}, or set EDGEDISTILL_CACHE to another folder") from error
    with (root / "labels.csv").open(encoding="utf-8", newline="") as table:
        return root, [(id, label) for id, label in csv.reader(table)]


def _cache_folder(cache: Path | None) -> Path:
    return Path(cache or os.environ.get("EDGEDISTILL_CACHE") or Path.home() / ".cache" / "edgedistill").expanduser()


def _find(folder: Path, name: str) -> Path:
    for candidate in (f"{name}.gz", name, name.replace("-idx", ".idx") + ".gz", name.replace("-idx", ".idx")):
        if (folder / candidate).is_file():
            return folder / candidate
    raise DataError(
        f"{folder}: no {name}.gz or {name}; on Debian run: apt-get install dataset-fashion-mnist, "
        "or give the folder that holds the four IDX files: --data fashion-mnist:FOLDER"
    )


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _write(root: Path, files: dict[tuple[str, str], Path]) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=temporary_prefix(root), dir=root.parent))
    handle = os.open(temporary, os.O_RDONLY)
    try:
        hold(handle)
        rows: list[tuple[str, str]] = []
        for split in SPLIT_PREFIX:
            images = read_idx(files[split, "images-idx3-ubyte"], magic=IMAGES_MAGIC)
            labels = read_idx(files[split, "labels-idx1-ubyte"], magic=LABELS_MAGIC)
            if len(images) != len(labels) or (len(labels) and labels.max() >= len(CLASSES)):
                raise DataError(
                    f"{files[split, 'labels-idx1-ubyte']}: {len(labels)} labels up to {labels.max(initial=0)} for "
                    f"{len(images)} images, expected one of 0..9 for each; copy the files again"
                )
            rows += _write_split(temporary / split, images, labels)
        with (temporary / "labels.csv").open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        temporary.chmod(0o755)
        os.sync()  # one flush for all images: 70,000 fsyncs take minutes
        try:
            temporary.rename(root)
        except OSError:
            if not (root / "labels.csv").is_file():  # else another process was first, with the same bytes
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(handle)


def _sweep(cache: Path) -> None:
    """Removes the temporary folders that killed processes of this machine left, as ``artifacts.sweep`` does with files."""
    for folder in cache.glob(f".fashion-mnist-*.{OWNER}.*"):
        if is_left(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _write_split(folder: Path, images: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8]) -> list[tuple[str, str]]:
    folder.mkdir()
    rows = []
    with console.progress(f"writing fashion-mnist {folder.name} images", len(images)) as bar:
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            name = f"{number:05d}.png"
            _, png = cv2.imencode(".png", image)
            (folder / name).write_bytes(png.tobytes())
            rows.append((f"{folder.name}/{name}", CLASSES[label]))
            if number % 500 == 499:
                bar.update(bar.task_ids[0], advance=500)
    return rows


def read_idx(path: Path, *, magic: int) -> npt.NDArray[np.uint8]:
    """An IDX file of unsigned bytes, gzipped or plain: uint8 [N, H, W] (magic 0x803) or [N] (magic 0x801).

    Raises DataError for another magic number, a size that does not fit the header, or damaged compression.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else Path.open
    dimensions = magic & 0xFF
    try:
        with opener(path, "rb") as file:
            start = file.read(4 * (1 + dimensions))
            header = np.frombuffer(start[: len(start) // 4 * 4], ">u4")
            if len(header) != 1 + dimensions or header[0] != magic:
                got = f"0x{header[0]:08x}" if len(header) else "nothing"
                raise DataError(f"{path}: IDX magic number {got}, expected 0x{magic:08x}; copy the file again")
            shape = tuple(int(size) for size in header[1:])
            expected = int(np.prod(shape, dtype=np.float64))
            body = file.read(min(expected, MAX_BYTES) + 1)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise DataError(f"{path}: damaged ({error}); copy the file again") from error
    if len(body) != expected or expected == 0:
        got = f"more than {expected}" if len(body) > expected else str(len(body))
        raise DataError(f"{path}: {got} bytes after the header, expected {expected} for {shape}; copy the file again")
    return np.frombuffer(body, np.uint8).reshape(shape)
