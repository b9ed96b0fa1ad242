"""The Euler sampler that makes rollouts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor


def euler_sample(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """Follow ``dx / dsigma = velocity(x, sigma)`` from noise to latents, one model call per step.

    Args:
        velocity: maps latents (B, ...) and a scalar sigma to ``eps - x_0``, (B, ...).
        noise: (B, ...), at sigma 1.
        sigmas: (steps + 1,), decreasing.

    Returns the latents at ``sigmas[-1]``, in the dtype of ``noise``. Steps are added in float32 or wider, as
    diffusers' FlowMatchEulerDiscreteScheduler adds them.
    """
    wide = torch.promote_types(noise.dtype, torch.float32)
    x = noise
    for sigma, sigma_next in pairwise(sigmas):
        x = (x.to(wide) + (sigma_next - sigma) * velocity(x, sigma)).to(noise.dtype)
    return x
