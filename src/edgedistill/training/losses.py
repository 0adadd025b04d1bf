"""Targets and losses: hard labels and stored soft labels."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from edgedistill.data.soft_label_store import HeldRows, SoftRows, row_blocks

LossName = Literal["ce", "kl", "js"]
HardLossName = Literal["ce", "focal", "ldam", "soft-f1", "bce"]
ClassWeights = Literal["none", "inverse", "class-balanced"]
HARD_LOSSES: tuple[HardLossName, ...] = ("ce", "focal", "ldam", "soft-f1", "bce")
CLASS_WEIGHTS: tuple[ClassWeights, ...] = ("none", "inverse", "class-balanced")
LDAM_SCALE, LDAM_MAX_MARGIN = 30.0, 0.5  # of the paper; the cosine classifier multiplies by the same scale
# Images x classes up to which the targets of all images are made beforehand: 134 MB for the hard and as much for the soft.
WHOLE_TARGETS = 2**25


@dataclass(frozen=True)
class HardLoss:
    """The loss against hard labels, target probabilities t (one-hot, smoothed or mixed) and p = softmax(logits):

    'ce': -sum_c t_c log p_c. 'focal': -alpha sum_c t_c (1 - p_c)^gamma log p_c (Lin et al., 1708.02002, over a softmax).
    'ldam': cross-entropy of logits whose true class lost its margin, ``margins`` in logits (Cao et al., 1906.07413).
    'soft-f1': 1 - mean_c 2 tp / (2 tp + fp + fn) on the batch's soft counts tp = sum t p, fp = sum (1 - t) p,
    fn = sum t (1 - p). 'bce': one sigmoid per class against the rest, summed over classes.

    ``class_weights``: one per class, or empty. An image weighs what its classes weigh, and the mean over the batch is a
    weighted one, as in torch's cross_entropy. ``deferred``: the share of the epochs that pass before weights count (DRW).
    With several heads ``margins`` and ``class_weights`` have one entry for each output; see label_loss_of for those of
    sigmoid heads.
    """

    name: HardLossName = "ce"
    gamma: float = 2.0
    alpha: float = 1.0
    margins: tuple[float, ...] = ()
    class_weights: tuple[float, ...] = ()
    deferred: float = 0.0


@dataclass(frozen=True)
class LossSettings:
    """``soft_weight`` is the share of the soft labels, 0 to 1 (0: hard labels alone). ``temperature`` T softens them.

    'ce': the hard loss, and cross-entropy with the soft labels, student at T=1; where both are linear in the target
    (ce, bce) this is one loss against the mixture. 'kl' and 'js': (1 - w) * hard loss + w * T^2 * divergence(soft labels
    at T, student at T), after Hinton et al., 1503.02531. ``hard``: see HardLoss.
    """

    name: LossName = "ce"
    soft_weight: float = 0.0
    temperature: float = 1.0
    hard: HardLoss = HardLoss()

    def at(self, progress: float) -> LossSettings:
        """The loss when the share ``progress``, 0 to 1, of the epochs is done."""
        if not self.hard.class_weights or progress >= self.hard.deferred:
            return self
        return replace(self, hard=replace(self.hard, class_weights=()))


@dataclass(frozen=True, eq=False)
class Targets:
    """Probabilities, float32 [N, C]: ``hard`` (one-hot or smoothed) and ``soft`` (already at the temperature)."""

    hard: torch.Tensor
    soft: torch.Tensor

    def __len__(self) -> int:
        return len(self.hard)

    def to(self, device: torch.device) -> Targets:
        return Targets(self.hard.to(device), self.soft.to(device))

    def take(self, rows: npt.NDArray[np.int64]) -> Targets:
        index = to_device(rows, self.hard.device)
        return Targets(self.hard[index], self.soft[index])


class TargetSource(Protocol):
    """Targets of N images, of which a batch takes its rows int64 [B]; they come on the device that ``to`` named."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> TargetSource: ...

    def take(self, rows: npt.NDArray[np.int64]) -> Targets: ...


@dataclass(frozen=True, eq=False)
class CodedTargets:
    """The targets that make_targets would give, made for the rows of a batch alone: a million images of a thousand
    classes would take 8 GB. Bit for bit the same.

    ``codes``: int64 [N] labels, on the device. ``soft``: where the soft labels are read, image n's at row ``soft_rows[n]``,
    int64 [N]; None: the hard targets stand in.
    """

    codes: torch.Tensor
    class_count: int
    soft: SoftRows | None
    soft_rows: npt.NDArray[np.int64]
    temperature: float = 1.0
    label_smoothing: float = 0.0

    def __len__(self) -> int:
        return len(self.codes)

    def to(self, device: torch.device) -> CodedTargets:
        return replace(self, codes=self.codes.to(device))

    def take(self, rows: npt.NDArray[np.int64]) -> Targets:
        codes = self.codes[to_device(rows, self.codes.device)]
        hard = torch.zeros((len(rows), self.class_count), device=codes.device).scatter_(1, codes[:, None], 1.0)
        soft = hard if self.soft is None else self._tempered(self.soft.rows(self.soft_rows[rows]), hard)
        if self.label_smoothing:
            hard = hard * (1 - self.label_smoothing) + self.label_smoothing / self.class_count
        return Targets(hard, soft)

    def _tempered(self, log_probs: npt.NDArray[np.float32], hard: torch.Tensor) -> torch.Tensor:
        # Log-probabilities are logits up to a constant, which softmax removes: any temperature is exact.
        tempered = torch.softmax(torch.from_numpy(log_probs.astype(np.float32, copy=False)) / self.temperature, dim=1)
        tempered = to_device(tempered.numpy(), hard.device)
        return torch.where(torch.isnan(tempered), hard, tempered)

    def whole(self) -> Targets:
        """All of them, block by block, so that nothing wider than float32 is as long."""
        parts = [self.take(rows) for rows in row_blocks(np.arange(len(self)), self.class_count)]
        hard = torch.cat([part.hard for part in parts] or [torch.zeros((0, self.class_count))])
        if self.soft is None and not self.label_smoothing:
            return Targets(hard, hard)
        return Targets(hard, torch.cat([part.soft for part in parts] or [hard]))


@dataclass(frozen=True, eq=False)
class JoinedTargets:
    """Targets of the rows of ``first``, then of those of ``second``."""

    first: TargetSource
    second: TargetSource

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def to(self, device: torch.device) -> JoinedTargets:
        return JoinedTargets(self.first.to(device), self.second.to(device))

    def take(self, rows: npt.NDArray[np.int64]) -> Targets:
        size = len(self.first)
        before, after = np.flatnonzero(rows < size), np.flatnonzero(rows >= size)
        parts = self.first.take(rows[before]), self.second.take(rows[after] - size)
        place = to_device(np.argsort(np.concatenate([before, after])), parts[0].hard.device)
        return Targets(torch.cat([part.hard for part in parts])[place], torch.cat([part.soft for part in parts])[place])


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
    soft, rows = None if soft_log_probs is None else HeldRows(soft_log_probs), np.arange(len(labels))
    codes = torch.from_numpy(labels.astype(np.int64))
    return CodedTargets(codes, class_count, soft, rows, temperature, label_smoothing).whole()


def targets_of(
    labels: npt.NDArray[np.int32],
    class_count: int,
    *,
    soft: SoftRows | None = None,
    soft_rows: npt.NDArray[np.int64] | None = None,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> TargetSource:
    """make_targets for any number of images: beyond WHOLE_TARGETS values they are made when a batch asks for them.

    ``soft``: where the soft labels are read, image n's at row ``soft_rows[n]`` (int64 [N]; None: at row n).
    """
    rows = np.arange(len(labels)) if soft_rows is None else soft_rows
    codes = torch.from_numpy(labels.astype(np.int64))
    coded = CodedTargets(codes, class_count, soft, rows, temperature, label_smoothing)
    return coded if len(labels) * class_count > WHOLE_TARGETS else coded.whole()


def class_weights(counts: npt.NDArray[np.int64], kind: ClassWeights, *, beta: float) -> tuple[float, ...]:
    """One weight per class from its number of training images; a class without any weighs 0. () for 'none'.

    'inverse': N / (C n_c), scikit-learn's 'balanced'. 'class-balanced': (1 - beta) / (1 - beta^n_c), scaled to sum to C
    (Cui et al., 1901.05555).
    """
    if kind == "none":
        return ()
    present = counts > 0
    numbers = np.maximum(counts, 1).astype(np.float64)
    raw = 1.0 / numbers if kind == "inverse" else (1.0 - beta) / (1.0 - np.power(beta, numbers))
    raw = np.where(present, raw, 0.0)
    scale = counts.sum() / present.sum() if kind == "inverse" else present.sum() / raw.sum()
    return tuple(float(value) for value in raw * scale)


def label_weights(
    applies: npt.NDArray[np.float64], known: npt.NDArray[np.int64], kind: ClassWeights, *, beta: float
) -> tuple[float, ...]:
    """The ``pos_weight`` of each label that may apply: how much an image that has it weighs against one without. () for
    'none'; 1 for a label that all images have, or none.

    ``applies``: float [C], images that have the label (shares count as such), of ``known`` [C]. 'inverse': n- / n+, as
    torch's BCEWithLogitsLoss advises. 'class-balanced': E(n-) / E(n+) with the effective number of n images
    E(n) = (1 - beta^n) / (1 - beta) (Cui et al., 1901.05555).
    """
    if kind == "none":
        return ()
    lacks = known - applies
    one_sided = (applies <= 0) | (lacks <= 0)
    have, lack = (np.where(one_sided, 1.0, numbers) for numbers in (applies, lacks))
    if kind == "class-balanced":
        have, lack = (1.0 - np.power(beta, have), 1.0 - np.power(beta, lack))
    return tuple(float(value) for value in lack / have)


def ldam_margins(counts: npt.NDArray[np.int64]) -> tuple[float, ...]:
    """Margins proportional to n_c^(-1/4), the largest LDAM_MAX_MARGIN in cosines, here times LDAM_SCALE: in logits."""
    margins = np.where(counts > 0, np.power(np.maximum(counts, 1.0), -0.25), 0.0)
    return tuple(float(value) for value in LDAM_SCALE * LDAM_MAX_MARGIN * margins / margins.max())


def loss_of(logits: torch.Tensor, targets: Targets, settings: LossSettings) -> torch.Tensor:
    """The mean loss of a batch, a float32 scalar. ``logits``: [B, C]."""
    weight, hard = settings.soft_weight, settings.hard
    logits = logits.float()
    if weight == 0.0:
        return hard_loss_of(logits, targets.hard, hard)
    if settings.name == "ce" and hard.name in ("ce", "bce") and not hard.class_weights:
        return hard_loss_of(logits, (1 - weight) * targets.hard + weight * targets.soft, hard)
    return (1 - weight) * hard_loss_of(logits, targets.hard, hard) + weight * soft_loss_of(
        logits, targets.soft, settings
    )


def soft_loss_of(logits: torch.Tensor, soft: torch.Tensor, settings: LossSettings) -> torch.Tensor:
    """The part of the loss that compares with the soft labels, before its weight. ``logits``, ``soft``: float32 [B, C]."""
    if settings.name == "ce":
        return hard_loss_of(logits, soft, HardLoss("bce" if settings.hard.name == "bce" else "ce"))
    softened = F.log_softmax(logits / settings.temperature, dim=1)
    divergence = _kl(soft, softened) if settings.name == "kl" else _js(soft, softened)
    return settings.temperature**2 * divergence


def hard_loss_of(logits: torch.Tensor, target: torch.Tensor, hard: HardLoss) -> torch.Tensor:
    """The formula of ``hard``: a float32 scalar. ``logits``, ``target``: float32 [B, C]."""
    if hard.name == "soft-f1":
        return _soft_f1(logits, target)
    weighted = target * _per_class(hard.class_weights, logits.device) if hard.class_weights else target
    if hard.name == "bce":
        losses = F.binary_cross_entropy_with_logits(logits, target, reduction="none").sum(dim=1)
        return losses.mean() if not hard.class_weights else _weighted_mean(losses * weighted.sum(dim=1), weighted)
    if hard.name == "ldam":
        logits = logits - target * _per_class(hard.margins, logits.device)
    log_probs = F.log_softmax(logits, dim=1)
    if hard.name == "focal":
        log_probs = hard.alpha * _doubt(log_probs) ** hard.gamma * log_probs
    losses = -(weighted * log_probs).sum(dim=1)
    return losses.mean() if not hard.class_weights else _weighted_mean(losses, weighted)


def _doubt(log_probs: torch.Tensor) -> torch.Tensor:
    """1 - p, never 0: with an exponent below 1 its slope there is infinite."""
    return (1 - log_probs.exp()).clamp_min(1e-7)


def _soft_f1(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    probabilities = F.softmax(logits, dim=1)
    both = (target.sum(dim=0) + probabilities.sum(dim=0)).clamp_min(1e-12)  # 2 tp + fp + fn
    found = 2 * (target * probabilities).sum(dim=0) / both
    return 1 - found.mean()


def label_loss_of(logits: torch.Tensor, target: torch.Tensor, hard: HardLoss) -> torch.Tensor:
    """``hard`` for labels that each apply or not, p = sigmoid(logits): a float32 scalar, the mean over what is known.

    ``logits``: float32 [B, C]; ``target``: float32 [B, C], 0 to 1, NaN where unknown. 'ce' and 'bce' are the binary
    cross-entropy; 'focal' has a factor (1 - p)^gamma where the label applies and p^gamma where it does not; 'soft-f1' is
    1 - mean over labels known in the batch. ``class_weights`` are torch's pos_weight (see label_weights). 'ldam' does not
    exist here: its margin parts classes that exclude each other.
    """
    known = ~torch.isnan(target)
    target = torch.where(known, target, 0.0)
    if hard.name == "soft-f1":
        found = torch.sigmoid(logits) * known
        both = (target + found).sum(dim=0).clamp(min=1e-12)
        counted = known.any(dim=0)
        f1 = 2 * (target * found).sum(dim=0) / both
        return ((1 - f1) * counted).sum() / counted.sum().clamp(min=1)
    applies, lacks = F.logsigmoid(logits), F.logsigmoid(-logits)
    if hard.name == "focal":
        applies, lacks = (hard.alpha * _doubt(part) ** hard.gamma * part for part in (applies, lacks))
    if hard.class_weights:
        applies = applies * _per_class(hard.class_weights, logits.device)
    losses = -(target * applies + (1 - target) * lacks)
    return (losses * known).sum() / known.sum().clamp(min=1)


def _weighted_mean(losses: torch.Tensor, weighted: torch.Tensor) -> torch.Tensor:
    return losses.sum() / weighted.sum().clamp(min=1e-12)


@functools.lru_cache(maxsize=64)
def _per_class(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Kept on the device: copying them for each batch would make a GPU wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device)


def _kl(target: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    return F.kl_div(log_probs, target, reduction="batchmean")


def _js(target: torch.Tensor, log_probs: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon: the mean divergence of both from their mean."""
    middle = torch.log(0.5 * (target + log_probs.exp()) + 1e-12)
    return 0.5 * (
        F.kl_div(middle, target, reduction="batchmean")
        + F.kl_div(middle, log_probs, reduction="batchmean", log_target=True)
    )
