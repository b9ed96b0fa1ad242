"""Bootstrap intervals and p values against what is known of the mean of normal draws, and by hand."""

import numpy as np
import pytest
import torch
from scipy.stats import ttest_1samp

from srpo_cli.metrics import intervals
from srpo_cli.metrics.intervals import (
    bootstrap,
    difference_interval,
    holm,
    interval,
    mean_interval,
    p_value,
    rate_interval,
    resample,
    share_interval,
    wilson,
)


def test_the_interval_of_a_constant_is_a_point():
    assert mean_interval(torch.full((20,), 3.0)) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_of_all_or_none_is_no_certainty(value):
    assert share_interval(torch.full((20,), value)) == wilson(round(20 * value), 20)
    mixed = torch.tensor([0.0, 1.0] * 10)
    assert share_interval(mixed) == mean_interval(mixed)


def test_the_interval_is_as_wide_as_the_normal_one():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    found = mean_interval(values)
    error = 1.96 * values.std().item() / 20
    assert found.mean == pytest.approx(values.mean().item(), abs=1e-6)
    assert found.low == pytest.approx(found.mean - error, abs=0.2 * error)
    assert found.high == pytest.approx(found.mean + error, abs=0.2 * error)


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


def all_at_once(values, draws, seed):
    """The interval as it is made of one matrix of indices."""
    index = torch.randint(len(values), (draws, len(values)), generator=torch.Generator().manual_seed(seed))
    means = values[index].mean(1).double()
    ends = torch.quantile(means, torch.tensor([(1 - 0.95) / 2, 1 - (1 - 0.95) / 2], dtype=torch.float64))
    return (values[torch.arange(len(values))[None]].mean(1).item(), *ends.tolist())


@pytest.mark.parametrize("chunk", [1, 700, 5000, 2**22])
def test_chunks_leave_every_bit_of_an_interval_as_it_was(monkeypatch, chunk):
    monkeypatch.setattr(intervals, "_CHUNK", chunk)
    values = torch.randn(256, generator=torch.Generator().manual_seed(2))
    assert mean_interval(values, draws=101, seed=5) == all_at_once(values, 101, 5)


def resampled_means(values, draws=1000, seed=0):
    return resample(values[:, None], draws, seed)[:, 0] / max(1, len(values) - 1)


def test_a_resample_holds_whole_prompts_and_one_fewer_than_there_are():
    drawn = resample(np.eye(4), draws=50, seed=1)
    assert (drawn.sum(1) == 3).all()
    assert len(np.unique(drawn, axis=0)) > 1
    assert (resample(np.eye(4), 50, 1) == drawn).all()
    assert (resample(np.eye(4), 50, 2) != drawn).any()
    assert (resample(np.ones((1, 2)), 3, 0) == 1).all()


def test_chunks_leave_a_resample_as_it_is(monkeypatch):
    together = resample(np.eye(25), 7, 0)
    monkeypatch.setattr(intervals, "_CHUNK", 10)
    assert (resample(np.eye(25), 7, 0) == together).all()


@pytest.mark.parametrize("prompts", [2, 5, 40])
def test_means_vary_over_resamples_as_they_do_over_samples(prompts):
    values = np.random.default_rng(prompts).normal(size=prompts)
    error = values.std(ddof=1) / np.sqrt(prompts)
    assert resampled_means(values, 20_000).std() == pytest.approx(error, rel=0.03)


def test_an_interval_of_few_prompts_is_wider_by_student_s_t_and_stays_on_its_scale():
    drawn = np.linspace(-1, 1, 2001)
    assert interval(0.0, drawn, 10_000)[1:] == pytest.approx((-0.95, 0.95), abs=1e-3)
    assert interval(0.0, drawn, 6)[2] == pytest.approx(0.95 * 2.5706 / 1.9600, abs=1e-3)  # 5 degrees of freedom
    assert interval(0.0, drawn, 60, freedom=5) == interval(0.0, drawn, 6)
    assert interval(0.0, drawn, 6, least=-1, most=0.5)[1:] == (-1, 0.5)
    assert interval(3.0, np.array([3.0, np.nan, 3.0]), 4) == (3, 3, 3)


def test_wilson_s_interval_of_8_in_10():
    # (0.8 + z²/20 ± z sqrt(0.016 + z²/400)) / (1 + z²/10), z = 1.959964
    assert wilson(8, 10) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)


def test_a_rate_of_none_or_all_has_the_interval_of_so_many_prompts():
    assert rate_interval(1.0, np.ones(9), 12) == wilson(12, 12)
    assert 0.7 < wilson(12, 12).low < 0.8
    assert rate_interval(0.5, np.linspace(0, 1, 101), 2)[1:] == (0, 1)


def test_a_difference_that_never_changes_has_newcombe_s_interval():
    found = difference_interval(wilson(0, 10), wilson(10, 10), np.ones(5), 10)  # 1 - sqrt((1 - 0.7225)² + 0.2775²)
    assert found == pytest.approx((1, 1 - 0.277533 * np.sqrt(2), 1), abs=1e-5)


def test_no_difference_at_all_has_a_p_value_of_one():
    assert p_value(0.0, np.zeros(99), 50) == p_value(0.0, np.linspace(-1, 1, 99), 50) == 1


@pytest.mark.parametrize(("prompts", "shift"), [(5, 0.5), (12, 0.3), (100, 0.5)])
def test_a_p_value_is_that_of_a_t_test(prompts, shift):
    values = shift + np.random.default_rng(prompts).normal(size=prompts)
    p = p_value(values.mean(), resampled_means(values, 20_000), prompts)
    assert p == pytest.approx(max(ttest_1samp(values, 0).pvalue, 2.0 ** (1 - prompts)), rel=0.1)


def test_a_few_prompts_that_agree_show_no_more_than_their_signs():
    for prompts, least in ((1, 1.0), (2, 0.5), (6, 2**-5)):
        assert p_value(1.0, np.ones(99), prompts) == least


@pytest.mark.parametrize("prompts", [6, 10, 20, 80])
def test_where_nothing_differs_p_values_and_intervals_say_so_as_often_as_they_claim(prompts):
    random, small, held = np.random.default_rng(prompts), 0, 0
    for seed in range(400):
        values = random.normal(size=prompts)
        drawn = resampled_means(values, 400, seed)
        small += p_value(values.mean(), drawn, prompts) < 0.05
        _, low, high = interval(values.mean(), drawn, prompts)
        held += low <= 0 <= high
    assert 7 <= small <= 33  # of 20 expected, standard error 4.4
    assert 366 <= held <= 394


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
