"""Networks that timm lacks, entered into its registry: FcaNet and torchvision's ShuffleNetV2.

Once this module is imported, ``timm.create_model("fcanet50")`` works like any other name.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from edgedistill.timm_import import import_timm

timm = import_timm()
from timm.layers import SelectAdaptivePool2d  # noqa: E402  timm and torchvision import only after import_timm()
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model  # noqa: E402
from timm.models.resnet import BasicBlock, Bottleneck, _create_resnet  # noqa: E402
from torchvision.models.shufflenetv2 import ShuffleNetV2 as TorchvisionShuffleNetV2  # noqa: E402

# FcaNet's 'top16' frequencies (vertical, horizontal) of a 7x7 DCT, best first: table in the authors' code.
FREQUENCIES = tuple(
    zip(
        (0, 0, 6, 0, 0, 1, 1, 4, 5, 1, 3, 0, 0, 0, 3, 2),
        (0, 1, 0, 5, 2, 0, 2, 0, 0, 6, 0, 4, 6, 3, 5, 2),
        strict=True,
    )
)
GRID = 7
REDUCTION = 16


class FrequencyAttention(nn.Module):
    """FcaNet's channel attention (Qin et al., 2012.11879): squeeze-and-excitation that squeezes each of 16 groups of
    channels by another frequency of the DCT in place of the mean. [N, C, H, W] -> the same shape.

    The authors fix the map sizes to multiples of 7 and scale the frequencies with them, which leaves
    cos(pi u (i + 1/2) / 7) at any size; so it is computed here, and any image size works.
    """

    def __init__(self, channels: int, **_: Any) -> None:
        super().__init__()
        if channels % len(FREQUENCIES):
            raise ValueError(f"{channels} channels, expected a multiple of {len(FREQUENCIES)}")
        self.channels = channels
        self.fc1 = nn.Linear(channels, channels // REDUCTION, bias=False)
        self.fc2 = nn.Linear(channels // REDUCTION, channels, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # int(): the exported graph holds the filters as constants.
        filters = _filters_on(int(x.shape[2]), int(x.shape[3]), self.channels, x.device)
        squeezed = (x * filters).sum(dim=(2, 3))
        weights = torch.sigmoid(self.fc2(F.relu(self.fc1(squeezed))))
        return x * weights[:, :, None, None]


@functools.lru_cache(maxsize=64)
def _filters_on(height: int, width: int, channels: int, device: torch.device) -> torch.Tensor:
    """Kept on the device: copying them for each batch would make a GPU wait."""
    with torch.inference_mode(False):
        return dct_filters(height, width, channels).to(device)


def dct_filters(height: int, width: int, channels: int) -> torch.Tensor:
    """float32 [C, H, W]: the frequency of each channel's group."""

    def wave(frequency: int, size: int) -> torch.Tensor:
        positions = torch.arange(size, dtype=torch.float32) + 0.5
        return torch.cos(math.pi * frequency * positions / GRID) * math.sqrt((2.0 if frequency else 1.0) / size)

    planes = torch.stack([torch.outer(wave(v, height), wave(u, width)) for v, u in FREQUENCIES])
    return planes.repeat_interleave(channels // len(FREQUENCIES), dim=0)


class ShuffleNetV2(TorchvisionShuffleNetV2):
    """torchvision's network and tensor names, with what timm's users expect: dropout, global_pool, get_classifier."""

    def __init__(
        self, channels: tuple[int, ...], *, num_classes: int = 1000, in_chans: int = 3, drop_rate: float = 0.0
    ) -> None:
        if in_chans != 3:
            raise ValueError(f"in_chans {in_chans}, expected 3")
        super().__init__([4, 8, 4], list(channels), num_classes=num_classes)
        self.num_classes, self.drop_rate = num_classes, drop_rate
        self.global_pool = SelectAdaptivePool2d(pool_type="avg", flatten=True)

    def get_classifier(self) -> nn.Module:
        return self.fc

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.maxpool(self.conv1(x))
        x = self.conv5(self.stage4(self.stage3(self.stage2(x))))
        x = self.global_pool(x)
        return self.fc(F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x)


register: Callable[[Callable[..., Any]], Callable[..., Any]] = register_model


def _config(first_conv: str) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": first_conv,
        "classifier": "fc",
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _config("conv1") for name in ("fcanet18", "fcanet34", "fcanet50", "fcanet101")}
    | {f"shufflenetv2_x{width}.untrained": _config("conv1.0") for width in ("0_5", "1_0", "1_5", "2_0")}
)


def _fcanet(variant: str, pretrained: bool, block: type, layers: list[int], options: dict[str, Any]) -> Any:
    attention = {"block_args": {"attn_layer": FrequencyAttention}}
    return _create_resnet(variant, pretrained, block=block, layers=layers, **attention, **options)


@register
def fcanet18(pretrained: bool = False, **options: Any) -> Any:
    return _fcanet("fcanet18", pretrained, BasicBlock, [2, 2, 2, 2], options)


@register
def fcanet34(pretrained: bool = False, **options: Any) -> Any:
    return _fcanet("fcanet34", pretrained, BasicBlock, [3, 4, 6, 3], options)


@register
def fcanet50(pretrained: bool = False, **options: Any) -> Any:
    return _fcanet("fcanet50", pretrained, Bottleneck, [3, 4, 6, 3], options)


@register
def fcanet101(pretrained: bool = False, **options: Any) -> Any:
    return _fcanet("fcanet101", pretrained, Bottleneck, [3, 4, 23, 3], options)


def _shufflenet(variant: str, pretrained: bool, channels: tuple[int, ...], options: dict[str, Any]) -> Any:
    return build_model_with_cfg(ShuffleNetV2, variant, pretrained, channels=channels, **options)


@register
def shufflenetv2_x0_5(pretrained: bool = False, **options: Any) -> Any:
    return _shufflenet("shufflenetv2_x0_5", pretrained, (24, 48, 96, 192, 1024), options)


@register
def shufflenetv2_x1_0(pretrained: bool = False, **options: Any) -> Any:
    return _shufflenet("shufflenetv2_x1_0", pretrained, (24, 116, 232, 464, 1024), options)


@register
def shufflenetv2_x1_5(pretrained: bool = False, **options: Any) -> Any:
    return _shufflenet("shufflenetv2_x1_5", pretrained, (24, 176, 352, 704, 1024), options)


@register
def shufflenetv2_x2_0(pretrained: bool = False, **options: Any) -> Any:
    return _shufflenet("shufflenetv2_x2_0", pretrained, (24, 244, 488, 976, 2048), options)
