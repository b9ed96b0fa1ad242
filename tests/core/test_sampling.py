"""The Euler sampler."""

from __future__ import annotations

import torch

from srpo_cli.core.sampling import euler_path, euler_sample
from srpo_cli.core.schedule import shifted_sigmas


def test_a_straight_path_needs_one_step_and_takes_any_number() -> None:
    noise, x_0 = torch.randn(2, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for steps in (1, 7):
        sigmas = shifted_sigmas(steps, 3.0, torch.float64)
        torch.testing.assert_close(euler_sample(lambda x, sigma: noise - x_0, noise, sigmas), x_0)


def test_the_model_is_asked_once_per_step_and_never_at_sigma_zero() -> None:
    asked: list[float] = []

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        asked.append(sigma.item())
        return x

    euler_sample(velocity, torch.ones(1, 1), shifted_sigmas(4, 1.0))
    assert asked == [1, 0.75, 0.5, 0.25]


def test_low_precision_latents_keep_their_dtype() -> None:
    noise = torch.ones(1, 4, dtype=torch.bfloat16)
    assert euler_sample(lambda x, sigma: x, noise, shifted_sigmas(3, 1.0)).dtype == torch.bfloat16


def test_a_path_has_the_noise_every_step_and_what_the_sampler_ends_at() -> None:
    noise, x_0 = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sigmas = shifted_sigmas(5, 3.0, torch.float64)
    path = euler_path(lambda x, sigma: noise - x_0, noise, sigmas)
    expected = torch.stack([(1 - sigma) * x_0 + sigma * noise for sigma in sigmas])  # a straight one
    torch.testing.assert_close(path, expected)
    assert torch.equal(path[0], noise)


def test_a_path_ends_where_the_sampler_does_to_the_bit_and_asks_as_often() -> None:
    noise, calls = torch.randn(3, 4, generator=torch.Generator().manual_seed(2)).bfloat16(), []

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        calls.append(sigma)
        return (3 * x).sin() + sigma

    sigmas = shifted_sigmas(4, 1.0)
    path = euler_path(velocity, noise, sigmas)
    assert len(calls) == 4
    assert torch.equal(path[-1], euler_sample(velocity, noise, sigmas))
    assert (path.shape, path.dtype) == ((5, 3, 4), torch.bfloat16)
    for step in range(4):  # any stretch of it is a sampler's own
        assert torch.equal(path[step + 1], euler_sample(velocity, path[step], sigmas[step : step + 2]))
