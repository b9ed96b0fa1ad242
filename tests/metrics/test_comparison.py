"""Figures of a comparison, by hand."""

import math

import pytest
import torch
from scipy.stats import t, ttest_1samp

from srpo_cli.metrics.comparison import cost_at, farthest, over_seeds, p_over_seeds
from srpo_cli.metrics.intervals import Interval


def test_seeds_are_the_unit_and_the_error_of_the_prompts_stays():
    figures = [Interval(mean, mean - 0.03, mean + 0.04) for mean in (1.0, 2.0, 3.0)]
    between = 4.302653 * 1 / math.sqrt(3)  # Student's t with 2 degrees of freedom, standard deviation 1
    found = over_seeds(figures)
    assert found == pytest.approx((2.0, 2 - math.hypot(between, 0.03), 2 + math.hypot(between, 0.04)), abs=1e-5)


def test_seeds_that_agree_leave_the_error_of_the_prompts():
    assert over_seeds([Interval(0.5, 0.4, 0.7)] * 5) == pytest.approx((0.5, 0.4, 0.7))


def test_two_seeds_say_nothing_of_others():
    found = over_seeds([Interval(0.2, 0.1, 0.3), Interval(0.4, 0.1, 0.7)])
    assert found == pytest.approx((0.3, 0.1, 0.5))


def test_an_interval_stays_on_its_scale():
    found = over_seeds([Interval(mean, mean, mean) for mean in (0.0, 0.5, 1.0)], 0, 1)
    assert found == (0.5, 0, 1)


def test_p_is_one_minus_the_level_of_the_interval_that_ends_at_0():
    """A difference whose 95 % interval ends at 0 has p 0.05, on either side and with unequal ends."""
    figures = [Interval(mean, mean - 0.03, mean + 0.04) for mean in (-0.1, 0.0, 0.1)]
    below, above = (abs(end) for end in over_seeds(figures)[1:])
    for shift in (below, -above):
        moved = [Interval(*(value + shift for value in figure)) for figure in figures]
        assert p_over_seeds(moved, 50) == pytest.approx(0.05, rel=1e-6)


@pytest.mark.parametrize("seeds", range(3, 9))
def test_p_is_that_of_students_t_over_seeds_or_over_prompts_where_the_other_adds_nothing(seeds):
    values = [0.8, 1.3, 1.1, 0.2, 0.9, 0.4, 1.0, 0.7][:seeds]
    exact = ttest_1samp(values, 0).pvalue
    assert p_over_seeds([Interval(value, value, value) for value in values], 100) == pytest.approx(exact)
    half = 0.1 * t.ppf(0.975, 19)  # of twenty prompts, standard error 0.1
    agreeing = [Interval(-0.3, -0.3 - half, -0.3 + half)] * seeds
    assert p_over_seeds(agreeing, 20) == pytest.approx(2 * t.sf(3, 19), rel=1e-6)


@pytest.mark.parametrize("seeds", range(3, 9))
def test_no_difference_has_p_1_and_one_without_error_the_least_that_so_many_signs_can_show(seeds):
    assert p_over_seeds([Interval(0, -0.1, 0.1)] * seeds, 8) == p_over_seeds([Interval(0, 0, 0)] * seeds, 8) == 1
    assert p_over_seeds([Interval(1, 1, 1)] * seeds, 8) == 2**-7
    assert p_over_seeds([Interval(1e6, 1e6 - 1, 1e6 + 1)] * seeds, 10) == 2**-9
    assert p_over_seeds([Interval(1, 1, 1)] * seeds, 1000) == 1e-60


def test_the_farthest_by_hand():
    distances = torch.tensor([[1.0, 5.0, 2.0, 0.0], [3.0, 1.0, 2.0, 0.0], [2.0, 4.0, 1.0, 0.0]])
    third = 1 / 3
    shares = torch.tensor([[0, 1, 0.5, third], [1, 0, 0.5, third], [0, 0, 0, third]], dtype=torch.float64)
    torch.testing.assert_close(farthest(distances), shares)
    assert farthest(distances).mean(1).sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("level", "cost"),
    [(0.1, 0), (0.2, 50), (0.3, 100), (0.4, 125), (0.5, 150), (0.7, 200), (0.71, None)],
)
def test_the_cost_of_a_level_lies_on_a_straight_line(level, cost):
    found = cost_at(level, [0, 100, 200, 300], [0.1, 0.3, 0.7, 0.6])
    assert found == (None if cost is None else pytest.approx(cost))


def test_the_first_time_counts():
    assert cost_at(0.5, [0, 10, 20, 30], [0, 0.5, 0.1, 0.9]) == 10
