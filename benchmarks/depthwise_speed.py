"""What the quick weight gradients of depthwise layers bring a training step, with them and without in turn.

    OMP_NUM_THREADS=1 python -m edgedistill.benchmarks.depthwise_speed --out depthwise-speed.json

On a CPU with AVX-512 both are torch's own, and the ratio is 1. Steps are run by edgedistill.training.step_speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from edgedistill import console
from edgedistill.artifacts import write_json
from edgedistill.benchmarks.command import exit_with, module_command, module_parser
from edgedistill.benchmarks.machine import machine_record
from edgedistill.errors import EdgedistillError


def main() -> int:
    parser = module_parser("depthwise_speed", __doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="of each kind in a round")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    program = [sys.executable, "-m", "edgedistill.training.step_speed", str(args.rounds), str(args.steps)]
    ended = subprocess.run(program, stdout=subprocess.PIPE, text=True, check=False)
    if ended.returncode:
        raise EdgedistillError(f"edgedistill.training.step_speed ended with code {ended.returncode}")
    record = json.loads(ended.stdout.splitlines()[-1])
    write_json(
        args.out,
        record | {"machine": machine_record(), "command": module_command("depthwise_speed")},
        format="edgedistill-depthwise-speed",
    )
    cells = [
        [
            f"{row['network']}, {row['size']} px, batch {row['batch']}",
            f"{row['ratio']['median']:.2f}",
            f"{row['ratio']['min']:.2f} to {row['ratio']['max']:.2f}",
            f"{row['images_per_s']}",
        ]
        for row in record["rows"]
    ]
    console.out.print(console.table("training steps", ("network", "ratio", "rounds", "images/s"), cells))
    return 0


if __name__ == "__main__":
    exit_with(main)
