"""Targets, losses, soft labels and metrics of a network with several heads.

Its targets lie side by side as its outputs do, float32 [N, D]: probabilities of softmax and sigmoid heads, standardised
values of regression heads, NaN where a label is missing. So CutMix mixes all heads alike, and what it makes of a missing
label is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from edgedistill import task_metrics
from edgedistill.data.manifest import Dataset
from edgedistill.data.soft_label_store import BLOCK_ROWS, StoreKind, kind_for, open_store, write_store
from edgedistill.errors import ArtifactError
from edgedistill.task_metrics import Scored
from edgedistill.tasks import Floats, Head, Task, Values
from edgedistill.training.losses import (
    HardLoss,
    LossSettings,
    Targets,
    hard_loss_of,
    label_loss_of,
    loss_of,
    soft_loss_of,
)

SMALLEST = float(np.finfo(np.float32).tiny)
Scores = npt.NDArray[np.float32]


def make_task_targets(
    task: Task,
    values: Values,
    *,
    soft_scores: Scores | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> Targets:
    """Targets of all images. ``values``: float32 [N, V]. ``soft_scores``: float32 [N, D] as ``scores_of`` gives them; where
    they are NaN the hard target stands in."""
    hard = np.concatenate([_hard(head, values[:, columns]) for head, columns in task.columns()], axis=1)
    soft = hard
    if soft_scores is not None:
        tempered = np.concatenate(
            [_tempered(head, soft_scores[:, part], temperature) for head, part in task.slices()], axis=1
        )
        soft = np.where(np.isnan(tempered), hard, tempered)
    if label_smoothing:
        hard = hard.copy()
        for head, part in task.slices():
            if head.kind != "regression":
                classes = head.width if head.kind == "softmax" else 2
                hard[:, part] = hard[:, part] * (1 - label_smoothing) + label_smoothing / classes
    return Targets(torch.from_numpy(hard.astype(np.float32)), torch.from_numpy(soft.astype(np.float32)))


def _hard(head: Head, values: Values) -> npt.NDArray[np.float64]:
    if head.kind == "softmax":
        return np.where(np.isnan(values), np.nan, values == np.arange(head.width, dtype=np.float32))
    if head.kind == "sigmoid":
        return values.astype(np.float64)
    return (values.astype(np.float64) - head.mean) / head.std


def _tempered(head: Head, scores: Scores, temperature: float) -> npt.NDArray[np.float64]:
    """A head's scores as targets at that temperature; regression has none."""
    if head.kind == "regression":
        return scores.astype(np.float64)
    tensor = torch.from_numpy(scores.astype(np.float64)) / temperature
    return (torch.softmax(tensor, dim=1) if head.kind == "softmax" else torch.sigmoid(tensor)).numpy()


def task_loss(logits: torch.Tensor, targets: Targets, settings: LossSettings, task: Task) -> torch.Tensor:
    """The sum over heads of weight * mean loss over what is known, a float32 scalar. ``logits``: [B, D].

    Softmax heads: ``loss_of``. Sigmoid heads: ``label_loss_of``, and against soft labels each label as a choice between
    two, whose logits are (z, 0). Regression: smooth L1 against (1 - w) hard and w soft values. Where an image's label is
    missing and its teacher answered, the soft part alone counts: hard and soft parts are each a mean over the images that
    have them.
    """
    total = logits.new_zeros((), dtype=torch.float32)
    for head, part in task.slices():
        own, hard, soft = logits[:, part].float(), targets.hard[:, part], targets.soft[:, part]
        if head.kind == "softmax":
            loss = _softmax_loss(own, hard, soft, _of_head(settings, part))
        elif head.kind == "sigmoid":
            loss = _sigmoid_loss(own, hard, soft, _of_head(settings, part))
        else:
            loss = _regression_loss(own, hard, soft, settings.soft_weight)
        total = total + head.weight * loss
    return total


def _of_head(settings: LossSettings, part: slice) -> LossSettings:
    """The settings with the margins and weights of one head's outputs."""
    hard = settings.hard
    own = replace(hard, margins=hard.margins[part], class_weights=hard.class_weights[part])
    return replace(settings, hard=own)


def _softmax_loss(logits: torch.Tensor, hard: torch.Tensor, soft: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    known = ~torch.isnan(hard[:, 0])
    if bool(known.all()):
        return loss_of(logits, Targets(hard, soft), settings)
    weight, loss = settings.soft_weight, logits.sum() * 0.0
    if weight < 1 and bool(known.any()):
        loss = loss + (1 - weight) * hard_loss_of(logits[known], hard[known], settings.hard)
    taught = ~torch.isnan(soft[:, 0])
    if weight > 0 and bool(taught.any()):
        loss = loss + weight * soft_loss_of(logits[taught], soft[taught], settings)
    return loss


def _sigmoid_loss(logits: torch.Tensor, hard: torch.Tensor, soft: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    weight = settings.soft_weight
    loss = (1 - weight) * label_loss_of(logits, hard, settings.hard)
    if weight == 0:
        return loss
    if settings.name == "ce":
        return loss + weight * label_loss_of(logits, soft, HardLoss())
    pairs = _shares(soft)
    taught = ~torch.isnan(pairs[:, 0])
    if not bool(taught.any()):
        return loss
    return loss + weight * soft_loss_of(_as_pairs(logits)[taught], pairs[taught], settings)


def _as_pairs(logits: torch.Tensor) -> torch.Tensor:
    """[B, C] -> [B * C, 2]: (z, 0), whose softmax is (sigmoid(z), 1 - sigmoid(z))."""
    flat = logits.reshape(-1)
    return torch.stack([flat, torch.zeros_like(flat)], dim=1)


def _shares(target: torch.Tensor) -> torch.Tensor:
    """[B, C] -> [B * C, 2]: (p, 1 - p)."""
    return torch.stack([target.reshape(-1), 1 - target.reshape(-1)], dim=1)


def _regression_loss(values: torch.Tensor, hard: torch.Tensor, soft: torch.Tensor, weight: float) -> torch.Tensor:
    loss = values.sum() * 0.0
    for share, target in ((1 - weight, hard), (weight, soft)):
        known = ~torch.isnan(target)
        if share > 0 and bool(known.any()):
            loss = loss + share * F.smooth_l1_loss(values[known], target[known])
    return loss


def scores_of(task: Task, logits: Floats) -> Scores:
    """float32 [N, D], what a teacher stores: log-probabilities of softmax heads at T=1, logits of sigmoid heads,
    standardised values. Any temperature stays exact, and as logits they give the same probabilities."""
    scores = np.asarray(logits, np.float64).copy()
    for head, part in task.slices():
        if head.kind == "softmax":
            scores[:, part] = torch.log_softmax(torch.from_numpy(scores[:, part]), dim=1).numpy()
    return scores.astype(np.float32)


def scores_from(task: Task, probabilities: Floats) -> Scores:
    """``scores_of`` logits that have these probabilities, float [N, D] as ``Task.probabilities`` gives them."""
    scores = np.asarray(probabilities, np.float64).copy()
    for head, part in task.slices():
        own = scores[:, part]
        if head.kind == "regression":
            scores[:, part] = (own - head.mean) / head.std
            continue
        likely = np.log(np.maximum(own, SMALLEST))
        scores[:, part] = likely if head.kind == "softmax" else likely - np.log(np.maximum(1 - own, SMALLEST))
    return scores.astype(np.float32)


def logs_of(task: Task | None, probabilities: Floats) -> Scores:
    """``scores_from``, and of one label per image, ``task`` None, log-probabilities: float32 [N, C] as they are stored."""
    if task is not None:
        return scores_from(task, probabilities)
    return np.log(np.maximum(probabilities, SMALLEST)).astype(np.float32)


def shares_from(task: Task | None, scores: Scores) -> npt.NDArray[np.float64]:
    """What ``logs_of`` was given, float64 [N, C]."""
    return np.exp(scores.astype(np.float64)) if task is None else task.probabilities(scores)


def validation_metrics(task: Task, logits: Floats, values: Values) -> dict[str, float]:
    """The joint figures and each head's, under val_NAME and val_HEAD_NAME."""
    found = task_metrics.summary(Scored(task, task.probabilities(logits), values))
    row = {
        f"val_{name}": found[name] for name in ("accuracy", "macro_f1", "joint_macro_f1", "log_loss") if name in found
    }
    for head, figures in found["heads"].items():
        for name in ("accuracy", "macro_f1", "map", "mae"):
            if figures.get(name) is not None:
                row[f"val_{head}_{name}"] = figures[name]
    return row


# ---- soft labels on disk ----


def write_scores(
    folder: Path, task: Task, blocks: Callable[[], Iterable[Scores]], *, count: int, kind: StoreKind
) -> dict[str, dict[str, Any]]:
    """One store for each head, read from ``blocks``: float32 [n, D], ``count`` rows in all, anew for each head.

    Returns the entries of meta.json's heads. Regression is stored in its own units. ``kind``: as soft_label_store.kind_for
    has it for each head.
    """
    entries = {}
    for head, part in task.slices():
        own = (_stored(head, block[:, part]) for block in blocks())
        shape, store = (count, head.width), kind_for(head, kind)
        entry = write_store(folder, head.name, own, shape=shape, kind=store, head_kind=head.kind)
        entries[head.name] = entry | {"classes": list(head.classes)}
    return entries


def _stored(head: Head, scores: Scores) -> Scores:
    if head.kind != "regression":
        return scores
    return (scores.astype(np.float64) * head.std + head.mean).astype(np.float32)


def read_scores(folder: Path, dataset: Dataset, count: int, entries: Mapping[str, Any]) -> Scores:
    """float32 [count, D]; ``entries``: what write_scores returned. Raises ArtifactError for arrays that are not those of
    the data set's task."""
    task = dataset.task
    if task is None:
        raise ArtifactError(f"{folder}: soft labels of several heads, but the data set has one label per image")
    scores = np.empty((count, task.width), np.float32)
    for head, part in task.slices():
        entry = dict(entries.get(head.name, {}))
        store = open_store(folder, head.name, entry, count=count, class_count=head.width, head_kind=head.kind)
        for start, block in zip(range(0, count, BLOCK_ROWS), store.blocks(BLOCK_ROWS), strict=True):
            own = (block - head.mean) / head.std if head.kind == "regression" else block
            scores[start : start + BLOCK_ROWS, part] = own
    return scores
