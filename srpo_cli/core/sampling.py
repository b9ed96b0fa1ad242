"""The Euler sampler that makes rollouts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
from torch import Tensor


def euler_steps(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Iterator[Tensor]:
    """Follow ``dx / dsigma = velocity(x, sigma)`` from noise to latents, one model call per step.

    Args:
        velocity: maps latents (B, ...) and a scalar sigma to ``eps - x_0``, (B, ...).
        noise: (B, ...), at sigma 1.
        sigmas: (steps + 1,), decreasing.

    Yields the latents at each of ``sigmas``, the noise first, in its dtype. Steps are added in float32 or wider, as
    diffusers' FlowMatchEulerDiscreteScheduler adds them.
    """
    wide = torch.promote_types(noise.dtype, torch.float32)
    x = noise
    yield x
    for sigma, sigma_next in pairwise(sigmas):
        x = (x.to(wide) + (sigma_next - sigma) * velocity(x, sigma)).to(noise.dtype)
        yield x


def euler_sample(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """The latents at ``sigmas[-1]``; see :func:`euler_steps`."""
    for x in euler_steps(velocity, noise, sigmas):
        last = x
    return last


def euler_path(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, sigmas: Tensor) -> Tensor:
    """The latents at each of ``sigmas``, (steps + 1, B, ...); see :func:`euler_steps`."""
    return torch.stack([*euler_steps(velocity, noise, sigmas)])
