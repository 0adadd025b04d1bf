"""What an image file says about itself, read without decoding it: format, size, EXIF orientation.

Every byte may be hostile. Offsets are checked before they are followed, walks end, and anything that does not add up
is an ImageError. Needs nothing but the standard library.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from edgedistill.errors import ImageError

ImageKind = Literal["jpeg", "png", "webp", "bmp", "tiff"]

# Larger images are refused before they are decoded, unless somebody raises the limit.
DEFAULT_MAX_PIXELS = 100_000_000
# A chunk is at least 8 bytes, so a 100 MB file could hold twelve million; no real one has thousands outside PNG's IDAT.
MAX_CHUNKS = 100_000
# An encoder's progressive script has about ten scans; thousands of any kind make a small file decode for minutes.
MAX_JPEG_SCANS = 500

_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_STANDALONE = frozenset(range(0xD0, 0xD9)) | {0x01}
_ANIMATION = frozenset({b"acTL", b"fcTL", b"fdAT"})
_LUMA_FACTORS = frozenset({0x11, 0x21, 0x22, 0x12, 0x41})


@dataclass(frozen=True)
class ImageHeader:
    """``height`` and ``width`` are as stored in the file, before ``orientation`` (EXIF, 1 to 8) is applied.

    ``plain_jpeg``: grey, or an everyday chroma subsampling (4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1): what the strict decoder
    reads. ``jpeg_components``: 1 grey, 3 colour, 4 CMYK. ``grey``: a JPEG or an 8-bit PNG of one channel.
    """

    kind: ImageKind
    height: int
    width: int
    orientation: int = 1
    jpeg_components: int = 0
    plain_jpeg: bool = False
    grey: bool = False

    @property
    def upright_size(self) -> tuple[int, int]:
        """(height, width) after orientation."""
        return (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)


def read_header(data: bytes, name: str) -> ImageHeader:
    """Raises ImageError that names the file for a foreign format or a header that does not hold together."""
    for magic, reader in _READERS:
        if data.startswith(magic) and (magic != b"RIFF" or data[8:12] == b"WEBP"):
            try:
                header = reader(data)
            except (struct.error, IndexError) as error:
                raise _damaged(name, "it ends inside its header") from error
            except ValueError as error:
                raise _damaged(name, str(error)) from error
            if header.height < 1 or header.width < 1:
                raise _damaged(name, f"it says {header.width}x{header.height} pixels")
            return header
    raise ImageError(f"{name}: {_what_it_is(data)}, not a JPEG, PNG, WebP, BMP or TIFF file; convert it or remove it")


def _damaged(name: str, why: str) -> ImageError:
    return ImageError(f"{name}: damaged or truncated ({why}); copy it again or remove it")


def _read_jpeg(data: bytes) -> ImageHeader:
    frame: tuple[int, bytes] | None = None
    orientation: int | None = None
    scanned = 0  # components of the first scan
    for marker, body in _jpeg_segments(data):
        if marker == 0xE1 and orientation is None and body.startswith(b"Exif\0\0"):
            orientation = exif_orientation(body[6:])
        elif marker in _SOF and frame is None:
            frame = (marker, body)
        elif marker == 0xDA:
            scanned = body[0]
    if frame is None:
        raise ValueError("no frame header before the pixels")
    marker, body = frame
    precision, height, width, components = struct.unpack_from(">BHHB", body)
    if precision != 8:
        raise ValueError(f"a {precision}-bit JPEG, only 8 bits are read")
    # After a scan of all components libjpeg takes no other, but in a progressive file.
    several = marker in _PROGRESSIVE or scanned < components
    if several and data.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise ValueError(f"more than {MAX_JPEG_SCANS} scans")
    factors = [body[6 + 3 * number + 1] for number in range(components)]
    plain = components == 1 or (
        components in (3, 4)
        and factors[0] in _LUMA_FACTORS
        and factors[1:3] == [0x11, 0x11]
        and factors[3:] in ([], factors[:1])
    )
    return ImageHeader("jpeg", height, width, orientation or 1, components, plain, grey=components == 1)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, body) of the segments up to the first scan's header."""
    at = 2
    while True:
        if data[at] != 0xFF:
            raise ValueError("something else where a marker should be")
        while data[at] == 0xFF:
            at += 1
        marker = data[at]
        at += 1
        if marker in _STANDALONE:
            continue
        if marker == 0xD9:
            return
        (length,) = struct.unpack_from(">H", data, at)
        if length < 2 or at + length > len(data):
            raise ValueError("a segment reaches beyond the end")
        yield marker, data[at + 2 : at + length]
        if marker == 0xDA:
            return
        at += length


def _read_png(data: bytes) -> ImageHeader:
    if data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
        raise ValueError("not a PNG signature")
    width, height, depth, color_type = struct.unpack_from(">IIBB", data, 16)
    orientation, at = 1, 33
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            break
        (length,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 8] == b"eXIf":
            orientation = exif_orientation(data[at + 8 : at + 8 + min(length, 1 << 16)])
        at += 12 + length
    return ImageHeader("png", height, width, orientation, grey=(depth, color_type) == (8, 0))


def check_png(data: bytes, name: str) -> bytes:
    """The file without the chunks of an animation: its still picture, which every reader of PNG understands.

    OpenCV composes an animation's first frame, and a hostile one writes outside its memory there. Raises ImageError
    unless every chunk up to IEND is there with its checksum: libpng versions differ in what they forgive, and OpenCV's
    older ones return a picture for a truncated file.
    """
    at, kept_from = 8, 0
    still: list[bytes] = []
    for _ in range(MAX_CHUNKS):
        if at + 12 > len(data):
            break
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            break
        kind = data[at + 4 : at + 8]
        if zlib.crc32(memoryview(data)[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise _damaged(name, f"checksum of chunk {kind!r}")
        if kind in _ANIMATION:
            still.append(data[kept_from:at])
            kept_from = end + 4
        if kind == b"IEND":
            return b"".join((*still, data[kept_from:])) if still else data
        at = end + 4
    raise _damaged(name, "no end chunk")


def _read_webp(data: bytes) -> ImageHeader:
    if struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise ValueError("shorter than it says")
    chunk, at = data[12:16], 20
    if chunk == b"VP8 ":
        if data[at + 3 : at + 6] != b"\x9d\x01\x2a":
            raise ValueError("no key frame")
        width, height = struct.unpack_from("<HH", data, at + 6)
        return ImageHeader("webp", height & 0x3FFF, width & 0x3FFF)
    if chunk == b"VP8L":
        signature, bits = struct.unpack_from("<BI", data, at)
        if signature != 0x2F:
            raise ValueError("no lossless signature")
        return ImageHeader("webp", (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if chunk == b"VP8X":
        width = int.from_bytes(data[at + 4 : at + 7], "little") + 1
        height = int.from_bytes(data[at + 7 : at + 10], "little") + 1
        if len(data) < at + 10:
            raise IndexError
        return ImageHeader("webp", height, width, _webp_orientation(data) if data[at] & 0x08 else 1)
    raise ValueError(f"an unknown WebP chunk {chunk!r}")


def _webp_orientation(data: bytes) -> int:
    at = 12
    for _ in range(MAX_CHUNKS):
        if at + 8 > len(data):
            break
        (length,) = struct.unpack_from("<I", data, at + 4)
        if data[at : at + 4] == b"EXIF":
            return exif_orientation(data[at + 8 : at + 8 + min(length, 1 << 16)].removeprefix(b"Exif\0\0"))
        at += 8 + length + (length & 1)
    return 1


def _read_bmp(data: bytes) -> ImageHeader:
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        width, height = struct.unpack_from("<HH", data, 18)
    else:
        width, height = struct.unpack_from("<ii", data, 18)
    return ImageHeader("bmp", abs(height), width)


def _read_tiff(data: bytes) -> ImageHeader:
    if data[8:10] == b"CR":
        raise ValueError("a camera's raw file (CR2); convert it to JPEG or PNG")
    tags = dict(_tiff_tags(data))
    named = [tag for tag, *_ in _tiff_entries(data)]
    if named.count(256) > 1 or named.count(257) > 1:
        raise ValueError("two sizes in its first directory")
    if 256 not in tags or 257 not in tags:
        raise ValueError("no size in its first directory")
    orientation = tags.get(274, 1)
    return ImageHeader("tiff", tags[257], tags[256], orientation if 1 <= orientation <= 8 else 1)


def exif_orientation(block: bytes) -> int:
    """1 to 8 from an EXIF block that starts at its TIFF header; 1 where there is none or it makes no sense."""
    try:
        orientation = dict(_tiff_tags(block)).get(274, 1)
    except (struct.error, ValueError):
        return 1
    return orientation if 1 <= orientation <= 8 else 1


def _tiff_tags(data: bytes) -> Iterator[tuple[int, int]]:
    """(tag, first value) of the SHORT and LONG entries of the first directory."""
    for tag, kind, order, at in _tiff_entries(data):
        if kind in (3, 4):
            yield tag, struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + 8)[0]


def _tiff_entries(data: bytes) -> Iterator[tuple[int, int, str, int]]:
    """(tag, type, byte order, place) of the entries of the first directory."""
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None:
        raise ValueError("no byte order")
    magic, offset = struct.unpack_from(order + "HI", data, 2)
    if magic == 43:
        raise ValueError("a BigTIFF file; convert it to TIFF or PNG")
    if magic != 42:
        raise ValueError("not a TIFF header")
    (count,) = struct.unpack_from(order + "H", data, offset)
    for number in range(count):
        at = offset + 2 + 12 * number
        tag, kind, _ = struct.unpack_from(order + "HHI", data, at)
        yield tag, kind, order, at


_READERS = (
    (b"\xff\xd8", _read_jpeg),
    (b"\x89PNG", _read_png),
    (b"RIFF", _read_webp),
    (b"BM", _read_bmp),
    (b"II", _read_tiff),
    (b"MM", _read_tiff),
)

_FOREIGN = (
    (b"GIF8", "a GIF"),
    (b"%PDF", "a PDF document"),
    (b"8BPS", "a Photoshop file"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL file"),
    (b"\xff\x0a", "a JPEG XL file"),
    (b"\0\0\0\x0cjP", "a JPEG 2000 file"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 file"),
    (b"v/1\x01", "an OpenEXR file"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"RIFF", "a RIFF file (video or sound)"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\0\0\0\x01Bud1", "a .DS_Store file"),
    (b"version https://git-lfs", "a Git LFS pointer (run `git lfs pull` to fetch the image)"),
)
_BOXES = {
    b"avif": "an AVIF file",
    b"avis": "an AVIF file",
    b"mif1": "a HEIF file",
    b"heic": "a HEIC file",
    b"heix": "a HEIC file",
    b"hevc": "a HEIC file",
    b"msf1": "a HEIF file",
    b"qt  ": "a QuickTime video",
}


def _what_it_is(data: bytes) -> str:
    for magic, what in _FOREIGN:
        if data.startswith(magic):
            return what
    if data[4:8] == b"ftyp":
        return _BOXES.get(data[8:12], "an MP4-like file (video, HEIF)")
    start = data[:512]
    if not start.strip(b"\0"):
        return "nothing but zero bytes (a copy that did not finish?)"
    head = start.lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        return "an HTML page (a download that failed?)"
    if head.startswith((b"<svg", b"<?xml")):
        return "an SVG or XML file"
    if all(byte >= 32 or byte in (9, 10, 13) for byte in start):
        return "a text file"
    return f"an unknown format (first bytes {data[:8].hex(' ')})"
