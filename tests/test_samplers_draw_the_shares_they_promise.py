"""Weighted sampling and oversampling: the shares over many epochs, the same draws on every resumption."""

import numpy as np
import pytest

from edgedistill.data.manifest import Dataset
from edgedistill.data.stratify import sampling_codes
from edgedistill.errors import UsageError
from edgedistill.tasks import Head, Task
from edgedistill.teacher import TeacherSettings
from edgedistill.training.loader import Draw, head_sampling_weights, sampling_weights, shared_out
from edgedistill.training.settings import TrainSettings

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
    with pytest.raises(UsageError, match=r"--oversample 'crackd': no such class; did you mean 'cracked'\?"):
        sampling_weights(LABELS, NAMES, oversample=("crackd=3",))


# ---- several labels per image ----

ATTRIBUTES = Task(
    (Head("color", "softmax", ("blue", "red")), Head("shape", "softmax", ("bar", "disc")), Head("size", "regression"))
)
# 200 images: red in 1 of 5 and disc in 1 of 4, independently; the last ten lack their colour.
COLOR = np.tile(np.repeat([0, 1], [4, 1]), 40).astype(np.float32)
SHAPE = np.repeat([0, 1], [150, 50]).astype(np.float32)
JOINT = ("?, disc", "blue, bar", "blue, disc", "red, bar", "red, disc")


def attributes(lacking=10):
    color = COLOR.copy()
    color[len(color) - lacking :] = np.nan
    values = np.stack([color, SHAPE, np.arange(200, dtype=np.float32)], axis=1)
    labels = np.array([JOINT.index(ATTRIBUTES.joint_label(row)) for row in values], np.int32)
    names = np.array([f"{n:03d}" for n in range(200)])
    none = np.full(200, "")
    return Dataset(
        names, names, np.full(200, "0" * 64), labels, none, np.full(200, "train"), np.arange(200) % 2, JOINT,
        task=ATTRIBUTES, values=values,
    )  # fmt: skip


def drawn(settings, dataset, epochs=30):
    labels, weights = settings.sampling(dataset, np.arange(len(dataset)))
    draw = Draw(np.arange(len(dataset)), labels, 20, balanced=False, seed=3, weights=weights)
    return np.concatenate([draw.epoch(epoch).ravel() for epoch in range(epochs)])


def test_power_balances_every_head_that_is_independent_of_the_others():
    settings = TrainSettings(name="x", balanced_sampling=False, sample_power=1.0)
    rows = drawn(settings, attributes(lacking=0))
    assert COLOR[rows].mean() == pytest.approx(0.5, abs=0.01) and SHAPE[rows].mean() == pytest.approx(0.5, abs=0.01)
    lacking = drawn(settings, attributes())
    assert 0 < (lacking >= 190).mean() < 0.15  # images without a colour are neither left out nor favoured


def test_an_image_is_drawn_by_the_product_of_its_labels_factors():
    settings = TrainSettings(name="x", balanced_sampling=False, oversample=("color=red=3", "shape=disc=2"))
    dataset = attributes()
    times = np.bincount(drawn(settings, dataset), minlength=200)
    color, shape = dataset.values[:, 0], dataset.values[:, 1]
    weights = np.where(color == 1, 3, 1) * np.where(shape == 1, 2, 1)
    assert times / times.sum() == pytest.approx(weights / weights.sum(), rel=0.08)
    joint = head_sampling_weights(ATTRIBUTES, dataset.values, dataset.labels, JOINT, oversample=("red, disc=5",))
    assert (joint == np.where(dataset.labels == 4, 5, 1)).all()


def test_of_several_labels_the_rarest_counts_for_power_and_all_for_factors():
    task = Task((Head("labels", "sigmoid", ("a", "b")),))
    values = np.array([[1, 0]] * 4 + [[1, 1]] * 2 + [[0, 0]] * 2 + [[np.nan, np.nan]] * 2, np.float32)
    names = ("?", "a", "a|b", "none")
    joint = np.repeat([1, 2, 3, 0], [4, 2, 2, 2]).astype(np.int32)
    weights = head_sampling_weights(task, values, joint, names, power=1.0)
    assert weights[:6] / weights[0] == pytest.approx([1, 1, 1, 1, 3, 3])  # a: 6 images, b: 2
    assert weights[8:].tolist() == [1, 1]  # nothing is known of them: they are not of those that nothing applies to
    assert weights[6] / weights[0] == pytest.approx(3)
    factors = head_sampling_weights(task, values, joint, names, oversample=("a=2", "b=3"))
    assert factors.tolist() == [2] * 4 + [6] * 2 + [1] * 4


def test_classes_of_heads_are_named_with_their_head():
    dataset = attributes()
    for settings, message in (
        (TrainSettings(name="x", balanced_sampling=False, oversample=("red=3",)), r"^--oversample 'red': no such class; did you mean 'color=red'\?"),
        (TeacherSettings(oversample=("red, dis=3",)), r"^--teacher-oversample 'red, dis': .*did you mean 'red, disc', "),
        (TrainSettings(name="x", balanced_sampling=False, oversample=("size=2",)), r"'size': no such class"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message):
            settings.sampling(dataset, dataset.rows("train"))


def test_many_small_classes_keep_their_share_over_the_epochs():
    shares = np.array([0.3] * 300 + [10.0])
    given, quotas = shared_out(shares, 100, 19)
    assert np.abs(given + quotas - 20 * shares).max() <= 1.5 and (quotas >= 0).all() and quotas.sum() >= 100
    again, _ = shared_out(shares, 100, 20)
    assert (again == given + quotas).all()


def test_images_with_a_label_missing_are_drawn_no_oftener_than_others():
    """Their joint label is no class of its own: it would be drawn as often as any other, and its loss is left out."""
    task = Task((Head("mask", "softmax", ("on", "off")), Head("sex", "softmax", ("f", "m")), Head("age", "regression")))
    values = np.repeat([[0, 0, 1], [0, 1, 1], [1, 0, 1], [1, 1, 1]], [20, 18, 15, 15], axis=0).astype(np.float32)
    values[[0, 25, 50], 0] = np.nan  # who wears a mask is not known of f, m, f
    values[67] = [np.nan, np.nan, 3]  # nothing is known
    values[40, 2] = np.nan  # a value makes no class
    joint = np.unique([task.joint_label(row) for row in values], return_inverse=True)[1]
    codes = sampling_codes(task, values, joint, least=10)
    assert len(np.unique(codes)) == 4
    assert codes[[0, 25, 50, 67]].tolist() == codes[[1, 26, 1, 1]].tolist(), "the largest that each may belong to"
    draw = Draw(np.arange(68), codes, 17, balanced=True, seed=0)
    times = np.bincount(np.concatenate([draw.epoch(epoch).ravel() for epoch in range(40)]), minlength=68)
    assert times[[0, 25, 50, 67]].mean() < times.mean() * 1.1


def test_images_of_unknown_labels_are_no_class_beside_those_without_any():
    task = Task((Head("tags", "sigmoid", ("a", "b")),))
    values = np.repeat([[1, 0], [0, 1], [0, 0]], [20, 8, 2], axis=0).astype(np.float32)
    values[[5, 25]] = np.nan, 1  # a is unknown
    values[6] = np.nan
    codes = sampling_codes(task, values, np.zeros(30, np.int64), least=10)
    assert codes[[5, 25]].tolist() == [1, 1], "what is known of them counts"
    assert codes[6] == codes[0] == 0 and set(codes[28:]) == {-1}
