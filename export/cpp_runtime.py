"""The C++ runtime's answers for the certificate: edgedistill-classify, asked for every class's probability."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill import __version__, shard_members
from edgedistill.errors import ImageError, ModelError
from edgedistill.images import DecodeMode, image_size, read_bytes
from edgedistill.runtime.cpp_programs import CLASSIFY, HOW_TO_BUILD, classify, find_cpp_program, last_line


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
        program = find_cpp_program(CLASSIFY)
        if program is None:
            return f"{CLASSIFY} is not built; {HOW_TO_BUILD}"
        try:
            done = subprocess.run([program, "--version"], capture_output=True, text=True, errors="replace", timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"{CLASSIFY} does not start ({error}); {HOW_TO_BUILD}"
        if done.returncode != 0:
            return f"{CLASSIFY} does not start ({last_line(done.stderr)}); {HOW_TO_BUILD}"
        if done.stdout.split() != ["edgedistill", __version__]:
            return f"{CLASSIFY} says {done.stdout.strip()[:80]!r}, this is edgedistill {__version__}; {HOW_TO_BUILD}"
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
        with tempfile.TemporaryDirectory() as scratch:
            files = [shard_members.as_file(path, Path(scratch), number) for number, path in enumerate(paths)]
            for number, answer in enumerate(classify(self.program, model, files, options)):
                if "error" not in answer:
                    rows.append(number)
                    probabilities.append(answer["probabilities"])
                elif not _is_tiff(paths[number]):
                    raise ModelError(f"{CLASSIFY} cannot read what Python reads: {answer['error']}")
        shaped = np.asarray(probabilities, np.float64).astype(np.float32)
        return CppAnswers(np.asarray(rows, np.intp), shaped.astype(np.float64))


def _is_tiff(path: Path) -> bool:
    data, name = read_bytes(path)
    try:
        return image_size(data, name=name)[2] == "tiff"
    except ImageError:
        return False
