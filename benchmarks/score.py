"""One number for accuracy and speed together, as in the contest where this recipe took second place."""

from __future__ import annotations

import math

from edgedistill.errors import UsageError


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
