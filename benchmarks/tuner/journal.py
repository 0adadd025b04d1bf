"""Every measurement as it is taken, one JSON line each, and the logits beside it: a killed tuning goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill.artifacts import append_jsonl, read_array, read_jsonl, write_array, write_text
from edgedistill.errors import ArtifactError, UsageError

Clock = Callable[[], float]
JOURNAL = "journal.jsonl"


class Journal:
    """What was measured in ``folder``. ``fingerprint``: what has to be equal for old measurements to count.

    Without ``resume`` an older journal is replaced. Raises UsageError when it was made for something else, ArtifactError
    when the folder cannot be written.
    """

    def __init__(
        self, folder: Path, fingerprint: dict[str, Any], *, resume: bool, clock: Clock = time.monotonic
    ) -> None:
        self.folder, self._clock = folder, clock
        self._path = folder / JOURNAL
        rows = read_jsonl(self._path) if resume else []
        self.rows = [row for row in rows if isinstance(row, dict)]
        if self.rows and self.rows[0].get("fingerprint") != fingerprint:
            theirs = self.rows[0].get("fingerprint")
            changed = [
                key for key in fingerprint if not isinstance(theirs, dict) or theirs.get(key) != fingerprint[key]
            ]
            raise UsageError(
                f"{self._path}: was measured with other {', '.join(changed)}; run without --resume to measure again"
            )
        self.resumed = bool(self.rows)
        self._before_s = max((float(row.get("elapsed_s", 0.0)) for row in self.rows), default=0.0)
        self._start = clock()
        if not self.rows:
            self.rows = [{"kind": "start", "fingerprint": fingerprint, "elapsed_s": 0.0}]
        # Whole lines only: what follows a torn last line would be lost with it.
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in self.rows))

    @classmethod
    def read(cls, folder: Path) -> Journal:
        """What is there, to look at: nothing is written. Raises ArtifactError when there is no journal."""
        rows = [row for row in read_jsonl(folder / JOURNAL) if isinstance(row, dict)]
        if not rows or "fingerprint" not in rows[0]:
            raise ArtifactError(f"{folder / JOURNAL}: no tuning's journal; name a folder that 'edgedistill tune' wrote")
        found = cls.__new__(cls)
        found.folder, found.rows, found.resumed = folder, rows, True
        return found

    @property
    def elapsed_s(self) -> float:
        """Since the beginning, over all calls."""
        return self._before_s + self._clock() - self._start

    def add(self, kind: str, **values: Any) -> dict[str, Any]:
        row = {"kind": kind, **values, "elapsed_s": round(self.elapsed_s, 3)}
        try:
            append_jsonl(self._path, row)
        except OSError as error:
            raise ArtifactError(
                f"{self._path}: cannot be written ({error.strerror}); free some space and go on with --resume"
            ) from error
        self.rows.append(row)
        return row

    def find(self, kind: str, **values: Any) -> dict[str, Any] | None:
        """The last row of that kind with those values."""
        for row in reversed(self.rows):
            if row.get("kind") == kind and all(row.get(name) == value for name, value in values.items()):
                return row
        return None

    def keep_logits(self, key: str, logits: npt.NDArray[np.float32], **values: Any) -> None:
        number = sum(row.get("kind") == "logits" for row in self.rows)
        name = f"logits-{number:03d}.npy"
        write_array(self.folder / name, logits)
        self.add("logits", key=key, file=name, **values)

    def kept_logits(self, key: str, shape: tuple[int, int]) -> npt.NDArray[np.float32] | None:
        """float32 [N, D] of an earlier call; None where there are none, or they are damaged."""
        row = self.find("logits", key=key)
        if row is None or not isinstance(row.get("file"), str):
            return None
        try:
            logits = read_array(self.folder / Path(row["file"]).name)
        except ArtifactError:
            return None
        return logits if logits.shape == shape and logits.dtype == np.float32 else None
