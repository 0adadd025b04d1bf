"""The C++ runtime's network input is Python's, byte for byte, for every file and frame; what Python refuses, it refuses."""

from __future__ import annotations

import io
import itertools
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest
import sklearn.datasets
from PIL import Image

from edgedistill.errors import ImageError
from edgedistill.images import DecodeMode, InputSpec, load_image, prepare

pytestmark = pytest.mark.cpp

SAMPLINGS = {"444": 0x111111, "422": 0x211111, "420": 0x221111, "440": 0x121111, "411": 0x411111}
# Tiny, odd, prime, exact multiples, large enough for every reduction.
SIZES = [(1, 1), (1, 9), (9, 1), (7, 5), (13, 17), (16, 16), (61, 97), (64, 96), (127, 131), (256, 256), (333, 500)]
SPECS = [
    InputSpec(height=height, width=width, resize=resize, crop_fraction=fraction)  # type: ignore[arg-type]
    for (height, width) in ((8, 8), (16, 16), (17, 31), (224, 224))
    for resize, fraction in (("squash", 1.0), ("center-crop", 0.875), ("squash", 0.33))
]
FEW = [SPECS[0], SPECS[4], InputSpec(height=32, width=48), InputSpec(height=64, width=64, resize="center-crop")]
MODES: tuple[DecodeMode, DecodeMode] = ("full", "reduced")
Pixels = npt.NDArray[np.uint8]


class Dump:
    """The program `pixel_dump`: one process, one decoder, as in a worker."""

    def __init__(self, program: Path, folder: Path) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._file = folder / "image with a space.img"

    def close(self) -> None:
        self._process.communicate()
        assert self._process.returncode == 0

    def answer(self, job: str, spec: InputSpec, contents: bytes) -> Pixels | str:
        """Network pixels, or the error's message."""
        assert self._process.stdin and self._process.stdout
        self._file.write_bytes(contents)
        kind, rest = job.split(" ", 1)
        head = f"{kind} {spec.height} {spec.width} {spec.resize} {spec.crop_fraction!r}"
        self._process.stdin.write(f"{head} {rest} {self._file}\n".encode())
        self._process.stdin.flush()
        line = self._process.stdout.readline().decode(errors="replace")
        assert line, f"pixel_dump died of {head} {rest}"
        if line.startswith("error "):
            return line[6:]
        pixels = np.frombuffer(self._process.stdout.read(int(line.split()[1])), np.uint8)
        return pixels.reshape(spec.height, spec.width, 3)

    def check(
        self, data: bytes, what: str, specs: Iterable[InputSpec] = FEW, modes: Iterable[DecodeMode] = MODES
    ) -> bool:
        """Asserts that both languages give the same pixels, or both refuse; whether there were pixels."""
        readable = True
        for spec, mode in itertools.product(specs, modes):
            try:
                expected: Pixels | None = load_image(data, spec, decode=mode)
            except ImageError:
                expected = None
            got = self.answer(f"bytes {mode} 100000000", spec, data)
            if expected is None or isinstance(got, str):
                assert expected is None and isinstance(got, str), f"{what}, {spec}, {mode}: {got}"
                readable = False
            else:
                np.testing.assert_array_equal(got, expected, err_msg=f"{what}, {spec}, {mode}")
        return readable


@pytest.fixture(scope="module")
def dump(cpp_program: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dump]:
    running = Dump(cpp_program("pixel_dump"), tmp_path_factory.mktemp("pixels"))
    yield running
    running.close()


def picture(height: int, width: int, *, seed: int = 0) -> Pixels:
    """Smooth shapes with some noise, so that chroma upsampling and rounding matter."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(2, height // 9), max(2, width // 9), 3), dtype=np.uint8)
    smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(smooth.astype(np.int16) + rng.integers(-9, 10, smooth.shape), 0, 255).astype(np.uint8)


def noise(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8).tobytes()


def encode(image: npt.NDArray[np.generic], suffix: str, *options: int) -> bytes:
    done, data = cv2.imencode(suffix, image, list(options))
    assert done
    return bytes(data)


def pillow(image: Image.Image, format: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)  # type: ignore[arg-type]
    return file.getvalue()


def with_alpha(image: Pixels) -> Image.Image:
    alpha = np.frombuffer(noise(image.shape[0] * image.shape[1]), np.uint8).reshape(image.shape[:2])
    return Image.fromarray(np.dstack([image, alpha]))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("progressive", [0, 1])
def test_jpegs_of_every_everyday_kind(dump: Dump, sampling: str, progressive: int) -> None:
    for number, ((height, width), restart) in enumerate(itertools.product(SIZES, (0, 3))):
        data = encode(
            picture(height, width, seed=number),
            ".jpg",
            *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, SAMPLINGS[sampling]),
            *(cv2.IMWRITE_JPEG_PROGRESSIVE, progressive),
            *(cv2.IMWRITE_JPEG_QUALITY, 60 + 13 * (number % 4)),
            *(cv2.IMWRITE_JPEG_RST_INTERVAL, restart),
        )
        assert dump.check(data, f"{height}x{width}, restart {restart}")


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_grey_cmyk_and_rgb_jpegs(dump: Dump, mode: str, progressive: bool) -> None:
    options: dict[str, object] = {"keep_rgb": True} if mode == "RGB" else {}
    for height, width in SIZES:
        source = Image.fromarray(picture(height, width)).convert(mode)
        assert dump.check(pillow(source, "JPEG", progressive=progressive, **options), f"{height}x{width}")


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
def test_real_photographs(dump: Dump, name: str) -> None:
    data = (Path(sklearn.datasets.__file__).parent / "images" / name).read_bytes()
    assert dump.check(data, name, SPECS)
    larger = cv2.resize(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), (1920, 1281))
    for sampling in SAMPLINGS.values():
        again = encode(larger, ".jpg", cv2.IMWRITE_JPEG_SAMPLING_FACTOR, sampling, cv2.IMWRITE_JPEG_QUALITY, 90)
        assert dump.check(again, f"{name} at 1920x1281, sampling {sampling:x}", SPECS[-3:])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_every_exif_orientation(dump: Dump, format: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x112] = orientation
    for (height, width), mode in itertools.product(((61, 97), (7, 5), (40, 40), (300, 200)), ("RGB", "L")):
        data = pillow(Image.fromarray(picture(height, width)).convert(mode), format, exif=exif.tobytes())
        assert dump.check(data, f"{height}x{width} {mode}")


@pytest.mark.parametrize("block", [b"", b"II*\0", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff", b"junk" * 9])
def test_nonsense_exif(dump: Dump, block: bytes) -> None:
    segment = b"Exif\0\0" + block
    data = encode(picture(20, 30), ".jpg")
    assert dump.check(data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:], "exif")


def test_pngs_that_libraries_write(dump: Dump) -> None:
    for height, width in ((1, 1), (7, 5), (61, 97), (128, 130)):
        colors = picture(height, width)
        source = Image.fromarray(colors)
        for mode in ("1", "L", "LA", "P", "RGB"):
            assert dump.check(pillow(source.convert(mode), "PNG"), mode)
        for bits in (1, 2, 4, 8):
            palette = source.convert("P", palette=Image.Palette.ADAPTIVE, colors=2**bits)
            assert dump.check(pillow(palette, "PNG", bits=bits, transparency=0), f"palette of {bits} bits")
        assert dump.check(pillow(with_alpha(colors), "PNG"), "RGBA")
        assert dump.check(pillow(source, "PNG", transparency=(5, 6, 7)), "a transparent colour")
        deep = (np.arange(height * width * 4).reshape(height, width, 4) * 37 % 65536).astype(np.uint16)
        for channels in (1, 3, 4):
            assert dump.check(encode(deep[:, :, :channels], ".png"), f"16 bits, {channels} channels")


def chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(size: tuple[int, int], depth: int, color_type: int, interlaced: bool, *chunks: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", size[1], size[0], depth, color_type, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def scanlines(size: tuple[int, int], bits: int, interlaced: bool) -> bytes:
    """Noise, with every filter."""
    passes = [(0, 0, 1, 1)]
    if interlaced:
        passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]
    raw = b""
    for left, top, across, down in passes:
        width, height = -(-(size[1] - left) // across), -(-(size[0] - top) // down)
        for row in range(height if width > 0 else 0):
            raw += bytes([row % 5]) + noise((width * bits + 7) // 8, row)
    return raw


@pytest.mark.parametrize("interlaced", [False, True])
def test_pngs_of_every_depth_and_colour(dump: Dump, interlaced: bool) -> None:
    kinds = [(depth, 0, 1) for depth in (1, 2, 4, 8, 16)]
    kinds += [(depth, color_type, channels) for depth in (8, 16) for color_type, channels in ((2, 3), (4, 2), (6, 4))]
    kinds += [(depth, 3, 1) for depth in (1, 2, 4, 8)]
    for (depth, color_type, channels), size in itertools.product(kinds, ((1, 1), (7, 5), (61, 97))):
        raw = scanlines(size, depth * channels, interlaced)
        palette = chunk(b"PLTE", noise(3 * 2**depth)) if color_type == 3 else b""
        what = f"{depth} bits, colour type {color_type}, {size}"
        assert dump.check(png(size, depth, color_type, interlaced, palette, chunk(b"IDAT", zlib.compress(raw))), what)


@pytest.mark.parametrize("interlaced", [False, True])
def test_damaged_pngs(dump: Dump, interlaced: bool) -> None:
    raw = scanlines((61, 97), 24, interlaced)
    body = zlib.compress(raw)
    variants = {
        "too few pixels": [chunk(b"IDAT", zlib.compress(raw[:-1]))],
        "pixels cut": [chunk(b"IDAT", body[:-9])],
        "wrong sum of pixels": [chunk(b"IDAT", body[:-4] + b"abcd")],
        "an unknown filter": [chunk(b"IDAT", zlib.compress(b"\7" + raw[1:]))],
        "no pixels": [],
        "an unknown critical chunk": [chunk(b"ABCD", b"x"), chunk(b"IDAT", body)],
        "a chunk that no letters name": [chunk(b"eX\xb7\x99", b"x"), chunk(b"IDAT", body)],
        "something between the pixels": [chunk(b"IDAT", body[:7]), chunk(b"tEXt", b"a\0b"), chunk(b"IDAT", body[7:])],
        "a wrong checksum": [chunk(b"IDAT", body)[:-1] + b"x"],
    }
    for what, chunks in variants.items():
        assert not dump.check(png((61, 97), 8, 2, interlaced, *chunks), what)
    harmless = {
        "too many pixels": [chunk(b"IDAT", zlib.compress(raw + b"abc"))],
        "more text than libpng keeps": [chunk(b"tEXt", b"a\0" + b"b" * 8_000_000), chunk(b"IDAT", body)],
        "more behind the pixels": [chunk(b"IDAT", body + b"xyz")],
        "pixels in pieces": [chunk(b"IDAT", b""), chunk(b"IDAT", body[:7]), chunk(b"IDAT", body[7:])],
    }
    for what, chunks in harmless.items():
        assert dump.check(png((61, 97), 8, 2, interlaced, *chunks), what)


def test_webps(dump: Dump) -> None:
    for height, width in ((1, 1), (7, 5), (61, 97), (133, 77)):
        colors = picture(height, width)
        for source in (Image.fromarray(colors), with_alpha(colors)):
            for options in ({"lossless": True}, {"lossless": True, "exact": True}, {"quality": 10}, {"quality": 90}):
                assert dump.check(pillow(source, "WEBP", **options), f"{source.mode} {options}")


def test_animations_give_one_picture(dump: Dump) -> None:
    colors = picture(61, 97)
    for source in (Image.fromarray(colors), with_alpha(colors), Image.fromarray(colors).convert("L")):
        more = [source.transpose(Image.Transpose.FLIP_LEFT_RIGHT), source.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
        assert dump.check(pillow(source, "WEBP", save_all=True, append_images=more, duration=50), "WebP")
        for still in (False, True):
            data = pillow(source, "PNG", save_all=True, append_images=more, default_image=still, duration=50)
            assert dump.check(data, f"PNG, {still}")
            expected = load_image(pillow(source, "PNG"), FEW[2])
            np.testing.assert_array_equal(load_image(data, FEW[2]), expected)


def test_pngs_with_hostile_animations(dump: Dump) -> None:
    """OpenCV writes outside its memory for some of these: Python must not show it an animation."""
    source = Image.fromarray(picture(61, 97)).convert("L")
    data = pillow(source, "PNG", save_all=True, append_images=[source.rotate(180)], duration=50)
    at = data.index(b"fcTL")
    for place, value in ((8, 50), (8, 200), (12, 200), (16, 50), (16, 2**31 - 1), (20, 2**32 - 1), (8, 0)):
        changed = bytearray(data)
        changed[at + place : at + place + 4] = struct.pack(">I", value)
        changed[at + 30 : at + 34] = struct.pack(">I", zlib.crc32(changed[at : at + 30]))
        assert dump.check(bytes(changed), f"{value} at {place}")


def bmp(size: tuple[int, int], bits: int, body: bytes, **fields: int | bytes) -> bytes:
    """``fields``: compression, used (colours), palette, masks, header_size, extra (of the header)."""
    header_size = int(fields.get("header_size", 40))
    height, width = size
    if header_size == 12:
        header = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        compression, used = int(fields.get("compression", 0)), int(fields.get("used", 0))
        header = struct.pack("<IiiHHIIiiII", header_size, width, height, 1, bits, compression, len(body), 0, 0, used, 0)
        header = (header + bytes(fields.get("extra", b"")))[:header_size].ljust(header_size, b"\0")
    tables = bytes(fields.get("masks", b"")) + bytes(fields.get("palette", b""))
    offset = 14 + len(header) + len(tables)
    return b"BM" + struct.pack("<IHHI", offset + len(body), 0, 0, offset) + header + tables + body


def test_bmps(dump: Dump) -> None:
    for (height, width), bits in itertools.product(((1, 1), (7, 5), (61, 97)), (1, 4, 8, 16, 24, 32)):
        body = noise((width * bits + 31) // 32 * 4 * height, bits)
        colors = 2**bits if bits <= 8 else 0
        for upside in (height, -height):
            assert dump.check(bmp((upside, width), bits, body, palette=noise(4 * colors)), f"{bits} bits")
            if colors:
                data = bmp((upside, width), bits, body, palette=noise(8), used=2)
                assert dump.check(data, f"{bits} bits, 2 colours")
        if bits != 16:
            assert dump.check(bmp((height, width), bits, body, palette=noise(3 * colors), header_size=12), "OS/2")
        assert not dump.check(bmp((height, width), bits, body[:-1], palette=noise(4 * colors)), "cut")
    for name in ("1", "L", "P", "RGB", "RGBA"):
        assert dump.check(pillow(with_alpha(picture(33, 47)).convert(name), "BMP"), name)


def test_bmps_with_masks(dump: Dump) -> None:
    size = (61, 97)
    for masks in ((0x7C00, 0x3E0, 0x1F), (0xF800, 0x7E0, 0x1F), (0xFF, 0xFF00, 0xFF0000)):
        packed = struct.pack("<III", *masks)
        for bits in (16, 32):
            body = noise(size[0] * (size[1] * bits + 31) // 32 * 4 + 400)
            dump.check(bmp(size, bits, body, compression=3, masks=packed), f"{bits} bits, {masks}")
    for masks4 in (
        (0xFF0000, 0xFF00, 0xFF, 0xFF000000),
        (0x3FF00000, 0xFFC00, 0x3FF, 0),
        (0xF00, 0xF0, 0xF, 0),
        (0xFF, 0, 9, 0),
    ):
        for header_size in (52, 56, 108, 124):
            fields = {"compression": 3, "header_size": header_size, "extra": struct.pack("<IIII", *masks4)}
            assert dump.check(bmp(size, 32, noise(4 * 61 * 97), **fields), f"{header_size}, {masks4}")  # type: ignore[arg-type]


def run_lengths(size: tuple[int, int], wide: bool, rng: np.random.Generator) -> bytes:
    """Codes that mostly stay inside the picture."""
    body, x = b"", 0
    for _ in range(int(rng.integers(1, 4 * size[0] + 20))):
        kind, room = int(rng.integers(0, 12)), size[1] - x
        if kind < 5 and room > 0:
            length = int(rng.integers(1, min(room, 255) + 1)) if rng.random() < 0.97 else 255
            body += bytes([length, int(rng.integers(256))])
            x = 0 if wide and x + length >= size[1] else x + length
        elif kind < 8 and room >= 3:
            length = int(rng.integers(3, min(room, 255) + 1))
            size_bytes = length if wide else (length + 1) // 2
            body += bytes([0, length]) + noise(size_bytes + size_bytes % 2, length)
            x += length
        elif kind < 10:
            body, x = body + b"\0\0", 0
        elif kind == 10:
            body += bytes([0, 2, int(rng.integers(0, 4)), int(rng.integers(0, 3))])
            x += 2
    return body + b"\0\1" * int(rng.integers(0, 3 * size[0]))


def test_bmps_with_run_lengths(dump: Dump) -> None:
    rng, readable = np.random.default_rng(0), 0
    for number in range(600):
        size, wide = [(1, 1), (7, 5), (61, 97), (3, 8)][number % 4], number // 4 % 2 == 0
        body = run_lengths(size, wide, rng)
        bits, compression = (8, 1) if wide else (4, 2)
        data = bmp(size, bits, body, compression=compression, palette=noise(4 * 2**bits))
        readable += dump.check(data, f"run lengths {number}", FEW[2:3], ("full",))
    assert readable > 100


@pytest.mark.parametrize("size", [*SIZES, (2, 2), (62, 98), (448, 448), (1282, 1920)])
def test_frames_in_every_format(dump: Dump, size: tuple[int, int]) -> None:
    height, width = size
    image = picture(height, width, seed=height)
    fourth = image[:, :, :1]
    formats = {
        "bgr": image,
        "rgb": image[:, :, ::-1],
        "bgra": np.dstack([image, fourth]),
        "rgba": np.dstack([image[:, :, ::-1], fourth]),
        "gray": fourth,
    }
    for (name, pixels), padding, spec in itertools.product(formats.items(), (0, 11), SPECS):
        used = width * pixels.shape[2]
        rows = np.zeros((height, used + padding), np.uint8)
        rows[:, :used] = pixels.reshape(height, used)
        # The last row has no padding: nothing behind its pixels may be read.
        memory = rows.reshape(-1)[: rows.size - padding].tobytes()
        job = f"frame {name} {height} {width} {used + padding if padding else 0}"
        expected = prepare(pixels[:, :, 0] if name == "gray" else image, spec)
        np.testing.assert_array_equal(dump.answer(job, spec, memory), expected, err_msg=f"{job} {spec}")


@pytest.mark.parametrize("size", [(2, 2), (16, 18), (62, 98), (256, 250), (1080, 1920)])
def test_camera_frames(dump: Dump, size: tuple[int, int]) -> None:
    height, width = size
    planes = np.frombuffer(noise(height * width * 3 // 2), np.uint8).reshape(height * 3 // 2, width)
    for spec in SPECS:
        for name, code in (("nv12", cv2.COLOR_YUV2BGR_NV12), ("i420", cv2.COLOR_YUV2BGR_I420)):
            expected = prepare(cv2.cvtColor(planes, code), spec)
            got = dump.answer(f"frame {name} {height} {width} 0", spec, planes.tobytes())
            np.testing.assert_array_equal(got, expected, err_msg=f"{name} {spec}")
        padded = np.zeros((height * 3 // 2, width + 64), np.uint8)
        padded[:, :width] = planes
        got = dump.answer(f"frame nv12 {height} {width} {width + 64}", spec, padded.tobytes())
        np.testing.assert_array_equal(got, prepare(cv2.cvtColor(planes, cv2.COLOR_YUV2BGR_NV12), spec))


def jpeg_variants() -> dict[str, bytes]:
    image = picture(61, 97)
    source = Image.fromarray(image)
    return {
        "4:2:0": pillow(source, "JPEG", quality=90, subsampling=2),
        "4:4:4": pillow(source, "JPEG", quality=95, subsampling=0),
        "progressive": pillow(source, "JPEG", progressive=True),
        "grey": pillow(source.convert("L"), "JPEG"),
        "CMYK": pillow(source.convert("CMYK"), "JPEG"),
        "restarts": encode(image, ".jpg", cv2.IMWRITE_JPEG_RST_INTERVAL, 2),
    }


@pytest.mark.parametrize("kind", jpeg_variants())
def test_jpegs_with_odd_ends(dump: Dump, kind: str) -> None:
    data = jpeg_variants()[kind]
    for cut in (*range(1, 12), 50, len(data) // 2):
        dump.check(data[:-cut], f"cut by {cut}")
        dump.check(data[:-cut] + b"\xff\xd9", f"cut by {cut}, closed") if kind != "progressive" else None
    for more in (
        b"\0",
        b"\xff",
        b"\xff\xff\xff",
        b"abc",
        bytes(20),
        b"\xff\xd9",
        b"\xff\xd0",
        b"\xff\xe0\0\4ab",
        b"\xff\0",
    ):
        dump.check(data + more, f"{more!r} behind")
        dump.check(data[:-2] + more + data[-2:], f"{more!r} before the end")


def test_jpegs_of_every_frame_type(dump: Dump) -> None:
    data = bytearray(jpeg_variants()["4:2:0"])
    at = data.index(b"\xff\xc0") + 1
    for marker in range(0xC0, 0xD0):
        data[at] = marker
        dump.check(bytes(data), f"{marker:x}")


def test_damaged_files_are_refused_alike(dump: Dump) -> None:
    source, exif = Image.fromarray(picture(61, 97)), Image.Exif()
    exif[0x112] = 6
    files = jpeg_variants() | {
        "EXIF": pillow(source, "JPEG", exif=exif.tobytes()),
        "PNG": pillow(source, "PNG", exif=exif.tobytes()),
        "WebP": pillow(source, "WEBP", exif=exif.tobytes()),
        "lossless WebP": pillow(with_alpha(picture(61, 97)), "WEBP", lossless=True),
        "BMP": pillow(source.convert("P"), "BMP"),
    }
    rng, readable = np.random.default_rng(1), 0
    for number, kind in enumerate(list(files) * 60):
        data = bytearray(files[kind])
        for _ in range(int(rng.integers(1, 4))):
            # Half of the damage is in the header.
            place = int(rng.integers(2, len(data) if number % 2 else min(len(data), 120)))
            match int(rng.integers(4)):
                case 0:
                    del data[place : place + int(rng.integers(1, 9))]
                case 1:
                    data[place:place] = noise(int(rng.integers(1, 5)), number)
                case _:
                    data[place] ^= 1 << int(rng.integers(8))
        readable += dump.check(
            bytes(data), f"{kind} {number}", FEW[number % 4 : number % 4 + 1], MODES[number % 2 :][:1]
        )
    assert 30 < readable < 600


def test_foreign_formats_and_limits_are_refused_in_pythons_words(dump: Dump) -> None:
    jpeg = encode(picture(20, 30), ".jpg")
    files = [
        b"GIF89a" + bytes(20),
        b"\0\0\0\x18ftypheic" + bytes(9),
        b"<svg></svg>",
        bytes(99),
        b"a text",
        b"\1\2\3\4\5",
    ]
    for data in [*files, b"PK\3\4" + bytes(9), b"RIFF\0\0\0\0AVI ", jpeg[:9], jpeg[:100], b"", jpeg]:
        with pytest.raises(ImageError) as refusal:
            load_image(data, FEW[0], max_pixels=599)
        got = dump.answer("bytes full 599", FEW[0], data)
        assert isinstance(got, str)
        assert got.rstrip("\n").split(": ", 1)[1] == str(refusal.value).split(": ", 1)[1]
    tiff = dump.answer("bytes full 100000000", FEW[0], encode(picture(20, 30), ".tiff"))
    assert isinstance(tiff, str) and "the C++ runtime does not read TIFF; convert it to PNG or JPEG" in tiff
    assert isinstance(dump.answer("file full 600", FEW[0], jpeg), np.ndarray)
