"""The SDE sampler: the ODE where there is no noise, the ODE's marginals where there is, and the stated Gaussian."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from srpo_cli.core.sampling import euler_sample
from srpo_cli.core.schedule import shifted_sigmas
from srpo_cli.core.sde import Gaussian, SdeStep, dance_step, flow_step, gaussian_kl, log_prob, sde_path, sde_step
from srpo_cli.errors import UsageError

STEPS = [dance_step, flow_step]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def curved(x: Tensor, sigma: Tensor) -> Tensor:
    """Some velocity that bends."""
    return (x + sigma).sin() + x


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


# --- a step ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("sigmas", [(1.0, 0.9), (0.5, 0.3), (0.1, 0.0)])
def test_without_noise_a_step_is_the_ode_step_exactly(step: Callable, sigmas: tuple[float, float]) -> None:
    x, velocity = torch.randn(2, 3, 4, generator=seeded())
    levels = torch.tensor(sigmas)
    mean, std = step(x, velocity, *levels, 0.0)
    assert torch.equal(mean, euler_sample(lambda *_: velocity, x, levels))
    assert std == 0


def test_the_dance_step_by_hand() -> None:
    # eps = 2 + 0.5 * -1 = 1.5, score = -1.5 / 0.5 = -3; 2 + -0.25 * -1 - 0.4^2 / 2 * -0.25 * -3 = 2.25 - 0.06
    mean, std = dance_step(*(torch.tensor(value) for value in (2.0, -1.0, 0.5, 0.25)), eta=0.4)
    torch.testing.assert_close(mean, torch.tensor(2.19))
    torch.testing.assert_close(std, torch.tensor(0.2))


def test_the_flow_step_by_hand() -> None:
    # rate^2 = 0.4^2 * 0.8 / 0.2 = 0.64, eps = 2 + 0.2 * -1 = 1.8, score = -2.25; 2 + 0.25 - 0.32 * -0.25 * -2.25
    mean, std = flow_step(*(torch.tensor(value) for value in (2.0, -1.0, 0.8, 0.55)), noise_level=0.4)
    torch.testing.assert_close(mean, torch.tensor(2.25 - 0.18))
    torch.testing.assert_close(std, torch.tensor(0.8 * 0.5))


def test_flow_noise_at_sigma_one_takes_its_denominator_from_the_next_level() -> None:
    sigma, sigma_next = torch.tensor([1.0, 0.8]).view(2, 1), torch.tensor([0.75, 0.5]).view(2, 1)
    _, std = flow_step(torch.ones(2, 3), torch.ones(2, 3), sigma, sigma_next, 0.7)
    expected = torch.tensor([0.7 * (1 / 0.25) ** 0.5 * 0.5, 0.7 * (0.8 / 0.2) ** 0.5 * 0.3**0.5])
    torch.testing.assert_close(std.flatten(), expected)


def test_the_first_flow_step_leaves_the_variance_too_large_however_short_it_is() -> None:
    sigma, sigma_next = torch.tensor([1.0, 1 - 1e-9], dtype=torch.float64)
    mean, std = flow_step(torch.ones(1).double(), torch.zeros(1).double(), sigma, sigma_next, 0.7)
    torch.testing.assert_close(
        mean**2 + std**2, torch.tensor([1 + 0.7**4 / 4], dtype=torch.float64)
    )  # of x of variance 1


@pytest.mark.parametrize("step", STEPS)
def test_samples_may_be_at_levels_of_their_own(step: Callable) -> None:
    x, velocity = normal(2, 3, 4)
    sigma, sigma_next = torch.tensor([1.0, 0.6, 0.2]).double(), torch.tensor([0.8, 0.5, 0.0]).double()
    mean, std = step(x, velocity, sigma.view(3, 1), sigma_next.view(3, 1), 0.5)
    for i in range(3):
        alone = step(x[i], velocity[i], sigma[i], sigma_next[i], 0.5)
        torch.testing.assert_close((mean[i], std[i, 0]), tuple(alone), rtol=1e-14, atol=0)


@pytest.mark.parametrize("step", STEPS)
def test_low_precision_is_widened_before_anything_is_added(step: Callable) -> None:
    x, velocity = torch.randn(2, 1, 64, generator=seeded()).bfloat16()
    levels = torch.tensor([0.9, 0.8])
    narrow, wide = step(x, velocity, *levels, 0.3), step(x.float(), velocity.float(), *levels, 0.3)
    assert torch.equal(narrow.mean, wide.mean) and narrow.mean.dtype == torch.float32


@pytest.mark.parametrize(("kind", "step"), [("dance", dance_step), ("flow", flow_step)])
def test_a_step_is_chosen_by_name(kind: str, step: Callable) -> None:
    arguments = (*normal(2, 3, 4), *torch.tensor([0.9, 0.7]).double())
    torch.testing.assert_close(sde_step(kind, 0.6)(*arguments), step(*arguments, 0.6), rtol=0, atol=0)


@pytest.mark.parametrize("level", [0.0, -0.3, float("nan")])
def test_a_sampler_without_noise_is_refused(level: float) -> None:
    with pytest.raises(UsageError, match=r"noise level .* deterministic.*above 0"):
        sde_step("dance", level)


# --- its density ----------------------------------------------------------------------------------------


def test_the_log_probability_is_that_of_the_gaussian_averaged_over_a_samples_dimensions() -> None:
    x_next, mean = normal(2, 5, 3, 4, 4)
    std = normal(5, 1, 1, 1, seed=1).exp()
    expected = Normal(mean, std).log_prob(x_next).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(x_next, Gaussian(mean, std)), expected, rtol=1e-13, atol=1e-13)
    shared = Normal(mean, std[0]).log_prob(x_next).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(x_next, Gaussian(mean, std[0, 0, 0, 0])), shared, rtol=1e-13, atol=1e-13)


def test_the_divergence_is_that_of_the_gaussians_averaged_over_a_samples_dimensions() -> None:
    mean, mean_ref = normal(2, 5, 3, 4)
    std = normal(5, 1, 1, seed=1).exp()
    expected = kl_divergence(Normal(mean, std), Normal(mean_ref, std)).mean((1, 2))
    torch.testing.assert_close(gaussian_kl(mean, mean_ref, std), expected, rtol=1e-13, atol=1e-13)


def test_flow_grpos_coefficient_is_worth_a_step_length_here() -> None:
    x, velocity, other = normal(3, 1, 8)
    sigma, sigma_next = torch.tensor([0.6, 0.5]).double()
    (mean, std), (mean_ref, _) = (flow_step(x, v, sigma, sigma_next, 0.7) for v in (velocity, other))
    rate_squared = 0.7**2 * 0.6 / 0.4
    theirs = 0.04 * ((mean - mean_ref) ** 2 / (2 * rate_squared)).mean(1)
    torch.testing.assert_close(0.004 * gaussian_kl(mean, mean_ref, std), theirs)


# --- a path ---------------------------------------------------------------------------------------------


def exact_velocity(mean: float, std: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The flow's velocity for data from N(mean, std^2), by conditioning one Gaussian on another."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        alpha = 1 - sigma
        standing = (x - alpha * mean) / (alpha**2 * std**2 + sigma**2)
        return sigma * standing - (mean + alpha * std**2 * standing)

    return velocity


def levels(steps: int) -> Tensor:
    """Half the steps ever shorter towards sigma 1, where the flow SDE's noise has no bound, the other half even."""
    near, far = 1 - torch.logspace(-6, -1, steps // 2), torch.linspace(0.9, 0, steps // 2 + 1)
    return torch.cat([torch.ones(1), near, far[1:]])


NOISE = [("dance", 0.3), ("dance", 1.0), ("flow", 0.3), ("flow", 0.7)]
MEAN, STD = 0.7, 0.5


def moments(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the noisy data, which the ODE keeps to."""
    return (1 - sigma) * MEAN, (1 - sigma) ** 2 * STD**2 + sigma**2


@pytest.mark.parametrize(("kind", "level"), NOISE)
def test_mean_and_variance_follow_the_odes_in_short_steps(kind: str, level: float) -> None:
    step, velocity = sde_step(kind, level), exact_velocity(MEAN, STD)
    worst = []
    for steps in (500, 2000):
        sigmas, mean, variance, off = levels(steps).double(), torch.zeros(()), torch.ones(()), []
        for sigma, sigma_next in pairwise(sigmas[:-1]):
            points = torch.stack([mean, mean + 1]).double()  # the step is linear in x: two points tell all of it
            to, std = step(points, velocity(points, sigma), sigma, sigma_next)
            mean, variance = to[0], (to[1] - to[0]) ** 2 * variance + std**2
            expected_mean, expected_variance = moments(sigma_next)
            off.append(max((mean - expected_mean).abs(), (variance / expected_variance - 1).abs()).item())
        worst.append(max(off[steps // 2 :]))
    assert worst[0] < 0.02
    assert worst[1] < worst[0] / 3.5  # of first order in the length of the steps


@pytest.mark.parametrize(("kind", "level"), NOISE)
def test_many_samples_end_as_the_ode_would_end(kind: str, level: float) -> None:
    samples = 40_000
    noise = torch.randn(1, samples, generator=seeded())
    end = sde_path(exact_velocity(MEAN, STD), noise, levels(300), sde_step(kind, level), [seeded(1)])[-1]
    assert end.mean().item() == pytest.approx(MEAN, abs=4 * STD / samples**0.5)
    assert end.var().item() == pytest.approx(STD**2, rel=4 * (2 / samples) ** 0.5)


@pytest.mark.parametrize("kind", ["dance", "flow"])
def test_noise_is_really_added(kind: str) -> None:
    noise = normal(1, 4).expand(2, 4)
    path = sde_path(curved, noise, shifted_sigmas(5, 1.0).double(), sde_step(kind, 0.5), [seeded(0), seeded(1)])
    assert torch.equal(path[0, 0], path[0, 1])
    assert (path[1:, 0] != path[1:, 1]).all()


@pytest.mark.parametrize("step", STEPS)
def test_a_path_without_noise_is_the_ode_samplers(step: Callable) -> None:
    noise, sigmas = torch.randn(2, 3, generator=seeded()), shifted_sigmas(6, 3.0)
    path = sde_path(curved, noise, sigmas, lambda *arguments: step(*arguments, 0.0), [seeded(1), seeded(2)])
    assert path.shape == (7, 2, 3)
    assert torch.equal(path[0], noise)
    for i in range(1, 7):
        assert torch.equal(path[i], euler_sample(curved, noise, sigmas[: i + 1]))


@pytest.mark.parametrize("kind", ["dance", "flow"])
def test_every_level_but_the_last_is_drawn_from_the_stated_gaussian(kind: str) -> None:
    step, sigmas = sde_step(kind, 0.5), shifted_sigmas(5, 3.0).double()
    path = sde_path(curved, normal(2, 3), sigmas, step, [seeded(0), seeded(1)])
    fresh = torch.stack([torch.randn(4, 3, generator=seeded(i)) for i in range(2)], 1)
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas[:-1])):
        mean, std = step(path[i], curved(path[i], sigma), sigma, sigma_next)
        torch.testing.assert_close((path[i + 1] - mean) / std, fresh[i].double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(path[5], path[4] - sigmas[4] * curved(path[4], sigmas[4]))


def test_a_sample_is_drawn_alike_in_a_batch_of_any_size() -> None:
    noise, sigmas, step = torch.randn(3, 4, generator=seeded()), shifted_sigmas(4, 1.0), sde_step("flow", 0.7)
    together = sde_path(curved, noise, sigmas, step, [seeded(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(together[:, i : i + 1], sde_path(curved, noise[i : i + 1], sigmas, step, [seeded(i)]))


def test_the_model_is_asked_once_per_step_and_never_at_sigma_zero() -> None:
    asked: list[float] = []

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        asked.append(sigma.item())
        return x

    sde_path(velocity, torch.ones(1, 1), shifted_sigmas(4, 1.0), sde_step("dance", 0.3), [seeded()])
    assert asked == [1, 0.75, 0.5, 0.25]


def test_a_path_is_wide_enough_for_a_density() -> None:
    step: SdeStep = sde_step("dance", 0.3)
    path = sde_path(curved, torch.ones(1, 4, dtype=torch.bfloat16), shifted_sigmas(3, 1.0), step, [seeded()])
    assert path.dtype == torch.float32
