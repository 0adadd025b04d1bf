"""Distillation of a small student, weight averaging, model.pt."""

import edgedistill.training  # noqa: F401  first: it sets how OpenMP waits, which torch reads when it loads
from edgedistill.student.distil import StudentSettings, train_student

__all__ = ["StudentSettings", "train_student"]
