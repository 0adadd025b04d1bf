"""Distillation of a small student, weight averaging, model.pt."""

import edgedistill.training  # noqa: F401  first: it sets how OpenMP waits, which torch reads when it loads
from edgedistill.student.distil import (
    LIVE_DEFAULTS,
    StudentSettings,
    find_unlabelled,
    live_defaults,
    refuse_other_work,
    refuse_several_processes,
    train_student,
)

__all__ = [
    "LIVE_DEFAULTS",
    "StudentSettings",
    "find_unlabelled",
    "live_defaults",
    "refuse_other_work",
    "refuse_several_processes",
    "train_student",
]
