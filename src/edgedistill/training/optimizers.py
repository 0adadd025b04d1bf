"""Optimisers by name, and the learning rate of each step.

torch's own where it has them; every other name goes to timm's factory (timm.optim.create_optimizer_v2), with
'lookahead_NAME' for Lookahead (Zhang et al., 1907.08610) around any of them.
"""

from __future__ import annotations

import difflib
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from edgedistill.errors import UsageError
from edgedistill.timm_import import import_timm
from edgedistill.training.loader import Draw
from edgedistill.training.settings import TORCH_OPTIMIZERS, ScheduleName, TrainSettings

# Ranger is Lookahead around RAdam; 'over9000' is it around LAMB's layer-wise rates (Ralamb there).
# Decoupled weight decay, as of our 'radam': timm calls that RAdam radamw.
OPTIMIZER_ALIASES = {"ranger": "lookahead_radamw", "over9000": "lookahead_lamb"}
TRIAL_STEPS = 7  # Lookahead first moves its slow weights in step 6


@dataclass(frozen=True, eq=False)
class Phase:
    """Some epochs over one set of rows, with the learning rate of ``learning_rate``.

    ``decay``: factor per epoch, for the exponential schedule. ``average``: the weights at the end of these epochs are
    averaged.
    """

    name: str
    epochs: int
    draw: Draw
    lr: float
    final_lr: float
    warmup_epochs: float = 0.0
    average: bool = False
    schedule: ScheduleName = "cosine"
    decay: float = 1.0


def resolve_optimizer(name: str) -> str:
    """The name that ``make_optimizer`` builds, after some steps on a tiny tensor that prove it usable here.

    Raises UsageError with close matches for an unknown name, and with the reason for one that needs another package, a
    GPU or second derivatives.
    """
    full = OPTIMIZER_ALIASES.get(name, name)
    if full not in TORCH_OPTIMIZERS:
        base = full.removeprefix("lookahead_")
        known = sorted({*TORCH_OPTIMIZERS, *OPTIMIZER_ALIASES, *_timm_optimizers()})
        if base not in known or base in OPTIMIZER_ALIASES:
            close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
            hint = f"did you mean {', '.join(close)}?" if close else f"such as {', '.join(TORCH_OPTIMIZERS)}, ranger"
            raise UsageError(f"no optimizer called {name!r}; {hint} (timm's names, lookahead_NAME)")
        _try_optimizer(name, full)
    return full


@functools.cache
def _timm_optimizers() -> tuple[str, ...]:
    import_timm()
    from timm.optim import list_optimizers

    return tuple(list_optimizers())


@functools.cache
def _try_optimizer(name: str, full: str) -> None:
    weights = nn.Parameter(torch.ones(4, 4))
    try:
        optimizer = _timm_optimizer(full, [{"params": [weights], "weight_decay": 1e-4}], 1e-3)
        if getattr(optimizer, "is_second_order", False):
            raise RuntimeError("it needs second derivatives")
        for _ in range(TRIAL_STEPS):
            weights.square().sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if not torch.isfinite(weights).all():
            raise RuntimeError("its weights stop being finite")
    except Exception as error:  # a package that is missing, a GPU that is not there: each fails in its own way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"optimizer {name!r} cannot be used here: {reason}; choose another") from error


def make_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """Weight decay falls on matrices and kernels alone, not on biases and norms. Raises UsageError."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    # foreach: one kernel over many tensors; on a CPU torch would otherwise loop over each of a network's ~200 tensors.
    if settings.optimizer == "radam":
        return torch.optim.RAdam(groups, lr=settings.lr, decoupled_weight_decay=True, foreach=True)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, foreach=True)
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=settings.lr, foreach=True)
    if settings.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=settings.lr, momentum=0.9, nesterov=True, foreach=True)
    return _timm_optimizer(resolve_optimizer(settings.optimizer), groups, settings.lr)


def _timm_optimizer(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """Lookahead keeps its slow weights in the base optimiser's state, and so in every checkpoint."""
    import_timm()
    from timm.optim import create_optimizer_v2

    optimizer: torch.optim.Optimizer = create_optimizer_v2(groups, opt=name, lr=lr)
    return optimizer


def learning_rate(phase: Phase, epoch: int, step: int) -> float:
    """Linear warm-up from 0 to ``lr``, then by ``schedule``; ``epoch`` counts within the phase.

    'cosine': half a cosine per step from ``lr`` to ``final_lr`` at the end of the phase. 'exponential': ``lr *
    decay**epoch``. 'constant': ``lr``.
    """
    done = epoch * phase.draw.steps + step
    total = phase.epochs * phase.draw.steps
    warmup = round(phase.warmup_epochs * phase.draw.steps)
    if done < warmup:
        return phase.lr * (done + 1) / (warmup + 1)
    if phase.schedule == "exponential":
        return phase.lr * phase.decay**epoch
    if phase.schedule == "constant":
        return phase.lr
    share = (done - warmup) / max(1, total - warmup)
    return phase.final_lr + (phase.lr - phase.final_lr) * 0.5 * (1 + math.cos(math.pi * share))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def make_phases(name: str, settings: TrainSettings, draw: Draw, *, last: Draw | None = None) -> tuple[Phase, ...]:
    """The main epochs on ``draw``, then those whose weights are averaged, on ``last`` where it is given."""
    swa = settings.lr * settings.swa_lr
    main = Phase(
        name,
        settings.main_epochs,
        draw,
        settings.lr,
        swa if settings.swa_start else settings.lr * settings.final_lr,
        settings.warmup_epochs,
        schedule=settings.schedule,
        decay=settings.lr_decay,
    )
    if settings.swa_start:
        return (main, Phase("swa", settings.epochs - settings.main_epochs, last or draw, swa, swa, average=True))
    if settings.extra_epochs:
        rate = settings.lr * settings.extra_lr
        return (main, Phase("average", settings.extra_epochs, last or draw, rate, rate, average=True))
    return (main,)


def update_average(average: AveragedModel, model: nn.Module, *, decay: float) -> None:
    """One more set of weights for the average: the plain mean, or with ``decay`` above 0 the exponential one.

    The first weights are random, so the decay rises with (1 + n) / (10 + n) until it reaches ``decay``.
    """
    if decay:
        n = int(average.n_averaged)  # lies on the CPU: no GPU is waited for
        average.multi_avg_fn = get_ema_multi_avg_fn(min(decay, (1 + n) / (10 + n)))
    average.update_parameters(model)
