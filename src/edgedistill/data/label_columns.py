"""Which columns of a CSV file are labels, and what they say: attributes, several labels per image, values. numpy only.

- ``attributes``: a column for each, one class per image and column (mask, gender, age)
- ``multi_label``: the column label with 'a|b'; '|' alone where none applies
- ``one_hot``: a column for each label with 0, 1 or a share between
- ``regression``: columns of numbers, learned beside any of these or beside the single label
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from edgedistill import console
from edgedistill.errors import ArtifactError, DataError, UsageError
from edgedistill.tasks import MANY, SINGLE, Head, Task, Values

SEPARATOR = "|"
RESERVED = frozenset({"path", "group", "split"})
SHOWN_LINES = 5
MAX_LABELS = 10_000
DEFAULT_WEIGHT = 0.1
PANDAS_MISSING = frozenset({"nan", "NaN", "<NA>"})  # what pandas writes and shows for a cell without a value


@dataclass(frozen=True)
class LabelColumns:
    """``regression_weight``: of the loss of every regression column. ``missing``: 'error', or 'ignore', which leaves an
    image out of the losses of the columns in which it has no value. Raises UsageError for what contradicts."""

    attributes: tuple[str, ...] = ()
    multi_label: bool = False
    one_hot: tuple[str, ...] = ()
    regression: tuple[str, ...] = ()
    regression_weight: float = DEFAULT_WEIGHT
    missing: Literal["error", "ignore"] = "error"

    def __post_init__(self) -> None:
        for name in ("attributes", "one_hot", "regression"):
            object.__setattr__(self, name, tuple(column.strip().lower() for column in getattr(self, name)))
        given = [
            name
            for name, used in (
                ("--label-columns", self.attributes),
                ("--multi-label", self.multi_label),
                ("--one-hot-columns", self.one_hot),
            )
            if used
        ]
        if len(given) > 1:
            raise UsageError(f"{' and '.join(given)} contradict each other; give one of them")
        names = self.columns
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise UsageError(f"label column {twice[0]!r} is named twice; name each once")
        wrong = sorted(RESERVED & set(names))
        if wrong:
            raise UsageError(f"column {wrong[0]!r} cannot be a label; expected other columns than path, group, split")
        if self.missing not in ("error", "ignore"):
            raise UsageError(f"--missing-labels {self.missing}: expected error or ignore")
        if not 0 < self.regression_weight < math.inf:
            raise UsageError(f"--regression-weight {self.regression_weight:g}: expected a number above 0")
        if self.regression_weight != DEFAULT_WEIGHT and not self.regression:
            raise UsageError("--regression-weight needs --regression, which names the columns that it weighs")
        if self.missing == "ignore" and not self:
            raise UsageError(
                "--missing-labels ignore needs --label-columns, --multi-label, --one-hot-columns or --regression"
            )

    def __bool__(self) -> bool:
        """Whether anything but the single label is asked for."""
        return bool(self.attributes or self.multi_label or self.one_hot or self.regression)

    def flags(self) -> list[str]:
        """The words of a command line that say this."""
        words: list[str] = []
        for flag, columns in (
            ("--label-columns", self.attributes),
            ("--one-hot-columns", self.one_hot),
            ("--regression", self.regression),
        ):
            words += [flag, ",".join(columns)] if columns else []
        words += ["--multi-label"] if self.multi_label else []
        if self.regression_weight != DEFAULT_WEIGHT:
            words += ["--regression-weight", f"{self.regression_weight:g}"]
        return words + (["--missing-labels", self.missing] if self.missing != "error" else [])

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of all label columns."""
        main = self.attributes or self.one_hot or (SINGLE,)
        return (*main, *self.regression)


def check_header(path: Path, header: Sequence[str], wanted: LabelColumns) -> list[str]:
    """The columns that are not read. Raises DataError for columns that are not there or stand twice."""
    missing = [name for name in ("path", *wanted.columns) if name not in header]
    repeated = sorted({name for name in header if header.count(name) > 1})
    if missing or repeated:
        parts = [
            f"{word} {', '.join(map(repr, names))}"
            for word, names in (("missing", missing), ("repeated", repeated))
            if names
        ]
        raise DataError(
            f"{path}: line 1: columns {'; '.join(parts)}; it has {', '.join(map(repr, header))}; name label columns as "
            "they stand there"
        )
    return [name for name in header if name not in {*wanted.columns, *RESERVED}]


def read_labels(path: Path, rows: Sequence[tuple[int, dict[str, str]]], wanted: LabelColumns) -> tuple[Task, Values]:
    """(task, values float32 [N, V]) of the rows of a CSV file, each with its line number.

    Raises DataError that counts and names lines: missing values where they are not ignored, what is no number, shares
    outside 0 to 1, a column with one value only, a label that applies to every image or to none.
    """
    cells = {name: [_text(row[name]) for _, row in rows] for name in wanted.columns}
    lines = [line for line, _ in rows]
    if wanted.missing == "error":
        for name, column in cells.items():
            _refuse(
                path, name, [line for line, cell in zip(lines, column, strict=True) if not cell], len(rows), _MISSING
            )
    heads: list[Head] = []
    parts: list[Values] = []
    if wanted.multi_label:
        _add(heads, parts, _many(path, lines, cells[SINGLE]))
    elif wanted.one_hot:
        numbers = [_numbers(path, name, lines, cells[name], share=True) for name in wanted.one_hot]
        _add(heads, parts, (_head(path, MANY, "sigmoid", wanted.one_hot), np.stack(numbers, axis=1)))
    else:
        for name in wanted.attributes or (SINGLE,):
            _add(heads, parts, _attribute(path, name, cells[name]))
    for name in wanted.regression:
        head = Head(name, "regression", weight=wanted.regression_weight)
        _add(heads, parts, (head, _numbers(path, name, lines, cells[name], share=False)[:, None]))
    try:
        task = Task(tuple(heads))
    except ArtifactError as error:
        raise DataError(f"{path}: {error}") from error
    values = np.concatenate(parts, axis=1)
    _check_variety(path, task, values)
    return task, values


_MISSING = "no value; fill it in, delete the row, or --missing-labels ignore leaves these images out of its loss"


def _text(cell: str) -> str:
    text = unicodedata.normalize("NFC", cell.strip())
    return "" if text in PANDAS_MISSING else text


def _refuse(path: Path, column: str, lines: Sequence[int], count: int, what: str) -> None:
    if lines:
        shown = ", ".join(map(str, lines[:SHOWN_LINES])) + (", ..." if len(lines) > SHOWN_LINES else "")
        raise DataError(f"{path}: column {column!r}: {len(lines)} of {count} rows (lines {shown}): {what}")


def _add(heads: list[Head], parts: list[Values], found: tuple[Head, Values]) -> None:
    heads.append(found[0])
    parts.append(found[1])


def _head(path: Path, name: str, kind: Literal["softmax", "sigmoid"], classes: Sequence[str]) -> Head:
    try:
        return Head(name, kind, tuple(classes))
    except ArtifactError as error:
        raise DataError(f"{path}: column {name!r}: {error}") from error


def _attribute(path: Path, name: str, cells: Sequence[str]) -> tuple[Head, Values]:
    classes = sorted({cell for cell in cells if cell})
    if len(classes) < 2:
        found = f"the single value {classes[0]!r}" if classes else "no value at all"
        raise DataError(f"{path}: column {name!r} has {found}; expected two classes or more, or leave the column out")
    number = {text: float(code) for code, text in enumerate(classes)}
    values = np.array([[number.get(cell, math.nan)] for cell in cells], np.float32)
    return _head(path, name, "softmax", classes), values


def _many(path: Path, lines: Sequence[int], cells: Sequence[str]) -> tuple[Head, Values]:
    """'a|b' -> a column for each label; '|' alone: none applies; an empty cell: not known."""
    sets = [{part.strip() for part in cell.split(SEPARATOR) if part.strip()} for cell in cells]
    classes = sorted(set().union(*sets))
    if not classes or len(classes) > MAX_LABELS:
        raise DataError(
            f"{path}: {len(classes)} different labels, expected 1 to {MAX_LABELS}, separated by {SEPARATOR!r}"
        )
    other = next((name for name in classes if "," in name or ";" in name), None)
    if other is not None:
        console.warn_once(f"{path}: {other!r} counts as one label; several are separated by {SEPARATOR!r}")
    column = {name: number for number, name in enumerate(classes)}
    values = np.zeros((len(cells), len(classes)), np.float32)
    for row, (cell, labels) in enumerate(zip(cells, sets, strict=True)):
        values[row, [column[name] for name in labels]] = 1.0
        if not cell:
            values[row] = math.nan
    return _head(path, MANY, "sigmoid", classes), values


def _numbers(path: Path, name: str, lines: Sequence[int], cells: Sequence[str], *, share: bool) -> Values:
    """float32 [N], NaN for an empty cell."""
    values = np.array([_number(cell) if cell else math.nan for cell in cells], np.float32)
    filled = np.array([bool(cell) for cell in cells])

    def refuse(wrong: np.ndarray, what: str) -> None:
        _refuse(path, name, [lines[row] for row in np.flatnonzero(wrong & filled).tolist()], len(cells), what)

    refuse(~np.isfinite(values), "not a finite number with a point for decimals; mend it")
    if share:
        refuse(~((values >= 0) & (values <= 1)), "outside 0 to 1; a label applies with 1, does not with 0")
    return values


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.inf


def _check_variety(path: Path, task: Task, values: Values) -> None:
    """Each label applies to some images and not to all; each value varies. NaN counts for neither."""
    for head, columns in task.columns():
        if head.kind == "softmax":
            continue
        names = head.classes or (head.name,)
        for name, column in zip(names, values[:, columns].T, strict=True):
            known = column[~np.isnan(column)] if head.kind == "regression" else column[~np.isnan(column)] >= 0.5
            if not len(known) or known.min() == known.max():
                what = "no value at all" if not len(known) else f"the single value {known[0]:g}"
                if head.kind == "sigmoid" and len(known):
                    what = f"{'every' if known[0] else 'no'} image to which it applies"
                raise DataError(f"{path}: label column {name!r} has {what}; leave it out or add images")
