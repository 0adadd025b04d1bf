"""Every optimiser that is offered trains and resumes; every schedule is its formula."""

import dataclasses

import numpy as np
import pytest
import torch

from edgedistill.errors import ArtifactError, UsageError
from edgedistill.training.checkpoints import load_tensors, save_tensors
from edgedistill.training.loader import Draw
from edgedistill.training.optimizers import Phase, learning_rate, make_optimizer, resolve_optimizer
from edgedistill.training.settings import TrainSettings, identity, refuse_other_settings


def network():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 3))


def trained(model, optimizer, steps):
    for step in steps:
        torch.manual_seed(step)
        loss = torch.nn.functional.cross_entropy(model(torch.randn(16, 6)), torch.randint(3, (16,)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model


@pytest.mark.parametrize(
    "name", ["radam", "adam", "adamw", "sgd", "ranger", "over9000", "lookahead_sgd", "lamb", "lion", "nadamw", "adopt"]
)
def test_a_checkpoint_between_steps_changes_no_weight(name, tmp_path):
    settings = TrainSettings(name="x", optimizer=name, lr=0.01)
    whole = network()
    before = {key: value.clone() for key, value in whole.state_dict().items()}
    trained(whole, make_optimizer(whole, settings), range(20))
    assert not torch.equal(before["0.weight"], whole.state_dict()["0.weight"])
    broken = network()
    optimizer = make_optimizer(broken, settings)
    trained(broken, optimizer, range(9))  # after Lookahead's first synchronisation, between two
    save_tensors(tmp_path / "c.pt", {"m": broken.state_dict(), "o": optimizer.state_dict()}, format="test")
    saved = load_tensors(tmp_path / "c.pt", format="test")
    again = network()
    optimizer = make_optimizer(again, settings)
    again.load_state_dict(saved["m"])
    optimizer.load_state_dict(saved["o"])
    trained(again, optimizer, range(9, 20))
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in whole.state_dict().items())


def test_ranger_decays_weights_as_radam_does():
    ours, ranger = (make_optimizer(network(), TrainSettings(name="x", optimizer=name)) for name in ("radam", "ranger"))
    kinds = [{group["decoupled_weight_decay"] for group in each.param_groups} for each in (ours, ranger)]
    assert kinds == [{True}, {True}]


def test_lookahead_pulls_every_sixth_step_half_way_back():
    # Zhang et al., 1907.08610: slow += alpha (fast - slow); fast = slow. timm's slow weights start in step 6.
    weight = torch.nn.Parameter(torch.zeros(1, 1))
    model = torch.nn.Module()
    model.weight = weight
    settings = TrainSettings(name="x", optimizer="lookahead_sgd", lr=1.0, weight_decay=0.0)
    optimizer = make_optimizer(model, settings)
    plain = torch.optim.SGD([other := torch.nn.Parameter(torch.zeros(1, 1))], lr=1.0, momentum=0.9, nesterov=True)
    slow = 0.0
    for step in range(1, 13):
        for parameter, stepper in ((weight, optimizer), (other, plain)):
            parameter.grad = torch.ones(1, 1)
            stepper.step()
        if step == 6:
            slow = other.item()
        if step == 12:
            slow += 0.5 * (other.item() - slow)
            assert weight.item() == pytest.approx(slow)


def test_weight_decay_spares_biases_and_norms():
    for name in ("adam", "lamb", "ranger"):
        groups = make_optimizer(network(), TrainSettings(name="x", optimizer=name, weight_decay=0.1)).param_groups
        assert [group["weight_decay"] for group in groups] == [0.1, 0.0], name
        assert {p.ndim for p in groups[0]["params"]} == {2} and {p.ndim for p in groups[1]["params"]} == {1}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("radan", "no optimizer called 'radan'; did you mean .*radam"),
        ("lookahead_ranger", "no optimizer called"),
        ("bnbadam8bit", "cannot be used here"),
        ("adahessian", "cannot be used here: it needs second derivatives"),
    ],
)
def test_optimizers_that_cannot_be_are_refused_with_a_reason(name, message):
    with pytest.raises(UsageError, match=message):
        resolve_optimizer(name)


def phase(**options):
    draw = Draw(np.arange(40), np.zeros(40, np.int32), 8, balanced=False, seed=0)
    return Phase("x", 4, draw, 1.0, 0.1, **options)


def test_the_exponential_rate_falls_per_epoch_after_warm_up():
    schedule = phase(warmup_epochs=1.0, schedule="exponential", decay=0.5)
    rates = [learning_rate(schedule, epoch, step) for epoch in range(4) for step in range(5)]
    assert rates[:5] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6])
    assert rates[5:] == [0.5] * 5 + [0.25] * 5 + [0.125] * 5
    assert {learning_rate(phase(schedule="constant"), epoch, 3) for epoch in range(4)} == {1.0}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "step"}, "schedule='step', expected cosine"),
        ({"lr_decay": 1.2}, "lr_decay=1.2, expected a factor"),
    ],
)
def test_schedules_that_cannot_be_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        TrainSettings(name="x", **wrong)


def test_work_from_before_an_option_existed_was_made_with_its_default():
    settings = TrainSettings(name="x")
    saved = {key: value for key, value in identity(settings).items() if key not in ("schedule", "oversample")}
    refuse_other_settings("checkpoint.pt", saved, identity(settings), TrainSettings)
    other = dataclasses.replace(settings, schedule="constant")
    with pytest.raises(ArtifactError, match=r"schedule='cosine' \(now 'constant'\)"):
        refuse_other_settings("checkpoint.pt", saved, identity(other), TrainSettings)
