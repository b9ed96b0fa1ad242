"""Noise schedules: which share of the picture (``alpha``) and of the noise (``sigma``) a noisy latent holds.

Everywhere ``x_t = alpha * x_0 + sigma * eps`` and sigma 1 is pure noise. Rectified flow has ``alpha = 1 -
sigma``; variance-preserving models (epsilon- and v-prediction) have ``alpha^2 + sigma^2 = 1``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AlphaSigma(NamedTuple):
    """The weights of picture and noise at one noise level; scalars or (B, 1, ...)."""

    alpha: Tensor
    sigma: Tensor


def flow(sigma: Tensor) -> AlphaSigma:
    """The rectified-flow weights at ``sigma`` in [0, 1]."""
    return AlphaSigma(1 - sigma, sigma)


def variance_preserving(alphas_cumprod: Tensor) -> AlphaSigma:
    """The weights of a DDPM schedule, from its cumulative product of alphas in (0, 1]."""
    return AlphaSigma(alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt())


def shifted_sigmas(steps: int, shift: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform sigmas from 1 to 0, bent towards the noise: ``shift * t / (1 + (shift - 1) * t)``.

    Returns (steps + 1,), decreasing. ``shift`` 1 leaves them uniform, 3 is what SRPO trains FLUX with.
    """
    t = torch.linspace(1, 0, steps + 1, dtype=dtype)
    return shift * t / (1 + (shift - 1) * t)


def truncate_to_clock(sigma: Tensor, ticks: int = 1000) -> Tensor:
    """Round ``sigma`` down to a whole tick of a model's integer clock, as the SRPO reference code does.

    The division is in float64: in float32 a few ticks (127, 251, 502 ...) would not survive a later
    ``* ticks``.
    """
    return torch.floor(sigma * ticks).double() / ticks


def expand_to(values: Tensor, like: Tensor) -> Tensor:
    """View (B,) ``values`` as (B, 1, ...), to weigh the samples of ``like`` (B, ...) one by one."""
    if values.shape != like.shape[:1]:
        raise ValueError(f"one value per sample needed: {tuple(values.shape)} for {tuple(like.shape)}")
    return values.view(-1, *[1] * (like.ndim - 1))
