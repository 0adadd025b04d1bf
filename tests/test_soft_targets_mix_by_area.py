"""Losses are their formulas, soft labels stay exact at any temperature, and CutMix mixes what it pastes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from edgedistill.training.losses import LossSettings, Targets, loss_of, make_targets
from edgedistill.training.mixing import Mixing, mix

LABELS = np.array([0, 1, 2, 1], np.int32)


@pytest.fixture
def logits():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def teacher():
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(1)) * 3


def test_hard_labels_alone_are_plain_cross_entropy(logits):
    targets = make_targets(LABELS, 3)
    expected = F.cross_entropy(logits, torch.from_numpy(LABELS).long())
    assert loss_of(logits, targets, LossSettings()).item() == pytest.approx(expected.item(), abs=1e-6)
    smooth = make_targets(LABELS, 3, label_smoothing=0.1)
    expected = F.cross_entropy(logits, torch.from_numpy(LABELS).long(), label_smoothing=0.1)
    assert loss_of(logits, smooth, LossSettings()).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_stored_log_probabilities_are_exact_at_any_temperature(teacher, temperature):
    stored = F.log_softmax(teacher, dim=1).numpy()
    targets = make_targets(LABELS, 3, soft_log_probs=stored, temperature=temperature)
    assert torch.allclose(targets.soft, F.softmax(teacher / temperature, dim=1), atol=1e-6)


def test_the_default_is_cross_entropy_against_the_mixture(logits, teacher):
    targets = make_targets(LABELS, 3, soft_log_probs=F.log_softmax(teacher, dim=1).numpy())
    mixture = 0.2 * F.softmax(teacher, dim=1) + 0.8 * F.one_hot(torch.from_numpy(LABELS).long(), 3)
    expected = F.cross_entropy(logits, mixture)
    assert loss_of(logits, targets, LossSettings("ce", 0.2)).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_multiply_by_the_temperature_squared(logits, teacher, temperature):
    stored = F.log_softmax(teacher, dim=1).numpy()
    targets = make_targets(LABELS, 3, soft_log_probs=stored, temperature=temperature)
    p, q = F.softmax(teacher / temperature, dim=1), F.softmax(logits / temperature, dim=1)
    m = (p + q) / 2
    kl = (p * (p / q).log()).sum(1).mean()
    js = (0.5 * (p * (p / m).log()).sum(1) + 0.5 * (q * (q / m).log()).sum(1)).mean()
    hard = F.cross_entropy(logits, torch.from_numpy(LABELS).long())
    for name, divergence in (("kl", kl), ("js", js)):
        expected = 0.3 * hard + 0.7 * temperature**2 * divergence
        assert loss_of(logits, targets, LossSettings(name, 0.7, temperature)).item() == pytest.approx(
            expected.item(), abs=1e-5
        )


def test_an_image_without_soft_label_keeps_its_hard_one(teacher):
    stored = F.log_softmax(teacher, dim=1).numpy()
    stored[2] = np.nan
    targets = make_targets(LABELS, 3, soft_log_probs=stored, temperature=2.0)
    assert targets.soft[2].tolist() == [0.0, 0.0, 1.0]
    assert torch.isfinite(targets.soft).all()


def test_cutmix_mixes_targets_by_the_area_it_pasted():
    # Every image is filled with its own number and every target row is its own axis: shares can be counted.
    count, mixed_batches = 8, 0
    for step in range(40):
        images = torch.arange(count, dtype=torch.uint8).view(count, 1, 1, 1).expand(count, 20, 30, 3).clone()
        hard, soft = torch.eye(count), torch.eye(count) * 0.9
        images, targets = mix(images, Targets(hard, soft), Mixing(cutmix=0.5), seed=1, epoch=2, step=step)
        for row in range(count):
            shares = torch.bincount(images[row, :, :, 0].flatten().long(), minlength=count) / 600
            assert torch.allclose(shares, targets.hard[row], atol=1e-6)
            assert torch.allclose(shares * 0.9, targets.soft[row], atol=1e-6)
        mixed_batches += int(not torch.equal(targets.hard, hard))
    assert 10 <= mixed_batches <= 30


def test_cutmix_draws_from_seed_epoch_and_step_alone():
    def mixed(seed, epoch, step):
        images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 16, 16, 3).clone()
        start = Targets(torch.eye(4), torch.eye(4))
        return mix(images, start, Mixing(cutmix=1.0), seed=seed, epoch=epoch, step=step)[0]

    assert torch.equal(mixed(0, 1, 2), mixed(0, 1, 2))
    assert not torch.equal(mixed(0, 1, 2), mixed(0, 1, 3))
    assert not torch.equal(mixed(0, 1, 2), mixed(0, 2, 2))
    assert not torch.equal(mixed(0, 1, 2), mixed(1, 1, 2))


def test_mixup_adds_images_and_targets_in_the_same_share():
    count, kinds = 8, set()
    for step in range(60):
        images = (torch.arange(count, dtype=torch.uint8) * 30).view(count, 1, 1, 1).expand(count, 6, 5, 3).clone()
        hard, soft = torch.eye(count), torch.eye(count) * 0.9
        mixing = Mixing(cutmix=0.3, mixup=0.4, mixup_alpha=0.8)
        images, targets = mix(images, Targets(hard, soft), mixing, seed=1, epoch=2, step=step)
        values = (images[:, 0, 0, 0] / 30).float()
        even = bool((images == images[:, :1, :1]).all())
        if even and not torch.equal(targets.hard, hard):
            expected = targets.hard @ torch.arange(count).float()
            assert torch.allclose(values, expected, atol=0.5 / 30 + 1e-5)
            assert torch.allclose(targets.soft, 0.9 * targets.hard)
        kinds.add("mixup" if even and not torch.equal(targets.hard, hard) else "plain" if even else "cutmix")
    assert kinds == {"mixup", "plain", "cutmix"}


def test_the_chances_of_both_kinds_are_per_batch():
    def kind(step):
        images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 16, 16, 3).clone() * 60
        before = images.clone()
        mixed, _ = mix(images, Targets(torch.eye(4), torch.eye(4)), Mixing(0.25, 1.0, 0.25), seed=0, epoch=0, step=step)
        if torch.equal(mixed, before):
            return "plain"
        return "mixup" if (mixed == mixed[:, :1, :1]).all() else "cutmix"

    kinds = [kind(step) for step in range(400)]
    assert 0.2 < kinds.count("cutmix") / 400 < 0.3
    assert 0.19 < kinds.count("mixup") / 400 < 0.31
