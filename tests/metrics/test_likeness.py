"""Likeness of pictures, and whether a ranking is kept."""

import math

import pytest
import torch

from srpo_cli.metrics.likeness import (
    ENOUGH_PICTURES,
    HIGHEST_PSNR,
    psnr,
    rank_correlation,
    ranking_window,
    rms,
    ssim,
)


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0)) * 0.8


def test_psnr_by_hand_one_value_a_picture(images):
    offsets = torch.tensor([0.1, 0.01, 0.0])[:, None, None, None]
    torch.testing.assert_close(psnr(images + offsets, images), torch.tensor([20.0, 40.0, HIGHEST_PSNR]))


def test_ssim_is_1_for_the_same_and_falls_with_noise(images):
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    values = [ssim(images + share * noise, images) for share in (0.0, 0.02, 0.2)]
    torch.testing.assert_close(values[0], torch.ones(3))
    assert (values[0] > values[1]).all() and (values[1] > values[2]).all()
    assert ssim(images[:1], images[:1]).shape == (1,)  # one picture keeps its dimension


def test_rms_by_hand():
    torch.testing.assert_close(
        rms(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.zeros(1, 2)), torch.tensor([12.5**0.5, 1])
    )


def test_rank_correlation_sees_the_order_alone():
    reference = list(range(ENOUGH_PICTURES))
    assert rank_correlation([math.exp(value) for value in reference], reference) == pytest.approx(1)
    assert rank_correlation([-value for value in reference], reference) == pytest.approx(-1)
    swapped = [1, 0, *reference[2:]]
    assert rank_correlation(swapped, reference) == pytest.approx(1 - 6 * 2 / (8 * 63))


@pytest.mark.parametrize(
    ("values", "reference"),
    [(range(ENOUGH_PICTURES - 1), range(ENOUGH_PICTURES - 1)), ([1.0] * 8, range(8)), (range(8), [1.0] * 8)],
    ids=["too few", "no order", "no order to keep"],
)
def test_there_is_no_correlation_without_an_order(values, reference):
    assert rank_correlation(list(values), list(reference)) is None


@pytest.mark.parametrize(
    ("correlations", "window"),
    [
        ([1.0, 0.95, 0.9, 0.89, 0.5], (0.1, 0.5)),
        ([0.95, 0.5, 0.95, 0.95, 0.95], (0.5, 0.95)),
        ([0.95, 0.95, 0.1, 0.95, 0.95], (0.1, 0.3)),  # 0.2 wide against 0.15
        ([0.5, 0.5, 0.95, None, 0.5], (0.5, 0.5)),
        ([0.95, 0.5, 0.5, 0.5, 0.95], (0.95, 0.95)),  # as wide, and noisier
        ([0.5, None, 0.5, 0.5, -1.0], None),
    ],
)
def test_the_window_is_the_widest_run_that_keeps_the_ranks(correlations, window):
    assert ranking_window([0.1, 0.3, 0.5, 0.8, 0.95], correlations) == window
