"""FPS of every candidate as one PNG: a panel per scope and input, bars at the median, whiskers over the rounds."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgedistill.artifacts import atomic_path
from edgedistill.benchmarks.target import CPP, OWN
from edgedistill.errors import UsageError

OWN_COLOR, PEER_COLOR, INK = "#0b6e99", "#b9bec4", "#22272b"
BAR_INCHES = 0.34


def check_plot(path: Path) -> None:
    """Raises UsageError, before minutes are spent measuring, for a plot that could not be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib; pip install 'edgedistill[report]'")
    if path.suffix.lower() != ".png":
        raise UsageError(f"--plot {path}: expected a name that ends in .png")


def plot_bench(record: dict[str, Any], path: Path) -> None:
    """``record``: what bench-fps writes. Raises UsageError as ``check_plot`` does."""
    check_plot(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _panels(record["results"])
    counts = [len(rows) for _, rows in panels]
    height = sum(BAR_INCHES * count + 0.95 for count in counts) + 0.7
    figure = Figure(figsize=(9, height), layout=ConstrainedLayoutEngine(h_pad=0.12))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=[count + 1.6 for count in counts])[:, 0]
    for axis, (title, rows) in zip(axes, panels, strict=True):
        _panel(axis, title, rows)
    machine = record["machine"]
    figure.suptitle(
        f"Images a second on {machine['cpu']}, {machine['cores']} cores\nmedian of {record['rounds']} interleaved rounds, "
        "whiskers from the slowest to the fastest round; panels are different work, never compare across them",
        fontsize=9,
        color=INK,
        x=0.01,
        ha="left",
    )
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")


def _panels(results: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows fastest first) of each scope and input, in the order measured."""
    blocks: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in results:
        blocks.setdefault((row["scope"], row["input"]), []).append(row)
    return [
        (f"{scope}: {name}", sorted(rows, key=lambda row: row["fps"]["median"], reverse=True))
        for (scope, name), rows in blocks.items()
    ]


def _panel(axis: Any, title: str, rows: Sequence[dict[str, Any]]) -> None:
    medians = [row["fps"]["median"] for row in rows]
    below = [row["fps"]["median"] - row["fps"]["min"] for row in rows]
    above = [row["fps"]["max"] - row["fps"]["median"] for row in rows]
    colors = [OWN_COLOR if row["candidate"] in (OWN, CPP) else PEER_COLOR for row in rows]
    places = range(len(rows))
    axis.barh(places, medians, color=colors, height=0.68)
    axis.errorbar(medians, places, xerr=[below, above], fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
    largest = max(row["fps"]["max"] for row in rows)
    for place, row in zip(places, rows, strict=True):
        ratio = row["ratio_to_naive_f32"]
        text = f"{row['fps']['median']:.0f}" if row["fps"]["median"] >= 100 else f"{row['fps']['median']:.1f}"
        text += f"  ({ratio['median']:.2f}x naive)" if ratio else ""
        axis.text(row["fps"]["max"] + 0.012 * largest, place, text, va="center", fontsize=8, color=INK)
    axis.set_yticks(places, [f"{row['candidate']}  {row['precision']}  {row['mode']}" for row in rows], fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, largest * 1.22)
    axis.set_title(title, fontsize=9, loc="left", color=INK, fontweight="bold")
    axis.tick_params(axis="x", labelsize=8)
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
