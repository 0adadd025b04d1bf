"""Training augmentation that depends on the image and a seed alone.

Images arrive prepared at 256/224 of the network's size, and a crop of 7/8 to all of them is resized to it: the network
also sees whole images, as it will when deployed, and never objects more than 8/7 as large as then. (Cut at exactly 7/8,
as the contest had it, all of them were, which cost students of two data sets 0.6 to 2.9 points of accuracy; Touvron et
al., 1906.06423, have the reason.) Crop, flips and quarter turns cost microseconds, so they are done here with OpenCV; everything else is
albumentations, timm's policies (AutoAugment, RandAugment, AugMix) and erasing.
"""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import cv2
import numpy as np

from edgedistill.errors import ImageError, UsageError
from edgedistill.images import ImageU8
from edgedistill.timm_import import import_timm

Strength = Literal["none", "light", "standard"]
CROP = (224 / 256, 1.0)
QUARTER_TURNS = (-1, cv2.ROTATE_90_COUNTERCLOCKWISE, cv2.ROTATE_180, cv2.ROTATE_90_CLOCKWISE)
STANDARD_JITTER = 0.2
JITTER_PROBABILITY, AFFINE_PROBABILITY = 0.5, 0.3
# Names for timm's configuration strings, which may be given as they are.
POLICIES = {"autoaugment": "original", "randaugment": "rand-m9-n2-mstd0.5", "augmix": "augmix-m3-w3"}
FILL_BGR = (104, 116, 124)  # ImageNet's mean: nothing, to a network that was normalised with it
GRID_PX, GRID_DEGREES, GRID_RATIO = (10 / 224, 100 / 224), 7.0, (0.4, 0.6)  # unit per image height; contest settings
ERASING = ("grayscale", "gridmask", "cutout", "coarse_dropout")


@dataclass(frozen=True)
class AugmentSettings:
    """``strength``: none (the whole image, as deployed), light (random crop and flips), standard (light, and colour jitter,
    slight rotation and scaling). ``any_way_up``: the subject has no up side (cells, satellite, microscope), so
    rotations by 90, 180 and 270 degrees are free data, and with the flip all eight symmetries of the square.
    ``crop_min``, ``crop_max``: the share of height and width that light and standard keep, above 0 to 1, drawn evenly
    between them. ``color_jitter``: 0 to 1, largest relative change of brightness, contrast and
    saturation (hue: a tenth of it), on half of the images; standard has at least 0.2.

    ``auto_augment``: 'none', 'autoaugment' (Cubuk et al., 1805.09501), 'randaugment' (1909.13719), 'augmix' (Hendrycks
    et al., 1912.02781), or a configuration string of timm.data.auto_augment such as 'rand-m5-n1'. Probabilities, each
    drawn per image: ``grayscale``; ``gridmask``, a rotated grid of grey squares (Chen et al., 2001.04086); ``cutout``,
    one grey square of half the side (DeVries and Taylor, 1708.04552); ``coarse_dropout``, up to eight of an eighth.
    Policies and erasing also work with strength none. Raises UsageError.
    """

    strength: Strength = "light"
    horizontal_flip: bool = True
    any_way_up: bool = False
    crop_min: float = CROP[0]
    crop_max: float = CROP[1]
    color_jitter: float = 0.0
    auto_augment: str = "none"
    grayscale: float = 0.0
    gridmask: float = 0.0
    cutout: float = 0.0
    coarse_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ERASING:
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise UsageError(f"{name} {getattr(self, name)}, expected a probability, 0 to 1")
        if self.auto_augment != "none":
            make_policy(self.auto_augment, 224)
        if self.strength not in ("none", "light", "standard"):
            raise UsageError(f"augmentation strength {self.strength!r}, expected none, light or standard")
        if not 0.0 < self.crop_min <= self.crop_max <= 1.0:
            raise UsageError(
                f"crops of {self.crop_min} to {self.crop_max} of height and width, expected 0 < crop_min <= crop_max <= 1"
            )
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
            return self._extras(self._whole(image), seed)
        rng = random.Random(int(seed))
        image = self._turn(self._crop(image, rng), rng)
        image = np.array(image, order="C") if self._plain else self._albumentations(image, rng)
        return self._extras(image, seed)

    def __reduce__(self) -> tuple[Any, ...]:
        return Augment, (self.settings, self.height, self.width)

    def _whole(self, image: ImageU8) -> ImageU8:
        if image.shape[:2] == (self.height, self.width):
            return image.copy()
        return cv2.resize(image, (self.width, self.height), interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]

    def _crop(self, image: ImageU8, rng: random.Random) -> ImageU8:
        least, most = self.settings.crop_min, self.settings.crop_max
        share = rng.uniform(least, most) if least < most else most
        height, width = (max(1, round(share * side)) for side in image.shape[:2])
        top = rng.randrange(image.shape[0] - height + 1)
        left = rng.randrange(image.shape[1] - width + 1)
        image = image[top : top + height, left : left + width]
        if (height, width) == (self.height, self.width):
            return image
        return cv2.resize(image, (self.width, self.height), interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]

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

    def _extras(self, image: ImageU8, seed: int) -> ImageU8:
        """Policy and erasing, with draws of their own: a recipe without them sees what it always saw."""
        settings = self.settings
        if settings.auto_augment == "none" and not any(getattr(settings, name) for name in ERASING):
            return image
        rng = random.Random(f"extras {int(seed)}")
        drawn = {name: rng.random() < getattr(settings, name) for name in ERASING}
        if drawn["grayscale"]:
            image = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)  # type: ignore[assignment]
        if settings.auto_augment != "none":
            image = self._policy(image, rng.getrandbits(32))
        if drawn["gridmask"]:
            _mask_grid(image, rng)
        if drawn["cutout"]:
            _erase(image, rng, holes=1, share=0.5)
        if drawn["coarse_dropout"]:
            _erase(image, rng, holes=rng.randint(1, 8), share=0.125)
        return image

    def _policy(self, image: ImageU8, seed: int) -> ImageU8:
        from PIL import Image

        policy = getattr(self._local, "policy", None)
        if policy is None:
            policy = self._local.policy = make_policy(self.settings.auto_augment, min(self.height, self.width))
        picture = Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
        with _global_chance(seed):
            picture = policy(picture)
        return cv2.cvtColor(np.asarray(picture), cv2.COLOR_RGB2BGR)  # type: ignore[return-value]

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


def make_policy(name: str, size_px: int) -> Callable[[Any], Any]:
    """timm's transform of PIL images of about ``size_px``. Raises UsageError for a configuration that timm cannot read."""
    import_timm()
    from timm.data import auto_augment

    text = POLICIES.get(name, name)
    options = {"translate_const": int(size_px * 0.45), "img_mean": FILL_BGR[::-1]}
    make = auto_augment.auto_augment_transform
    if text.startswith("rand"):
        make = auto_augment.rand_augment_transform
    elif text.startswith("augmix"):
        make = auto_augment.augment_and_mix_transform
    try:
        policy: Callable[[Any], Any] = make(text, options)
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"auto_augment {name!r}: expected none, {', '.join(POLICIES)}, or timm's configuration, such as rand-m5-n1"
        ) from error
    return policy


_CHANCE = threading.Lock()


@contextmanager
def _global_chance(seed: int) -> Iterator[None]:
    """timm's policies draw from the generators of the whole process: seeded for one image, then put back."""
    with _CHANCE:
        before = random.getstate(), np.random.get_state()  # noqa: NPY002
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])  # noqa: NPY002


def _mask_grid(image: ImageU8, rng: random.Random) -> None:
    """Grey squares in a grid of random unit, shift and small rotation, in place."""
    height, width = image.shape[:2]
    unit = max(2.0, rng.uniform(*GRID_PX) * height)
    side = rng.uniform(*GRID_RATIO) * unit
    angle = np.deg2rad(rng.uniform(-GRID_DEGREES, GRID_DEGREES))
    y, x = np.mgrid[:height, :width].astype(np.float32)
    along = x * np.cos(angle) + y * np.sin(angle) + rng.uniform(0, unit)
    across = y * np.cos(angle) - x * np.sin(angle) + rng.uniform(0, unit)
    image[(along % unit < side) & (across % unit < side)] = FILL_BGR


def _erase(image: ImageU8, rng: random.Random, *, holes: int, share: float) -> None:
    """Grey squares whose centres lie anywhere in the image, in place; ``share`` of each side."""
    height, width = image.shape[:2]
    half_y, half_x = max(1, round(height * share / 2)), max(1, round(width * share / 2))
    for _ in range(holes):
        y, x = rng.randrange(height), rng.randrange(width)
        image[max(0, y - half_y) : y + half_y, max(0, x - half_x) : x + half_x] = FILL_BGR
