"""Randomness that needs no memory: every draw derives from the seed and from what it is for.

Because nothing advances from step to step, a resumed run draws what the unbroken one would have drawn, and the number
of loader processes changes nothing.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive(seed: int, *purpose: int | str) -> int:
    """A 63-bit number for one purpose, such as ``derive(seed, "step", epoch, step)``."""
    text = "\0".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(seed: int, *purpose: int | str) -> np.random.Generator:
    """A fresh numpy generator for one purpose."""
    return np.random.default_rng(derive(seed, *purpose))
