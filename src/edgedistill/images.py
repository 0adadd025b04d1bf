"""From image bytes to network input: one input spec and one transform, the same to the pixel everywhere.

Validation, soft labels, calibration, tuning, the Python runtime and the C++ runtime all use the three steps below:

1. ``decode``: EXIF orientation applied; grey becomes three equal channels, 16-bit is shifted right by 8, alpha dropped.
2. ``reduce``: by k in {1, 2, 4, 8}, the largest k that leaves at least the network's size; in the JPEG decoder's DCT
   (``decode="reduced"``) or by exact area averaging.
3. ``crop and resize``: centred crop, 8-bit bilinear to height x width.

Needs numpy and OpenCV only.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from edgedistill.errors import ArtifactError, ImageError

ImageU8 = npt.NDArray[np.uint8]
DecodeMode = Literal["full", "reduced"]
ResizeMode = Literal["squash", "center-crop"]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
DEFAULT_MAX_PIXELS = 100_000_000
REDUCTIONS = (8, 4, 2)


@dataclass(frozen=True)
class InputSpec:
    """What the network sees; frozen into model.pt and the IR.

    ``mean`` and ``std`` are per channel in RGB order on the 0-255 scale. ``crop_fraction`` is the share of the image's
    (or of its centred crop's) height and width that is kept; 1 throws nothing away.
    """

    height: int = 224
    width: int = 224
    resize: ResizeMode = "squash"
    crop_fraction: float = 1.0
    color_order: Literal["RGB"] = "RGB"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        problems = []
        if not (8 <= self.height <= 4096 and 8 <= self.width <= 4096):
            problems.append(f"size {self.height}x{self.width}, expected 8 to 4096 pixels")
        if self.resize not in ("squash", "center-crop"):
            problems.append(f"resize {self.resize!r}, expected 'squash' or 'center-crop'")
        if not 0.1 <= self.crop_fraction <= 1.0:
            problems.append(f"crop_fraction {self.crop_fraction}, expected 0.1 to 1")
        if self.color_order != "RGB":
            problems.append(f"color_order {self.color_order!r}, expected 'RGB'")
        if (
            len(self.mean) != 3
            or len(self.std) != 3
            or not all(np.isfinite(self.mean))
            or not all(s > 0 for s in self.std)
        ):
            problems.append(f"mean {self.mean} and std {self.std}, expected three finite values each, std above 0")
        if problems:
            raise ArtifactError("input spec: " + "; ".join(problems))

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> InputSpec:
        """Raises ArtifactError for a missing or unknown field or one out of range."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(values, dict) or set(values) != names:
            got = sorted(values) if isinstance(values, dict) else type(values).__name__
            raise ArtifactError(f"input spec: fields {got}, expected {sorted(names)}; export the model again")
        try:
            return cls(
                height=int(values["height"]),
                width=int(values["width"]),
                resize=values["resize"],
                crop_fraction=float(values["crop_fraction"]),
                color_order=values["color_order"],
                mean=tuple(float(v) for v in values["mean"]),  # type: ignore[arg-type]
                std=tuple(float(v) for v in values["std"]),  # type: ignore[arg-type]
            )
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"input spec: {error}; export the model again") from error

    def resized(self, height: int, width: int | None = None) -> InputSpec:
        """The same spec at another resolution."""
        return dataclasses.replace(self, height=height, width=width or height)


def crop_size(height: int, width: int, spec: InputSpec) -> tuple[int, int]:
    """(height, width) of the centred crop of an image of that size; integer arithmetic that C++ repeats exactly."""
    crop_h, crop_w = height, width
    if spec.resize == "center-crop":
        if width * spec.height >= height * spec.width:
            crop_w = max(1, (2 * height * spec.width + spec.height) // (2 * spec.height))
        else:
            crop_h = max(1, (2 * width * spec.height + spec.width) // (2 * spec.width))
    if spec.crop_fraction < 1.0:
        crop_h = max(1, int(np.floor(crop_h * spec.crop_fraction + 0.5)))
        crop_w = max(1, int(np.floor(crop_w * spec.crop_fraction + 0.5)))
    return min(crop_h, height), min(crop_w, width)


def reduction(height: int, width: int, spec: InputSpec) -> int:
    """The largest k in {1, 2, 4, 8} with ceil(crop / k) no smaller than the network's input in both directions."""
    crop_h, crop_w = crop_size(height, width, spec)
    for k in REDUCTIONS:
        if -(-crop_h // k) >= spec.height and -(-crop_w // k) >= spec.width:
            return k
    return 1


def reduce_area(image: ImageU8, k: int) -> ImageU8:
    """Step 2 for decoded pixels: replicate-pad to a multiple of k, then average k x k blocks.

    ``image``: uint8 [h, w, 3]; returns uint8 [ceil(h/k), ceil(w/k), 3].
    """
    if k == 1:
        return image
    height, width = image.shape[:2]
    pad_h, pad_w = -height % k, -width % k
    if pad_h or pad_w:
        image = cv2.copyMakeBorder(image, 0, pad_h, 0, pad_w, cv2.BORDER_REPLICATE)  # type: ignore[assignment]
    size = (image.shape[1] // k, image.shape[0] // k)
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)  # type: ignore[return-value]


def crop_and_resize(image: ImageU8, spec: InputSpec) -> ImageU8:
    """Step 3: uint8 [h, w, 3] -> uint8 [spec.height, spec.width, 3]."""
    height, width = image.shape[:2]
    crop_h, crop_w = crop_size(height, width, spec)
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    crop = image[top : top + crop_h, left : left + crop_w]
    if crop.shape[:2] == (spec.height, spec.width):
        return np.ascontiguousarray(crop)
    return cv2.resize(crop, (spec.width, spec.height), interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]


def prepare(image: npt.NDArray[Any], spec: InputSpec) -> ImageU8:
    """A decoded frame to network pixels (the ``frames`` path): area reduction, crop, bilinear resize.

    ``image``: uint8 or uint16 [h, w], [h, w, 1], [h, w, 3] BGR or [h, w, 4] BGRA; returns uint8 [H, W, 3] BGR.
    Raises ImageError for any other shape or dtype.
    """
    frame = to_bgr(image)
    return crop_and_resize(reduce_area(frame, reduction(frame.shape[0], frame.shape[1], spec)), spec)


def to_bgr(image: npt.NDArray[Any]) -> ImageU8:
    """Any odd mode to uint8 [h, w, 3] BGR: grey repeated, 16-bit >> 8, alpha dropped."""
    if not isinstance(image, np.ndarray) or image.dtype not in (np.uint8, np.uint16):
        got = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"image array: {got}, expected uint8 or uint16 pixels, BGR, 0-255 or 0-65535")
    if image.ndim not in (2, 3) or 0 in image.shape or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ImageError(f"image array: shape {image.shape}, expected [h, w], [h, w, 3] BGR or [h, w, 4] BGRA")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    if image.ndim == 2 or image.shape[2] == 1:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)  # type: ignore[return-value]
    return image if image.shape[2] == 3 else np.ascontiguousarray(image[:, :, :3])


def load_image(
    source: str | Path | bytes,
    spec: InputSpec,
    *,
    decode: DecodeMode = "reduced",
    max_pixels: int = DEFAULT_MAX_PIXELS,
) -> ImageU8:
    """An encoded image to network pixels (the ``files`` path).

    ``source``: a path or the encoded bytes. Returns uint8 [H, W, 3] BGR. Raises ImageError that names the file.
    """
    data, name = read_bytes(source)
    height, width, kind = image_size(data, name=name, max_pixels=max_pixels)
    k = reduction(height, width, spec)
    if decode == "reduced" and kind == "jpeg" and k > 1:
        return crop_and_resize(decode_image(data, name=name, k=k), spec)
    return crop_and_resize(reduce_area(decode_image(data, name=name), k), spec)


def read_bytes(source: str | Path | bytes) -> tuple[bytes, str]:
    """(encoded bytes, name for messages). Raises ImageError when the file is missing, unreadable or empty."""
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), f"<{len(source)} bytes>"
    else:
        name = str(source)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror or error})") from error
    if not data:
        raise ImageError(f"{name}: the file is empty; delete it or copy it again")
    return data, name


def image_size(data: bytes, *, name: str = "<bytes>", max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int, str]:
    """(height, width, kind) from the header, after EXIF orientation, before anything is decoded.

    ``kind`` is 'jpeg', 'png', 'webp', 'bmp' or 'tiff'. Raises ImageError for other formats and above ``max_pixels``.
    """
    kinds = (
        (b"\xff\xd8", "jpeg"),
        (b"\x89PNG", "png"),
        (b"RIFF", "webp"),
        (b"BM", "bmp"),
        (b"II", "tiff"),
        (b"MM", "tiff"),
    )
    kind = next((kind for magic, kind in kinds if data.startswith(magic)), None)
    if kind is None:
        raise ImageError(f"{name}: not a JPEG, PNG, WebP, BMP or TIFF file; convert it or remove it")
    image = decode_image(data, name=name)
    if image.shape[0] * image.shape[1] > max_pixels:
        raise ImageError(f"{name}: {image.shape[1]}x{image.shape[0]} pixels, the limit is {max_pixels}")
    return image.shape[0], image.shape[1], kind


def decode_image(data: bytes, *, name: str = "<bytes>", k: int = 1) -> ImageU8:
    """Step 1: uint8 [h, w, 3] BGR; ``k`` in {1, 2, 4, 8} scales a JPEG in its DCT to ceil(size / k)."""
    flags = {
        1: cv2.IMREAD_COLOR,
        2: cv2.IMREAD_REDUCED_COLOR_2,
        4: cv2.IMREAD_REDUCED_COLOR_4,
        8: cv2.IMREAD_REDUCED_COLOR_8,
    }
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags[k])
    if image is None:
        raise ImageError(f"{name}: damaged or truncated; copy it again or remove it")
    return image  # type: ignore[return-value]


def normalize(images: ImageU8, spec: InputSpec) -> npt.NDArray[np.float32]:
    """uint8 [N, H, W, 3] BGR -> float32 [N, 3, H, W] RGB, (x - mean) / std: what torch and ONNX Runtime are fed."""
    rgb = images[..., ::-1].astype(np.float32)
    scaled = (rgb - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
