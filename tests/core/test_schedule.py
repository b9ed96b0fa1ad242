"""Noise schedules: their ends, their identities, and the clock."""

from __future__ import annotations

import pytest
import torch

from srpo_cli.core.schedule import expand_to, flow, shifted_sigmas, truncate_to_clock, variance_preserving


@pytest.mark.parametrize("shift", [1.0, 2.2, 3.0])
def test_sigmas_fall_from_pure_noise_to_the_picture(shift: float) -> None:
    sigmas = shifted_sigmas(25, shift)
    assert sigmas.shape == (26,) and sigmas[0] == 1 and sigmas[-1] == 0
    assert (sigmas.diff() < 0).all()


def test_shift_one_is_uniform() -> None:
    torch.testing.assert_close(shifted_sigmas(4, 1.0), torch.tensor([1, 0.75, 0.5, 0.25, 0]))


def test_shift_three_by_hand() -> None:  # 3 * 0.5 / (1 + 2 * 0.5)
    torch.testing.assert_close(shifted_sigmas(2, 3.0), torch.tensor([1, 0.75, 0]))


def test_flow_weights_sum_to_one_and_variance_preserving_squares_do() -> None:
    level = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)
    torch.testing.assert_close(sum(flow(level)), torch.ones_like(level))
    alpha, sigma = variance_preserving(level)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(level))


def test_the_clock_only_ever_rounds_down_to_whole_ticks() -> None:
    told = truncate_to_clock(torch.tensor([0.8784856, 0.75, 0.9999]))
    assert told.tolist() == [0.878, 0.75, 0.999]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_tick_of_the_clock_survives_the_way_to_the_model(dtype: torch.dtype) -> None:
    ticks = torch.arange(1001, dtype=torch.float64)
    told = truncate_to_clock((ticks + 0.5) / 1000)
    assert torch.equal(((told * 1000).to(dtype) / 1000 * 1000).float().round(), ticks.float())
    assert torch.equal((told * 1000).float(), ticks.float())


def test_one_value_per_sample_or_nothing() -> None:
    assert expand_to(torch.ones(2), torch.ones(2, 3, 4)).shape == (2, 1, 1)
    with pytest.raises(ValueError, match=r"\(3,\) for \(2, 3, 4\)"):
        expand_to(torch.ones(3), torch.ones(2, 3, 4))
