"""What a section is made of. The template knows how to draw each block; the sections decide what goes into it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from markupsafe import Markup


@dataclass(frozen=True)
class Text:
    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Heading:
    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True)
class Callout:
    """A sentence that must not be overlooked. ``level``: 'good', 'bad' or 'note'."""

    kind: ClassVar[str] = "callout"
    level: str
    text: str


@dataclass(frozen=True)
class Sentences:
    """A list of (level, sentence), marked as callouts are but quieter."""

    kind: ClassVar[str] = "sentences"
    items: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Missing:
    """One line: what is not there yet and the command that makes it."""

    kind: ClassVar[str] = "missing"
    what: str
    command: str


@dataclass(frozen=True)
class Bar:
    """A table cell drawn as a bar; ``share`` is 0..1 of the longest."""

    share: float
    color: str = "accent"


@dataclass(frozen=True)
class Table:
    """The first column holds row headers. ``numeric``: the other columns are aligned right."""

    kind: ClassVar[str] = "table"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | Bar, ...], ...]
    numeric: bool = True
    colors: tuple[str, ...] = ()  # one per row: the colour that this row has in the charts
    strong_row: int | None = None


@dataclass(frozen=True)
class Figure:
    title: str
    svg: Markup
    note: str = ""


@dataclass(frozen=True)
class Key:
    """One entry of a legend: the same colour class and dash as in the charts."""

    label: str
    color: str
    dash: str = ""


@dataclass(frozen=True)
class Charts:
    kind: ClassVar[str] = "charts"
    figures: tuple[Figure, ...]
    legend: tuple[Key, ...] = ()


@dataclass(frozen=True)
class MatrixCell:
    count: int
    share: float  # of its row
    heat: float  # 0..1
    right: bool


@dataclass(frozen=True)
class Matrix:
    kind: ClassVar[str] = "matrix"
    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, int, tuple[MatrixCell, ...]], ...]  # (true class, images, cells)


@dataclass(frozen=True)
class Picture:
    """``data``: a data URI, or '' where the file cannot be shown and ``problem`` says why."""

    data: str
    name: str
    predicted: str
    predicted_probability: float
    true: str
    true_probability: float
    problem: str = ""


@dataclass(frozen=True)
class Gallery:
    kind: ClassVar[str] = "gallery"
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Sheet:
    """One picture over the whole width. ``data``: a data URI."""

    kind: ClassVar[str] = "sheet"
    data: str
    alt: str


@dataclass(frozen=True)
class Facts:
    kind: ClassVar[str] = "facts"
    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Code:
    kind: ClassVar[str] = "code"
    text: str


@dataclass(frozen=True)
class Card:
    label: str
    value: str
    detail: str
    color: str = ""


@dataclass(frozen=True)
class Cards:
    kind: ClassVar[str] = "cards"
    cards: tuple[Card, ...]


@dataclass(frozen=True)
class Details:
    """Folded away on screen, opened on paper."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: tuple[Block, ...]


Block = (
    Text
    | Heading
    | Callout
    | Sentences
    | Missing
    | Table
    | Charts
    | Matrix
    | Gallery
    | Sheet
    | Facts
    | Code
    | Cards
    | Details
)


@dataclass(frozen=True)
class Section:
    anchor: str
    title: str
    blocks: tuple[Block, ...] = field(default_factory=tuple)
