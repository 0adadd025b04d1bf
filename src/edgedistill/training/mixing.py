"""Two images in one, and their targets in the same shares: CutMix and MixUp."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from edgedistill.training.losses import Targets, to_device
from edgedistill.training.seeds import generator


@dataclass(frozen=True)
class Mixing:
    """A batch is mixed by CutMix with probability ``cutmix``, by MixUp with ``mixup``, else left as it is; together at
    most 1. ``cutmix_alpha``, ``mixup_alpha``: of the Beta distributions that the shares come from."""

    cutmix: float = 0.0
    cutmix_alpha: float = 1.0
    mixup: float = 0.0
    mixup_alpha: float = 1.0


def mix(
    images: torch.Tensor,
    targets: Targets,
    mixing: Mixing,
    *,
    seed: int,
    epoch: int,
    step: int,
    folds: npt.NDArray[np.int16] | None = None,
) -> tuple[torch.Tensor, Targets]:
    """A batch and its targets, mixed with shuffled partners or not. ``images``: uint8 [B, H, W, 3], changed in place.

    Draws derive from (seed, epoch, step). ``folds``: see draw_partners.
    """
    draw = generator(seed, "cutmix", epoch, step)
    chance = draw.random()
    if chance < mixing.cutmix:
        return _cutmix(images, targets, mixing.cutmix_alpha, draw, folds)
    if chance < mixing.cutmix + mixing.mixup:
        return _mixup(images, targets, mixing.mixup_alpha, draw, folds)
    return images, targets


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


def _cutmix(
    images: torch.Tensor,
    targets: Targets,
    alpha: float,
    draw: np.random.Generator,
    folds: npt.NDArray[np.int16] | None,
) -> tuple[torch.Tensor, Targets]:
    """Paste one rectangle per batch from partners; targets mix by the area pasted (Yun et al., 1905.04899)."""
    size, height, width = images.shape[:3]
    cut = np.sqrt(1.0 - draw.beta(alpha, alpha))
    centre_y, centre_x = draw.integers(height), draw.integers(width)
    top, bottom = np.clip([centre_y - int(height * cut) // 2, centre_y + int(height * cut) // 2], 0, height)
    left, right = np.clip([centre_x - int(width * cut) // 2, centre_x + int(width * cut) // 2], 0, width)
    partner = to_device(draw_partners(draw, size, folds), images.device)
    images[:, top:bottom, left:right] = images[partner, top:bottom, left:right]
    return images, _mixed(targets, partner, 1.0 - float((bottom - top) * (right - left)) / (height * width))


def _mixup(
    images: torch.Tensor,
    targets: Targets,
    alpha: float,
    draw: np.random.Generator,
    folds: npt.NDArray[np.int16] | None,
) -> tuple[torch.Tensor, Targets]:
    """Add partners in the share 1 - lambda, one lambda per batch (Zhang et al., 1710.09412), rounded to whole pixels."""
    kept = float(draw.beta(alpha, alpha))
    partner = to_device(draw_partners(draw, images.shape[0], folds), images.device)
    blended = torch.lerp(images[partner].float(), images.float(), kept)
    images.copy_(blended.round_())
    return images, _mixed(targets, partner, kept)


def _mixed(targets: Targets, partner: torch.Tensor, kept: float) -> Targets:
    return Targets(*(kept * kind + (1 - kept) * kind[partner] for kind in (targets.hard, targets.soft)))
