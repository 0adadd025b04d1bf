"""Weighted sampling and oversampling: the shares over many epochs, the same draws on every resumption."""

import numpy as np
import pytest

from edgedistill.errors import UsageError
from edgedistill.training.loader import Draw, sampling_weights

NAMES = ("good", "cracked", "a=b")
LABELS = np.repeat([0, 1, 2], [80, 15, 5]).astype(np.int32)


def shares(weights, epochs=40, batch_size=10):
    draw = Draw(np.arange(100) + 7, LABELS, batch_size, balanced=False, seed=3, weights=weights)
    rows = np.concatenate([draw.epoch(epoch).ravel() for epoch in range(epochs)]) - 7
    assert len(rows) == epochs * 100
    times = np.bincount(rows, minlength=100)
    for label in range(3):  # no image of a class more often than another by more than a cycle and the trimming
        own = times[label == LABELS]
        assert own.max() - own.min() <= 2 + epochs // 10, label
    return np.bincount(LABELS[rows], minlength=3) / len(rows)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_power_goes_from_natural_to_balanced(power):
    natural = np.array([80, 15, 5]) ** (1 - power)
    weights = sampling_weights(LABELS, NAMES, power=power) or (1.0, 1.0, 1.0)
    assert shares(weights) == pytest.approx(natural / natural.sum(), abs=0.015)


def test_chosen_classes_are_drawn_more_often_by_their_factor():
    weights = sampling_weights(LABELS, NAMES, oversample=("cracked=3", "a=b=2"))
    assert weights == (1.0, 3.0, 2.0)
    expected = np.array([80, 45, 10])
    assert shares(weights) == pytest.approx(expected / expected.sum(), abs=0.015)


def test_draws_depend_on_seed_and_epoch_alone():
    def rows(seed, epoch):
        return Draw(np.arange(100), LABELS, 10, balanced=False, seed=seed, weights=(1.0, 2.0, 3.0)).epoch(epoch)

    assert np.array_equal(rows(1, 4), rows(1, 4))
    assert not np.array_equal(rows(1, 4), rows(1, 5)) and not np.array_equal(rows(1, 4), rows(2, 4))


def test_nothing_asked_for_is_todays_draw():
    assert sampling_weights(LABELS, NAMES) == ()


def test_a_class_without_images_and_one_without_a_name():
    labels = np.repeat([0, 2], [20, 10]).astype(np.int32)
    weights = sampling_weights(labels, NAMES, power=1.0)
    rows = Draw(np.arange(30), labels, 10, balanced=False, seed=0, weights=weights).epoch(0).ravel()
    assert np.bincount(labels[rows], minlength=3).tolist() == [15, 0, 15]
    with pytest.raises(UsageError, match=r"--oversample crackd: no such class; did you mean cracked\?"):
        sampling_weights(LABELS, NAMES, oversample=("crackd=3",))
