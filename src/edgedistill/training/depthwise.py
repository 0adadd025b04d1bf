"""Weight gradients of depthwise convolutions whose kernel is larger than their image, on CPUs without AVX-512.

oneDNN 3.12 has no kernel for them there and multiplies a matrix per channel: 54 ms for 576 channels of 2 x 2 under 5 x 5
on an AMD EPYC 7003, batch 64, where the formula below takes 0.7 ms. The last stages of MobileNetV3-small at 128 px and
less and of the EfficientNets are such layers; half of a training step went there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


def quick_depthwise(device: torch.device) -> AbstractContextManager[Any]:
    """A context for the forward pass of a training step; where torch has kernels of its own it does nothing."""
    slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    return _QuickDepthwise() if slow else nullcontext()


class _QuickDepthwise(TorchFunctionMode):
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.conv2d and not kwargs and len(args) == 7 and _is_ours(*args):
            images, weight, bias, stride, padding, _, _ = args
            return _DepthwiseConv.apply(images, weight, bias, stride, padding)
        return func(*args, **(kwargs or {}))


def _is_ours(
    images: torch.Tensor,
    weight: torch.Tensor,
    _bias: torch.Tensor | None,
    _stride: tuple[int, int],
    padding: tuple[int, int] | str,
    dilation: tuple[int, int],
    groups: int,
) -> bool:
    """Whether oneDNN would multiply matrices: an image side below the kernel's. (torch.conv2d's own arguments.)"""
    return (
        groups == images.shape[1] == weight.shape[0]
        and not isinstance(padding, str)
        and tuple(dilation) == (1, 1)
        and (images.shape[2] < weight.shape[2] or images.shape[3] < weight.shape[3])
        and images.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")  # the outputs' gradients would be of another type
        and torch.is_grad_enabled()
        and weight.requires_grad
    )


class _DepthwiseConv(torch.autograd.Function):
    """Images [N, C, H, W], weight [C, 1, KH, KW], bias [C] or None; float32."""

    @staticmethod
    def forward(
        ctx: Any,
        images: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> torch.Tensor:
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return torch.conv2d(images, weight, bias, stride, padding, 1, images.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        images, weight = ctx.saved_tensors
        stride, padding, groups = ctx.stride, ctx.padding, images.shape[1]
        to_images = to_bias = None
        if ctx.needs_input_grad[0]:
            to_images, _, _ = torch.ops.aten.convolution_backward(
                gradient, images, weight, None, stride, padding, [1, 1], False, [0, 0], groups, [True, False, False]
            )
        if ctx.needs_input_grad[2]:
            to_bias = gradient.sum((0, 2, 3))
        return to_images, weight_gradient(images, gradient, weight, stride, padding), to_bias, None, None


def weight_gradient(
    images: torch.Tensor,
    gradient: torch.Tensor,
    weight: torch.Tensor,
    stride: tuple[int, int],
    padding: tuple[int, int],
) -> torch.Tensor:
    """[C, 1, KH, KW]: for each place of the kernel, image times gradient, summed over the outputs whose pixel it meets.

    images: [N, C, H, W]; gradient: of the outputs, [N, C, OH, OW].
    """
    height, width = weight.shape[2:]
    pixels, outputs = images.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)  # channels last, as they lie in memory
    result = torch.zeros_like(weight)
    for row in range(height):
        ys = _meeting(row, images.shape[2], gradient.shape[2], stride[0], padding[0])
        for column in range(width):
            xs = _meeting(column, images.shape[3], gradient.shape[3], stride[1], padding[1])
            if ys is not None and xs is not None:
                product = pixels[:, ys[0], xs[0]] * outputs[:, ys[1], xs[1]]
                result[:, 0, row, column] = product.sum((0, 1, 2))
    return result


def _meeting(place: int, side: int, outputs: int, stride: int, padding: int) -> tuple[slice, slice] | None:
    """Pixels, and the outputs that see them, under this place of the kernel, along one side; None where it sees padding
    alone."""
    first = max(0, -(-(padding - place) // stride))
    end = min(outputs, (side - 1 + padding - place) // stride + 1)
    if end <= first:
        return None
    start = first * stride + place - padding
    return slice(start, start + (end - first - 1) * stride + 1, stride), slice(first, end)
