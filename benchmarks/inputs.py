"""The photographs that a benchmark decodes: the user's, the run's own, or generated ones that say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from edgedistill import shard_members
from edgedistill.artifacts import atomic_path
from edgedistill.console import warn
from edgedistill.data.manifest import read_dataset
from edgedistill.errors import EdgedistillError, ImageError, UsageError
from edgedistill.images import IMAGE_SUFFIXES, decode_image, image_size, read_bytes

# Enough to defeat caching of one image, few enough to hold decoded (the `frames` scope keeps the pixels in memory).
MAX_IMAGES = 64
SYNTHETIC = "synthetic"
SYNTHETIC_SIZES = ((427, 640), (1281, 1920))
JPEG_QUALITY = 90


@dataclass(frozen=True)
class InputSet:
    """Readable images that are measured together; ``name`` goes into the table, and no two of one run share it."""

    name: str
    paths: tuple[Path, ...]


def input_sets(images: Sequence[str], *, dataset: Path | None, scratch: Path) -> tuple[list[InputSet], str]:
    """(one set per argument, a sentence on where the images come from).

    Without ``images``: the val split of ``dataset`` where its files are still there, else two generated photographs,
    written into ``scratch``. Unreadable images are named in a warning and left out.
    Raises UsageError when an argument does not exist or holds no readable image.
    """
    if images and tuple(images) != (SYNTHETIC,):
        sets = _told_apart([_user_set(argument) for argument in images])
        return sets, "images: " + ", ".join(one.name for one in sets)
    if not images and dataset is not None:
        found = _val_set(dataset, scratch)
        if found is not None:
            return [found], f"images: the val split of {dataset}"
    sizes = " and ".join(f"{width}x{height}" for height, width in SYNTHETIC_SIZES)
    return _synthetic_sets(scratch), (
        f"images: generated noise photographs, JPEG quality {JPEG_QUALITY}, {sizes}; "
        "give real ones with --images, decoding speed depends on the picture"
    )


def _user_set(argument: str) -> InputSet:
    path = Path(argument)
    if not path.exists():
        raise UsageError(f"--images {argument}: no such file or folder")
    if path.is_dir():
        candidates = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
        if not candidates:
            raise UsageError(f"--images {argument}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))})")
    else:
        candidates = [path]
    found = _readable(path.name or str(path), candidates)
    if found is None:
        raise UsageError(f"--images {argument}: none of its {len(candidates)} images can be read; see the warnings")
    return found


def _told_apart(sets: Sequence[InputSet]) -> list[InputSet]:
    """The second of a name gets " (2)", as in C++: from here on an input goes by its name."""
    names: list[str] = []
    for one in sets:
        name, number = one.name, 2
        while name in names:
            name, number = f"{one.name} ({number})", number + 1
        names.append(name)
    return [dataclasses.replace(one, name=name) for one, name in zip(sets, names, strict=True)]


def _val_set(dataset: Path, scratch: Path) -> InputSet | None:
    """None, with a warning, when the manifest or its images are not here (a model copied to another machine)."""
    try:
        manifest = read_dataset(dataset)
    except EdgedistillError as error:
        warn(f"{error}; measuring on generated images")
        return None
    paths = [Path(str(manifest.paths[row])) for row in manifest.rows("val")]
    here = [path for path in paths if shard_members.exists(path)]
    if not here:
        warn(f"{dataset}: none of its val images is on this machine; measuring on generated images")
        return None
    found = _readable("val", here)
    if found is None:
        return None
    files = (shard_members.as_file(path, scratch / "val", number) for number, path in enumerate(found.paths))
    return dataclasses.replace(found, paths=tuple(files))


def _readable(name: str, candidates: Sequence[Path]) -> InputSet | None:
    """Up to MAX_IMAGES of them, evenly drawn, each decoded once to see that every candidate can."""
    step = max(1, -(-len(candidates) // MAX_IMAGES))
    kept, sizes = [], set()
    for path in candidates[::step]:
        try:
            data, shown = read_bytes(path)
            height, width, kind = image_size(data, name=shown)
            decode_image(data, name=shown)
        except ImageError as error:
            warn(f"{error}; left out")
            continue
        kept.append(path)
        sizes.add(f"{width}x{height} {kind.upper()}")
    if not kept:
        return None
    size = sizes.pop() if len(sizes) == 1 else f"{len(sizes)} sizes"
    return InputSet(f"{name} {size}" if len(kept) == 1 else f"{name}, {len(kept)} images, {size}", tuple(kept))


def _synthetic_sets(scratch: Path) -> list[InputSet]:
    sets = []
    for height, width in SYNTHETIC_SIZES:
        path = scratch / f"synthetic-{width}x{height}.jpg"
        write_jpeg(path, synthetic_photo(height, width, seed=0))
        sets.append(InputSet(f"synthetic {width}x{height} JPEG", (path,)))
    return sets


def write_jpeg(path: Path, image: npt.NDArray[np.uint8]) -> None:
    """``image``: uint8 [h, w, 3] BGR; baseline JPEG with 4:2:0 colour at JPEG_QUALITY, whole or not at all."""
    ok, encoded = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not ok:
        raise ImageError(f"{path}: cannot be encoded as JPEG")
    with atomic_path(path) as temporary:
        temporary.write_bytes(encoded.tobytes())


def synthetic_photo(height: int, width: int, *, seed: int) -> npt.NDArray[np.uint8]:
    """uint8 [height, width, 3] BGR with a photograph's falling spectrum, smooth colours and hard edges; same for a seed.

    What a JPEG costs to decode depends on how its energy falls with frequency: flat noise takes several times longer
    than a photograph, a gradient a fraction.
    """
    rng = np.random.default_rng(seed)
    luma = _pink_noise(rng, height, width)
    chroma = [cv2.GaussianBlur(_pink_noise(rng, height, width), (0, 0), 4) for _ in range(2)]
    scene = np.stack([luma + 0.5 * chroma[0], luma, luma + 0.5 * chroma[1]], axis=-1)
    image = np.clip(118 + 36 * scene, 0, 255).astype(np.uint8)
    for _ in range(24):
        center = (int(rng.integers(width)), int(rng.integers(height)))
        size = max(4, int(rng.integers(height // 40, height // 6)))
        color = tuple(int(value) for value in rng.integers(20, 236, 3))
        shape = image.copy()
        if rng.random() < 0.5:
            cv2.circle(shape, center, size, color, -1, cv2.LINE_AA)
        else:
            cv2.rectangle(shape, center, (center[0] + size, center[1] + size), color, -1, cv2.LINE_AA)
        image = cv2.addWeighted(image, 0.45, shape, 0.55, 0)  # type: ignore[assignment]
    return image


def _pink_noise(rng: np.random.Generator, height: int, width: int) -> npt.NDArray[np.float32]:
    """float32 [height, width], mean 0, deviation 1, amplitude falling as frequency^-1.2, as photographs do."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None, :])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency**1.2
    noise = np.fft.irfft2(spectrum, s=(height, width))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)
