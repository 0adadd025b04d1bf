"""Test-time augmentation: a network's mean answer over several views of each image.

The first view is always the deployable transform's own picture. Views that look closer are cut from the same transform
at a higher resolution, so that every view has the size that the network was made for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from edgedistill import console
from edgedistill.errors import UsageError
from edgedistill.images import ImageU8, InputSpec
from edgedistill.metrics import softmax
from edgedistill.tasks import Task
from edgedistill.training.heads import Scores, logs_of, scores_of
from edgedistill.training.predict import PathLike, decoded_batches, joined, logit_batches, predict_pixels

CROP_ZOOM = 256 / 224


@dataclass(frozen=True)
class View:
    """``zoom`` 1 sees the whole picture, 2 half its height and width. ``top``, ``left``: where the window lies, as shares
    of the free border (0.5: centred). ``flip``: left and right exchanged."""

    zoom: float = 1.0
    top: float = 0.5
    left: float = 0.5
    flip: bool = False


WHOLE = View()
FIVE_CROP = tuple(View(CROP_ZOOM, top, left) for top, left in ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1)))
SCALES = (View(CROP_ZOOM), View(4 / 3))
KINDS = ("flip", "five-crop", "scales")


def views_of(tta: str) -> tuple[View, ...]:
    """'flip,five-crop,scales' or some of them -> the views, each once; '' -> the whole picture alone.

    'five-crop': centre and corners at 8/7; 'scales': the centre at 8/7 and 4/3; 'flip': all views mirrored too.
    Raises UsageError for other words.
    """
    words = [word.strip() for word in tta.split(",") if word.strip()]
    unknown = sorted(set(words) - set(KINDS))
    if unknown:
        raise UsageError(f"--tta {', '.join(unknown)}: unknown; expected {', '.join(KINDS)}, with commas between")
    views = [WHOLE, *(FIVE_CROP if "five-crop" in words else ()), *(SCALES if "scales" in words else ())]
    if "flip" in words:
        views += [View(view.zoom, view.top, view.left, True) for view in views]
    return tuple(dict.fromkeys(views))


def label_pictures(
    model: nn.Module,
    paths: Sequence[PathLike] | npt.NDArray[np.str_],
    spec: InputSpec,
    *,
    tta: str = "",
    task: Task | None = None,
    title: str = "",
) -> Scores:
    """What a teacher says of images, as soft labels store it: float32 [N, C] log-probabilities at T=1, of the whole
    picture or of the mean over the views of ``tta``; of several heads, ``task``, their scores [N, D] (heads.scores_of).

    Raises ImageError that names the damaged file.
    """
    return joined(label_batches(model, paths, spec, tta=tta, task=task, title=title), model)


def label_batches(
    model: nn.Module,
    paths: Sequence[PathLike] | npt.NDArray[np.str_],
    spec: InputSpec,
    *,
    tta: str = "",
    task: Task | None = None,
    title: str = "",
) -> Iterator[Scores]:
    """``label_pictures``, float32 [n, C] at a time: of a million images and a thousand classes, 4 GB in all."""
    if tta:
        for shares in probability_batches(model, paths, spec, views=views_of(tta), task=task, title=title):
            yield logs_of(task, shares)
        return
    for logits in logit_batches(model, paths, spec, title=title):
        if task is None:
            yield torch.log_softmax(torch.from_numpy(logits).double(), dim=1).float().numpy()
        else:
            yield scores_of(task, logits)


def predict_probabilities(
    model: nn.Module,
    paths: Sequence[PathLike] | npt.NDArray[np.str_],
    spec: InputSpec,
    *,
    views: Sequence[View],
    temperature: float = 1.0,
    task: Task | None = None,
    batch_size: int = 64,
    title: str = "",
) -> npt.NDArray[np.float32]:
    """float32 [N, C]: all that ``probability_batches`` gives."""
    batches = probability_batches(
        model, paths, spec, views=views, temperature=temperature, task=task, batch_size=batch_size, title=title
    )
    return joined(batches, model)


def probability_batches(
    model: nn.Module,
    paths: Sequence[PathLike] | npt.NDArray[np.str_],
    spec: InputSpec,
    *,
    views: Sequence[View],
    temperature: float = 1.0,
    task: Task | None = None,
    batch_size: int = 64,
    title: str = "",
) -> Iterator[npt.NDArray[np.float32]]:
    """The mean of softmax(logits / temperature) over ``views``, float32 [n, C] at a time, in eval mode; of several heads,
    ``task``, the mean of their probabilities, [n, D].

    Raises ImageError that names the damaged file.
    """
    zooms = zooms_of(views)
    streams = [decoded_batches(paths, zoomed(spec, zoom), batch_size=batch_size) for zoom in zooms]
    probabilities = softmax if task is None else task.probabilities

    def answer(pixels: ImageU8) -> npt.NDArray[np.float64]:
        return probabilities(predict_pixels(model, pixels, spec, batch_size=batch_size), temperature)

    with console.progress(title, len(paths) if title else 0) as bar:
        for pictures in zip(*streams, strict=True):
            mean = mean_over_views(answer, dict(zip(zooms, pictures, strict=True)), spec, views=views)
            yield mean.astype(np.float32)
            bar.update(bar.task_ids[0], advance=len(mean) if title else 0)


def mean_over_views(
    answer: Callable[[ImageU8], npt.NDArray[np.float64]],
    pictures: Mapping[float, ImageU8],
    spec: InputSpec,
    *,
    views: Sequence[View],
) -> npt.NDArray[np.float64]:
    """The mean of ``answer`` over ``views``: for networks of any kind, and pictures that are decoded already.

    ``answer``: uint8 [N, H, W, 3] BGR at the size of ``spec`` -> probabilities float64 [N, D]. ``pictures``: the same N
    images for each of ``zooms_of(views)``, decoded for ``zoomed(spec, zoom)``.
    """
    total: npt.NDArray[Any] = np.zeros(())
    for view in views:
        total = total + answer(seen_through(pictures[view.zoom], view, spec))
    return total / len(views)


def zooms_of(views: Sequence[View]) -> list[float]:
    """The sizes at which an image is decoded for ``views``, ascending: 1 is the network's own."""
    return sorted({view.zoom for view in views})


def zoomed(spec: InputSpec, zoom: float) -> InputSpec:
    """The deployable transform at ``zoom`` times the network's size."""
    return spec.resized(round(spec.height * zoom), round(spec.width * zoom))


def seen_through(pictures: ImageU8, view: View, spec: InputSpec) -> ImageU8:
    """The view's window of pictures uint8 [N, H * zoom, W * zoom, 3], at the network's size."""
    top = round((pictures.shape[1] - spec.height) * view.top)
    left = round((pictures.shape[2] - spec.width) * view.left)
    window = pictures[:, top : top + spec.height, left : left + spec.width]
    return np.ascontiguousarray(window[:, :, ::-1] if view.flip else window)
