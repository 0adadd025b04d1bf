"""The evaluation of networks with several heads: the joint score and every head, with intervals and paired tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgedistill import console
from edgedistill.task_metrics import Scored, bootstrap_interval, paired_difference, statistics_of, summary
from edgedistill.tasks import Task, Values

Probabilities = npt.NDArray[np.float32]
# The figure that a table shows of a head of each kind, and its name there.
SHOWN = {"softmax": ("accuracy", "accuracy"), "sigmoid": ("map", "mAP"), "regression": ("mae", "MAE")}


def task_evaluation(
    task: Task,
    probabilities: dict[str, Probabilities],
    values: Values,
    *,
    pairs: Sequence[tuple[str, str]],
    own: Mapping[str, Task] | None = None,
) -> dict[str, Any]:
    """evaluation.json: as for one label per image, ``accuracy`` being the joint score and ``macro_f1`` the mean over
    heads and, of several attributes, ``joint_macro_f1`` that of their joint classes; ``heads`` describes them, and each
    model has their figures by name. ``own``: the task of a model whose labels have thresholds of their own, which its
    figures then say as ``task``."""
    own = {name: theirs for name, theirs in (own or {}).items() if theirs != task}
    scored = {name: Scored(own.get(name, task), found, values) for name, found in probabilities.items()}
    return {
        "split": "test",
        "n": len(values),
        "classes": list(task.outputs),
        "heads": task.to_dict(),
        "models": {
            name: _row(one) | ({"task": own[name].to_dict()} if name in own else {}) for name, one in scored.items()
        },
        "paired": [
            {"a": a, "b": b, "metric": metric} | paired_difference(metric, scored[a], scored[b])
            for a, b in pairs
            for metric in statistics_of(task)
        ],
    }


def _row(scored: Scored) -> dict[str, Any]:
    return summary(scored) | {
        f"{metric}_ci95": bootstrap_interval(metric, scored) for metric in statistics_of(scored.task)
    }


def priors(task: Task, values: Values, count: int) -> Probabilities:
    """What an answer that looks at no image would be, [count, D]: class shares, how often a label applies, medians.

    ``values``: float32 [N, V] of the training images.
    """
    parts = []
    for head, columns in task.columns():
        own = values[:, columns].astype(np.float64)
        if head.kind == "softmax":
            known = own[~np.isnan(own[:, 0]), 0].astype(np.int64)
            parts.append(np.bincount(known, minlength=head.width) / max(1, len(known)))
        elif head.kind == "sigmoid":
            parts.append(np.nan_to_num(np.nanmean(own, axis=0)))
        else:
            parts.append(np.nanmedian(own, axis=0) if not np.isnan(own).all() else np.array([head.mean]))
    return np.tile(np.concatenate(parts).astype(np.float32), (count, 1))


def head_table(evaluation: dict[str, Any]) -> Any:
    """The joint score and one figure of each head as a table for ``console.out.print``."""
    heads = [(str(head["name"]), *SHOWN[head["kind"]]) for head in evaluation["heads"]]
    joint = [name for name in ("joint_macro_f1",) if all(name in row for row in evaluation["models"].values())]
    rows = []
    for name, row in evaluation["models"].items():
        low, high = row["accuracy_ci95"]
        figures = [row["heads"][head].get(figure) for head, figure, _ in heads]
        shown = ["-" if figure is None else f"{figure:.3f}" for figure in figures]
        f1 = [f"{row[figure]:.3f}" for figure in ("macro_f1", *joint)]
        rows.append([name.replace("_", "-"), f"{row['accuracy']:.3f} [{low:.3f}, {high:.3f}]", *f1, *shown])
    columns = (
        "model",
        "all right [95%]",
        "macro-F1",
        *("joint macro-F1" for _ in joint),
        *(f"{head}: {word}" for head, _, word in heads),
    )
    return console.table(f"test split, {evaluation['n']} images", columns, rows)
