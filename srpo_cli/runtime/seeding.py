"""Randomness as a pure function of (seed, purpose, counters): a resumed run needs no generator state."""

from __future__ import annotations

import hashlib

import torch


def derive(seed: int, purpose: str, *counters: int) -> int:
    """A seed in [0, 2**63) that depends on nothing but its arguments; ``counters`` are step, rank and the like."""
    key = ":".join(map(str, (seed, purpose, *counters))).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "big") >> 1


def generator(seed: int, purpose: str, *counters: int) -> torch.Generator:
    """A CPU generator with the derived seed; it draws the same numbers for every device."""
    return torch.Generator().manual_seed(derive(seed, purpose, *counters))
