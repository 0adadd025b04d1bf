"""Where the C++ runtime's programs lie on this machine, if they do."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

BUILT = Path(__file__).resolve().parent.parent / "build" / "cpp" / "bin"
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
