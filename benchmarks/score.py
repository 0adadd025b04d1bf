"""One number for accuracy and speed together, as in the contest where this recipe took second place."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from edgedistill.errors import UsageError

METRICS = ("accuracy", "macro-f1")


def score(accuracy: float, fps: float, fps_target: float, w: float = 0.7) -> float:
    """``w * accuracy + (1 - w) * min(fps / fps_target, 1)``, between 0 and 1.

    ``accuracy``: 0 to 1 (or macro-F1). ``fps``: images per second in the scope that counts, usually ``files``.
    ``fps_target``: the speed beyond which more is worth nothing. ``w``: the weight of accuracy, 0 to 1.
    Raises UsageError for a value out of range.

    Worked example: 0.7292 accuracy at 162.5 FPS with a target of 200 FPS and the default weight is
    0.7 * 0.7292 + 0.3 * min(162.5 / 200, 1) = 0.51044 + 0.24375 = 0.75419.

    >>> round(score(0.7292, 162.5, 200), 5)
    0.75419
    """
    limits = (
        ("accuracy", accuracy, 0.0 <= accuracy <= 1.0, "0 to 1 (a share, not a percentage)"),
        ("weight", w, 0.0 <= w <= 1.0, "0 to 1"),
        ("fps", fps, math.isfinite(fps) and fps >= 0, "a finite number of images per second, 0 or more"),
        ("fps_target", fps_target, math.isfinite(fps_target) and fps_target > 0, "a finite number above 0"),
    )
    for name, value, good, expected in limits:
        if not good:
            raise UsageError(f"score: {name} is {value}, expected {expected}")
    return w * accuracy + (1 - w) * min(fps / fps_target, 1.0)


@dataclass(frozen=True)
class Objective:
    """What a deployment is chosen for: one of three goals.

    - 'score': the largest ``score`` (needs ``fps_target``).
    - 'accuracy': the largest metric among those with FPS >= ``min_fps`` and p99 <= ``max_p99_ms`` (one or both given).
    - 'fps': the fastest among those whose metric falls by at most ``max_drop`` below the reference, the best FP32 network
      at the resolution that it was trained at.

    ``metric``: 'accuracy' or 'macro-f1'. ``scope``: where FPS and latency are measured. Raises UsageError for values out
    of range and for goals that contradict.
    """

    w: float = 0.7
    fps_target: float | None = None
    metric: str = "accuracy"
    scope: str = "files"
    min_fps: float | None = None
    max_p99_ms: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        if self.metric not in METRICS:
            raise UsageError(f"--metric {self.metric}: expected one of {', '.join(METRICS)}")
        if self.scope not in ("model", "frames", "files"):
            raise UsageError(f"--scope {self.scope}: expected model, frames or files")
        for name, value in (("--min-fps", self.min_fps), ("--max-p99-ms", self.max_p99_ms)):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise UsageError(f"{name} {value}: expected a finite number above 0")
        if self.max_drop is not None and not 0 <= self.max_drop < 1:
            raise UsageError(f"--max-drop {self.max_drop}: expected 0 to 1 (a share: 0.01 is one point)")
        if self.max_drop is not None and (self.min_fps is not None or self.max_p99_ms is not None):
            raise UsageError(
                "--max-drop asks for the fastest, --min-fps and --max-p99-ms for the most accurate; give one of them"
            )
        if self.goal == "score" and self.fps_target is None:
            raise UsageError(
                "nothing to choose by; give --fps-target (for the score), --min-fps or --max-p99-ms (the most accurate"
                " that is fast enough), or --max-drop (the fastest that is accurate enough)"
            )
        score(0.0, 0.0, 1.0 if self.fps_target is None else self.fps_target, self.w)

    @property
    def goal(self) -> Literal["score", "accuracy", "fps"]:
        if self.max_drop is not None:
            return "fps"
        return "accuracy" if self.min_fps is not None or self.max_p99_ms is not None else "score"

    def value(self, accuracy: float, fps: float, *, p99_ms: float = math.inf, reference: float = 0.0) -> float:
        """What is to be as large as possible: below 0 where a condition is broken, by how much it is broken.

        ``p99_ms`` counts under ``max_p99_ms``, ``reference`` (the metric that ``max_drop`` is taken from) under that.
        """
        if self.goal == "score":
            return score(accuracy, fps, self.fps_target or 1.0, self.w)
        if self.goal == "fps":
            missing = reference - (self.max_drop or 0.0) - accuracy
            # A hair of slack: 3 of 300 images is 0.01 on paper and 0.010000000000000009 in binary.
            return fps if missing <= 1e-9 else -missing
        short = 0.0 if self.min_fps is None else 1 - fps / self.min_fps
        late = 0.0 if self.max_p99_ms is None else 1 - self.max_p99_ms / max(p99_ms, 1e-9)
        broken = max(short, late)
        return accuracy if broken <= 0 else -broken

    def describe(self) -> str:
        """The goal in words."""
        if self.goal == "fps":
            return f"the fastest with at most {self.max_drop:g} less {self.metric} than the best FP32 network"
        if self.goal == "accuracy":
            limits = []
            if self.min_fps is not None:
                limits.append(f"FPS >= {self.min_fps:g}")
            if self.max_p99_ms is not None:
                limits.append(f"p99 <= {self.max_p99_ms:g} ms")
            return f"the best {self.metric} with {' and '.join(limits)}"
        return f"score = {self.w:g} x {self.metric} + {1 - self.w:g} x min(FPS / {self.fps_target:g}, 1)"
