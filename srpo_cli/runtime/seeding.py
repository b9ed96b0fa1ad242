"""Randomness as a pure function of (seed, purpose, counters): a resumed run needs no generator state."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments.

    ``counters`` are step, rank and the like. A CPU generator draws the same numbers for every device.
    """
    key = ":".join(map(str, (seed, purpose, *counters))).encode()
    number = int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)
