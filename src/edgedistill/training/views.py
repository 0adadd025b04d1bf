"""Test-time augmentation: a network's mean answer over several views of each image.

The first view is always the deployable transform's own picture. Views that look closer are cut from the same transform
at a higher resolution, so that every view has the size that the network was made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import nn

from edgedistill import console
from edgedistill.errors import UsageError
from edgedistill.images import ImageU8, InputSpec
from edgedistill.metrics import softmax
from edgedistill.tasks import Task
from edgedistill.training.predict import PathLike, decoded_batches, predict_pixels

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
    """The mean of softmax(logits / temperature) over ``views``, float32 [N, C], in eval mode; of several heads, ``task``,
    the mean of their probabilities, [N, D].

    Raises ImageError that names the damaged file.
    """
    zooms = sorted({view.zoom for view in views})
    streams = [decoded_batches(paths, _zoomed(spec, zoom), batch_size=batch_size) for zoom in zooms]
    answer = softmax if task is None else task.probabilities
    answers: list[npt.NDArray[np.float32]] = []
    with console.progress(title, len(paths) if title else 0) as bar:
        for pictures in zip(*streams, strict=True):
            pictures_of = dict(zip(zooms, pictures, strict=True))
            total = np.zeros(())
            for view in views:
                pixels = _seen(pictures_of[view.zoom], view, spec)
                total = total + answer(predict_pixels(model, pixels, spec, batch_size=batch_size), temperature)
            answers.append((total / len(views)).astype(np.float32))
            bar.update(bar.task_ids[0], advance=len(total) if title else 0)
    if not answers:
        return predict_pixels(model, np.zeros((0, spec.height, spec.width, 3), np.uint8), spec, batch_size=batch_size)
    return np.concatenate(answers)


def _zoomed(spec: InputSpec, zoom: float) -> InputSpec:
    return spec.resized(round(spec.height * zoom), round(spec.width * zoom))


def _seen(pictures: ImageU8, view: View, spec: InputSpec) -> ImageU8:
    """The view's window of pictures [N, H * zoom, W * zoom, 3], at the network's size."""
    top = round((pictures.shape[1] - spec.height) * view.top)
    left = round((pictures.shape[2] - spec.width) * view.left)
    window = pictures[:, top : top + spec.height, left : left + spec.width]
    return np.ascontiguousarray(window[:, :, ::-1] if view.flip else window)
