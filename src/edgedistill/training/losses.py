"""Targets and losses: hard labels, stored soft labels, and CutMix on both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from edgedistill.training.seeds import generator

LossName = Literal["ce", "kl", "js"]


@dataclass(frozen=True)
class LossSettings:
    """``soft_weight`` is the share of the soft labels, 0 to 1 (0: hard labels alone). ``temperature`` T softens them.

    'ce': cross-entropy against the mixture of both, student at T=1. 'kl' and 'js': (1 - w) * cross-entropy with the
    hard label + w * T^2 * divergence(soft labels at T, student at T), after Hinton et al., 1503.02531.
    """

    name: LossName = "ce"
    soft_weight: float = 0.0
    temperature: float = 1.0


@dataclass(frozen=True, eq=False)
class Targets:
    """Probabilities, float32 [N, C]: ``hard`` (one-hot or smoothed) and ``soft`` (already at the temperature)."""

    hard: torch.Tensor
    soft: torch.Tensor

    def to(self, device: torch.device) -> Targets:
        return Targets(self.hard.to(device), self.soft.to(device))

    def take(self, rows: npt.NDArray[np.int64]) -> Targets:
        index = to_device(rows, self.hard.device)
        return Targets(self.hard[index], self.soft[index])


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Through pinned memory to a GPU, which then need not be waited for; on a CPU the tensor shares the array."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def make_targets(
    labels: npt.NDArray[np.int32],
    class_count: int,
    *,
    soft_log_probs: npt.NDArray[np.float32] | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> Targets:
    """Targets of all images. ``soft_log_probs``: float32 [N, C] at T=1; a row of NaN has no soft label: its hard one
    stands in."""
    hard = F.one_hot(torch.from_numpy(labels.astype(np.int64)), class_count).float()
    soft = hard
    if soft_log_probs is not None:
        # Log-probabilities are logits up to a constant, which softmax removes: any temperature is exact.
        tempered = torch.softmax(torch.from_numpy(soft_log_probs.astype(np.float32)) / temperature, dim=1)
        soft = torch.where(torch.isnan(tempered), hard, tempered)
    if label_smoothing:
        hard = hard * (1 - label_smoothing) + label_smoothing / class_count
    return Targets(hard, soft)


def loss_of(logits: torch.Tensor, targets: Targets, settings: LossSettings) -> torch.Tensor:
    """The mean loss of a batch, a float32 scalar. ``logits``: [B, C]."""
    weight, temperature = settings.soft_weight, settings.temperature
    log_probs = F.log_softmax(logits.float(), dim=1)
    if settings.name == "ce" or weight == 0.0:
        mixture = targets.hard if weight == 0.0 else (1 - weight) * targets.hard + weight * targets.soft
        return -(mixture * log_probs).sum(dim=1).mean()
    hard_loss = -(targets.hard * log_probs).sum(dim=1).mean()
    softened = F.log_softmax(logits.float() / temperature, dim=1)
    divergence = _kl(targets.soft, softened) if settings.name == "kl" else _js(targets.soft, softened)
    return (1 - weight) * hard_loss + weight * temperature**2 * divergence


def _kl(target: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_probs, target, reduction="batchmean")


def _js(target: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon: the mean divergence of both from their mean."""
    middle = torch.log(0.5 * (target + log_probs.exp()) + 1e-12)
    return 0.5 * (
        F.kl_div(middle, target, reduction="batchmean")
        + F.kl_div(middle, log_probs, reduction="batchmean", log_target=True)
    )


def draw_partners(
    draw: np.random.Generator, size: int, folds: npt.NDArray[np.int16] | None = None
) -> npt.NDArray[np.int64]:
    """int64 [size]: whom each image of a batch is mixed with.

    ``folds``: int16 [size]; partners then share a fold, and nobody is its own partner unless it is its fold's only one.
    """
    if folds is None:
        return draw.permutation(size)
    partners = np.empty(size, np.int64)
    for fold in np.unique(folds):
        members = draw.permutation(np.flatnonzero(folds == fold))
        partners[members] = np.roll(members, 1)
    return partners


def cutmix(
    images: torch.Tensor,
    targets: Targets,
    *,
    alpha: float,
    probability: float,
    seed: int,
    epoch: int,
    step: int,
    folds: npt.NDArray[np.int16] | None = None,
) -> tuple[torch.Tensor, Targets]:
    """Paste one rectangle per batch from shuffled partners; targets mix by the area pasted (Yun et al., 1905.04899).

    ``images``: uint8 [B, H, W, 3], changed in place. Draws derive from (seed, epoch, step). ``folds``: see draw_partners.
    """
    draw = generator(seed, "cutmix", epoch, step)
    if draw.random() >= probability:
        return images, targets
    size, height, width = images.shape[:3]
    cut = np.sqrt(1.0 - draw.beta(alpha, alpha))
    centre_y, centre_x = draw.integers(height), draw.integers(width)
    top, bottom = np.clip([centre_y - int(height * cut) // 2, centre_y + int(height * cut) // 2], 0, height)
    left, right = np.clip([centre_x - int(width * cut) // 2, centre_x + int(width * cut) // 2], 0, width)
    partner = to_device(draw_partners(draw, size, folds), images.device)
    images[:, top:bottom, left:right] = images[partner, top:bottom, left:right]
    kept = 1.0 - float((bottom - top) * (right - left)) / (height * width)
    mixed = (kept * kind + (1 - kept) * kind[partner] for kind in (targets.hard, targets.soft))
    return images, Targets(*mixed)
