"""Named presets of ``distill`` and ``teach``: one small TOML file each, whose options flags on the command line override."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from edgedistill.errors import UsageError


@dataclass(frozen=True)
class Recipe:
    """``options``: by flag, with '_' for '-'. ``text``: the file as it is, with its comments."""

    name: str
    summary: str
    options: dict[str, Any]
    text: str


def recipe_names() -> list[str]:
    return sorted(
        path.name.removesuffix(".toml") for path in resources.files(__name__).iterdir() if path.name.endswith(".toml")
    )


def read_recipe(name: str, *, known: Iterable[str]) -> Recipe:
    """A recipe by name, or a TOML file of the same form. ``known``: the flags that there are, with '_' for '-'.

    Raises UsageError with close matches for an unknown name or option, and for a file that cannot be read.
    """
    if name in recipe_names():
        text = resources.files(__name__).joinpath(f"{name}.toml").read_text(encoding="utf-8")
    elif name.endswith(".toml"):
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--recipe {name}: cannot be read ({error})") from error
    else:
        close = difflib.get_close_matches(name, recipe_names(), n=3, cutoff=0.4) or recipe_names()
        raise UsageError(f"no recipe called {name!r}; did you mean {', '.join(close)}? (--recipe list, or FILE.toml)")
    try:
        values = tomllib.loads(text)
        options = {key.replace("-", "_"): value for key, value in values.get("options", {}).items()}
        summary = str(values["summary"])
    except (tomllib.TOMLDecodeError, AttributeError, KeyError) as error:
        raise UsageError(f"--recipe {name}: not a recipe ({error}); expected summary and a table [options]") from error
    known = sorted(known)
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=3) or ["see distill --help"]
            flags = ", ".join(text.replace("_", "-") for text in close)
            raise UsageError(f"--recipe {name}: no option {option.replace('_', '-')}; did you mean {flags}?")
    return Recipe(name, summary, options, text)
