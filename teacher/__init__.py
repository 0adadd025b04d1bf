"""K-fold teachers and their out-of-fold soft labels."""

import edgedistill.training  # noqa: F401  first: it sets how OpenMP waits, which torch reads when it loads
from edgedistill.teacher.ensemble import BlendSettings
from edgedistill.teacher.teach import (
    Ensemble,
    NamedTeacher,
    TeacherSettings,
    read_blend,
    refuse_other_work,
    train_teachers,
)

__all__ = [
    "BlendSettings",
    "Ensemble",
    "NamedTeacher",
    "TeacherSettings",
    "read_blend",
    "refuse_other_work",
    "train_teachers",
]
