"""Ten thousand damaged images through both languages: pixels or an error that names the image, and the same in both.

Where the two may differ, and why:

- JPEGs of an odd chroma subsampling. Python has no strict decoder for them and takes OpenCV's picture, damaged or not;
  C++ makes libjpeg's warnings errors there as well.
- Progressive JPEGs whose last scans never came, which is no damage that a decoder could know of. libjpeg-turbo smooths
  what is missing, and Debian's 2.1 does it a little differently than the 3.1 in Python's wheels.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgedistill.errors import ImageError
from edgedistill.image_headers import read_header
from edgedistill.images import InputSpec, load_image

pytestmark = pytest.mark.cpp

COUNT = 10_000
MAX_PIXELS = 300_000
SECONDS_AN_IMAGE = 5.0
damaged = runpy.run_path(str(Path(__file__).with_name("damaged_images.py")))["damaged"]
SETTINGS: tuple[tuple[InputSpec, Any], ...] = (
    (InputSpec(height=16, width=16), "reduced"),
    (InputSpec(height=24, width=40, resize="center-crop", crop_fraction=0.875), "full"),
    (InputSpec(height=32, width=32), "full"),
    (InputSpec(height=8, width=8), "reduced"),
)


@dataclass(frozen=True)
class Image:
    name: str
    data: bytes
    spec: InputSpec
    decode: Any

    @property
    def job(self) -> bytes:
        """What makes pixel_dump read it."""
        spec, size = self.spec, len(self.data)
        settings = f"{spec.height} {spec.width} {spec.resize} {spec.crop_fraction} {self.decode} {MAX_PIXELS}"
        return f"memory {settings} {size}\n".encode() + self.data

    def load(self) -> bytes | str:
        """What Python makes of it: network pixels, or the error."""
        try:
            pixels = load_image(self.data, self.spec, decode=self.decode, max_pixels=MAX_PIXELS)
        except ImageError as error:
            return str(error)
        assert pixels.shape == (self.spec.height, self.spec.width, 3) and pixels.dtype == np.uint8
        return pixels.tobytes()


def memory_of(pid: int | str, field: str = "VmRSS") -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


class PixelDump:
    """One process of pixel_dump that reads one image after the other. A hang ends with the process."""

    def __init__(self, program: Path, seconds: float) -> None:
        self._process = subprocess.Popen([program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._watchdog = threading.Timer(seconds, self._process.kill)
        self._watchdog.start()
        self.slowest_s = 0.0

    def load(self, image: Image) -> bytes | str:
        assert self._process.stdin and self._process.stdout
        started = time.monotonic()
        self._process.stdin.write(image.job)
        self._process.stdin.flush()
        kind, _, rest = self._process.stdout.readline().partition(b" ")
        assert kind in (b"ok", b"error"), f"{image.name}: crash or hang, {self._process.poll()}"
        pixels = self._process.stdout.read(int(rest)) if kind == b"ok" else b""
        self.slowest_s = max(self.slowest_s, time.monotonic() - started)
        return pixels or rest.decode().rstrip("\n")

    def memory(self, field: str = "VmRSS") -> int:
        return memory_of(self._process.pid, field)

    def close(self) -> int:
        self._watchdog.cancel()
        self._process.communicate()
        return self._process.returncode


@pytest.fixture(scope="module")
def images() -> list[Image]:
    pairs = enumerate(damaged(COUNT, seed=1))
    return [Image(name, data, *SETTINGS[number % len(SETTINGS)]) for number, (name, data) in pairs]


@pytest.fixture(scope="module")
def cpp_answers(images: list[Image], cpp_program: Callable[[str], Path]) -> list[bytes | str]:
    """All through one worker's buffers, twice, so that what a damaged image leaves behind would be seen."""
    dump = PixelDump(cpp_program("pixel_dump"), seconds=200.0)
    try:
        answers = [dump.load(image) for image in images]
        memory = dump.memory()
        again = [dump.load(image) for image in images]
        grown, peak = dump.memory() - memory, dump.memory("VmHWM")
    finally:
        status = dump.close()
    assert status == 0 and again == answers
    assert dump.slowest_s < SECONDS_AN_IMAGE
    assert grown < 4 << 20, f"{grown} bytes more after {COUNT} images"
    assert peak < 256 << 20, "sizes that are only declared took memory"
    return answers


def test_both_languages_give_the_same_pixels_or_an_error(images: list[Image], cpp_answers: list[bytes | str]) -> None:
    errors = exceptions = 0
    for image, got in zip(images, cpp_answers, strict=True):
        started = time.monotonic()
        expected = image.load()
        assert time.monotonic() - started < SECONDS_AN_IMAGE
        for answer in (got, expected):
            assert isinstance(answer, bytes) or answer.startswith(f"<{len(image.data)} bytes>: "), answer
        errors += isinstance(expected, str)
        if isinstance(got, bytes) != isinstance(expected, bytes) or (isinstance(got, bytes) and got != expected):
            assert may_differ(image, got, expected), f"{image.name}: {got[:200]!r}, in Python {expected[:200]!r}"
            exceptions += 1
    # The damage is neither harmless nor always fatal, and the exceptions stay exceptions.
    assert COUNT // 2 < errors < COUNT - COUNT // 5
    assert exceptions <= COUNT // 1000


def may_differ(image: Image, got: bytes | str, expected: bytes | str) -> bool:
    """Whether it is one of the two kinds of JPEG above."""
    if isinstance(expected, str):
        return False
    header = read_header(image.data, "")
    if isinstance(got, str):
        return header.kind == "jpeg" and not header.plain_jpeg and "damaged or truncated" in got
    difference = np.abs(np.frombuffer(got, np.uint8).astype(int) - np.frombuffer(expected, np.uint8))
    return header.kind == "jpeg" and b"\xff\xc2" in image.data and int(difference.max()) <= 8


def test_pythons_memory_stays_as_it_is(images: list[Image]) -> None:
    chosen = images[: COUNT // 4]
    for image in chosen:
        image.load()
    memory = memory_of("self")
    for image in chosen:
        image.load()
    assert memory_of("self") - memory < 8 << 20


def test_every_damaged_file_gets_a_label_or_an_error_of_its_own(
    images: list[Image], test_models: Path, cpp_program: Callable[[str], Path], tmp_path: Path
) -> None:
    paths = [tmp_path / image.name for image in images[: COUNT // 20]]
    for path, image in zip(paths, images, strict=False):
        path.write_bytes(image.data)
    result = subprocess.run(
        [cpp_program("answer_dump"), test_models / "single"],
        input="".join(f"file\t{path}\n" for path in paths),
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"EDGEDISTILL_CACHE": str(tmp_path / "cache")},
    )
    assert result.returncode == 0, result.stderr
    model, *answers = (json.loads(line) for line in result.stdout.splitlines())
    for path, answer in zip(paths, answers, strict=True):
        if "error" in answer:
            assert answer["kind"] == "image" and answer["error"].startswith(f"{path}: ")
        else:
            assert answer["label"] in model["labels"] and abs(sum(answer["probabilities"]) - 1) < 1e-5
    assert 0 < sum("error" in answer for answer in answers) < len(answers)
