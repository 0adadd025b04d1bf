"""Progress bars, tables and messages: standard error for people, standard output for the one answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

out = Console(soft_wrap=True)
err = Console(stderr=True, soft_wrap=True)


def note(message: str) -> None:
    """One line about what is happening."""
    err.print(message, markup=False, highlight=False)


def warn(message: str) -> None:
    """One line about something the user should know and may want to change."""
    err.print(f"warning: {message}", style="yellow", markup=False, highlight=False)


_said: set[str] = set()


def warn_once(message: str) -> None:
    """``warn``, unless this process has said it: what is looked at before a run and again in it."""
    if message not in _said:
        _said.add(message)
        warn(message)


@contextmanager
def progress(description: str, total: int | None) -> Iterator[Progress]:
    """A progress bar with one task (id 0); update with ``bar.update(0, advance=1, info="812 images/s")``."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[info]}"),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        bar.add_task(description, total=total, info="")
        yield bar


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table for ``out.print``; the first column is text, the others are aligned right."""
    result = Table(title=Text(title), title_justify="left")  # Text: a class may be called [bold]
    for number, column in enumerate(columns):
        result.add_column(Text(column), justify="left" if number == 0 else "right")
    for row in rows:
        result.add_row(*(Text(str(cell)) for cell in row))
    return result
