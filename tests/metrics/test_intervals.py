"""Bootstrap intervals against what is known of the mean of normal draws."""

import pytest
import torch

from srpo_cli.metrics.intervals import bootstrap, mean_interval


def test_the_interval_of_a_constant_is_a_point():
    assert mean_interval(torch.full((20,), 3.0)) == (3.0, 3.0, 3.0)


def test_the_interval_is_as_wide_as_the_normal_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    interval = mean_interval(values)
    error = 1.96 * values.std().item() / 20
    assert interval.mean == pytest.approx(values.mean().item(), abs=1e-6)
    assert interval.low == pytest.approx(interval.mean - error, abs=0.2 * error)
    assert interval.high == pytest.approx(interval.mean + error, abs=0.2 * error)


def test_it_covers_the_truth_as_often_as_it_says():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for seed in range(200):
        low, high = mean_interval(torch.randn(60, generator=generator), draws=400, seed=seed)[1:]
        covered += low <= 0 <= high
    assert 180 <= covered <= 199


def test_any_statistic_of_the_rows_will_do():
    values = torch.arange(10.0)
    assert bootstrap(lambda index: values[index].amax(1), 10).mean == 9
