"""What the benchmarks that run as modules share: the line that repeats one, and how it ends."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from typing import NoReturn

from edgedistill import console
from edgedistill.errors import EdgedistillError


def module_command(name: str) -> str:
    """The command line of this process, a benchmark run as ``python -m edgedistill.benchmarks.NAME``."""
    return shlex.join(["python", "-m", f"edgedistill.benchmarks.{name}", *sys.argv[1:]])


def module_parser(name: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the docstring ``doc`` as it stands."""
    program = f"python -m edgedistill.benchmarks.{name}"
    return argparse.ArgumentParser(prog=program, description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_photo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", nargs="*", default=[], help="a small and a large JPEG (default: scikit-learn's)")


def add_round_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=2.0, help="per candidate and round")


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the code of ``main``; an EdgedistillError is shown in one line and gives its own code."""
    try:
        sys.exit(main())
    except EdgedistillError as problem:
        console.err.print(f"error: {problem}", style="red", markup=False, highlight=False)
        sys.exit(problem.exit_code)
