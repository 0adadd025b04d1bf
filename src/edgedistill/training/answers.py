"""What teachers say, in the two forms that distillation needs, for a network of one head or of several.

``scores`` [N, D]: what is stored and averaged over time: log-probabilities of softmax heads, logits of sigmoid heads,
standardised values of regression heads (see heads.scores_of); a network's own outputs are scores too. ``shares`` [N, D]:
what targets hold and what an ensemble averages: probabilities, and values as they are. ``task`` None everywhere: one label
per image. Tensors keep their device and type.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from edgedistill.tasks import Task

Form = Callable[[torch.Tensor], torch.Tensor]
LEAST = 1e-12  # a probability whose logarithm is still a number


def tempered(task: Task | None, scores: torch.Tensor, temperature: float) -> torch.Tensor:
    """Scores at a temperature of their own; values of regression heads have none."""
    if task is None:
        return scores / temperature
    parts = [
        scores[:, part] if head.kind == "regression" else scores[:, part] / temperature for head, part in task.slices()
    ]
    return torch.cat(parts, dim=1)


def shares_of(task: Task | None, scores: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    scores = tempered(task, scores, temperature)
    if task is None:
        return torch.softmax(scores, dim=1)
    forms: dict[str, Form] = {
        "softmax": lambda own: torch.softmax(own, dim=1),
        "sigmoid": torch.sigmoid,
        "regression": lambda own: own,
    }
    return torch.cat([forms[head.kind](scores[:, part]) for head, part in task.slices()], dim=1)


def scores_of_shares(task: Task | None, shares: torch.Tensor, *, least: float = LEAST) -> torch.Tensor:
    """The inverse of ``shares_of`` at temperature 1; probabilities of less than ``least`` count as that."""
    if task is None:
        return shares.clamp_min(least).log()
    forms: dict[str, Form] = {
        "softmax": lambda own: own.clamp_min(least).log(),
        "sigmoid": lambda own: own.clamp_min(least).log() - (1 - own).clamp_min(least).log(),
        "regression": lambda own: own,
    }
    return torch.cat([forms[head.kind](shares[:, part]) for head, part in task.slices()], dim=1)


def confidences(task: Task | None, shares: torch.Tensor) -> torch.Tensor:
    """[N]: how sure the least sure head is, by its largest probability; of a sigmoid head's label by max(p, 1 - p)."""
    if task is None:
        return shares.max(dim=1).values
    parts = []
    for head, part in task.slices():
        own = shares[:, part]
        if head.kind == "softmax":
            parts.append(own.max(dim=1).values)
        elif head.kind == "sigmoid":
            parts.append(torch.maximum(own, 1 - own).min(dim=1).values)
    return torch.stack(parts, dim=1).min(dim=1).values


def first_choices(task: Task | None, shares: torch.Tensor) -> torch.Tensor:
    """int64 [N, H]: the likeliest class of each of the H softmax heads."""
    if task is None:
        return shares.argmax(dim=1, keepdim=True)
    parts = [shares[:, part].argmax(dim=1) for head, part in task.slices() if head.kind == "softmax"]
    return torch.stack(parts, dim=1) if parts else torch.zeros((len(shares), 0), dtype=torch.int64)
