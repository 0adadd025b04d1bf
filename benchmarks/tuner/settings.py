"""What a user asks of the tuner."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from edgedistill.benchmarks.score import Objective
from edgedistill.errors import UsageError


@dataclass(frozen=True)
class TuneSettings:
    """``targets``: bundles or runs; the first one's openvino/ folder is written to unless ``out`` names another.

    ``data``: where the val images lie, or labelled images of the user's own. ``minutes``: for everything, also over
    several calls with ``resume``. ``sizes``: inference resolutions in pixels (empty: around each student's own).
    ``images``: at most that many val images (a fixed draw by ``seed``). ``command``: the line that repeats this.
    Raises UsageError for a value out of range.
    """

    targets: tuple[Path, ...]
    objective: Objective
    data: str | None = None
    minutes: float = 10.0
    sizes: tuple[int, ...] = ()
    images: int = 2000
    seed: int = 0
    out: Path | None = None
    resume: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        if not self.targets:
            raise UsageError("nothing to tune; give an openvino/ folder or a run")
        if not (math.isfinite(self.minutes) and 0 < self.minutes <= 1440):
            raise UsageError(f"--minutes {self.minutes:g}: expected more than 0, at most 1440")
        if any(not 32 <= size <= 4096 for size in self.sizes):
            raise UsageError(f"--sizes {','.join(map(str, self.sizes))}: expected 32 to 4096 pixels")
        if self.images < 20:
            raise UsageError(f"--images {self.images}: expected 20 or more; fewer say nothing about accuracy")
