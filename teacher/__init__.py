"""K-fold teachers and their out-of-fold soft labels."""

import edgedistill.training  # noqa: F401  first: it sets how OpenMP waits, which torch reads when it loads
from edgedistill.teacher.teach import TeacherSettings, train_teachers

__all__ = ["TeacherSettings", "train_teachers"]
