"""The C++ runtime's answers for the certificate: edgedistill-classify, asked for every class's probability."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill import __version__
from edgedistill.errors import ImageError, ModelError
from edgedistill.images import DecodeMode, image_size, read_bytes
from edgedistill.runtime.cpp_programs import HOW_TO_BUILD, find_cpp_program

PROGRAM = "edgedistill-classify"
# Of one run: as many paths as any system's command line takes.
PATHS_AT_ONCE = 500
LIMIT_S = 1800.0


@dataclass(frozen=True, eq=False)
class CppAnswers:
    """``rows``: which of the images were read, all but TIFFs. ``probabilities``: float64 [len(rows), C]."""

    rows: npt.NDArray[np.intp]
    probabilities: npt.NDArray[np.float64]


@dataclass(frozen=True)
class CppRuntime:
    """The program, which starts and is of this release."""

    program: Path

    @classmethod
    def find(cls) -> CppRuntime | str:
        """The runtime, or why there is none to ask."""
        program = find_cpp_program(PROGRAM)
        if program is None:
            return f"{PROGRAM} is not built; {HOW_TO_BUILD}"
        try:
            done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{PROGRAM} does not start ({error}); {HOW_TO_BUILD}"
        if done.returncode != 0:
            return f"{PROGRAM} does not start ({_last_line(done.stderr)}); {HOW_TO_BUILD}"
        if done.stdout.split() != ["edgedistill", __version__]:
            return f"{PROGRAM} says {done.stdout.strip()[:80]!r}, this is edgedistill {__version__}; {HOW_TO_BUILD}"
        return cls(program)

    def answers(
        self, model: Path, paths: Sequence[Path], *, precision: str, decode: DecodeMode, threads: int | None = None
    ) -> CppAnswers:
        """Raises ModelError when the program fails or cannot read an image that Python reads (a TIFF is left out)."""
        rows: list[int] = []
        probabilities: list[list[float]] = []
        options = ["--precision", precision, "--decode", decode, "--probabilities", "--no-cache"]
        if threads is not None:
            options += ["--threads", str(threads), "--streams", str(threads)]
        for start in range(0, len(paths), PATHS_AT_ONCE):
            part = paths[start : start + PATHS_AT_ONCE]
            for number, answer in enumerate(self._run(model, part, options), start=start):
                if "error" not in answer:
                    rows.append(number)
                    probabilities.append(answer["probabilities"])
                elif not _is_tiff(paths[number]):
                    raise ModelError(f"{PROGRAM} cannot read what Python reads: {answer['error']}")
        shaped = np.asarray(probabilities, np.float64).astype(np.float32)
        return CppAnswers(np.asarray(rows, np.intp), shaped.astype(np.float64))

    def _run(self, model: Path, paths: Sequence[Path], options: list[str]) -> list[dict[str, Any]]:
        """One answer per path, in order."""
        command = [str(self.program), os.path.abspath(model), *map(os.path.abspath, paths), *options]  # noqa: PTH100
        try:
            done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", timeout=LIMIT_S)
            answers = [json.loads(line) for line in done.stdout.splitlines()]
        except (OSError, subprocess.TimeoutExpired, ValueError) as error:
            raise ModelError(f"{PROGRAM}: {error}") from error
        # 1 also stands for images that could not be read; each of those has a line.
        if done.returncode not in (0, 1) or len(answers) != len(paths):
            raise ModelError(
                f"{PROGRAM} ended with code {done.returncode} after {len(answers)} of {len(paths)} images: "
                f"{_last_line(done.stderr)}"
            )
        return answers


def _is_tiff(path: Path) -> bool:
    data, name = read_bytes(path)
    try:
        return image_size(data, name=name)[2] == "tiff"
    except ImageError:
        return False


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it says nothing"
