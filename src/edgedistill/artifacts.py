"""Every file of a run: where it lies, how it is written whole or not at all, and how it is checked when read."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.errors import ArtifactError

FORMAT_VERSION = 1
REFUSALS = (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.EISDIR)
FULL_DISK_BYTES = 1 << 20
OWNER = platform.node() or "localhost"  # in the names of temporary files, with the process, so that others keep theirs


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; fsynced and renamed to ``path`` when the block ends well.

    Whatever happens, ``path`` is either the old file or the whole new one, and no temporary file of this process stays.
    Raises ArtifactError that names the file and the remedy when the disk is full or cannot be written.
    """
    path = Path(path)
    temporary: Path | None = None
    handle = -1
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=temporary_prefix(path), suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        hold(handle)
        yield temporary
        _fsync(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
        temporary = None
        _fsync(path.parent)
    except (OSError, RuntimeError) as error:
        if _disk_is_full(error, path.parent):
            raise ArtifactError(
                f"{path}: the disk is full; free some space and run the command again with --resume"
            ) from error
        if isinstance(error, OSError) and error.errno in REFUSALS:
            raise ArtifactError(f"{path}: cannot be written ({error.strerror}); choose another --out") from error
        raise
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if handle >= 0:
            os.close(handle)


def sweep(root: Path) -> None:
    """Remove the temporary files that killed processes of this machine left below ``root``."""
    for path in root.rglob(f".*.{OWNER}.*.tmp"):
        if is_left(path):
            path.unlink(missing_ok=True)


def temporary_prefix(path: Path) -> str:
    """How the name of a temporary file or folder begins that is to be renamed to ``path``: it says whose it is."""
    return f".{path.name}.{OWNER}.{os.getpid()}."


def hold(handle: int) -> bool:
    """Marks an open temporary file or folder, until it is closed, as one that a living process writes. Whether this process
    holds it now; True too where the file system knows no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EWOULDBLOCK, errno.EACCES)
    return True


def is_left(path: Path) -> bool:
    """Whether a killed process of this machine left that temporary file or folder: /proc does not know it, nor does any hold
    it. Containers with the host's network share its name, and not its processes."""
    process = path.name.split(f".{OWNER}.", 1)[1].split(".", 1)[0]
    if not process.isdecimal() or Path("/proc", process).exists():
        return False
    try:
        handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    except OSError:
        return False
    try:
        return hold(handle)
    finally:
        os.close(handle)


def _disk_is_full(error: Exception, folder: Path) -> bool:
    """numpy (OSError without a number) and torch (RuntimeError) do not say why a write stopped short."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return folder.is_dir() and shutil.disk_usage(folder).free < FULL_DISK_BYTES


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict[str, Any], *, format: str) -> None:
    """A JSON object with its format name and version in front."""
    write_text(
        path, json.dumps({"format": format, "version": FORMAT_VERSION} | values, indent=2, ensure_ascii=False) + "\n"
    )


def read_json(path: Path, *, format: str) -> dict[str, Any]:
    """Raises ArtifactError when the file is missing, is not JSON, or has another format or version."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: not valid JSON ({error}); write it again with the command that made it"
        ) from error
    got = (values.get("format"), values.get("version")) if isinstance(values, dict) else (type(values).__name__, None)
    if got != (format, FORMAT_VERSION):
        raise ArtifactError(
            f"{path}: format {got[0]!r} version {got[1]!r}, expected {format!r} version {FORMAT_VERSION}"
        )
    return values


def write_array(path: Path, array: npt.NDArray[Any]) -> None:
    """An .npy file of plain numbers or fixed-width strings; never a pickle."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, array, allow_pickle=False)


def read_array(path: Path, *, mmap: bool = False) -> npt.NDArray[Any]:
    """Raises ArtifactError when the file is missing, damaged or holds Python objects."""
    try:
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, EOFError) as error:
        raise ArtifactError(f"{path}: damaged or not a plain array ({error}); make it again") from error


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """One line, flushed; a torn last line of a killed process is dropped by ``read_jsonl``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if not path.exists():
        return rows
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def sha256_file(path: Path) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


RUN_FORMAT = "edgedistill-run"  # of config.json


def commands_of(config: dict[str, Any]) -> list[str]:
    """The command lines that made a run, in their order, from its config.json; older files have the first alone."""
    saved = config.get("commands", [config.get("command")])
    lines = [shlex.join(map(str, line)) if isinstance(line, list) else line for line in saved if line]
    return [str(line) for line in lines]


@dataclass(frozen=True)
class RunDir:
    """The names inside runs/NAME; design and README list the same tree."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.json"

    def settings(self) -> dict[str, Any]:
        """What `distill` was asked for, as config.json has it; empty without the file. Raises ArtifactError."""
        if not self.config.is_file():
            return {}
        values = read_json(self.config, format=RUN_FORMAT).get("settings", {})
        if not isinstance(values, dict) or not isinstance(values.get("student", {}), dict):
            raise ArtifactError(f"{self.config}: 'settings' is no table of settings; the file is damaged")
        return values

    @property
    def dataset(self) -> Path:
        return self.root / "dataset.csv"

    def teacher(self, fold: int, label: str = "") -> Path:
        """Of the first architecture; ``label``: of a further one, as files have its name."""
        return self.root / "teacher" / label / f"fold-{fold}"

    @property
    def soft_labels(self) -> Path:
        return self.root / "soft_labels"

    @property
    def student(self) -> Path:
        return self.root / "student"

    @property
    def hard_label_student(self) -> Path:
        return self.root / "student-hard-labels"

    @property
    def model(self) -> Path:
        return self.root / "model.pt"

    def other_student(self, label: str) -> Path:
        """Of a second, third, ... student; ``label``: its name as files have it."""
        return self.root / f"student-{label}"

    def other_hard_label_student(self, label: str) -> Path:
        return self.root / f"student-{label}-hard-labels"

    def model_of(self, label: str) -> Path:
        """model-NAME.pt, where a run has several students; the first one's is model.pt too."""
        return self.root / f"model-{label}.pt"

    @property
    def evaluation(self) -> Path:
        return self.root / "evaluation"

    @property
    def openvino(self) -> Path:
        return self.root / "openvino"

    @property
    def report(self) -> Path:
        return self.root / "report.html"


def settings_dict(settings: Any) -> dict[str, Any]:
    """A frozen settings dataclass as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(settings), default=str))
