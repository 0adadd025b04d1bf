"""The quick weight gradients of depthwise convolutions are torch's, and are used where torch's are slow."""

from contextlib import nullcontext

import pytest
import torch
from torch.nn import functional as F

from edgedistill.training import depthwise
from edgedistill.training.depthwise import quick_depthwise
from edgedistill.training.models import create_model

CPU = torch.device("cpu")


@pytest.fixture
def without_avx512(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")


@pytest.fixture
def ours(monkeypatch):
    """The kernels of the layers whose gradients were computed here."""
    seen = []
    compute = depthwise.weight_gradient

    def noted(images, gradient, weight, stride, padding):
        seen.append(tuple(weight.shape))
        return compute(images, gradient, weight, stride, padding)

    monkeypatch.setattr(depthwise, "weight_gradient", noted)
    return seen


@pytest.mark.parametrize("bias", [None, torch.arange(8.0)], ids=["no bias", "bias"])
@pytest.mark.parametrize(
    ("height", "width", "kernel", "stride", "padding"),
    [
        (2, 2, 5, 1, 2),
        (3, 3, 5, 2, 2),
        (4, 3, 5, 1, 2),
        (1, 1, 3, 1, 1),
        (2, 9, 5, 2, 2),  # one side alone is below the kernel's
        (6, 5, 7, 2, 3),
        (4, 4, 5, 1, 1),  # not every pixel is in the middle of a kernel
        (3, 3, 5, 3, 4),  # more padding than a kernel half
    ],
)
def test_gradients_are_torchs(without_avx512, ours, height, width, kernel, stride, padding, bias):
    torch.manual_seed(height * 10 + kernel)
    images = torch.randn(6, 8, height, width).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(8, 1, kernel, kernel).requires_grad_()
    wanted = [images, weight] if bias is None else [images, weight, bias.requires_grad_()]
    expected = F.conv2d(images, weight, bias, stride, padding, 1, 8)
    pull = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, wanted, pull)
    assert not ours
    with quick_depthwise(CPU):
        outputs = F.conv2d(images, weight, bias, (stride, stride), (padding, padding), (1, 1), 8)
    mine = torch.autograd.grad(outputs, wanted, pull)
    assert len(ours) == 1
    assert torch.equal(outputs, expected)
    for one, other in zip(mine, theirs, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_a_network_uses_them_where_its_maps_are_smaller_than_its_kernels(without_avx512, ours):
    model = create_model("mbv3s", class_count=3, image_size=64).train()
    images, labels = torch.rand(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])

    def gradients(context):
        with context:
            loss = F.cross_entropy(model(images), labels)
        model.zero_grad()
        loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    theirs = gradients(nullcontext())
    assert not ours
    mine = gradients(quick_depthwise(CPU))
    # Five layers of 5 x 5 see 4 x 4 pixels and two 2 x 2; what is larger is left to torch.
    assert len(ours) == 7 and {shape[2:] for shape in ours} == {(5, 5)}
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * float(other.abs().max()) + 1e-9)


def test_half_precision_is_left_to_torch(without_avx512, ours):
    model = create_model(
        "test_convnext", class_count=3, image_size=32
    ).train()  # its sums are float32 under autocast too
    with quick_depthwise(CPU), torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(torch.rand(4, 3, 32, 32)).float(), torch.tensor([0, 1, 2, 0]))
    loss.backward()
    assert not ours and all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("capability", ["AVX512", "DEFAULT"])
def test_a_cpu_with_kernels_of_its_own_keeps_them(monkeypatch, ours, capability):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    weight = torch.randn(8, 1, 5, 5, requires_grad=True)
    with quick_depthwise(CPU):
        F.conv2d(torch.randn(2, 8, 2, 2), weight, None, (1, 1), (2, 2), (1, 1), 8).sum().backward()
    assert not ours and weight.grad is not None


@pytest.mark.parametrize(
    "change",
    [
        {"groups": 4},  # not depthwise
        {"dilation": (2, 2), "padding": (4, 4)},
        {"padding": "same"},
        {"dtype": torch.bfloat16},
    ],
)
def test_what_is_no_plain_depthwise_convolution_is_left_to_torch(without_avx512, ours, change):
    dtype, groups = change.get("dtype", torch.float32), change.get("groups", 8)
    weight = torch.randn(8, 8 // groups, 5, 5, dtype=dtype, requires_grad=True)
    images = torch.randn(2, 8, 2, 2, dtype=dtype)
    with quick_depthwise(CPU):
        outputs = F.conv2d(
            images, weight, None, (1, 1), change.get("padding", (2, 2)), change.get("dilation", (1, 1)), groups
        )
    outputs.sum().backward()
    assert not ours and weight.grad is not None
