"""What can be chosen: networks, precisions, resolutions, ways of serving, and two of them as a cascade."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import openvino as ov

from edgedistill.images import DecodeMode, InputSpec
from edgedistill.runtime.bundle import precision_name
from edgedistill.runtime.network import usable_cores
from edgedistill.runtime.processor import cpu_info
from edgedistill.tasks import Task

PRECISIONS = ("f32", "bf16", "int8")
# Of the resolution that a student was trained at. A student often gains from a larger picture than it was trained on
# (FixRes, 1906.06423), and easy pictures stay easy when they are small.
SIZE_FACTORS = (0.5, 0.625, 0.75, 0.875, 1.0, 1.125, 1.25, 1.5)
SMALLEST_PX = 32
BATCHES = (1, 2, 4, 8, 16)
DOT_PRODUCTS = frozenset({"avx512_vnni", "avx_vnni", "amx_int8", "asimddp", "i8mm"})


@dataclass(frozen=True)
class Host:
    """This machine, as far as it decides what can be tried."""

    cores: int
    bf16: bool
    int8_dot_products: bool
    cpu: str

    @classmethod
    def here(cls) -> Host:
        name, flags = cpu_info()
        abilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        return cls(usable_cores(), "BF16" in abilities, bool(flags & DOT_PRODUCTS), name)


@dataclass(frozen=True)
class Student:
    """One exported network. ``model``: its FP32 IR inside ``root``; ``spec``: as it was trained and exported. ``labels``: a
    name for each of its outputs; ``heads``: what they are where it gives more than one label per image."""

    name: str
    root: Path
    model: str
    spec: InputSpec
    sha256: str
    int8_sha256: str | None
    labels: tuple[str, ...]
    temperature: float = 1.0
    dataset_hash: str = ""
    architecture: str = ""
    heads: Task | None = None

    @property
    def task(self) -> Task:
        return self.heads or Task.single(self.labels)

    @property
    def size(self) -> tuple[int, int]:
        return self.spec.height, self.spec.width


@dataclass(frozen=True, order=True)
class Variant:
    """One student at one precision and resolution (height, width): what has an accuracy."""

    student: str
    precision: str
    size: tuple[int, int]

    @property
    def key(self) -> str:
        height, width = self.size
        return f"{self.student} {self.precision} {height if height == width else f'{height}x{width}'}"


@dataclass(frozen=True, order=True)
class Serving:
    """How the cores are used: ``streams`` images at once, ``threads`` in all, ``batch`` images per inference."""

    streams: int
    threads: int
    batch: int = 1
    pinning: bool = False

    @property
    def key(self) -> str:
        return f"{self.streams}s{self.threads}t{self.batch}b{'p' if self.pinning else ''}"

    def words(self) -> str:
        pinned = ", pinned to cores" if self.pinning else ""
        return f"{self.streams} streams, {self.threads} threads, {self.batch} images per inference{pinned}"


@dataclass(frozen=True, order=True)
class Deployment:
    """Everything that deploy.json says but the temperatures, which follow from the variants."""

    stages: tuple[Variant, ...]
    serving: Serving
    decode: DecodeMode = "reduced"
    exit_threshold: float | None = None

    @property
    def key(self) -> str:
        """One line, equal for equal deployments."""
        return f"{self.network_key}, {self.serving.key}"

    @property
    def network_key(self) -> str:
        """What answers, without how it is served."""
        threshold = "" if self.exit_threshold is None else f" (exit at {self.exit_threshold:.5f})"
        return " -> ".join(stage.key for stage in self.stages) + threshold + f", {self.decode}"

    @property
    def precision(self) -> str:
        """'int8', or 'int8+f32' where the stages differ."""
        return precision_name([stage.precision for stage in self.stages])

    def served(self, serving: Serving) -> Deployment:
        return dataclasses.replace(self, serving=serving)


def variants_of(student: Student, host: Host, sizes: Sequence[int] = ()) -> list[Variant]:
    """Every precision that this CPU computes and the student has, at every resolution; the student's own FP32 first."""
    precisions = ["f32", *(["bf16"] if host.bf16 else []), *(["int8"] if student.int8_sha256 is not None else [])]
    shapes = [(size, size) for size in sizes] if sizes else _sizes(student.spec)
    found = [Variant(student.name, precision, size) for size in shapes for precision in precisions]
    own = Variant(student.name, "f32", student.size)
    return sorted({*found, own}, key=lambda variant: _distance(variant, student))


def _sizes(spec: InputSpec) -> list[tuple[int, int]]:
    """Around the student's own, in steps that suit strided convolutions."""
    step = 32 if min(spec.height, spec.width) >= 160 else 16

    def scaled(length: int, factor: float) -> int:
        return length if factor == 1 else max(SMALLEST_PX, round(length * factor / step) * step)

    return sorted({(scaled(spec.height, factor), scaled(spec.width, factor)) for factor in SIZE_FACTORS})


def _distance(variant: Variant, student: Student) -> tuple[bool, float, int, tuple[int, int]]:
    """The student's own resolution first, then nearer ones; FP32 before the others."""
    ratio = variant.size[0] / student.size[0]
    return (variant.size != student.size, abs(ratio - 1), PRECISIONS.index(variant.precision), variant.size)


def default_serving(host: Host) -> Serving:
    """What the runtime does unasked: one stream and one thread per core."""
    return Serving(host.cores, host.cores)


def servings(host: Host) -> list[Serving]:
    """Ways to use the cores, the default first. Pinning only with one stream: several would share the first core."""
    cores = host.cores
    found = [default_serving(host)]
    found += [Serving(cores, cores, batch) for batch in BATCHES[1:]]
    found += [Serving(streams, cores) for streams in sorted({max(1, cores // 2), 1}, reverse=True)]
    found += [Serving(1, cores, 4), Serving(1, cores, 1, True)]
    return list(dict.fromkeys(found))
