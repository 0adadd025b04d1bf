"""A result folder that is the old one or the whole new one, whatever happens in between."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from edgedistill.errors import ArtifactError, UsageError

OWN_NAMES = frozenset({"stages", "deploy.json", "labels.txt"})
TUNED_NAMES = frozenset(
    {"deploy.before-tune.json", "tune.json", "pareto.png"}
)  # what a tuner wrote about the old networks
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_target(out: Path) -> None:
    """Raises UsageError unless ``out`` is missing, empty, or a folder that an export wrote before."""
    if out.is_dir() and any(out.iterdir()) and not ((out / "deploy.json").exists() or (out / "stages").is_dir()):
        names = ", ".join(sorted(path.name for path in out.iterdir())[:3])
        raise UsageError(f"--out {out}: holds other files ({names}); name an empty or a new folder")
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out}: is a file; name a folder")


@contextlib.contextmanager
def building(out: Path) -> Iterator[Path]:
    """A temporary folder beside ``out``, empty and locked; deleted at the end unless ``put_in_place`` moved it.

    What a killed export left there is deleted. Raises UsageError when another export is building the same folder, and
    ArtifactError when the disk is full or cannot be written.
    """
    temporary = out.with_name(f".{out.name}.new")
    try:
        temporary.mkdir(parents=True, exist_ok=True)
        lock = os.open(temporary, os.O_RDONLY)
    except OSError as error:
        raise ArtifactError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        _take(lock, temporary, out)
        yield from _locked(lock, temporary, out)
    finally:
        os.close(lock)


def _locked(lock: int, temporary: Path, out: Path) -> Iterator[Path]:
    try:
        _clear(temporary)
        yield temporary
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ArtifactError(f"{out}: the disk is full; free some space and export again") from error
        raise
    finally:
        if _same_folder(lock, temporary):
            shutil.rmtree(temporary, ignore_errors=True)


def put_in_place(temporary: Path, out: Path) -> None:
    """``temporary`` becomes ``out``; a folder that was there is exchanged in one step where the system can, then deleted.

    Files in the old folder that no export writes (val.csv, a user's) are copied into the new one first; what a tuner and
    bench-fps said of the old networks goes with them.
    """
    if not out.exists():
        _sync(temporary)
        temporary.rename(out)
        return
    for entry in out.iterdir():
        of_old_networks = entry.name in TUNED_NAMES or entry.match("bench*.json")
        if entry.name in OWN_NAMES or of_old_networks or (temporary / entry.name).exists():
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, temporary / entry.name, symlinks=True)
        else:
            shutil.copy2(entry, temporary / entry.name, follow_symlinks=False)
    _sync(temporary)
    if not _exchange(temporary, out):
        old = out.with_name(f".{out.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        out.rename(old)
        temporary.rename(out)
        temporary = old
    shutil.rmtree(temporary, ignore_errors=True)


def _take(lock: int, temporary: Path, out: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UsageError(f"--out {out}: another export is writing it; wait for it or choose another folder") from None
    if not _same_folder(lock, temporary):
        raise UsageError(f"--out {out}: another export has just written it; try again")


def _same_folder(lock: int, path: Path) -> bool:
    """Whether ``path`` still is the folder that was locked (it may have become the result, or been renamed)."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except FileNotFoundError:
        return False


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)


def _exchange(first: Path, second: Path) -> bool:
    """Linux's renameat2(RENAME_EXCHANGE): both names change hands in one step. False where it is not to be had."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    code = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    return int(code) == 0
