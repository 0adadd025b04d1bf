"""export/fusion.py: every norm that may be folded is folded, none that may not, and no logit moves."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from edgedistill.errors import ModelError
from edgedistill.export.fusion import fuse, plan_folds
from edgedistill.timm_import import import_timm

timm = import_timm()
from timm.layers.norm_act import BatchNormAct2d, freeze_batch_norm_2d  # noqa: E402  import_timm has to come first

SIZE = 64


def with_random_norms(model: nn.Module) -> nn.Module:
    """Statistics that a wrong fold cannot survive; fresh norms are nearly the identity and would hide it."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if getattr(module, "running_var", None) is not None:
            module.running_mean.copy_(torch.randn(module.running_mean.shape, generator=generator) * 0.3)
            module.running_var.copy_(torch.rand(module.running_var.shape, generator=generator) + 0.5)
            if module.weight is not None:
                module.weight.data.copy_(torch.rand(module.weight.shape, generator=generator) + 0.5)
                module.bias.data.copy_(torch.randn(module.bias.shape, generator=generator) * 0.2)
    return model.eval()


def images(count: int = 2, size: int = SIZE) -> npt.NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal((count, 3, size, size), dtype=np.float32)


def norm_count(model: nn.Module) -> int:
    return sum(getattr(module, "running_var", None) is not None for module in model.modules())


@pytest.mark.parametrize(
    ("name", "norms_left"),
    [
        ("mobilenetv3_small_050", 0),
        ("efficientnet_b0", 0),
        ("tf_efficientnet_lite0", 0),
        ("lcnet_050", 0),
        ("ghostnet_100", 0),
        ("repvgg_a0", 0),
        ("mobileone_s0", 0),
        ("fastvit_t8", 0),
        ("densenet121", 62),  # 58 norms before their convolution, 3 in transitions, 1 at the end
        ("resnet18", 0),
        ("regnety_002", 0),
        ("mobilenetv4_conv_small", 0),
    ],
)
def test_timm_networks_are_folded_without_moving_a_logit(name: str, norms_left: int) -> None:
    model = with_random_norms(timm.create_model(name, num_classes=5))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused, report = fuse(model, images(), image_kind="random")
    assert report.relative_difference < 1e-4
    assert norm_count(fused) == norms_left == len(report.kept)
    assert report.folded + report.reparameterized > 0
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items()), "fuse changed the caller's model"


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_frozen_norms_are_folded_too(name: str) -> None:
    model = with_random_norms(timm.create_model(name, num_classes=5))
    frozen = freeze_batch_norm_2d(copy.deepcopy(model)).eval()
    fused, report = fuse(frozen, images(), image_kind="random")
    assert report.relative_difference < 1e-4 and norm_count(fused) == 0 and report.folded > 10


class Classifier(nn.Module):
    """A body that ends in 5 logits, so that each case below is one line."""

    def __init__(self, body: nn.Module, forward: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.run = body, nn.Linear(8, 5), forward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.run(self.body, x).mean((2, 3)))


def parts(**layers: nn.Module) -> nn.ModuleDict:
    return nn.ModuleDict(layers)


def conv(**options: int) -> nn.Conv2d:
    return nn.Conv2d(3, 8, 3, padding=1, **options)


class Standardised(nn.Conv2d):
    """Weight standardisation: the kernel that runs is not the parameter."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, weight, self.bias, padding=1)


@pytest.mark.parametrize(
    ("body", "forward", "reason"),
    [
        pytest.param(
            parts(a=conv(), n=nn.BatchNorm2d(8)), lambda m, x: m.n(y := m.a(x)) + y, "read elsewhere", id="shortcut"
        ),
        pytest.param(
            parts(a=conv(), n=nn.BatchNorm2d(8)), lambda m, x: m.n(m.a(x).relu()), "does not follow", id="relu-between"
        ),
        pytest.param(
            # In the order of names b comes before n; in the data flow a does, and b after.
            parts(a=conv(), b=nn.Conv2d(8, 8, 1), n=nn.BatchNorm2d(8)),
            lambda m, x: m.b(m.n(m.a(x).sigmoid())),
            "does not follow",
            id="named-after-another",
        ),
        pytest.param(
            parts(a=conv(), n=nn.BatchNorm2d(8)), lambda m, x: m.n(m.a(x)) + m.n(m.a(-x)), "times", id="called-twice"
        ),
        pytest.param(
            parts(a=conv(), n=nn.BatchNorm2d(8)),
            lambda m, x: m.n(m.a(x)) + nn.functional.conv2d(x, m.a.weight, padding=1),
            "shares its weights",
            id="weights-used-elsewhere",
        ),
        pytest.param(
            parts(a=nn.ConvTranspose2d(3, 8, 3), n=nn.BatchNorm2d(8)),
            lambda m, x: m.n(m.a(x)),
            "follow",
            id="transpose",
        ),
        pytest.param(
            parts(a=Standardised(3, 8, 3), n=nn.BatchNorm2d(8)), lambda m, x: m.n(m.a(x)), "no plain", id="standardised"
        ),
        pytest.param(
            parts(a=conv(), n=nn.BatchNorm2d(8, track_running_stats=False)),
            lambda m, x: m.n(m.a(x)),
            "statistics of each batch",
            id="batch-statistics",
        ),
        pytest.param(
            parts(a=nn.utils.parametrizations.weight_norm(conv()), n=nn.BatchNorm2d(8)),
            lambda m, x: m.n(m.a(x)),
            "computes its weights",
            id="parametrised",
        ),
    ],
)
def test_what_may_not_be_folded_is_left_with_a_reason(
    body: nn.ModuleDict, forward: Callable[..., torch.Tensor], reason: str
) -> None:
    model = with_random_norms(Classifier(body, forward))
    _, report = fuse(model, images(size=16), image_kind="random")
    assert report.folded == 0 and [name for name, _ in report.kept] == ["body.n"]
    assert reason in report.kept[0][1]
    assert report.max_logit_difference == 0


def test_a_freed_tensor_is_not_taken_for_a_later_one() -> None:
    """Forty norms read tensors that die at once; Python gives their identities to the convolutions' outputs after them."""
    body = parts(
        n=nn.ModuleList(nn.BatchNorm2d(3) for _ in range(40)), c=nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(40))
    )

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        for norm, convolution in zip(m.n, m.c, strict=True):
            x = convolution(norm(x.sin()).relu())
        return x

    folds, kept = plan_folds(
        Classifier(body, lambda m, x: forward(m, x).tile(1, 3, 1, 1)[:, :8]).eval(), torch.zeros(1, 3, 8, 8)
    )
    assert folds == []
    assert {reason for _, reason in kept} == {"does not follow a convolution or linear layer"}


def test_a_norm_in_training_mode_is_left_with_a_reason() -> None:
    model = with_random_norms(Classifier(parts(a=conv(), n=nn.BatchNorm2d(8)), lambda m, x: m.n(m.a(x))))
    model.body.n.train()
    _, report = fuse(model, images(size=16), image_kind="random")
    assert report.kept == (("body.n", "is in training mode"),)


@pytest.mark.parametrize(
    ("body", "forward"),
    [
        pytest.param(parts(a=conv(bias=False), n=nn.BatchNorm2d(8)), lambda m, x: m.n(m.a(x)), id="no-bias"),
        pytest.param(parts(a=conv(), n=nn.BatchNorm2d(8)), lambda m, x: m.n(m.a(x)), id="bias"),
        pytest.param(parts(a=conv(), n=nn.BatchNorm2d(8, affine=False)), lambda m, x: m.n(m.a(x)), id="no-affine"),
        pytest.param(
            parts(s=conv(), a=nn.Conv2d(8, 8, 3, groups=8), n=BatchNormAct2d(8, act_layer=nn.Hardswish)),
            lambda m, x: m.n(m.a(m.s(x))),
            id="depthwise-with-activation",
        ),
        pytest.param(
            parts(s=conv(), a=nn.Conv2d(8, 8, 3, groups=2), n=nn.BatchNorm2d(8)),
            lambda m, x: m.n(m.a(m.s(x))),
            id="grouped",
        ),
        pytest.param(
            parts(s=conv(), a=nn.Linear(8, 8), n=nn.BatchNorm1d(8)),
            lambda m, x: m.n(m.a(m.s(x).mean((2, 3))))[:, :, None, None],
            id="linear",
        ),
    ],
)
def test_each_kind_of_layer_is_folded(body: nn.ModuleDict, forward: Callable[..., torch.Tensor]) -> None:
    model = with_random_norms(Classifier(body, forward))
    fused, report = fuse(model, images(size=16), image_kind="random")
    assert report.folded == 1 and not report.kept and report.relative_difference < 1e-5
    kept = [module for module in fused.modules() if isinstance(module, nn.Hardswish)]
    assert len(kept) == sum(isinstance(module, nn.Hardswish) for module in model.modules()), "an activation was lost"


def test_a_fold_that_moves_the_logits_is_an_error() -> None:
    """A variance of 0 with a tiny eps blows the scale up until float32 cannot hold the folded kernel."""
    model = with_random_norms(Classifier(parts(a=conv(), n=nn.BatchNorm2d(8, eps=1e-30)), lambda m, x: m.n(m.a(x))))
    model.body.n.running_var.zero_()
    model.body.n.weight.data.fill_(1e30)
    with pytest.raises(ModelError, match="fusion moved the logits"):
        fuse(model, images(size=16), image_kind="random")
