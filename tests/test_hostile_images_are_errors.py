"""images.py on files that lie: never a crash, a hang or a wrong picture, always one error that names the file."""

from __future__ import annotations

import io
import os
import struct
import time
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from edgedistill.errors import ImageError
from edgedistill.image_headers import MAX_JPEG_SCANS
from edgedistill.images import InputSpec, decode_image, image_size, load_image, prepare, read_bytes

SPEC = InputSpec(height=16, width=16)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")


def small_file(format: str, *, size: tuple[int, int] = (24, 20), **options: object) -> bytes:
    pixels = np.random.default_rng(3).integers(0, 256, (size[0], size[1], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(cv2.blur(pixels, (5, 5))).save(file, format, **options)  # type: ignore[arg-type]
    return file.getvalue()


def variants() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x112] = 6
    files = {format: small_file(format) for format in FORMATS}
    files["JPEG with EXIF"] = small_file("JPEG", exif=exif.tobytes())
    files["JPEG progressive"] = small_file("JPEG", progressive=True)
    files["PNG with EXIF"] = small_file("PNG", exif=exif.tobytes())
    files["WebP lossless"] = small_file("WEBP", lossless=True)
    files["WebP extended"] = small_file("WEBP", exif=exif.tobytes())
    file = io.BytesIO()
    Image.new("CMYK", (20, 24), (9, 99, 30, 0)).save(file, "JPEG")
    files["JPEG CMYK"] = file.getvalue()
    return files


@pytest.mark.parametrize("kind", variants())
def test_every_truncation_is_an_error(kind: str) -> None:
    data = variants()[kind]
    whole = decode_image(data)
    # A BMP's or TIFF's last bytes may be padding: a picture is then right only if it is the whole picture.
    for length in range(len(data)):
        try:
            image = decode_image(data[:length], name="cut.img")
        except ImageError as error:
            assert "cut.img" in str(error)
        else:
            assert kind in ("BMP", "TIFF") and np.array_equal(image, whole), (
                f"{kind} cut to {length} of {len(data)} bytes"
            )


def flip(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(0, len(data), int(rng.integers(1, 4))):
        changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


@pytest.mark.parametrize("kind", variants())
def test_two_thousand_flips_never_crash_and_sizes_agree(kind: str) -> None:
    data, rng = variants()[kind], np.random.default_rng(5)
    started = time.monotonic()
    for _ in range(2000):
        changed = flip(data, rng)
        try:
            height, width, _ = image_size(changed, name="flipped.img", max_pixels=4096)
            assert load_image(changed, SPEC, max_pixels=4096).shape == (16, 16, 3)
            assert decode_image(changed, max_pixels=4096).shape == (height, width, 3)
        except ImageError as error:
            assert "flipped.img" in str(error) or "bytes>" in str(error)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("kind", ["JPEG", "JPEG progressive", "JPEG CMYK", "PNG"])
def test_a_flip_that_the_format_can_notice_is_noticed(kind: str) -> None:
    """JPEG through libjpeg's warnings, PNG through its checksums: OpenCV alone returns the damaged JPEG."""
    data = small_file("PNG", size=(200, 200)) if kind == "PNG" else variants()[kind]
    if kind.startswith("JPEG"):
        data = data[:-2] + bytes(64) + data[-2:]
    else:
        data = data[:-40] + bytes([data[-40] ^ 1]) + data[-39:]
    with pytest.raises(ImageError, match=r"x\.img: damaged or truncated"):
        decode_image(data, name="x.img")


def test_a_cut_with_an_end_marker_glued_on_is_an_error() -> None:
    data = small_file("JPEG", size=(200, 200))
    with pytest.raises(ImageError, match="damaged"):
        decode_image(data[: len(data) // 2] + b"\xff\xd9")


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def bombs() -> dict[str, bytes]:
    jpeg = bytearray(small_file("JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))
    bmp = bytearray(small_file("BMP"))
    bmp[18:26] = struct.pack("<ii", 2**31 - 1, -(2**31))
    tiff = (
        b"II*\0\x08\0\0\0\x02\0"
        + struct.pack("<HHII", 256, 4, 1, 2**32 - 1)
        + struct.pack("<HHII", 257, 4, 1, 2**32 - 1)
    )
    webp = b"RIFF" + struct.pack("<I", 22) + b"WEBPVP8X" + struct.pack("<I", 10) + b"\0\0\0\0" + b"\xff" * 6
    return {
        "JPEG": bytes(jpeg),
        "PNG": b"\x89PNG\r\n\x1a\n"
        + header
        + png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + png_chunk(b"IEND", b""),
        "BMP": bytes(bmp),
        "TIFF": tiff,
        "WEBP": webp,
    }


@pytest.mark.parametrize("kind", FORMATS)
def test_decompression_bombs_are_refused_before_decoding(kind: str) -> None:
    started = time.monotonic()
    for function in (image_size, decode_image):
        with pytest.raises(ImageError, match=r"bomb\.img: \d+x\d+ pixels, the limit is 100000000"):
            function(bombs()[kind], name="bomb.img")
    assert time.monotonic() - started < 0.5


def test_the_pixel_limit_is_configurable() -> None:
    data = small_file("JPEG", size=(20, 30))
    assert image_size(data, max_pixels=600) == (20, 30, "jpeg")
    with pytest.raises(ImageError, match="the limit is 599"):
        load_image(data, SPEC, max_pixels=599)


def jpeg_segment(marker: int, body: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def many_scans(frame: int, count: int) -> bytes:
    """64x64 pixels in scans of one component each, of 12 bytes, which arithmetic coding (SOF9) fills by itself."""
    components = b"".join(bytes([number, 0x11, 0]) for number in (1, 2, 3))
    head = jpeg_segment(0xDB, b"\0" + b"\1" * 64) + jpeg_segment(frame, struct.pack(">BHHB", 8, 64, 64, 3) + components)
    scans = (jpeg_segment(0xDA, bytes([1, number % 3 + 1, 0, 0, 63, 0])) + b"\x91\xd8" for number in range(count))
    return b"\xff\xd8" + head + b"".join(scans) + b"\xff\xd9"


@pytest.mark.parametrize("frame", [0xC0, 0xC1, 0xC2, 0xC9, 0xCA], ids=hex)
def test_an_endless_jpeg_is_refused_of_whatever_kind(frame: int) -> None:
    with pytest.raises(ImageError, match=f"more than {MAX_JPEG_SCANS} scans"):
        decode_image(many_scans(frame, MAX_JPEG_SCANS + 1))
    assert decode_image(many_scans(0xC9, MAX_JPEG_SCANS)).shape == (64, 64, 3)


def test_an_endless_progressive_jpeg_is_refused() -> None:
    data = small_file("JPEG", progressive=True)
    scan = data.index(b"\xff\xda")
    with pytest.raises(ImageError, match=f"more than {MAX_JPEG_SCANS} scans"):
        decode_image(data[:scan] + data[scan:-2] * (MAX_JPEG_SCANS + 1) + data[-2:])


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"GIF89a" + bytes(20), "a GIF"),
        (b"%PDF-1.7 ...", "a PDF document"),
        (b"\0\0\0\x18ftypheic" + bytes(20), "a HEIC file"),
        (b"\0\0\0\x18ftypavif" + bytes(20), "an AVIF file"),
        (b"\0\0\0\x18ftypisom" + bytes(20), "MP4"),
        (b"PK\x03\x04" + bytes(20), "a ZIP archive"),
        (b"RIFF\0\0\0\0AVI " + bytes(20), "a RIFF file"),
        (b"\0\0\0\x01Bud1" + bytes(20), r"a \.DS_Store file"),
        (b"  <!DOCTYPE html><html>", "an HTML page"),
        (b"<svg xmlns=''></svg>", "an SVG"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ("naïve text, not a picture".encode(), "a text file"),
        (bytes(100), "zero bytes"),
        (b"\x01\x02\x03\x04\x05", "unknown format .first bytes 01 02 03 04 05"),
        (b"II+\0" + bytes(20), "BigTIFF"),
        (b"II*\0\x10\0\0\0CR\x02\0" + bytes(20), "CR2"),
    ],
)
def test_foreign_formats_are_named(data: bytes, what: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=rf"photo\.jpg: .*{what}"):
        load_image(path, SPEC)


def test_a_twelve_bit_jpeg_is_named() -> None:
    data = bytearray(small_file("JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(ImageError, match="12-bit"):
        decode_image(bytes(data))


@pytest.mark.parametrize("kind", [1, 4], ids=["bytes", "a number"])
def test_a_tiff_of_two_sizes_is_an_error(kind: int) -> None:
    """Of two entries libtiff takes the first, whatever its type."""
    entries = [(256, kind, 1, 200), (256, 4, 1, 10), (257, 4, 1, 10)]
    data = b"II*\0\x08\0\0\0\x03\0" + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    with pytest.raises(ImageError, match="two sizes"):
        image_size(data)


def test_a_float_tiff_is_an_error() -> None:
    done, data = cv2.imencode(".tiff", np.random.default_rng(0).random((9, 9, 3), np.float32))
    assert done
    with pytest.raises(ImageError, match="float32"):
        decode_image(bytes(data))


def test_paths_that_are_no_files_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.jpg").touch()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name, what in {
        "missing.jpg": "No such file",
        "empty.jpg": "empty",
        "pipe.jpg": "not a file",
        ".": "not a file",
    }.items():
        with pytest.raises(ImageError, match=what):
            read_bytes(tmp_path / name)
    with pytest.raises(ImageError, match="null"):
        read_bytes("a\0b.jpg")


def test_only_jpegs_decode_scaled() -> None:
    with pytest.raises(ImageError, match="only JPEG"):
        decode_image(small_file("PNG"), k=2)
    with pytest.raises(ImageError, match="1/3"):
        decode_image(small_file("JPEG"), k=3)


@pytest.mark.parametrize(
    "frame",
    [
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 2), np.uint8),
        np.zeros(4, np.uint8),
        np.zeros((2, 4, 4, 3), np.uint8),
        "photo.jpg",
        None,
    ],
)
def test_frames_of_another_shape_or_type_are_errors(frame: object) -> None:
    with pytest.raises(ImageError, match="image array"):
        prepare(frame, SPEC)  # type: ignore[arg-type]
