"""Damaged images, the same every time: small pictures of every kind that C++ reads, and seeded ways to break them.

damaged(10_000, seed=1) -> (name, bytes), one after the other
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from PIL import Image

Rng = np.random.Generator


def texture(height: int, width: int, seed: int = 7) -> np.ndarray:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(pixels, (5, 5), 1.2)


def pillow(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)  # type: ignore[arg-type]
    return file.getvalue()


def opencv(suffix: str, pixels: np.ndarray, *options: int) -> bytes:
    done, data = cv2.imencode(suffix, pixels, list(options))
    assert done
    return data.tobytes()


def exif(orientation: int) -> bytes:
    block = Image.Exif()
    block[0x112] = orientation
    return block.tobytes()


def jpegs() -> dict[str, bytes]:
    pixels, small = texture(45, 70), texture(13, 15)
    rgb = Image.fromarray(pixels)
    factor = cv2.IMWRITE_JPEG_SAMPLING_FACTOR
    return {
        "jpeg": pillow(rgb, "JPEG"),
        "jpeg 444": pillow(rgb, "JPEG", subsampling=0, quality=95),
        "jpeg 422": pillow(rgb, "JPEG", subsampling=1),
        "jpeg 411": opencv(".jpg", pixels, factor, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_411),
        "jpeg 440": opencv(".jpg", pixels, factor, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_440),
        "jpeg grey": pillow(rgb.convert("L"), "JPEG"),
        "jpeg progressive": pillow(rgb, "JPEG", progressive=True),
        "jpeg grey progressive": pillow(rgb.convert("L"), "JPEG", progressive=True),
        "jpeg optimised": pillow(rgb, "JPEG", optimize=True, quality=30),
        "jpeg restarts": opencv(".jpg", pixels, cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
        "jpeg CMYK": pillow(rgb.convert("CMYK"), "JPEG"),
        "jpeg turned": pillow(rgb, "JPEG", exif=exif(6)),
        "jpeg mirrored": pillow(rgb, "JPEG", exif=exif(4)),
        "jpeg tiny": pillow(Image.fromarray(small), "JPEG"),
        "jpeg large": pillow(Image.fromarray(texture(150, 260)), "JPEG", quality=60),
    }


def others() -> dict[str, bytes]:
    pixels = texture(29, 37)
    rgb = Image.fromarray(pixels)
    alpha = np.dstack([pixels, pixels[:, :, 0]])
    return {
        "png": opencv(".png", pixels),
        "png grey": pillow(rgb.convert("L"), "PNG"),
        "png palette": pillow(rgb.quantize(16), "PNG"),
        "png transparent palette": pillow(rgb.quantize(9), "PNG", transparency=3),
        "png alpha": pillow(Image.fromarray(alpha), "PNG"),
        "png grey alpha": pillow(rgb.convert("LA"), "PNG"),
        "png bits": pillow(rgb.convert("1"), "PNG"),
        "png 16": opencv(".png", pixels.astype(np.uint16) * 257),
        "png turned": pillow(rgb, "PNG", exif=exif(8)),
        "png grey 16": opencv(".png", pixels[:, :, 0].astype(np.uint16) * 251),
        "png animated": pillow(rgb, "PNG", save_all=True, append_images=[Image.fromarray(255 - pixels)]),
        "webp": pillow(rgb, "WEBP"),
        "webp lossless": pillow(rgb, "WEBP", lossless=True),
        "webp alpha": pillow(Image.fromarray(alpha), "WEBP"),
        "webp turned": pillow(rgb, "WEBP", exif=exif(5)),
        "webp animated": pillow(rgb, "WEBP", save_all=True, append_images=[Image.fromarray(255 - pixels)]),
        "bmp": opencv(".bmp", pixels),
        "bmp grey": pillow(rgb.convert("L"), "BMP"),
        "bmp palette": pillow(rgb.quantize(16), "BMP"),
        "bmp bits": pillow(rgb.convert("1"), "BMP"),
        "bmp 32": opencv(".bmp", alpha),
        "bmp rle8": rle8(11, 13),
        "bmp rle4": rle4(11, 13),
        "bmp os2": os2(9, 10),
    }


def bmp(header: bytes, palette: bytes, pixels: bytes) -> bytes:
    offset = 14 + len(header) + len(palette)
    return struct.pack("<2sIII", b"BM", offset + len(pixels), 0, offset) + header + palette + pixels


def info_header(width: int, height: int, bits: int, form: int, size: int) -> bytes:
    return struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, form, size, 2835, 2835, 0, 0)


def rle8(height: int, width: int) -> bytes:
    rows = b"".join(bytes([width - 4, 9 * y, 0, 4, y, 2 * y, 3 * y, 4 * y, 0, 0]) for y in range(height))
    palette = bytes(range(256)) * 4
    return bmp(info_header(width, height, 8, 1, len(rows) + 2), palette, rows + b"\0\1")


def rle4(height: int, width: int) -> bytes:
    rows = b"".join(bytes([width - 5, 0x11 * y, 0, 5, 0x12, 0x34, 0x50, 0, 0, 0]) for y in range(height))
    palette = bytes(range(64))
    return bmp(info_header(width, height, 4, 2, len(rows) + 2), palette, rows + b"\0\1")


def os2(height: int, width: int) -> bytes:
    row = -(-3 * width // 4) * 4
    return bmp(struct.pack("<IHHHH", 12, width, height, 1, 24), b"", bytes(n % 251 for n in range(row * height)))


def seeds() -> dict[str, bytes]:
    return jpegs() | others()


# Each way to break a file takes its bytes, those of another one, and where its chances come from.


def truncated(data: bytes, other: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(1, len(data)))]


def flipped(data: bytes, other: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for at in rng.integers(0, len(data), int(rng.integers(1, 6))):
        changed[at] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def flipped_head(data: bytes, other: bytes, rng: Rng) -> bytes:
    head = min(len(data), int(rng.choice([32, 128, 700])))
    return flipped(data[:head], other, rng) + data[head:]


def odd_bytes(data: bytes, other: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    at = int(rng.integers(0, len(data)))
    count = int(rng.choice([1, 2, 4, 16, 64]))
    changed[at : at + count] = bytes([int(rng.choice([0, 1, 0x7F, 0x80, 0xD0, 0xD9, 0xDA, 0xFE, 0xFF]))]) * count
    return bytes(changed)


def removed(data: bytes, other: bytes, rng: Rng) -> bytes:
    at = int(rng.integers(0, len(data)))
    return data[:at] + data[at + int(rng.integers(1, 40)) :]


def repeated(data: bytes, other: bytes, rng: Rng) -> bytes:
    at = int(rng.integers(0, len(data)))
    piece = data[at : at + int(rng.integers(1, 200))]
    return data[:at] + piece * int(rng.integers(2, 4)) + data[at + len(piece) :]


def spliced(data: bytes, other: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(2, len(data)))] + other[int(rng.integers(0, len(other))) :]


def longer(data: bytes, other: bytes, rng: Rng) -> bytes:
    return data + [bytes(100), rng.bytes(50), other, b"\xff\xd9"][int(rng.integers(4))]


def foreign(data: bytes, other: bytes, rng: Rng) -> bytes:
    magic = [b"GIF89a", b"RIFF", b"BM", b"\xff\xd8", b"\x89PNG", b"II*\0", b"%PDF", b"\0\0\0\0ftypheic", b"<svg "]
    start = magic[int(rng.integers(len(magic)))]
    return start + data[len(start) :]


def resized(data: bytes, other: bytes, rng: Rng) -> bytes:
    """Declares another size: somewhat, absurdly or not at all as large."""
    side = [0, 1, 2, 7, 8, 9, 33, 64, 100, 400, 5000, 65_535, 2**20, 2**24, 2**31 - 1, 2**32 - 1]
    height, width = (int(rng.choice(side)) for _ in range(2))
    changed = bytearray(data)
    if data[:2] == b"\xff\xd8":
        frame = next((at for at in range(2, len(data) - 9) if data[at] == 0xFF and 0xC0 <= data[at + 1] <= 0xC2), 2)
        changed[frame + 5 : frame + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
    elif data[:4] == b"\x89PNG":
        changed[16:24] = struct.pack(">II", width, height)
        changed = bytearray(with_checksums(bytes(changed)))
    elif data[:4] == b"RIFF" and data[12:16] == b"VP8X":
        changed[24:30] = struct.pack("<I", width)[:3] + struct.pack("<I", height)[:3]
    elif data[:4] == b"RIFF":
        at = 26 if data[12:16] == b"VP8 " else 21
        changed[at : at + 4] = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    elif data[14:18] == b"\x0c\0\0\0":
        changed[18:22] = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
    else:
        changed[18:26] = struct.pack("<II", width, height if rng.random() < 0.5 else -height & 0xFFFFFFFF)
    return bytes(changed)


def with_checksums(data: bytes) -> bytes:
    """A PNG's chunks with the checksums that they should have: so that damage gets beyond the first check."""
    out, at = bytearray(data), 8
    while at + 12 <= len(out):
        (length,) = struct.unpack_from(">I", out, at)
        if at + 12 + length > len(out):
            break
        struct.pack_into(">I", out, at + 8 + length, zlib.crc32(out[at + 4 : at + 8 + length]))
        at += 12 + length
    return bytes(out)


def flipped_chunks(data: bytes, other: bytes, rng: Rng) -> bytes:
    damage = [flipped, odd_bytes, flipped_head][int(rng.integers(3))]
    return with_checksums(damage(data, other, rng))


def flipped_pixels(data: bytes, other: bytes, rng: Rng) -> bytes:
    """In a PNG, beneath the compression: filters that do not exist, rows that are missing."""
    at = data.find(b"IDAT")
    if data[:4] != b"\x89PNG" or at < 0:
        return flipped(data, other, rng)
    (length,) = struct.unpack_from(">I", data, at - 4)
    rows = zlib.decompress(data[at + 4 : at + 4 + length])
    rows = [truncated, flipped, removed, repeated, longer][int(rng.integers(5))](rows, b"x" * 99, rng)
    body = zlib.compress(rows)
    return with_checksums(data[: at - 4] + struct.pack(">I", len(body)) + b"IDAT" + body + data[at + 4 + length :])


DAMAGES: tuple[Callable[[bytes, bytes, Rng], bytes], ...] = (
    truncated,
    flipped,
    flipped_head,
    odd_bytes,
    removed,
    repeated,
    spliced,
    longer,
    foreign,
    resized,
    flipped_chunks,
    flipped_pixels,
)


def damaged(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    files, rng = seeds(), np.random.default_rng(seed)
    names = list(files)
    for number in range(count):
        name = names[int(rng.integers(len(names)))]
        other = files[names[int(rng.integers(len(names)))]]
        damage = DAMAGES[number % len(DAMAGES)]
        data = damage(files[name], other, rng)
        if rng.random() < 0.1:
            data = flipped(data, other, rng)
        yield f"{number:05d} {damage.__name__} {name}".replace(" ", "_"), data
