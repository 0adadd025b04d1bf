"""The Pareto picture: FPS against accuracy of everything that was measured. Drawn only where matplotlib is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgedistill.artifacts import atomic_path

CHOSEN, FRONT, REST, INK = "#c2410c", "#0b6e99", "#b9bec4", "#22272b"


def draw_pareto(record: dict[str, Any], path: Path) -> bool:
    """``record``: what tune.json holds. False, and no file, without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False

    rows = [row for row in record["measured"] if row.get("fps")]
    front = sorted((row for row in rows if row["key"] in set(record["pareto"])), key=lambda row: row["fps"])
    chosen = next((row for row in rows if row["key"] == record["chosen"]["key"]), None)
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for count, marker, label in ((1, "o", "one network"), (2, "D", "cascade")):
        some = [row for row in rows if row["stages"] == count]
        if some:
            axis.scatter(*_points(some), s=22, c=REST, marker=marker, label=label, zorder=2)
    axis.plot(*_points(front), color=FRONT, marker=".", linewidth=1.5, label="Pareto front", zorder=3)
    if chosen is not None:
        axis.scatter(*_points([chosen]), s=90, c=CHOSEN, marker="*", label="chosen", zorder=4)
    machine, metric = record["machine"], record["objective"]["metric"]
    axis.set_xlabel(f"images a second ({record['objective']['scope']})", color=INK)
    axis.set_ylabel(f"{metric} on {record['val']['images']} val images", color=INK)
    axis.set_title(f"{machine['cpu']}, {machine['cores']} cores", fontsize=9, loc="left", color=INK)
    axis.grid(color="#e6e8eb", linewidth=0.6)
    axis.legend(fontsize=8, frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=130, facecolor="white")
    return True


def _points(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    return [row["fps"] for row in rows], [row["metric"] for row in rows]
