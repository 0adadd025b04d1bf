"""Broken and hostile IRs, the same every time: one small network, and seeded ways to change its two files.

hostile(xml, weights, 500, seed=1) -> (name, xml, weights), one after the other
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import numpy as np

Rng = np.random.Generator
Ir = tuple[bytes, bytes]
NUMBERS = (
    b"", b"-1", b"0", b"1", b"2", b"7", b"-7", b"1.5", b"x", b"nan", b"64", b"4096", b"65536", b"1000000", b"2147483647",
    b"2147483648", b"4294967295", b"4294967296", b"9223372036854775807", b"9223372036854775808",
    b"18446744073709551615", b"99999999999999999999999", b"?", b"1..10",
)  # fmt: skip
TYPES = (
    b"Parameter", b"Const", b"Result", b"Convolution", b"MatMul", b"ReduceMean", b"Softmax", b"Reshape", b"Gather",
    b"Broadcast", b"Tile", b"Pad", b"NonZero", b"TopK", b"Loop", b"TensorIterator", b"If", b"ReadValue", b"Assign",
    b"Split", b"Concat", b"Transpose", b"StridedSlice", b"FakeQuantize", b"LSTMSequence", b"NonMaxSuppression",
    b"ConvertLike", b"ScatterNDUpdate", b"Range", b"Interpolate", b"Nonsense",
)  # fmt: skip
ELEMENTS = (b"f32", b"f16", b"bf16", b"f64", b"i4", b"u1", b"u8", b"i32", b"i64", b"string", b"boolean", b"nf4", b"zz")


def truncated(ir: Ir, rng: Rng) -> Ir:
    return ir[0][: int(rng.integers(0, len(ir[0])))], ir[1]


def flipped(ir: Ir, rng: Rng) -> Ir:
    xml = bytearray(ir[0])
    for at in rng.integers(0, len(xml), int(rng.integers(1, 5))):
        xml[at] ^= 1 << int(rng.integers(8))
    return bytes(xml), ir[1]


def replaced(pattern: bytes, values: tuple[bytes, ...]) -> Callable[[Ir, Rng], Ir]:
    """The text of one group somewhere in the XML becomes another."""

    def change(ir: Ir, rng: Rng) -> Ir:
        xml = ir[0]
        for _ in range(int(rng.integers(1, 4))):
            found = list(re.finditer(pattern, xml))
            if not found:
                break
            start, end = found[int(rng.integers(len(found)))].span(1)
            xml = xml[:start] + values[int(rng.integers(len(values)))] + xml[end:]
        return xml, ir[1]

    return change


def element_moved(ir: Ir, rng: Rng) -> Ir:
    """A layer, port, edge, dimension or section is taken away, written twice, or moved."""
    xml = ir[0]
    kinds = rb"(<layer .*?</layer>|<port .*?</port>|<dim>.*?</dim>|<edge [^>]*>|<data [^>]*>|<rt_info>.*?</rt_info>)"
    found = list(re.finditer(kinds, xml, re.S))
    start, end = found[int(rng.integers(len(found)))].span()
    other = found[int(rng.integers(len(found)))].start()
    what = int(rng.integers(3))
    if what == 0:
        return xml[:start] + xml[end:], ir[1]
    if what == 1:
        return xml[:end] + xml[start:end] * int(rng.integers(1, 4)) + xml[end:], ir[1]
    return xml[:other] + xml[start:end] + xml[other:], ir[1]


def edge_bent(ir: Ir, rng: Rng) -> Ir:
    """An edge leads from or to another layer: circles, inputs with two sources, inputs with none."""
    layers = tuple(re.findall(rb'<layer id="(\d+)"', ir[0])) or (b"0",)
    return replaced(rb'(?:from|to)-layer="(\d+)"', layers)(ir, rng)


def weights_changed(ir: Ir, rng: Rng) -> Ir:
    weights = bytearray(ir[1])
    what = int(rng.integers(4))
    if what == 0:
        return ir[0], bytes(weights[: int(rng.integers(0, len(weights)))])
    if what == 1:
        return ir[0], bytes(weights) + rng.bytes(100)
    at = int(rng.integers(0, len(weights)))
    value = [b"\xff\xff\xff\x7f", b"\0\0\xc0\x7f", b"\0\0\x80\xff", b"\xff" * 8, b"\0" * 16, b"\x80" * 8][
        int(rng.integers(6))
    ]
    weights[at : at + len(value)] = value
    return ir[0], bytes(weights[: len(ir[1])])


def encoded_otherwise(ir: Ir, rng: Rng) -> Ir:
    encoding = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")[int(rng.integers(6))]
    return ir[0].decode("latin-1").encode(encoding), ir[1]


def section_filled(ir: Ir, rng: Rng) -> Ir:
    """Something long or deep where metadata are."""
    at = ir[0].find(b"<edgedistill>")
    fillings = (
        b'<a value="1"/>' * 5000,
        b"<a>" * 200 + b"</a>" * 200,
        b"&amp;" * 100,
        b"<!-- -->" * 2000,
        b"\xff\xfe",
        b"&lol;",
    )
    return ir[0][:at] + fillings[int(rng.integers(len(fillings)))] + ir[0][at:], ir[1]


CHANGES: dict[str, Callable[[Ir, Rng], Ir]] = {
    "truncated": truncated,
    "flipped": flipped,
    "any attribute": replaced(rb'="([^"<]*)"', NUMBERS + TYPES + ELEMENTS),
    "shape": replaced(rb'shape="([^"]*)"', (*NUMBERS, b"1,3,0,0", b"1,3,65536,65536", b"4,4,4,4,4,4,4,4,4,4", b"1,-1", b"1,3,9999999999,1")),
    "dimension": replaced(rb"<dim>([^<]*)</dim>", NUMBERS),
    "offset or size": replaced(rb'(?:offset|size)="(\d+)"', NUMBERS),
    "operation": replaced(rb' type="([^"]*)"', TYPES),
    "element": replaced(rb'(?:element_type|precision)="([^"]*)"', ELEMENTS),
    "strides and such": replaced(rb'(?:strides|dilations|pads_begin|pads_end|axis|keep_dims)="([^"]*)"', (*NUMBERS, b"0, 0", b"-1, -1", b"1000000, 1000000", b"1")),
    "ports": replaced(rb'(?:id|from-port|to-port)="(\d+)"', NUMBERS),
    "metadata": replaced(rb'<(?:labels|temperature|input_spec|task|format_version)[^>]*value="([^"]*)"', (*NUMBERS, b"[]", b"{}", b"&quot;", b"&#0;", b"&#x1b;[2J", b"[" * 2000)),
    "element moved": element_moved,
    "edge bent": edge_bent,
    "weights": weights_changed,
    "section": section_filled,
    "encoded otherwise": encoded_otherwise,
}  # fmt: skip


def hostile(xml: bytes, weights: bytes, count: int, seed: int) -> Iterator[tuple[str, bytes, bytes]]:
    rng = np.random.default_rng(seed)
    for number in range(count):
        name, change = list(CHANGES.items())[number % len(CHANGES)]
        yield f"{number:04d}-{name.replace(' ', '-')}", *change((xml, weights), rng)
