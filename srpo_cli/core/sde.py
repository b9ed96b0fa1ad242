"""The flow's sampler with noise in each step: the same marginals, and a probability for every step that it takes.

Adding noise of rate ``g`` and, to make up for it, half of ``g^2`` times the score leaves the distribution at every
level as the ODE has it (arXiv:2011.13456, section 4.3), up to the length of the steps. A step then is a Gaussian, which
is what a policy gradient needs. DanceGRPO (arXiv:2505.07818) and Flow-GRPO (arXiv:2505.05470) differ in ``g`` alone.

The score comes from the velocity: ``x + (1 - sigma) velocity`` is the noise that the model sees in ``x``, and the score
is minus that over ``sigma``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from srpo_cli.core.sampling import euler_sample
from srpo_cli.errors import UsageError


class Gaussian(NamedTuple):
    """Where a step leads: mean (B, ...), and a standard deviation for all of it, a scalar or (B, 1, ...)."""

    mean: Tensor
    std: Tensor


SdeStep = Callable[[Tensor, Tensor, Tensor, Tensor], Gaussian]
"""From ``x``, its velocity, ``sigma`` and ``sigma_next`` to the Gaussian that the next latents are drawn from."""


def dance_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, eta: float) -> Gaussian:
    """One step of DanceGRPO's SDE, whose noise has the same rate at all levels; ``train_grpo_flux.py``, ``flux_step``.

    Args:
        x, velocity: latents at ``sigma`` and the model's ``eps - x_0`` there, (B, ...) each.
        sigma, sigma_next: scalars or (B, 1, ...), in [0, 1]; ``sigma`` is above ``sigma_next``.
        eta: rate of the noise; 0 gives the Euler step of the ODE.

    Returns mean and standard deviation in float32 or wider.
    """
    return _step(x, velocity, sigma, sigma_next, torch.full_like(sigma, eta))


def flow_step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, noise_level: float) -> Gaussian:
    """One step of Flow-GRPO's SDE (arXiv:2505.05470, eq. 9): the rate is ``noise_level * sqrt(sigma / (1 - sigma))``.

    That is without bound at sigma 1, where the denominator is taken at ``sigma_next`` instead, as in the authors'
    ``sde_step_with_logprob``. However short that first step is, it leaves the variance ``noise_level^4 / 4`` too large,
    6 % at 0.7, which later steps wear off. Arguments and result are those of :func:`dance_step`.
    """
    rate = noise_level * (sigma / (1 - torch.where(sigma < 1, sigma, sigma_next))).sqrt()
    return _step(x, velocity, sigma, sigma_next, rate)


def _step(x: Tensor, velocity: Tensor, sigma: Tensor, sigma_next: Tensor, rate: Tensor) -> Gaussian:
    wide = torch.promote_types(x.dtype, torch.float32)
    x, velocity = x.to(wide), velocity.to(wide)
    change = sigma_next - sigma
    score = -(x + (1 - sigma) * velocity) / sigma
    mean = x + change * velocity - rate**2 / 2 * change * score
    return Gaussian(mean, rate * (-change).sqrt())


def sde_step(kind: Literal["dance", "flow"], level: float) -> SdeStep:
    """:func:`dance_step` or :func:`flow_step` with noise of a given level.

    Raises UsageError where there is no noise: the steps of an ODE have no probability.
    """
    if not level > 0:
        raise UsageError(
            f"noise level {level:g} makes the sampler deterministic, but GRPO learns from steps drawn at random: give "
            "one above 0 (published: 0.3 for dance, 0.7 to 0.9 for flow), or train by a method that needs none"
        )
    step = {"dance": dance_step, "flow": flow_step}[kind]
    return lambda x, velocity, sigma, sigma_next: step(x, velocity, sigma, sigma_next, level)


def log_prob(x_next: Tensor, gaussian: Gaussian) -> Tensor:
    """Log-density of the latents that a step led to, averaged over the dimensions of each sample, (B,).

    The average, which both papers' code takes, keeps the ratio of two policies near 1 at any size of picture; the
    logarithm of the density itself is the sum.
    """
    mean, std = gaussian
    density = -((x_next - mean) / std).square() / 2 - std.log() - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def gaussian_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """KL divergence of two Gaussians of one standard deviation, averaged over the dimensions of each sample, (B,).

    Flow-GRPO's code divides by the square of the *rate* and not by the variance of the step, which is that times
    ``sigma - sigma_next``: its coefficient of 0.04 over ten even steps is 0.004 here.
    """
    return ((mean - mean_ref) / std).square().flatten(1).mean(1) / 2


def sde_path(
    velocity: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    sigmas: Tensor,
    step: SdeStep,
    generators: Sequence[torch.Generator],
) -> Tensor:
    """Draw a path from noise to clean latents, one model call per step, and keep the latents at every level.

    The last step, down to sigma 0, is the ODE's: noise added there would stay in the picture. DanceGRPO judges the same
    picture, the last estimate of ``x_0``, and neither paper's code trains that step.

    Args:
        velocity: maps latents (B, ...) and a scalar sigma to ``eps - x_0``, (B, ...).
        noise: (B, ...), at sigma 1.
        sigmas: (steps + 1,), decreasing to 0, on the device of ``noise``.
        step: the SDE.
        generators: one for each sample, on the CPU, so that a sample is drawn alike in a batch of any size.

    Returns (steps + 1, B, ...) in float32 or wider, whatever the dtype of ``noise``: latents that are rounded after
    they were drawn are not distributed as the step says.
    """
    wide = torch.promote_types(noise.dtype, torch.float32)
    shape = (len(sigmas) - 2, *noise.shape[1:])
    fresh = torch.stack([torch.randn(shape, generator=generator) for generator in generators], 1)
    path = [noise.to(wide)]
    for z, (sigma, sigma_next) in zip(fresh.to(noise.device, wide), pairwise(sigmas[:-1]), strict=True):
        mean, std = step(path[-1], velocity(path[-1], sigma), sigma, sigma_next)
        path.append(mean + std * z)
    path.append(euler_sample(velocity, path[-1], sigmas[-2:]))
    return torch.stack(path)
