"""Each hard loss is its paper's formula, checked against other people's code; contradictions are refused by name."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score
from sklearn.utils.class_weight import compute_class_weight

from edgedistill.errors import UsageError
from edgedistill.student import LIVE_DEFAULTS, StudentSettings, live_defaults
from edgedistill.teacher import TeacherSettings
from edgedistill.timm_import import import_timm
from edgedistill.training.losses import (
    HardLoss,
    LossSettings,
    class_weights,
    hard_loss_of,
    label_loss_of,
    label_weights,
    ldam_margins,
    loss_of,
    make_targets,
)

LABELS = np.array([0, 1, 2, 1, 0, 1], np.int32)
COUNTS = np.array([1000, 100, 10])
INDEX = torch.from_numpy(LABELS).long()
ONE_HOT = F.one_hot(INDEX, 3).float()


@pytest.fixture
def logits():
    return torch.randn(6, 3, generator=torch.Generator().manual_seed(0)) * 2


@pytest.fixture
def mixed():
    """Targets of mixed images."""
    return 0.3 * ONE_HOT + 0.7 * ONE_HOT.roll(1, 0)


def test_focal_without_focus_is_cross_entropy_and_two_classes_are_the_sigmoid_form(logits, mixed):
    plain = hard_loss_of(logits, mixed, HardLoss("focal", gamma=0.0))
    assert plain.item() == pytest.approx(F.cross_entropy(logits, mixed).item(), abs=1e-6)
    import_timm()
    from torchvision.ops import sigmoid_focal_loss

    two = torch.stack([torch.zeros(6), logits[:, 0]], dim=1)
    labels = (INDEX > 0).long()
    expected = sigmoid_focal_loss(logits[:, 0], labels.float(), alpha=-1, gamma=2.0, reduction="mean")
    ours = hard_loss_of(two, F.one_hot(labels, 2).float(), HardLoss("focal", gamma=2.0, alpha=0.25))
    assert ours.item() == pytest.approx(0.25 * expected.item(), abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_a_certain_answer_has_a_finite_slope(gamma):
    certain = torch.tensor([[40.0, 0.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    hard_loss_of(certain, ONE_HOT[:1].expand(2, 3), HardLoss("focal", gamma=gamma)).backward()
    assert torch.isfinite(certain.grad).all() and certain.grad[1].abs().max() > 0.01
    labels = torch.tensor([[40.0, -40.0, 0.5]], requires_grad=True)
    label_loss_of(labels, torch.tensor([[1.0, 0.0, 1.0]]), HardLoss("focal", gamma=gamma)).backward()
    assert torch.isfinite(labels.grad).all() and labels.grad[0, 2].abs() > 0.01
    far = torch.tensor([[0.0, 0.0, -200.0]], requires_grad=True)
    hard_loss_of(far, torch.tensor([[1.0, 0.0, 0.0]]), HardLoss("soft-f1")).backward()
    assert torch.isfinite(far.grad).all()


def test_weights_are_a_weighted_mean_as_in_torch(logits):
    weights = class_weights(COUNTS, "inverse", beta=0.9)
    expected = F.cross_entropy(logits, INDEX, weight=torch.tensor(weights))
    ours = hard_loss_of(logits, ONE_HOT, HardLoss(class_weights=weights))
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)


def test_inverse_weights_are_scikit_learns_and_class_balanced_ones_the_papers():
    labels = np.repeat([0, 1, 2], COUNTS)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    assert class_weights(COUNTS, "inverse", beta=0.9) == pytest.approx(expected)
    # Cui et al.: E_n = (1 - beta^n) / (1 - beta), weights 1 / E_n that sum to C.
    effective = [sum(0.99**power for power in range(count)) for count in COUNTS]
    expected = np.array([1 / value for value in effective])
    assert class_weights(COUNTS, "class-balanced", beta=0.99) == pytest.approx(expected * 3 / expected.sum())
    assert class_weights(COUNTS, "class-balanced", beta=0.0) == pytest.approx([1.0, 1.0, 1.0])
    assert class_weights(COUNTS, "none", beta=0.9) == ()
    for kind in ("inverse", "class-balanced"):  # a class that a fold lacks
        absent = class_weights(np.array([30, 0, 10]), kind, beta=0.99)
        assert absent[1] == 0 and absent[2] > absent[0] > 0 and np.isfinite(absent).all()


def test_ldam_is_cross_entropy_of_cosines_less_their_margins(logits):
    # The authors' code: F.cross_entropy(s * (x - m_y one_hot), target), m = 0.5 n^(-1/4) / max, s = 30.
    cosines = torch.tanh(logits)
    raw = COUNTS.astype(float) ** -0.25
    margins = torch.tensor(0.5 * raw / raw.max(), dtype=torch.float32)
    moved = cosines.clone()
    moved[torch.arange(6), INDEX] -= margins[INDEX]
    expected = F.cross_entropy(30 * moved, INDEX)
    ours = hard_loss_of(30 * cosines, ONE_HOT, HardLoss("ldam", margins=ldam_margins(COUNTS)))
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    assert np.isfinite(ldam_margins(np.array([5, 0, 3]))).all()


def test_soft_f1_of_certain_answers_is_scikit_learns_macro_f1(logits):
    answers = logits.argmax(1)
    certain = 1000.0 * F.one_hot(answers, 3).float()
    expected = 1 - f1_score(LABELS, answers.numpy(), average="macro")
    assert hard_loss_of(certain, ONE_HOT, HardLoss("soft-f1")).item() == pytest.approx(expected, abs=1e-6)
    p = F.softmax(logits, dim=1)
    tp, fp, fn = (ONE_HOT * p).sum(0), ((1 - ONE_HOT) * p).sum(0), (ONE_HOT * (1 - p)).sum(0)
    ours = hard_loss_of(logits, ONE_HOT, HardLoss("soft-f1"))
    assert ours.item() == pytest.approx((1 - (2 * tp / (2 * tp + fp + fn)).mean()).item(), abs=1e-6)


def test_bce_is_one_sigmoid_per_class_as_in_timm(logits, mixed):
    import_timm()
    from timm.loss import BinaryCrossEntropy

    expected = BinaryCrossEntropy(smoothing=0.0, sum_classes=True)(logits, mixed)
    assert hard_loss_of(logits, mixed, HardLoss("bce")).item() == pytest.approx(expected.item(), abs=1e-6)


LABELS_TRUE = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [1, 0, 1], [0, 1, 0], [1, 1, 0]]).float()


def test_losses_of_labels_that_each_apply_or_not_are_torchs_and_scikit_learns(logits):
    unknown = LABELS_TRUE.clone()
    unknown[0, 1] = unknown[4, 2] = float("nan")
    known = ~torch.isnan(unknown)
    weights = label_weights(np.array([3.0, 3.0, 1.0]), np.array([6, 5, 5]), "inverse", beta=0.9)
    assert weights == pytest.approx((1.0, 2 / 3, 4.0))
    each = F.binary_cross_entropy_with_logits(logits, LABELS_TRUE, pos_weight=torch.tensor(weights), reduction="none")
    for name in ("ce", "bce"):
        ours = label_loss_of(logits, unknown, HardLoss(name, class_weights=weights))
        assert ours.item() == pytest.approx(each[known].mean().item(), rel=1e-5)
    import_timm()
    from torchvision.ops import sigmoid_focal_loss

    expected = sigmoid_focal_loss(logits[known], LABELS_TRUE[known], alpha=-1, gamma=1.5, reduction="mean")
    ours = label_loss_of(logits, unknown, HardLoss("focal", gamma=1.5, alpha=0.5))
    assert ours.item() == pytest.approx(0.5 * expected.item(), rel=1e-5)
    expected = 1 - f1_score(LABELS_TRUE.numpy(), (logits > 0).numpy(), average="macro")
    assert label_loss_of(1000 * logits, LABELS_TRUE, HardLoss("soft-f1")).item() == pytest.approx(expected, abs=1e-6)
    unknown[:, 2] = float("nan")  # a label that no image of the batch is known to have or lack
    expected = 1 - f1_score(LABELS_TRUE.numpy()[:, 0], (logits > 0).numpy()[:, 0])
    rows = known[:, 1]
    expected += 1 - f1_score(LABELS_TRUE[rows].numpy()[:, 1], (logits[rows] > 0).numpy()[:, 1])
    assert label_loss_of(1000 * logits, unknown, HardLoss("soft-f1")).item() == pytest.approx(expected / 2, abs=1e-6)


def test_weights_of_labels_compare_the_images_with_and_without():
    applies, known = np.array([10.0, 90.0, 0.0, 100.0]), np.full(4, 100)
    assert label_weights(applies, known, "none", beta=0.9) == ()
    assert label_weights(applies, known, "inverse", beta=0.9) == pytest.approx((9.0, 1 / 9, 1.0, 1.0))
    few, many = (sum(0.99**power for power in range(count)) for count in (10, 90))
    balanced = label_weights(applies, known, "class-balanced", beta=0.99)
    assert balanced == pytest.approx((many / few, few / many, 1.0, 1.0))


@pytest.mark.parametrize("name", ["ce", "focal", "soft-f1"])
def test_losses_of_labels_fall_when_they_are_followed_and_unknown_ones_pull_nowhere(name, logits):
    target = LABELS_TRUE.clone()
    target[0, 0] = float("nan")
    parameter = torch.nn.Parameter(logits.clone())
    optimizer = torch.optim.SGD([parameter], lr=10.0)
    start = label_loss_of(parameter, target, HardLoss(name)).item()
    for _ in range(50):
        optimizer.zero_grad()
        label_loss_of(parameter, target, HardLoss(name)).backward()
        optimizer.step()
    assert label_loss_of(parameter, target, HardLoss(name)).item() < 0.5 * start
    assert parameter[0, 0] == logits[0, 0] and not torch.isnan(parameter).any()


@pytest.mark.parametrize("name", ["ce", "focal", "ldam", "soft-f1", "bce"])
def test_every_loss_falls_when_it_is_followed(name, logits):
    settings = TeacherSettings(hard_loss=name, classifier="cosine" if name == "ldam" else "linear")
    hard = settings.loss_against(LABELS, 3)
    parameter = torch.nn.Parameter(logits.clone())
    optimizer = torch.optim.SGD([parameter], lr=10.0 if name == "soft-f1" else 0.5)
    start = hard_loss_of(parameter, ONE_HOT, hard).item()
    for _ in range(50):
        optimizer.zero_grad()
        hard_loss_of(parameter, ONE_HOT, hard).backward()
        optimizer.step()
    assert hard_loss_of(parameter, ONE_HOT, hard).item() < 0.7 * start
    assert (parameter.argmax(1) == INDEX).all()


def test_soft_labels_join_every_hard_loss_in_their_share(logits):
    teacher = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    targets = make_targets(LABELS, 3, soft_log_probs=F.log_softmax(teacher, dim=1).numpy())
    soft_ce = F.cross_entropy(logits, F.softmax(teacher, dim=1))
    kl = F.kl_div(F.log_softmax(logits, 1), F.softmax(teacher, 1), reduction="batchmean")
    weights = class_weights(COUNTS, "inverse", beta=0.9)
    for hard in (HardLoss("focal"), HardLoss("soft-f1"), HardLoss(class_weights=weights)):
        alone = hard_loss_of(logits, ONE_HOT, hard)
        for name, part in (("ce", soft_ce), ("kl", kl)):
            ours = loss_of(logits, targets, LossSettings(name, 0.3, 1.0, hard))
            assert ours.item() == pytest.approx((0.7 * alone + 0.3 * part).item(), abs=1e-5)
    sigmoids = HardLoss("bce", class_weights=weights)
    soft_bce = F.binary_cross_entropy_with_logits(logits, F.softmax(teacher, dim=1), reduction="none").sum(1).mean()
    expected = 0.7 * hard_loss_of(logits, ONE_HOT, sigmoids) + 0.3 * soft_bce
    assert loss_of(logits, targets, LossSettings("ce", 0.3, 1.0, sigmoids)).item() == pytest.approx(
        expected.item(), abs=1e-5
    )
    mixture = 0.7 * ONE_HOT + 0.3 * F.softmax(teacher, dim=1)
    expected = F.binary_cross_entropy_with_logits(logits, mixture, reduction="none").sum(1).mean()
    ours = loss_of(logits, targets, LossSettings("ce", 0.3, 1.0, HardLoss("bce")))
    assert ours.item() == pytest.approx(expected.item(), abs=1e-6)


def test_deferred_weights_wait_for_their_epoch():
    loss = LossSettings(hard=HardLoss(class_weights=(1.0, 2.0), deferred=0.8))
    assert [bool(loss.at(epoch / 10).hard.class_weights) for epoch in range(10)] == [False] * 8 + [True] * 2
    assert LossSettings().at(0.0) == LossSettings()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"class_weights": "inverse"}, "counts rare classes twice; give --no-balanced"),
        (
            {"class_weights": "inverse", "balanced_sampling": False, "sample_power": 0.5},
            "with --sample-power or --oversample counts",
        ),
        ({"sample_power": 0.5}, "have no say in balanced sampling; give --no-balanced"),
        ({"oversample": ("a=2",)}, "have no say in balanced sampling"),
        ({"defer_weights": 0.8}, "defers nothing; give --class-weights"),
        ({"hard_loss": "focal", "label_smoothing": 0.1}, "focal with label smoothing"),
        ({"hard_loss": "ldam", "classifier": "cosine"}, "ldam needs one true class per image.*--cutmix 0"),
        (
            {"hard_loss": "ldam", "cutmix_probability": 0.0},
            "margins of --hard-loss ldam are angles; give --classifier cosine",
        ),
        (
            {"hard_loss": "soft-f1", "class_weights": "inverse", "balanced_sampling": False},
            "soft-f1 weighs all classes alike already",
        ),
        ({"hard_loss": "bce", "loss": "kl"}, "--hard-loss bce trains sigmoids and --loss kl compares softmax"),
        ({"cutmix_probability": 0.7, "mixup_probability": 0.5}, "together more than all"),
        ({"hard_loss": "arcface"}, "hard_loss='arcface', expected one of ce, focal, ldam"),
        ({"focal_gamma": -1}, "focal_gamma=-1, expected 0 to 20"),
        ({"class_weight_beta": 1.0}, "class_weight_beta=1.0"),
        ({"oversample": ("a=many",), "balanced_sampling": False}, "--oversample a=many: expected CLASS=FACTOR"),
    ],
)
def test_options_that_contradict_each_other_are_refused_with_the_way_out(wrong, message):
    with pytest.raises(UsageError, match=message):
        StudentSettings(**wrong)


def test_teachers_are_advised_in_their_own_flags():
    both = "give --no-teacher-balanced or --teacher-class-weights none"
    with pytest.raises(UsageError, match=f"^teacher: .*{both}$"):
        TeacherSettings(class_weights="inverse", balanced_sampling=True)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({}, None),
        (
            {"hard_loss": "ldam", "classifier": "cosine"},
            "ldam and balanced sampling both favour rare classes; consider",
        ),
        ({"hard_loss": "soft-f1", "batch_size": 64}, "soft-f1 and balanced sampling both favour rare classes"),
        (
            {"hard_loss": "soft-f1", "balanced_sampling": False, "sample_power": 0.5},
            "soft-f1 and --sample-power or --oversample both favour rare classes",
        ),
        ({"hard_loss": "soft-f1", "balanced_sampling": False, "batch_size": 8}, "batches of 8 hold few"),
        ({"soft_temperature": 4.0}, "--loss ce with --soft-temperature 4 softens the target and not the answer"),
        ({"soft_temperature": 4.0, "loss": "kl"}, None),
        ({"test_size": 224}, "--test-size 224 is not above --image-size 224"),
        ({"test_size": 256}, None),
    ],
)
def test_what_is_only_doubtful_is_a_warning(asked, told):
    doubts = StudentSettings(**{"cutmix_probability": 0.0} | asked).doubts()
    assert len(doubts) == (told is not None)
    assert told is None or told in doubts[0]


def test_live_teachers_soften_only_what_the_loss_softens_too():
    assert live_defaults(None) == live_defaults("kl") == LIVE_DEFAULTS
    assert live_defaults("ce") == LIVE_DEFAULTS | {"soft_temperature": 1.0}
