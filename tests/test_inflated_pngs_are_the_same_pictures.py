"""png_inflate.py: what ISA-L inflates is the picture, or the refusal, that OpenCV makes of the file itself."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import pytest
from PIL import Image

from edgedistill import images
from edgedistill.errors import ImageError
from edgedistill.images import decode_image
from edgedistill.png_inflate import MOST_BYTES, inflated

Chunks = list[tuple[bytes, bytes]]
ODD_CHUNKS = (b"tRNS", b"PLTE", b"gAMA", b"bKGD", b"eXIf", b"ABCD", b"abcd", b"iCCP", b"pHYs", b"acTL")


def picture(rng: np.random.Generator, mode: str, *, side: int = 70) -> bytes:
    height, width = rng.integers(1, side, 2).tolist()
    pixels = rng.integers(0, 256, (height, width, len(Image.new(mode, (1, 1)).getbands())), np.uint8)
    if rng.random() < 0.7:
        pixels = cv2.GaussianBlur(pixels, (9, 9), 3).reshape(pixels.shape)
    file = io.BytesIO()
    image = Image.fromarray(pixels[..., 0] if mode == "L" else pixels, mode)
    image.save(file, "PNG", compress_level=int(rng.integers(0, 10)))
    return file.getvalue()


def chunks_of(data: bytes) -> Chunks:
    at, found = 8, []
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        found.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    return found


def file_of(chunks: Chunks) -> bytes:
    """With right checksums: a wrong one is refused before."""
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def outcome(data: bytes) -> np.ndarray | str:
    try:
        return decode_image(data)
    except ImageError as error:
        return str(error)


def assert_same(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = outcome(data)
    with monkeypatch.context() as patch:
        patch.setattr(images, "inflated", lambda data: data)
        plain = outcome(data)
    if isinstance(ours, str) or isinstance(plain, str):
        assert isinstance(ours, str) and ours == plain, [(kind, len(body)) for kind, body in chunks_of(data)]
    else:
        np.testing.assert_array_equal(ours, plain)


@pytest.mark.parametrize("mode", ["L", "LA", "RGB", "RGBA"])
def test_plain_pictures_keep_their_pixels(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    for _ in range(30):
        data = picture(rng, mode)
        assert (inflated(data) is data) == (mode == "LA")
        assert_same(data, monkeypatch)


def odd_chunk(chunks: Chunks, rng: np.random.Generator) -> None:
    body = rng.bytes(int(rng.choice([0, 1, 2, 6, 9, 32])))
    chunks.insert(int(rng.integers(1, len(chunks))), (ODD_CHUNKS[rng.integers(len(ODD_CHUNKS))], body))


def split_pixels(chunks: Chunks, rng: np.random.Generator) -> None:
    place = next(number for number, (kind, _) in enumerate(chunks) if kind == b"IDAT")
    body = chunks[place][1]
    cut = int(rng.integers(0, len(body)))
    between: Chunks = [(b"tEXt", b"a\0b")] if rng.random() < 0.3 else []
    chunks[place : place + 1] = [(b"IDAT", body[:cut]), *between, (b"IDAT", body[cut:])]


def change_pixels(
    change: Callable[[bytes, np.random.Generator], bytes],
) -> Callable[[Chunks, np.random.Generator], None]:
    def changed(chunks: Chunks, rng: np.random.Generator) -> None:
        chunks[:] = [(kind, change(body, rng) if kind == b"IDAT" else body) for kind, body in chunks]

    return changed


def flip(body: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(body)))
    return body[:at] + bytes([body[at] ^ 1 << int(rng.integers(8))]) + body[at + 1 :]


def flip_header(chunks: Chunks, rng: np.random.Generator) -> None:
    at, body = int(rng.choice([3, 7, 8, 9, 10, 11, 12])), chunks[0][1]
    chunks[0] = (b"IHDR", body[:at] + bytes([body[at] ^ 1 << int(rng.integers(4))]) + body[at + 1 :])


def resized(body: bytes, rng: np.random.Generator) -> bytes:
    pixels = zlib.decompress(body)
    return zlib.compress(pixels + bytes(5) if rng.random() < 0.5 else pixels[: -int(rng.integers(1, 9))])


CHANGES: dict[str, Callable[[Chunks, np.random.Generator], None]] = {
    "another chunk": odd_chunk,
    "several pixel chunks": split_pixels,
    "a bit of the pixels": change_pixels(flip),
    "a bit of the header": flip_header,
    "pixels that end early": change_pixels(lambda body, rng: body[: int(rng.integers(len(body)))]),
    "more or fewer pixels": change_pixels(resized),
    "an unknown filter": change_pixels(lambda body, rng: zlib.compress(b"\x07" + zlib.decompress(body)[1:])),
    "bytes after the pixels": change_pixels(lambda body, rng: body + rng.bytes(5)),
    "no pixels": change_pixels(lambda body, rng: b""),
}


@pytest.mark.parametrize("change", CHANGES)
def test_odd_and_damaged_files_are_judged_as_before(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    for number in range(60):
        chunks = chunks_of(picture(rng, ("L", "RGB", "RGBA")[number % 3]))
        CHANGES[change](chunks, rng)
        assert_same(file_of(chunks), monkeypatch)


def test_a_bomb_is_not_inflated_beyond_the_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """256 MB of zeros behind an 8x8 picture."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(bytes(1 << 20)) for _ in range(256)) + packer.flush()
    chunks = chunks_of(picture(np.random.default_rng(3), "RGB"))
    bomb = file_of([(kind, packed if kind == b"IDAT" else body) for kind, body in chunks])
    assert inflated(bomb) is bomb
    assert_same(bomb, monkeypatch)


def test_large_pictures_are_left_to_the_decoder() -> None:
    for height, same in ((MOST_BYTES // 3001 + 1, True), (MOST_BYTES // 3001 - 1, False)):
        data = cv2.imencode(".png", np.zeros((height, 1000, 3), np.uint8))[1].tobytes()
        assert (inflated(data) is data) == same
