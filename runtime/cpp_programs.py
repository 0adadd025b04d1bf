"""Where the C++ runtime's programs lie on this machine, if they do, and what edgedistill-classify answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgedistill.errors import ModelError

BUILT = Path(__file__).resolve().parent.parent / "build" / "cpp" / "bin"
CLASSIFY = "edgedistill-classify"
# Of one run: as many paths as any system's command line takes.
PATHS_AT_ONCE = 500
LIMIT_S = 1800.0
HOW_TO_BUILD = "build it with 'make cpp', or name its folder in EDGEDISTILL_CPP_BIN"


def find_cpp_program(name: str) -> Path | None:
    """``name`` in the folder $EDGEDISTILL_CPP_BIN where that is set (empty: nowhere), else in the checkout's build, else on PATH."""
    folder = os.environ.get("EDGEDISTILL_CPP_BIN")
    if folder is not None:
        return _program(Path(folder) / name) if folder else None
    found = shutil.which(name)
    return _program(BUILT / name) or (Path(found) if found else None)


def _program(path: Path) -> Path | None:
    return path if path.is_file() and os.access(path, os.X_OK) else None


def classify(program: Path, model: Path, paths: Sequence[Path], options: Sequence[str]) -> list[dict[str, Any]]:
    """The JSON answer of edgedistill-classify for each path, in order; an image that it cannot read has an 'error'.

    Raises ModelError when it fails as a whole.
    """
    answers: list[dict[str, Any]] = []
    for start in range(0, len(paths), PATHS_AT_ONCE):
        answers += _classify_at_once(program, model, paths[start : start + PATHS_AT_ONCE], options)
    return answers


def _classify_at_once(
    program: Path, model: Path, paths: Sequence[Path], options: Sequence[str]
) -> list[dict[str, Any]]:
    command = [str(program), os.path.abspath(model), *map(os.path.abspath, paths), *options]  # noqa: PTH100
    try:
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=LIMIT_S)
        answers = [json.loads(line) for line in done.stdout.splitlines()]
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise ModelError(f"{CLASSIFY}: {error}") from error
    # 1 also stands for images that could not be read; each of those has a line.
    if done.returncode not in (0, 1) or len(answers) != len(paths):
        raise ModelError(
            f"{CLASSIFY} ended with code {done.returncode} after {len(answers)} of {len(paths)} images: "
            f"{last_line(done.stderr)}"
        )
    return answers


def last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"
