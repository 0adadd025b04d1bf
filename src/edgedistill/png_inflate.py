"""PNG files whose pixels are inflated already: OpenCV's zlib takes a third to a half of the time that a PNG takes.

ISA-L inflates two to three times as fast. What it makes of the pixel chunks is put back into the file as stored blocks,
which OpenCV has only to copy, so every pixel, and every judgement on the rest of the file, is still OpenCV's. Needs isal
only.
"""

from __future__ import annotations

import struct

from isal import isal_zlib

# Above it the copies eat the gain (1.04 times as fast at 1280x854, 1.4 times at 640x427).
MOST_BYTES = 1 << 21
# Colour type -> channels; palettes are small already.
_CHANNELS = {0: 1, 2: 3, 6: 4}
_STORED = 65535  # the longest stored block of DEFLATE
_FIRST_CHUNK = 33  # behind IHDR


def inflated(data: bytes) -> bytes:
    """The same PNG file with its pixels stored; ``data`` itself where that is not surely the same picture.

    ``data``: its chunks are whole, their checksums right, and it is no animation (`image_headers.check_png`). Only plain
    pictures are changed (8 bits, grey or colour, not interlaced), and only where exactly the pixels come out: what is
    wrong with any other file is for the decoder to say.
    """
    size = _pixel_bytes(data)
    place = _pixel_chunks(data) if size else None
    if place is None:
        return data
    packed, start, end = place
    decompressor = isal_zlib.decompressobj()
    try:
        pixels = decompressor.decompress(packed, size + 1)
    except isal_zlib.IsalError:  # type: ignore[misc]  # the stub calls it a variable
        return data
    if len(pixels) != size or not decompressor.eof or decompressor.unused_data:
        return data
    parts = _stored(pixels)
    checksum = 0
    for part in parts:
        checksum = isal_zlib.crc32(part, checksum)
    length = sum(map(len, parts)) - 4  # without the name
    return b"".join((data[:start], struct.pack(">I", length), *parts, struct.pack(">I", checksum), data[end:]))


def _pixel_bytes(data: bytes) -> int:
    """Filter bytes and pixels of a plain picture; 0 for any other."""
    width, height, depth, color_type, compression, filters, interlaced = struct.unpack_from(">IIBBBBB", data, 16)
    if depth != 8 or color_type not in _CHANNELS or compression or filters or interlaced:
        return 0
    size = int(height * (width * _CHANNELS[color_type] + 1))
    return size if size <= MOST_BYTES else 0


def _pixel_chunks(data: bytes) -> tuple[bytes, int, int] | None:
    """(what the IDAT chunks hold, where they begin, where they end); None where they are apart."""
    found: list[bytes] = []
    at, start, end = _FIRST_CHUNK, 0, 0
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        kind, after = data[at + 4 : at + 8], at + 12 + length
        if kind == b"IEND":
            break
        if kind == b"IDAT":
            if found and at != end:
                return None
            start, end = start or at, after
            found.append(data[at + 8 : at + 8 + length])
        at = after
    return (b"".join(found), start, end) if found else None


def _stored(pixels: bytes) -> list[bytes | memoryview]:
    """Name and content of an IDAT chunk, in parts: a zlib stream of stored blocks."""
    size, view = len(pixels), memoryview(pixels)
    parts: list[bytes | memoryview] = [b"IDAT\x78\x01"]
    for start in range(0, size, _STORED):
        count = min(_STORED, size - start)
        parts += (struct.pack("<BHH", start + count == size, count, count ^ 0xFFFF), view[start : start + count])
    parts.append(struct.pack(">I", isal_zlib.adler32(pixels)))
    return parts
