"""What the benchmarks that run as modules share: the line that repeats one, and how it ends."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import NoReturn

from edgedistill import console
from edgedistill.errors import EdgedistillError


def module_command(name: str) -> str:
    """The command line of this process, a benchmark run as ``python -m edgedistill.benchmarks.NAME``."""
    return shlex.join(["python", "-m", f"edgedistill.benchmarks.{name}", *sys.argv[1:]])


def exit_with(main: Callable[[], int]) -> NoReturn:
    """Ends the process with the code of ``main``; an EdgedistillError is shown in one line and gives its own code."""
    try:
        sys.exit(main())
    except EdgedistillError as problem:
        console.err.print(f"error: {problem}", style="red", markup=False, highlight=False)
        sys.exit(problem.exit_code)
