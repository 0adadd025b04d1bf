"""CPU time from JPEG or PNG bytes to network pixels: ours, libjpeg-turbo, libpng and OpenCV, taking turns in one thread.

    make cpp-peers
    python -m edgedistill.benchmarks.cpp_decode --out benchmarks/results/cpp-decode.json

The program is benchmarks/cpp/decode.cpp; photographs as in benchmarks/python_runtime.py, as they are and as PNG in
colour and in grey.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2

from edgedistill import console
from edgedistill.artifacts import write_json
from edgedistill.benchmarks.command import add_photo_options, exit_with, module_command, module_parser
from edgedistill.benchmarks.cpp_peers import cpp_peer
from edgedistill.benchmarks.inputs import InputSet
from edgedistill.benchmarks.machine import machine_record
from edgedistill.benchmarks.python_runtime import photographs
from edgedistill.benchmarks.timing import Spread
from edgedistill.errors import ModelError
from edgedistill.images import decode_image

FORMAT = "edgedistill-cpp-decode"
OWN = "edgedistill"


def measure(image: InputSet, *, size: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of each way and its ratio to ours, round by round: median with the extremes."""
    command = [str(cpp_peer("edgedistill-decode")), str(image.paths[0]), str(size), str(rounds)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ModelError(done.stderr.strip() or f"edgedistill-decode ended with code {done.returncode}")
    answer = json.loads(done.stdout)
    own = answer["milliseconds"][OWN]
    ways = {
        name: {
            "cpu_ms": Spread.of(values).to_dict(),
            "ratio_to_ours": Spread.of([value / ours for value, ours in zip(values, own, strict=True)]).to_dict(),
        }
        for name, values in answer["milliseconds"].items()
    }
    return {"image": image.name, "bytes": image.paths[0].stat().st_size, "reduction": answer["reduction"], "ways": ways}


def with_pngs(sets: Sequence[InputSet], scratch: Path) -> list[InputSet]:
    """The same photographs, then their copies as PNG (OpenCV's own settings), which are written into ``scratch``."""
    copies = []
    for number, image in enumerate(sets):
        pixels = decode_image(image.paths[0].read_bytes(), name=str(image.paths[0]))
        for kind, picture in (("colour", pixels), ("grey", cv2.cvtColor(pixels, cv2.COLOR_BGR2GRAY))):
            path = scratch / f"{number}-{kind}.png"
            cv2.imwrite(str(path), picture)
            copies.append(InputSet(f"{image.name.removesuffix(' JPEG')} {kind} PNG", (path,)))
    return [*sets, *copies]


def main() -> int:
    parser = module_parser("cpp_decode", __doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    add_photo_options(parser)
    parser.add_argument("--size", type=int, default=224, help="of the network's input")
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    machine = machine_record()
    with tempfile.TemporaryDirectory(prefix="edgedistill-bench-") as scratch:
        sets, origin = photographs(options.images, Path(scratch))
        results = [measure(image, size=options.size, rounds=options.rounds) for image in with_pngs(sets, Path(scratch))]
    record = {
        "machine": machine,
        "command": module_command("cpp_decode"),
        "images": origin,
        "size": options.size,
        "rounds": options.rounds,
        "results": results,
    }
    write_json(options.out, record, format=FORMAT)
    for result in results:
        rows = [
            (name, f"{way['cpu_ms']['median']:.2f}", f"{way['ratio_to_ours']['median']:.2f}")
            for name, way in result["ways"].items()
        ]
        title = f"{result['image']}, {result['bytes'] / 1000:.0f} kB, to {options.size} px"
        console.out.print(console.table(title, ("", "CPU ms", "of ours"), rows))
    return 0


if __name__ == "__main__":
    exit_with(main)
