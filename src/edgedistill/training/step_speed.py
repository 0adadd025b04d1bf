"""Training steps a second with the quick weight gradients of depthwise layers and without, in turn; prints JSON.

python -m edgedistill.training.step_speed ROUNDS STEPS     # benchmarks/depthwise_speed.py keeps what it prints
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn

from edgedistill.training.depthwise import quick_depthwise
from edgedistill.training.models import create_model

CASES = (("mbv3s", 48, 64), ("mbv3s", 96, 64), ("mbv3s", 128, 32), ("mbv3s", 224, 32), ("efflite0", 64, 32))
CPU = torch.device("cpu")


def steps_per_s(model: nn.Module, images: torch.Tensor, *, quick: bool, steps: int) -> float:
    """Forward and backward passes a second, on this process's threads."""
    started = time.perf_counter()
    for _ in range(steps):
        with quick_depthwise(CPU) if quick else nullcontext():
            loss = model(images).square().mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
    return steps / (time.perf_counter() - started)


def measure(name: str, size: int, batch: int, *, rounds: int, steps: int) -> dict[str, Any]:
    """The ratio of speeds, median and range of the rounds, a first one left out as warm-up."""
    model = create_model(name, class_count=10, image_size=size).train()
    images = torch.randn(batch, 3, size, size).to(memory_format=torch.channels_last)
    pairs = [
        [steps_per_s(model, images, quick=quick, steps=steps) for quick in (True, False)] for _ in range(rounds + 1)
    ]
    ratios = [quick / plain for quick, plain in pairs[1:]]
    return {
        "network": name,
        "size": size,
        "batch": batch,
        "images_per_s": round(batch * float(np.median([quick for quick, _ in pairs[1:]])), 1),
        "ratio": {"median": float(np.median(ratios)), "min": min(ratios), "max": max(ratios)},
    }


def main() -> None:
    rounds, steps = map(int, sys.argv[1:])
    rows = [measure(*case, rounds=rounds, steps=steps) for case in CASES]
    capability = torch.backends.cpu.get_cpu_capability()
    print(json.dumps({"capability": capability, "threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main()
