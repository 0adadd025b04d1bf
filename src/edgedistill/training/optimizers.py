"""Optimisers, and the learning rate of each step."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from edgedistill.training.loader import Draw
from edgedistill.training.settings import TrainSettings


@dataclass(frozen=True, eq=False)
class Phase:
    """Some epochs over one set of rows. The rate falls from ``lr`` to ``final_lr`` on a cosine per step.

    ``average``: the weights at the end of these epochs are averaged.
    """

    name: str
    epochs: int
    draw: Draw
    lr: float
    final_lr: float
    warmup_epochs: float = 0.0
    average: bool = False


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Weight decay falls on matrices and kernels alone, not on biases and norms."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # foreach: one kernel over many tensors; on a CPU torch would otherwise loop over each of a network's ~200 tensors.
    if settings.optimizer == "radam":
        return torch.optim.RAdam(groups, lr=settings.lr, decoupled_weight_decay=True, foreach=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, foreach=True)
    return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, foreach=True)


def learning_rate(phase: Phase, epoch: int, step: int) -> float:
    """Linear warm-up, then half a cosine from ``lr`` to ``final_lr`` over the phase; ``epoch`` counts within it."""
    done = epoch * phase.draw.steps + step
    total = phase.epochs * phase.draw.steps
    warmup = round(phase.warmup_epochs * phase.draw.steps)
    if done < warmup:
        return phase.lr * (done + 1) / (warmup + 1)
    share = (done - warmup) / max(1, total - warmup)
    return phase.final_lr + (phase.lr - phase.final_lr) * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
