"""From image bytes to network input: one input spec and one transform, the same to the pixel everywhere.

Validation, soft labels, calibration, tuning, the Python runtime and the C++ runtime all use the three steps below:

1. ``decode``: EXIF orientation applied; grey becomes three equal channels, 16-bit is shifted right by 8, alpha dropped.
2. ``reduce``: by k in {1, 2, 4, 8}, the largest k that leaves at least the network's size; in the JPEG decoder's DCT
   (``decode="reduced"``) or by exact area averaging.
3. ``crop and resize``: centred crop, 8-bit bilinear to height x width.

Needs numpy, OpenCV, simplejpeg (libjpeg-turbo) and isal (PNG) only.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from edgedistill.errors import ArtifactError, ImageError
from edgedistill.image_headers import DEFAULT_MAX_PIXELS, ImageHeader, check_png, read_header
from edgedistill.png_inflate import inflated
from edgedistill.shard_members import NotAFileError, read_file

ImageU8 = npt.NDArray[np.uint8]
DecodeMode = Literal["full", "reduced"]
ResizeMode = Literal["squash", "center-crop"]

IMAGENET_MEAN = (123.675, 116.28, 103.53)
IMAGENET_STD = (58.395, 57.12, 57.375)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"})
REDUCTIONS = (8, 4, 2)

_OPENCV_FLAGS = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
_OPENCV_GREY_FLAGS = {
    1: cv2.IMREAD_GRAYSCALE,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
# cv2.flip codes (1 left-right, 0 up-down, -1 both), after the transposition of orientations 5 to 8.
_FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}


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
        except (TypeError, ValueError, OverflowError) as error:
            raise ArtifactError(f"input spec: {error}; export the model again") from error

    def resized(self, height: int, width: int | None = None) -> InputSpec:
        """The same spec at another resolution."""
        return dataclasses.replace(self, height=height, width=width or height)

    def covering(self, others: Iterable[InputSpec]) -> InputSpec:
        """The same spec at a resolution that has no less detail than any of ``others``."""
        sizes = [(spec.height, spec.width) for spec in (self, *others)]
        return self.resized(*(max(side) for side in zip(*sizes, strict=True)))

    def same_pixels(self, other: InputSpec) -> bool:
        """Whether both see an image as the same uint8 [H, W, 3]: colour order, mean and std are the network's affair."""
        mine, theirs = ((spec.height, spec.width, spec.resize, spec.crop_fraction) for spec in (self, other))
        return mine == theirs


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

    ``image``: uint8 [h, w, 3], or grey [h, w]; returns uint8 [ceil(h/k), ceil(w/k), 3], or [ceil(h/k), ceil(w/k)].
    """
    if k == 1:
        return image
    height, width = image.shape[:2]
    whole_h, whole_w = height // k, width // k
    out = np.empty((-(-height // k), -(-width // k), *image.shape[2:]), np.uint8)
    # Only the edges are padded: copying all of a 1920x1281 frame for one missing row took as long as averaging it.
    _average(image[: whole_h * k, : whole_w * k], k, out[:whole_h, :whole_w])
    _average(image[whole_h * k :, : whole_w * k], k, out[whole_h:, :whole_w])
    _average(image[:, whole_w * k :], k, out[:, whole_w:])
    return out


def _average(image: ImageU8, k: int, out: ImageU8) -> None:
    if out.size == 0:
        return
    pad_h, pad_w = -image.shape[0] % k, -image.shape[1] % k
    if pad_h or pad_w:
        image = cv2.copyMakeBorder(image, 0, pad_h, 0, pad_w, cv2.BORDER_REPLICATE)  # type: ignore[assignment]
    out[:] = cv2.resize(image, (out.shape[1], out.shape[0]), interpolation=cv2.INTER_AREA)


def crop_and_resize(image: ImageU8, spec: InputSpec, *, out: ImageU8 | None = None) -> ImageU8:
    """Step 3: uint8 [h, w, 3] -> uint8 [spec.height, spec.width, 3], written to ``out`` where that is given.

    Grey pixels [h, w] are repeated only when they have been resized: the same result, with a third of the work.
    """
    if image.ndim == 2:
        small = _crop_and_resize(image, spec, None)
        return cv2.cvtColor(small, cv2.COLOR_GRAY2BGR, dst=out)  # type: ignore[return-value]
    return _crop_and_resize(image, spec, out)


def _crop_and_resize(image: ImageU8, spec: InputSpec, out: ImageU8 | None) -> ImageU8:
    height, width = image.shape[:2]
    crop_h, crop_w = crop_size(height, width, spec)
    top, left = (height - crop_h) // 2, (width - crop_w) // 2
    crop = image[top : top + crop_h, left : left + crop_w]
    if crop.shape[:2] == (spec.height, spec.width):
        if out is None:
            return crop.copy()
        np.copyto(out, crop)
        return out
    return cv2.resize(crop, (spec.width, spec.height), dst=out, interpolation=cv2.INTER_LINEAR)  # type: ignore[return-value]


def prepare(image: npt.NDArray[Any], spec: InputSpec, *, out: ImageU8 | None = None) -> ImageU8:
    """A decoded frame to network pixels (the ``frames`` path): area reduction, crop, bilinear resize.

    ``image``: uint8 or uint16 [h, w], [h, w, 1], [h, w, 3] BGR or [h, w, 4] BGRA; returns uint8 [H, W, 3] BGR, which is
    ``out`` where that is given. Raises ImageError for any other shape or dtype.
    """
    frame = _eight_bits(image)
    return crop_and_resize(reduce_area(frame, reduction(frame.shape[0], frame.shape[1], spec)), spec, out=out)


def to_bgr(image: npt.NDArray[Any]) -> ImageU8:
    """Any odd mode to uint8 [h, w, 3] BGR: grey repeated, 16-bit >> 8, alpha dropped."""
    frame = _eight_bits(image)
    return cv2.cvtColor(frame, cv2.COLOR_GRAY2BGR) if frame.ndim == 2 else frame  # type: ignore[return-value]


def _eight_bits(image: npt.NDArray[Any]) -> ImageU8:
    """uint8 [h, w, 3] BGR, or [h, w] where it is grey."""
    if not isinstance(image, np.ndarray) or image.dtype not in (np.uint8, np.uint16):
        got = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ImageError(f"image array: {got}, expected uint8 or uint16 pixels, BGR, 0-255 or 0-65535")
    if image.ndim not in (2, 3) or 0 in image.shape or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ImageError(f"image array: shape {image.shape}, expected [h, w], [h, w, 3] BGR or [h, w, 4] BGRA")
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    # OpenCV refuses views with negative strides (a flipped frame, image[..., ::-1]) and byte-swapped arrays.
    if image.ndim == 2 or image.shape[2] == 1:
        return np.ascontiguousarray(image.reshape(image.shape[:2]), dtype=np.uint8)
    return np.ascontiguousarray(image[:, :, :3], dtype=np.uint8)


class DecodeBuffer:
    """Memory that one thread decodes JPEGs into again and again: 15% of the time at 1920x1281 was page faults.

    Pixels decoded into it are gone with the next decode. It keeps the largest size it has seen, up to ``limit_bytes``.
    """

    def __init__(self, limit_bytes: int = 64 << 20) -> None:
        self._limit = limit_bytes
        self._memory: ImageU8 = np.empty(0, np.uint8)

    def take(self, size: int) -> ImageU8 | None:
        """At least ``size`` bytes, or None where that is above the limit."""
        if size > self._limit:
            return None
        if self._memory.size < size:
            self._memory = np.empty(size, np.uint8)
        return self._memory


def load_image(
    source: str | Path | bytes,
    spec: InputSpec,
    *,
    decode: DecodeMode = "reduced",
    max_pixels: int = DEFAULT_MAX_PIXELS,
    out: ImageU8 | None = None,
    buffer: DecodeBuffer | None = None,
) -> ImageU8:
    """An encoded image to network pixels (the ``files`` path).

    ``source``: a path or the encoded bytes. Returns uint8 [H, W, 3] BGR, which is ``out`` where that is given;
    ``buffer`` saves allocations over many images. Raises ImageError that names the file.
    """
    return EncodedImage(source, decode=decode, max_pixels=max_pixels, buffer=buffer).pixels(spec, out=out)


class EncodedImage:
    """One encoded image on its way into one or more networks: read once, decoded once for each reduction they need.

    For every spec the pixels are those of ``load_image``, bit for bit. Two networks that reduce a JPEG by the same k
    share one decoding, and whatever is decoded whole (other formats, ``decode="full"``) is decoded once. For another k
    the JPEG is decoded again: a picture that was reduced further in the DCT is not what the second network was
    promised. Measured for two networks (processor time in one thread): 640x427 at 128 and 160 px 3.3 ms against 6.1 ms
    decoded twice, 1920x1281 15.8 against 31.1; with unlike k, 96 and 224 px, 6.6 against 6.7 and 30.3 against 30.4. ``buffer`` belongs to this image until the last ``pixels``. Raises ImageError that names the file.
    """

    def __init__(
        self,
        source: str | Path | bytes,
        *,
        decode: DecodeMode = "reduced",
        max_pixels: int = DEFAULT_MAX_PIXELS,
        buffer: DecodeBuffer | None = None,
    ) -> None:
        self._data, self._name = read_bytes(source)
        self._header = _checked_header(self._data, self._name, max_pixels)
        self._scaled = decode == "reduced" and self._header.kind == "jpeg"
        self._buffer = buffer
        self._decoded_k = 0
        self._decoded: ImageU8 = np.empty((0, 0, 3), np.uint8)

    def decoding_k(self, spec: InputSpec) -> int:
        """The scale 1/k at which the file is decoded for that spec: equal numbers share one decoding."""
        return reduction(*self._header.upright_size, spec) if self._scaled else 1

    def pixels(self, spec: InputSpec, *, out: ImageU8 | None = None) -> ImageU8:
        """uint8 [H, W, 3] BGR, which is ``out`` where that is given. Raises ImageError."""
        k = self.decoding_k(spec)
        if k != self._decoded_k:
            self._decoded_k = 0  # a failure leaves the buffer half overwritten
            self._decoded = _decode(self._data, self._header, self._name, k=k, buffer=self._buffer)
            self._decoded_k = k
        image = (
            self._decoded if self._scaled else reduce_area(self._decoded, reduction(*self._header.upright_size, spec))
        )
        return crop_and_resize(image, spec, out=out)


def no_image(source: object) -> ImageError:
    return ImageError(f"{type(source).__name__}: expected a path, encoded bytes or a uint8 array [h, w, 3] BGR")


def read_bytes(source: str | Path | bytes) -> tuple[bytes, str]:
    """(encoded bytes, name for messages). Raises ImageError for what is neither, and for a file that is missing, unreadable
    or empty."""
    if isinstance(source, bytes | bytearray | memoryview):
        data, name = bytes(source), f"<{len(source)} bytes>"
    elif not isinstance(source, str | os.PathLike):  # open() would take a number for a file that is open already
        raise no_image(source)
    else:
        name = str(source)
        try:
            data = read_file(source)
        except NotAFileError as error:
            raise ImageError(f"{name}: not a file; name an image file") from error
        except OSError as error:
            raise ImageError(f"{name}: cannot be read ({error.strerror or error})") from error
        except ValueError as error:
            raise ImageError(f"{name!r}: cannot be read ({error})") from error
    if not data:
        raise ImageError(f"{name}: the file is empty; delete it or copy it again")
    return data, name


def image_size(data: bytes, *, name: str = "<bytes>", max_pixels: int = DEFAULT_MAX_PIXELS) -> tuple[int, int, str]:
    """(height, width, kind) from the header, after EXIF orientation, before anything is decoded.

    ``kind`` is 'jpeg', 'png', 'webp', 'bmp' or 'tiff'. Raises ImageError for other formats and above ``max_pixels``.
    """
    header = _checked_header(data, name, max_pixels)
    return *header.upright_size, header.kind


def decode_image(data: bytes, *, name: str = "<bytes>", k: int = 1, max_pixels: int = DEFAULT_MAX_PIXELS) -> ImageU8:
    """Step 1: uint8 [h, w, 3] BGR; ``k`` in {1, 2, 4, 8} scales a JPEG in its DCT to ceil(size / k).

    Raises ImageError that names the file when it is damaged, too large or of a foreign format, and for ``k`` > 1 on
    anything but a JPEG (there, ``reduce_area`` follows the decoding).
    """
    header = _checked_header(data, name, max_pixels)
    if k not in _OPENCV_FLAGS or (k > 1 and header.kind != "jpeg"):
        raise ImageError(f"{name}: a {header.kind} cannot be decoded at 1/{k}; only JPEG can, at 1/2, 1/4 and 1/8")
    return to_bgr(_decode(data, header, name, k=k))


def _checked_header(data: bytes, name: str, max_pixels: int) -> ImageHeader:
    header = read_header(data, name)
    if header.height * header.width > max_pixels:
        raise ImageError(
            f"{name}: {header.width}x{header.height} pixels, the limit is {max_pixels}; make it smaller or raise the limit"
        )
    return header


def _decode(data: bytes, header: ImageHeader, name: str, *, k: int = 1, buffer: DecodeBuffer | None = None) -> ImageU8:
    """uint8 [h, w, 3] BGR, or [h, w] where the header says grey."""
    channels = () if header.grey else (3,)
    expected = (-(-header.height // k), -(-header.width // k), *channels)
    if header.kind == "jpeg":
        image = _decode_jpeg(data, header, name, k=k, buffer=buffer)
    else:
        if header.kind == "png":
            data = inflated(check_png(data, name))
        flags = cv2.IMREAD_GRAYSCALE if header.grey else cv2.IMREAD_COLOR
        flags |= cv2.IMREAD_ANYDEPTH if header.kind == "tiff" else cv2.IMREAD_IGNORE_ORIENTATION
        image = _decode_opencv(data, flags, name)
    if header.kind == "tiff":
        # OpenCV applies a TIFF's orientation whatever it is told, and rounds 16 bits where everything else shifts.
        expected = (*header.upright_size, 3)
        if image.dtype == np.uint16:
            image = (image >> 8).astype(np.uint8)
    else:
        image = _upright(image, header.orientation)
        expected = (expected[1], expected[0], *channels) if header.orientation >= 5 else expected
    if image.dtype != np.uint8 or image.shape != expected:
        raise ImageError(
            f"{name}: decodes to {image.dtype} {image.shape}, its header says uint8 {expected}; convert it or remove it"
        )
    return image


def _decode_jpeg(data: bytes, header: ImageHeader, name: str, *, k: int, buffer: DecodeBuffer | None) -> ImageU8:
    """Through libjpeg-turbo with its warnings as errors: OpenCV prints them and returns the damaged picture.

    The pixels are OpenCV's, bit for bit (ISLOW, fancy upsampling); colour spaces and subsamplings that the strict
    decoder does not do are OpenCV's own.
    """
    height, width = -(-header.height // k), -(-header.width // k)
    opencv = not header.plain_jpeg or header.jpeg_components == 4
    try:
        if header.plain_jpeg and header.jpeg_components == 4:
            simplejpeg.decode_jpeg(data, "CMYK")
        # Below 16 pixels several of the decoder's scales give the same size, and it may take another than 1/k.
        elif not opencv and (k == 1 or max(header.height, header.width) >= 16):
            colors, channels = ("GRAY", 1) if header.grey else ("BGR", 3)
            memory = buffer.take(channels * height * width) if buffer else None
            least = (height, width) if k > 1 else (0, 0)
            image = simplejpeg.decode_jpeg(data, colors, min_height=least[0], min_width=least[1], buffer=memory)
            return image.reshape(image.shape[:2]) if header.grey else image
    except ValueError as error:
        raise ImageError(f"{name}: damaged or truncated ({error}); copy it again or remove it") from error
    flags = (_OPENCV_GREY_FLAGS if header.grey else _OPENCV_FLAGS)[k]
    return _decode_opencv(data, flags | cv2.IMREAD_IGNORE_ORIENTATION, name)


def _decode_opencv(data: bytes, flags: int, name: str) -> ImageU8:
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise ImageError(f"{name}: OpenCV cannot decode it ({error.err}); convert it or remove it") from error
    if image is None:
        raise ImageError(f"{name}: damaged or truncated; copy it again or remove it")
    return image  # type: ignore[return-value]


def _upright(image: ImageU8, orientation: int) -> ImageU8:
    """EXIF orientation: 2 to 4 mirror and turn, 5 to 8 also swap height and width."""
    if orientation >= 5:
        image = cv2.transpose(image)  # type: ignore[assignment]
    flip = _FLIPS.get(orientation)
    return image if flip is None else cv2.flip(image, flip)  # type: ignore[return-value]


def normalize(images: ImageU8, spec: InputSpec) -> npt.NDArray[np.float32]:
    """uint8 [N, H, W, 3] BGR -> float32 [N, 3, H, W] RGB, (x - mean) / std: what torch and ONNX Runtime are fed."""
    rgb = images[..., ::-1].astype(np.float32)
    scaled = (rgb - np.asarray(spec.mean, np.float32)) / np.asarray(spec.std, np.float32)
    return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))
