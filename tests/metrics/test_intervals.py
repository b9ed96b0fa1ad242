"""Bootstrap intervals against what is known of the mean of normal draws."""

import pytest
import torch
from scipy.stats import ttest_1samp

from srpo_cli.metrics import intervals
from srpo_cli.metrics.intervals import bootstrap, mean_interval, p_values, percentiles, resamples


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


def test_more_prompts_than_a_chunk_holds_are_resampled_too(monkeypatch):
    monkeypatch.setattr(intervals, "_CHUNK", 10)
    parts = list(resamples(25, 4, torch.Generator().manual_seed(0)))
    assert [part.shape for part in parts] == [(1, 25)] * 4
    together = torch.randint(25, (4, 25), generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.cat(parts), together)


def test_percentiles_keep_their_columns_apart():
    values = torch.arange(1001.0)[:, None] * torch.tensor([1.0, -2.0])
    torch.testing.assert_close(percentiles(values), torch.tensor([[25.0, -1950.0], [975.0, -50.0]]).double())


def test_a_p_value_is_twice_the_share_beyond_zero_with_one_added():
    resampled = torch.cat([torch.full((95,), 1.0), torch.full((4,), -1.0)])  # 2 (4 + 1) / (99 + 1)
    assert p_values(torch.tensor(0.9), resampled, 50).item() == pytest.approx(0.1)
    assert p_values(torch.tensor(-0.9), -resampled, 50).item() == pytest.approx(0.1)


def test_no_difference_at_all_has_a_p_value_of_one():
    assert p_values(torch.tensor(0.0), torch.zeros(99), 50).item() == 1


def resampled_means(values, draws=1000):
    return torch.cat(
        [values[index].mean(1) for index in resamples(len(values), draws, torch.Generator().manual_seed(0))]
    )


def test_beyond_what_the_draws_can_count_it_is_that_of_a_t_test():
    values = 0.5 + torch.randn(100, generator=torch.Generator().manual_seed(3))
    p = p_values(values.mean(), resampled_means(values), 100).item()
    expected = ttest_1samp(values.numpy(), 0).pvalue
    assert expected < 1e-4 < 2 / 1001
    assert p == pytest.approx(expected, rel=0.8)  # the resamples' own spread is known to 2 %, and t is about 5


def test_a_few_prompts_that_agree_show_no_more_than_their_signs():
    for prompts, least in ((1, 1.0), (2, 0.5), (6, 2**-5)):
        values = torch.ones(prompts)
        assert p_values(values.mean(), resampled_means(values), prompts).item() == least


def test_where_nothing_differs_p_values_are_as_often_small_as_they_say():
    generator = torch.Generator().manual_seed(4)
    small = 0
    for _ in range(300):
        values = torch.randn(80, generator=generator)
        small += p_values(values.mean(), resampled_means(values, 400), 80).item() < 0.05
    assert 6 <= small <= 27  # 15 expected, four standard deviations to the right and less than three to the left
