"""The columns of dataset.csv that hold several labels per image: their names say what they are.

``softmax:NAME`` the class, ``sigmoid:NAME:LABEL`` 0 to 1, ``regression@WEIGHT:NAME`` a number; an empty cell: not known.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from edgedistill.errors import ArtifactError
from edgedistill.tasks import Head, Task, Values

COLUMN = re.compile(r"(softmax|sigmoid|regression@(?P<weight>[0-9.e+-]+)):(?P<name>[^:]+)(:(?P<label>.+))?", re.S)


def column_names(task: Task) -> list[str]:
    names = []
    for head in task.heads:
        if head.kind == "sigmoid":
            names += [f"sigmoid:{head.name}:{label}" for label in head.classes]
        else:
            names.append(f"softmax:{head.name}" if head.classes else f"regression@{head.weight!r}:{head.name}")
    return names


def cells(task: Task, values: Values) -> list[list[str]]:
    """The columns as text, in the order of ``column_names``."""
    columns = []
    for head, part in task.columns():
        for column in values[:, part].T:
            known = [not math.isnan(value) for value in column.tolist()]
            if head.kind == "softmax":
                text = [head.classes[int(value)] if there else "" for value, there in zip(column, known, strict=True)]
            else:
                text = [f"{value:.9g}" if there else "" for value, there in zip(column, known, strict=True)]
            columns.append(text)
    return columns


def read_task(names: Sequence[str], columns: Sequence[Sequence[str]], path: Path) -> tuple[Task, Values]:
    """What ``column_names`` and ``cells`` wrote. Raises ArtifactError that names the column."""
    found = [COLUMN.fullmatch(name) for name in names]
    for name, match in zip(names, found, strict=True):
        if match is None or (match["label"] is not None) != name.startswith("sigmoid"):
            raise ArtifactError(f"{path}: line 1: column {name!r} is none that edgedistill writes")
    matches = [match for match in found if match is not None]
    heads: list[Head] = []
    parts: list[Values] = []
    try:
        for name in dict.fromkeys(match["name"] for match in matches):
            own = [number for number, match in enumerate(matches) if match["name"] == name]
            first = matches[own[0]]
            if first["label"] is not None:
                heads.append(Head(name, "sigmoid", tuple(matches[number]["label"] for number in own)))
            elif first["weight"] is not None:
                heads.append(Head(name, "regression", weight=float(first["weight"])))
            else:
                heads.append(Head(name, "softmax", tuple(sorted(set(columns[own[0]]) - {""}))))
            if len(own) != heads[-1].column_count:
                raise ArtifactError(f"column {name!r} stands {len(own)} times")
            parts += [_values(heads[-1], columns[number]) for number in own]
        return Task(tuple(heads)), np.stack(parts, axis=1)
    except (ArtifactError, ValueError) as error:
        raise ArtifactError(f"{path}: label columns: {error}") from error


def _values(head: Head, column: Sequence[str]) -> Values:
    if head.kind == "softmax":
        number = {text: float(code) for code, text in enumerate(head.classes)}
        return np.array([number.get(cell, math.nan) for cell in column], np.float32)
    values = np.array([float(cell) if cell else math.nan for cell in column], np.float32)
    if np.isinf(values).any() or (head.kind == "sigmoid" and ((values < 0) | (values > 1)).any()):
        raise ArtifactError(f"column {head.name!r}: a value is out of range")
    return values


def standardised(task: Task, values: Values, train: npt.NDArray[np.bool_]) -> Task:
    """The task with the mean and standard deviation of its training images' values. ``train``: bool [N]."""
    heads = []
    for head, columns in task.columns():
        if head.kind == "regression":
            known = values[train, columns].astype(np.float64)
            known = known[~np.isnan(known)]
            if len(known) and known.std() > 0:
                head = dataclasses.replace(head, mean=float(known.mean()), std=float(known.std()))
        heads.append(head)
    return Task(tuple(heads))
