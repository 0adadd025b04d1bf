"""WebDataset shards as a source: tar files that hold key.jpg beside key.cls, key.txt or key.json.

The webdataset package reads shards as a stream; splits, folds and balanced sampling need any image at any time. So each
shard's headers are read once, and every image is named by its place in the shard (see shard_members). Nothing is
unpacked, and nothing that the tar says is used as a path on this machine.
"""

from __future__ import annotations

import glob
import json
import os
import tarfile
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from edgedistill import console
from edgedistill.errors import DataError
from edgedistill.images import IMAGE_SUFFIXES
from edgedistill.shard_members import Member

LABEL_KINDS = ("cls", "txt", "json")  # in the order in which they count where a key has several
JSON_LABELS = ("label", "cls", "class")
MAX_LABEL_BYTES = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One image of a shard: ``key`` as WebDataset has it, ``path`` for shard_members.read_file."""

    key: str
    shard: str
    path: str
    label: str
    group: str = ""


@dataclass
class _Key:
    """What a shard holds of one key."""

    images: list[Member] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    group: str = ""


def find_shards(data: str) -> list[Path] | None:
    """The .tar files behind --data: one file, a pattern such as 'shards/*.tar', or a folder that holds nothing else of
    interest; None where it is none of these. Raises DataError for compressed shards and for a pattern without files."""
    path = Path(data).expanduser()
    try:
        entries = sorted(path.iterdir()) if path.is_dir() else None
    except OSError as error:
        raise DataError(
            f"--data {data[:200]}: cannot be listed ({error.strerror}); check its name and permissions"
        ) from error
    if entries is not None:
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        shards = [entry for entry in entries if entry.suffix == ".tar" and entry.is_file()]
        return shards if shards and not any(entry.is_dir() for entry in entries) else None
    if path.is_file():
        if any(suffix in (".tgz", ".tar") for suffix in path.suffixes) and path.suffix != ".tar":
            raise DataError(f"{path}: a compressed tar cannot be read at any place; decompress it to .tar")
        return [path] if path.suffix == ".tar" else None
    if not glob.has_magic(data) or not data.endswith(".tar"):
        return None
    found = sorted(Path(name) for name in glob.glob(str(path)))  # noqa: PTH207 (an absolute pattern too)
    if not found:
        raise DataError(f"--data {data}: no such shards; expected .tar files, such as 'shards/*.tar' in quotes")
    return found


def read_shards(paths: Sequence[Path]) -> tuple[list[Sample], list[tuple[str, str]]]:
    """(samples, (path, reason) of members that are not used), in the order of the shards.

    Raises DataError that names shard and member: no tar, truncated or without its end, a link or device, an absolute or
    climbing name, a sparse or compressed member, a key with two images, without image or without label, a label that
    cannot be read; two shards of one name.
    """
    names = [path.stem for path in paths]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two shards are called {twice}.tar; rename one: images are named SHARD/KEY")
    samples: list[Sample] = []
    skipped: list[tuple[str, str]] = []
    with console.progress("reading shards", len(paths)) as bar:
        for path in paths:
            samples += _samples(path, skipped)
            bar.update(bar.task_ids[0], advance=1)
    return samples, skipped


def _samples(path: Path, skipped: list[tuple[str, str]]) -> Iterator[Sample]:
    keys: dict[str, _Key] = {}
    for info, tar in _members(path):
        folder, _, base = info.name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = _nfc(f"{folder}/{stem}" if folder else stem)
        last = PurePosixPath(info.name).suffix.lower()
        if last in IMAGE_SUFFIXES:
            member = Member(str(path.absolute()), info.offset_data, info.size, info.name)
            keys.setdefault(key, _Key()).images.append(member)
        elif extension.lower() in LABEL_KINDS:
            _read_label(path, info, tar, extension.lower(), into=keys.setdefault(key, _Key()))
        else:
            skipped.append((f"{path}: {info.name}", "neither image nor label"))
    for key, found in keys.items():
        yield _sample(path, key, found)


def _sample(path: Path, key: str, found: _Key) -> Sample:
    if len(found.images) != 1:
        raise DataError(
            f"{path}: key {key!r} has {len(found.images)} images, expected one beside its label; write the shard again"
        )
    label = next((found.labels[kind] for kind in LABEL_KINDS if found.labels.get(kind)), "")
    if not label:
        raise DataError(
            f"{path}: {found.images[0].name}: no label; expected {key}.cls or .txt with the class, or {key}.json with "
            f'{{"label": ...}}'
        )
    return Sample(key, path.stem, found.images[0].path, label, found.group)


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The regular files of a shard, each proven to lie inside it."""
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                if info.isdir() or PurePosixPath(info.name).name.startswith("."):
                    continue
                _refuse(path, info, size)
                yield info, tar
                tar.members = []  # type: ignore[attr-defined]  # a list of all headers, which nobody reads again
            _refuse_cut(path, tar)
    except (tarfile.TarError, EOFError, OverflowError, ValueError) as error:
        raise DataError(
            f"{path}: not a whole, uncompressed tar file ({error}); copy it again, or write it without compression"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _refuse_cut(path: Path, tar: tarfile.TarFile) -> None:
    """tarfile takes a damaged header, and the file's end, for the end of the archive, which POSIX marks with zero blocks.
    Their lack is an error, though some tools leave them out and tar itself forgives it: a copy that broke off, at a
    multiple of 512 bytes as copies do, may end between two members just as well."""
    tar.fileobj.seek(tar.offset)  # type: ignore[union-attr]
    block = tar.fileobj.read(tarfile.BLOCKSIZE)  # type: ignore[union-attr]
    if block == bytes(tarfile.BLOCKSIZE):
        return
    if block:
        raise DataError(
            f"{path}: damaged at byte {tar.offset}, where a member's header should be; copy the shard again"
        )
    raise DataError(
        f"{path}: it ends without the zero blocks that end a tar file, so images may be missing; copy the shard again, or, "
        f"if nothing is missing, add them: head -c 1024 /dev/zero >> {path.name}"
    )


def _refuse(path: Path, info: tarfile.TarInfo, size: int) -> None:
    """A reader of data has no use for what a tar can say beyond plain files inside it."""
    parts = PurePosixPath(info.name).parts
    problem = ""
    if not info.isreg() or info.issparse():
        problem = "a link, a device or a sparse file; expected regular files"
    elif info.name.startswith("/") or ".." in parts or "\0" in info.name or "\\" in info.name:
        problem = "an absolute name or one that climbs out of the shard; expected names such as 000123.jpg"
    elif info.offset_data + info.size > size:
        problem = "the shard ends before it does; copy the shard again"
    elif not _is_utf8(info.name):
        problem = "its name is not valid UTF-8; rename it"
    if problem:
        raise DataError(f"{path}: {info.name.encode(errors='replace').decode()!r}: {problem}")


def _read_label(path: Path, info: tarfile.TarInfo, tar: tarfile.TarFile, kind: str, *, into: _Key) -> None:
    where = f"{path}: {info.name}"
    if info.size > MAX_LABEL_BYTES:
        raise DataError(f"{where}: a label of {info.size} bytes; expected a class name or its number")
    file = tar.extractfile(info)
    data = file.read() if file is not None else b""
    try:
        text = data.decode("utf-8").strip()
        value = json.loads(text) if kind == "json" else text
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not a label ({error}); expected UTF-8 text, or JSON with a label") from error
    if isinstance(value, dict):
        into.group = into.group or _word(value.get("group"))
        value = next((value[name] for name in JSON_LABELS if name in value), None)
    into.labels[kind] = _word(value)


def _word(value: Any) -> str:
    """A class as JSON or text have it: a name or a whole number; '' for anything else."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return ""
    return _nfc(str(value).strip())


def _is_utf8(name: str) -> bool:
    return os.fsencode(name).decode(errors="replace") == name


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)
