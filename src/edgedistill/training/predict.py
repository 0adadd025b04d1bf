"""Logits of a network for image files or for pixels: what validation, soft labels and the evaluation use."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import nn

from edgedistill import console
from edgedistill.images import DecodeMode, ImageU8, InputSpec, load_image, reduction
from edgedistill.training.loader import core_count
from edgedistill.training.seeds import generator

BATCH_NORM_IMAGES = 16_384  # statistics of more images do not move in the fourth digit

PathLike = str | Path | np.str_


def network_input(images: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """uint8 [N, H, W, 3] RGB on any device -> float32 [N, 3, H, W] in channels_last layout, (x - mean) / std."""
    mean, std = _mean_and_std(spec, images.device)
    return images.permute(0, 3, 1, 2).to(torch.float32, copy=True).sub_(mean).div_(std)


def at_size(images: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """[N, h, w, 3], uint8 or float -> [N, spec.height, spec.width, 3] by the deployable transform (see images.py): the
    average of k x k pixels, then bilinear. Not rounded to whole grey values; float32 unless it was that size before."""
    height, width = images.shape[1:3]
    if (height, width) == (spec.height, spec.width):
        return images
    k = reduction(height, width, dataclasses.replace(spec, resize="squash", crop_fraction=1.0))
    pixels = images.permute(0, 3, 1, 2).float()
    if k > 1:
        pixels = F.avg_pool2d(F.pad(pixels, (0, -width % k, 0, -height % k), mode="replicate"), k)
    pixels = F.interpolate(pixels, (spec.height, spec.width), mode="bilinear", align_corners=False)
    return pixels.permute(0, 2, 3, 1)


@functools.lru_cache(maxsize=8)
def _mean_and_std(spec: InputSpec, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept on the device: copying them for each batch would make a GPU wait."""
    with torch.inference_mode(False):
        mean = torch.tensor(spec.mean, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        return mean, torch.tensor(spec.std, dtype=torch.float32, device=device).view(1, 3, 1, 1)


def device_of(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def predict_logits(
    model: nn.Module,
    paths: Sequence[PathLike] | npt.NDArray[np.str_],
    spec: InputSpec,
    *,
    batch_size: int = 64,
    decode: DecodeMode = "reduced",
    title: str = "",
) -> npt.NDArray[np.float32]:
    """float32 [N, C]: all that ``logit_batches`` gives."""
    return joined(logit_batches(model, paths, spec, batch_size=batch_size, decode=decode, title=title), model)


def logit_batches(
    model: nn.Module,
    paths: Sequence[PathLike] | npt.NDArray[np.str_],
    spec: InputSpec,
    *,
    batch_size: int = 64,
    decode: DecodeMode = "reduced",
    title: str = "",
) -> Iterator[npt.NDArray[np.float32]]:
    """float32 [n, C] in the order of ``paths`` through the deployable transform, in eval mode, on the model's device,
    always in float32.

    The next batch is decoded while this one is computed. ``title`` shows a progress bar. Raises ImageError that names
    the damaged file.
    """
    with console.progress(title, len(paths) if title else 0) as bar:
        for pixels in decoded_batches(paths, spec, batch_size=batch_size, decode=decode):
            yield predict_pixels(model, pixels, spec, batch_size=batch_size)
            bar.update(bar.task_ids[0], advance=len(pixels) if title else 0)


def joined(batches: Iterable[npt.NDArray[np.float32]], model: nn.Module) -> npt.NDArray[np.float32]:
    """All batches in one array; of none float32 [0, C]."""
    found = list(batches)
    return np.concatenate(found) if found else np.zeros((0, int(model.num_classes)), np.float32)  # type: ignore[arg-type]


def decoded_batches(
    paths: Sequence[PathLike] | npt.NDArray[np.str_],
    spec: InputSpec,
    *,
    batch_size: int,
    decode: DecodeMode = "reduced",
) -> Iterator[ImageU8]:
    """uint8 [<= batch_size, H, W, 3] BGR in the order of ``paths``; threads decode one batch ahead."""
    groups = [paths[start : start + batch_size] for start in range(0, len(paths), batch_size)]
    with ThreadPoolExecutor(core_count()) as pool:

        def start(group: Sequence[PathLike] | npt.NDArray[np.str_]) -> Iterator[ImageU8]:
            return pool.map(lambda path: load_image(str(path), spec, decode=decode), group)

        ahead = [start(group) for group in groups[:1]]
        for number in range(len(groups)):
            images = ahead.pop()
            ahead = [start(group) for group in groups[number + 1 : number + 2]]
            yield np.stack(list(images))


def load_pixels(paths: npt.NDArray[np.str_], spec: InputSpec) -> ImageU8:
    """All images at the network's size: uint8 [N, H, W, 3] BGR."""
    pixels = np.empty((len(paths), spec.height, spec.width, 3), np.uint8)
    start = 0
    for images in decoded_batches(paths, spec, batch_size=256):
        pixels[start : start + len(images)] = images
        start += len(images)
    return pixels


def predict_pixels(model: nn.Module, pixels: ImageU8, spec: InputSpec, *, batch_size: int) -> npt.NDArray[np.float32]:
    """float32 [N, C] for uint8 [N, H, W, 3] BGR pixels; leaves the model in eval mode."""
    device = device_of(model)
    model.eval()
    outputs = []
    with torch.inference_mode():
        for start in range(0, len(pixels), batch_size):
            images = torch.from_numpy(pixels[start : start + batch_size]).to(device).flip(-1)
            outputs.append(model(network_input(images, spec)).float().cpu().numpy())
    return joined(outputs, model)


def reestimate_batch_norm(
    model: nn.Module, paths: npt.NDArray[np.str_], spec: InputSpec, *, batch_size: int, limit: int, seed: int
) -> int:
    """Replace the running statistics of every batch-norm layer by those of clean images at deployment resolution.

    Averaged weights have statistics that nothing measured (torch.optim.swa_utils.update_bn does the same, but also
    switches dropout on). At most ``limit`` images, in an order drawn by ``seed``: in the order of a folder a batch would
    hold one class or one series of photographs, and vary less than what training saw (with Fashion-MNIST's images by
    class, that cost each of two students 1.6 and 1.9 points). Returns how many layers there were.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    if not layers:
        return 0
    paths = paths[generator(seed, "batch-norm").permutation(len(paths))[:limit]]
    whole = len(paths) - len(paths) % batch_size if len(paths) > batch_size else len(paths)
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain average over equal batches
        layer.train()
    with torch.inference_mode():
        for pixels in decoded_batches(paths[:whole], spec, batch_size=batch_size):
            model(network_input(torch.from_numpy(pixels).to(device_of(model)).flip(-1), spec))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
    model.eval()
    return len(layers)
