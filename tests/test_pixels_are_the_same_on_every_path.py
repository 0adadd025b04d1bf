"""images.py: one transform, the same to the pixel from every file format, every path and a numpy reference."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from edgedistill import images
from edgedistill.images import DecodeBuffer, InputSpec, decode_image, load_image, normalize, prepare, reduce_area

SAMPLINGS = {"444": 0x111111, "422": 0x211111, "420": 0x221111, "440": 0x121111, "411": 0x411111}
REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def picture(height: int, width: int, *, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth shapes with some noise, so that chroma upsampling and rounding matter."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth.astype(np.int16) + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def encode(image: npt.NDArray[np.generic], suffix: str, *options: int) -> bytes:
    done, data = cv2.imencode(suffix, image, list(options))
    assert done
    return bytes(data)


def pillow(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)  # type: ignore[arg-type]
    return file.getvalue()


def opencv(data: bytes, flags: int = cv2.IMREAD_COLOR) -> npt.NDArray[np.uint8]:
    image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    assert image is not None
    return image  # type: ignore[return-value]


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("progressive", [0, 1])
def test_jpegs_decode_to_opencvs_pixels_at_every_scale(sampling: str, progressive: int) -> None:
    for (height, width), quality in (((61, 97), 90), ((64, 128), 60), ((17, 33), 98), ((9, 9), 80), ((1, 1), 90)):
        data = encode(
            picture(height, width),
            ".jpg",
            *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling]),
            *(cv2.IMWRITE_JPEG_PROGRESSIVE, progressive),
            *(cv2.IMWRITE_JPEG_QUALITY, quality),
        )
        for k, flags in REDUCED.items():
            np.testing.assert_array_equal(decode_image(data, k=k), opencv(data, flags))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_grey_cmyk_and_rgb_jpegs_decode_to_opencvs_pixels(mode: str) -> None:
    source = Image.fromarray(picture(61, 97)).convert(mode)
    data = pillow(source, "JPEG", quality=90, **({"keep_rgb": True} if mode == "RGB" else {}))
    for k, flags in REDUCED.items():
        np.testing.assert_array_equal(decode_image(data, k=k), opencv(data, flags))
    if mode == "L":
        pixels = decode_image(data)
        assert (pixels == pixels[:, :, :1]).all()


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
@pytest.mark.parametrize("spec", [InputSpec(32, 48), InputSpec(31, 31, resize="center-crop", crop_fraction=0.875)])
def test_grey_files_are_prepared_in_one_channel_to_the_pixels_of_three(
    spec: InputSpec, format: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    for size in ((131, 209), (70, 64), (15, 9)):
        data = pillow(Image.fromarray(picture(*size)).convert("L"), format, exif=exif.tobytes())
        assert images.read_header(data, "").grey
        whole = decode_image(data)
        k = images.reduction(*whole.shape[:2], spec)
        expected = images.crop_and_resize(reduce_area(whole, k), spec)
        np.testing.assert_array_equal(load_image(data, spec, decode="full"), expected)
        np.testing.assert_array_equal(prepare(whole[:, :, 0], spec), expected)
        if format == "JPEG":
            expected = images.crop_and_resize(decode_image(data, k=k), spec)
        out = np.zeros((spec.height, spec.width, 3), np.uint8)
        assert load_image(data, spec, out=out, buffer=DecodeBuffer()) is out
        np.testing.assert_array_equal(out, expected)


def uncommon_subsampling() -> bytes:
    """A grey-valued colour JPEG whose first chroma plane is finer than its luma: legal, and unknown to TurboJPEG."""
    data = bytearray(pillow(Image.new("RGB", (32, 32), (128, 128, 128)), "JPEG", subsampling=2))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[frame + 11], data[frame + 14] = 0x11, 0x22
    for component in range(3):
        data[scan + 6 + 2 * component] = 0
    bits = "001010" * 24
    entropy = int(bits, 2).to_bytes(len(bits) // 8, "big")
    return bytes(data[: scan + 2 + int.from_bytes(data[scan + 2 : scan + 4], "big")]) + entropy + b"\xff\xd9"


def test_uncommon_chroma_subsampling_is_left_to_opencv() -> None:
    assert (decode_image(uncommon_subsampling()) == 128).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation_is_applied_as_opencv_does(format: str, orientation: int) -> None:
    source, exif = Image.fromarray(picture(61, 97)), Image.Exif()
    exif[0x112] = orientation
    options = {"tiffinfo": {0x112: orientation}} if format == "TIFF" else {"exif": exif.tobytes()}
    data = pillow(source, format, **options, **({"lossless": True} if format == "WEBP" else {}))
    stored = opencv(pillow(source, format, **({"lossless": True} if format == "WEBP" else {})))
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(stored),
    }[orientation]
    pixels = decode_image(data)
    np.testing.assert_array_equal(pixels, upright)
    np.testing.assert_array_equal(pixels, opencv(data))
    assert images.image_size(data)[:2] == pixels.shape[:2]
    if format == "JPEG":
        for k, flags in REDUCED.items():
            np.testing.assert_array_equal(decode_image(data, k=k), opencv(data, flags))


@pytest.mark.parametrize("block", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"junk" * 9])
def test_nonsense_exif_means_no_orientation(block: bytes) -> None:
    data = encode(picture(20, 30), ".jpg")
    segment = b"Exif\0\0" + block
    changed = data[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + data[2:]
    np.testing.assert_array_equal(decode_image(changed), decode_image(data))


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
def test_sixteen_bits_are_shifted_and_never_rounded(suffix: str) -> None:
    deep = (np.arange(64 * 64 * 3).reshape(64, 64, 3) * 5 % 65536).astype(np.uint16)
    assert ((deep >> 8) != np.round(deep / 257)).any()
    np.testing.assert_array_equal(decode_image(encode(deep, suffix)), deep >> 8)
    grey = decode_image(encode(deep[:, :, 0], suffix))
    np.testing.assert_array_equal(grey, np.repeat(deep[:, :, :1] >> 8, 3, axis=2))
    np.testing.assert_array_equal(images.to_bgr(deep), deep >> 8)


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tiff", ".bmp"])
def test_alpha_is_dropped(suffix: str) -> None:
    solid = picture(33, 47)
    clear = np.dstack([solid, np.full((33, 47), 7, np.uint8)])
    options = (cv2.IMWRITE_WEBP_QUALITY, 101) if suffix == ".webp" else ()
    np.testing.assert_array_equal(decode_image(encode(clear, suffix, *options)), solid)
    np.testing.assert_array_equal(images.to_bgr(clear), solid)


@pytest.mark.parametrize("mode", ["P", "1", "LA", "L"])
def test_palette_and_grey_files_become_three_channels(mode: str) -> None:
    source = Image.fromarray(picture(33, 47)[:, :, ::-1]).convert(mode)
    expected = np.asarray(source.convert("LA").convert("L").convert("RGB") if mode == "LA" else source.convert("RGB"))
    np.testing.assert_array_equal(decode_image(pillow(source, "PNG")), expected[:, :, ::-1])


def test_a_transparent_palette_keeps_its_colours() -> None:
    source = Image.fromarray(picture(33, 47)).convert("P")
    data = pillow(source, "PNG", transparency=0)
    np.testing.assert_array_equal(decode_image(data), np.asarray(source.convert("RGB"))[:, :, ::-1])


def reference_area(image: npt.NDArray[np.uint8], k: int) -> npt.NDArray[np.uint8]:
    """Block averages. INTER_AREA rounds halves up for 2 x 2 blocks (integer) and to even for larger ones (float)."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((0, -height % k), (0, -width % k), (0, 0)), mode="edge").astype(np.int64)
    sums = padded.reshape(padded.shape[0] // k, k, padded.shape[1] // k, k, 3).sum(axis=(1, 3))
    if k == 2:
        return ((sums + 2) >> 2).astype(np.uint8)
    return np.rint(sums / (k * k)).astype(np.uint8)


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("size", [(64, 96), (61, 97), (8, 8), (9, 31)])
def test_area_reduction_is_the_exact_average(k: int, size: tuple[int, int]) -> None:
    image = np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8)
    np.testing.assert_array_equal(reduce_area(image, k), reference_area(image, k))


def reference_linear(image: npt.NDArray[np.uint8], height: int, width: int) -> npt.NDArray[np.float64]:
    """Bilinear with pixel centres at half integers, in real numbers."""
    rows = np.clip((np.arange(height) + 0.5) * image.shape[0] / height - 0.5, 0, image.shape[0] - 1)
    columns = np.clip((np.arange(width) + 0.5) * image.shape[1] / width - 0.5, 0, image.shape[1] - 1)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    bottom, right = np.minimum(top + 1, image.shape[0] - 1), np.minimum(left + 1, image.shape[1] - 1)
    down, across = (rows - top)[:, None, None], (columns - left)[None, :, None]
    pixels = image.astype(np.float64)
    upper = pixels[top][:, left] * (1 - across) + pixels[top][:, right] * across
    lower = pixels[bottom][:, left] * (1 - across) + pixels[bottom][:, right] * across
    return upper * (1 - down) + lower * down


@pytest.mark.parametrize("size", [(61, 97), (32, 32), (20, 24), (200, 333), (511, 257)])
@pytest.mark.parametrize("resize", ["squash", "center-crop"])
@pytest.mark.parametrize("fraction", [1.0, 0.875])
def test_steps_two_and_three_match_the_reference(size: tuple[int, int], resize: str, fraction: float) -> None:
    spec = InputSpec(height=32, width=48, resize=resize, crop_fraction=fraction)  # type: ignore[arg-type]
    image = picture(*size)
    crop_h, crop_w = images.crop_size(*size, spec)
    k = next(k for k in (8, 4, 2, 1) if k == 1 or (-(-crop_h // k) >= 32 and -(-crop_w // k) >= 48))
    assert images.reduction(*size, spec) == k
    reduced = reference_area(image, k) if k > 1 else image
    crop_h, crop_w = images.crop_size(*reduced.shape[:2], spec)
    top, left = (reduced.shape[0] - crop_h) // 2, (reduced.shape[1] - crop_w) // 2
    expected = reference_linear(reduced[top : top + crop_h, left : left + crop_w], 32, 48)
    pixels = prepare(image, spec)
    assert pixels.shape == (32, 48, 3) and pixels.dtype == np.uint8
    # 8-bit INTER_LINEAR works with 11-bit weights: off by one grey level at most.
    assert np.abs(pixels - expected).max() <= 1.0
    assert np.abs(pixels - expected).mean() <= 0.3


@pytest.mark.parametrize("size", [(61, 97), (300, 300), (511, 257)])
def test_lossless_files_frames_and_full_decoding_are_one(size: tuple[int, int], tmp_path: Path) -> None:
    spec, image = InputSpec(height=64, width=64, resize="center-crop", crop_fraction=0.9), picture(*size)
    expected = prepare(image, spec)
    for suffix in (".png", ".bmp", ".tiff", ".webp"):
        options = (cv2.IMWRITE_WEBP_QUALITY, 101) if suffix == ".webp" else ()
        path = tmp_path / f"bildé{suffix}"
        path.write_bytes(encode(image, suffix, *options))
        for decode in ("full", "reduced"):
            np.testing.assert_array_equal(load_image(path, spec, decode=decode), expected)  # type: ignore[arg-type]
    jpeg = encode(image, ".jpg")
    np.testing.assert_array_equal(load_image(jpeg, spec, decode="full"), prepare(opencv(jpeg), spec))


def test_scaled_decoding_is_opencvs_scaled_decoding() -> None:
    spec, data = InputSpec(height=32, width=32), encode(picture(200, 333), ".jpg")
    reduced = opencv(data, cv2.IMREAD_REDUCED_COLOR_4)
    expected = cv2.resize(reduced, (32, 32), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(load_image(data, spec), expected)
    assert (load_image(data, spec, decode="full") != expected).any()


def test_output_and_decode_buffers_change_no_pixel() -> None:
    spec, buffer = InputSpec(height=32, width=32), DecodeBuffer()
    for number, size in enumerate([(200, 333), (61, 97), (400, 400), (32, 32), (16, 8)]):
        for suffix in (".jpg", ".png"):
            data = encode(picture(*size, seed=number), suffix)
            out = np.full((32, 32, 3), 99, np.uint8)
            for decode in ("full", "reduced"):
                result = load_image(data, spec, decode=decode, out=out, buffer=buffer)  # type: ignore[arg-type]
                assert result is out
                np.testing.assert_array_equal(out, load_image(data, spec, decode=decode))  # type: ignore[arg-type]
            frame = decode_image(data)
            assert prepare(frame, spec, out=out) is out
            np.testing.assert_array_equal(out, prepare(frame, spec))


def test_a_buffer_above_its_limit_is_not_kept() -> None:
    assert DecodeBuffer(limit_bytes=10).take(11) is None
    taken = DecodeBuffer(limit_bytes=10).take(10)
    assert taken is not None and taken.size == 10


def test_prepare_never_returns_the_callers_memory() -> None:
    frame = picture(32, 32)
    prepared = prepare(frame, InputSpec(height=32, width=32))
    assert not np.shares_memory(prepared, frame)


@pytest.mark.parametrize("frame", [picture(40, 50)[::-1], picture(40, 50)[:, :, ::-1], picture(40, 60)[:, ::2]])
def test_frames_that_are_views_are_read_rightly(frame: npt.NDArray[np.uint8]) -> None:
    spec = InputSpec(height=16, width=16)
    np.testing.assert_array_equal(prepare(frame, spec), prepare(frame.copy(), spec))


def test_normalize_is_the_formula() -> None:
    spec, image = InputSpec(height=8, width=8), picture(8, 8)
    values = normalize(image[None], spec)
    assert values.shape == (1, 3, 8, 8) and values.dtype == np.float32
    red = (float(image[2, 3, 2]) - spec.mean[0]) / spec.std[0]
    assert values[0, 0, 2, 3] == pytest.approx(red, abs=1e-6)
    blue = (float(image[2, 3, 0]) - spec.mean[2]) / spec.std[2]
    assert values[0, 2, 2, 3] == pytest.approx(blue, abs=1e-6)
