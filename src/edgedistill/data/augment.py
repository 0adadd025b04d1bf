"""Training augmentation that depends on the image and a seed alone.

Images arrive prepared at 256/224 of the network's size (the contest recipe: resize to 256, random crop of 224,
horizontal flip). Crop, flips and quarter turns cost microseconds, so they are done here with OpenCV; everything
else is albumentations.
"""

from __future__ import annotations

import os
import random
import threading
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np

from edgedistill.errors import ImageError, UsageError
from edgedistill.images import ImageU8

Strength = Literal["none", "light", "standard"]
QUARTER_TURNS = (-1, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)
STANDARD_JITTER = 0.2
JITTER_PROBABILITY, AFFINE_PROBABILITY = 0.5, 0.3


@dataclass(frozen=True)
class AugmentSettings:
    """``strength``: none (the whole image, as deployed), light (random crop and flips), standard (light, and colour jitter,
    slight rotation and scaling). ``any_way_up``: the subject has no up side (cells, satellite, microscope), so
    rotations by 90, 180 and 270 degrees are free data, and with the flip all eight symmetries of the square. ``color_jitter``: 0 to 1, largest relative change of brightness, contrast and
    saturation (hue: a tenth of it), on half of the images; standard has at least 0.2. Raises UsageError."""

    strength: Strength = "light"
    horizontal_flip: bool = True
    any_way_up: bool = False
    color_jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.strength not in ("none", "light", "standard"):
            raise UsageError(f"augmentation strength {self.strength!r}, expected none, light or standard")
        if not 0.0 <= self.color_jitter <= 1.0:
            raise UsageError(f"color jitter {self.color_jitter}, expected 0 to 1")


class Augment:
    """A prepared image and a seed to network pixels, the same in every process, thread and order of calls.

    ``height``, ``width``: of the network's input. Images are uint8 [h, w, 3] BGR with h >= height and w >= width, best at
    256/224 of them. Safe to call from several threads and to pickle.
    """

    def __init__(self, settings: AugmentSettings, height: int, width: int) -> None:
        self.settings, self.height, self.width = settings, height, width
        self._plain = not self._transforms()
        self._local = threading.local()

    def __call__(self, image: ImageU8, seed: int) -> ImageU8:
        """uint8 [height, width, 3], a copy. ``seed``: any integer from 0 on. Raises ImageError for a smaller image."""
        if image.ndim != 3 or image.shape[0] < self.height or image.shape[1] < self.width or image.dtype != np.uint8:
            raise ImageError(
                f"image to augment: {image.dtype} {image.shape}, expected uint8 of at least "
                f"({self.height}, {self.width}, 3); prepare it at 256/224 of the network's input"
            )
        if self.settings.strength == "none":
            return self._whole(image)
        rng = random.Random(int(seed))
        image = self._turn(self._crop(image, rng), rng)
        return np.array(image, order="C") if self._plain else self._albumentations(image, rng)

    def __reduce__(self) -> tuple[Any, ...]:
        return Augment, (self.settings, self.height, self.width)

    def _whole(self, image: ImageU8) -> ImageU8:
        if image.shape[:2] == (self.height, self.width):
            return image.copy()
        return cv2.resize(image, (self.width, self.height), interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]

    def _crop(self, image: ImageU8, rng: random.Random) -> ImageU8:
        top = rng.randrange(image.shape[0] - self.height + 1)
        left = rng.randrange(image.shape[1] - self.width + 1)
        return image[top : top + self.height, left : left + self.width]

    def _turn(self, image: ImageU8, rng: random.Random) -> ImageU8:
        """OpenCV's flip and rotate: numpy's strided copy of three channels costs five times more."""
        flip, turns = rng.getrandbits(1), rng.getrandbits(2)
        if self.settings.horizontal_flip and flip:
            image = cv2.flip(image, 1)  # type: ignore[assignment]
        if self.height != self.width:
            turns &= 2  # a quarter turn would change the shape
        if self.settings.any_way_up and turns:
            image = cv2.rotate(image, QUARTER_TURNS[turns])  # type: ignore[assignment]
        return image

    def _transforms(self) -> list[Any]:
        """A fresh list: albumentations' transforms hold their generator, so threads cannot share them."""
        transforms: list[Any] = []
        standard = self.settings.strength == "standard"
        jitter = max(self.settings.color_jitter, STANDARD_JITTER if standard else 0.0)
        if self.settings.strength == "none" or not jitter:
            return transforms
        albumentations = _import_albumentations()
        if standard:
            transforms.append(
                albumentations.Affine(
                    scale=(0.9, 1.1), rotate=(-10, 10), border_mode=cv2.BORDER_REFLECT_101, p=AFFINE_PROBABILITY
                )
            )
        change = (1 - jitter, 1 + jitter)
        transforms.append(
            albumentations.ColorJitter(
                brightness=change, contrast=change, saturation=change, hue=jitter / 10, p=JITTER_PROBABILITY
            )
        )
        return transforms

    def _albumentations(self, image: ImageU8, rng: random.Random) -> ImageU8:
        compose = getattr(self._local, "compose", None)
        if compose is None:
            compose = self._local.compose = _import_albumentations().Compose(self._transforms())
        compose.set_random_state(np.random.default_rng(rng.getrandbits(64)), random.Random(rng.getrandbits(64)))
        rgb = cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_BGR2RGB)
        return cv2.cvtColor(compose(image=rgb)["image"], cv2.COLOR_RGB2BGR)  # type: ignore[return-value]


def _import_albumentations() -> Any:
    """Three seconds, and only recipes beyond crop and flip need it. The variable comes first: without it the import asks
    the network for a newer version."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    import albumentations

    return albumentations
