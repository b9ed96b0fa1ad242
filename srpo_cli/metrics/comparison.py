"""Figures of a comparison of training methods: over seeds, per picture against the other methods, and at what cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean, stdev

from scipy.optimize import brentq
from scipy.special import stdtrit
from torch import Tensor

from srpo_cli.metrics.intervals import Interval

FEWEST_SEEDS = 3
"""From so many seeds an interval is of other seeds, too."""

_LEAST = 1e-60  # of a p value; quantiles of Student's t are known down to there


def over_seeds(figures: Sequence[Interval], least: float = -math.inf, most: float = math.inf) -> Interval:
    """The mean of one method's figures over its seeds, with a 95 % interval for other seeds and other prompts.

    ``figures``: of each seed, its interval over prompts. Two errors are added as squares: that of the mean over seeds,
    by Student's t, and the mean one over prompts, which more seeds do not make smaller since all draw the same prompts.
    Of one or two seeds it is the latter alone. The ends stay within ``least`` and ``most``, those of the scale.
    """
    mean, between = fmean(figure.mean for figure in figures), 0.0
    if len(figures) >= FEWEST_SEEDS:
        between = float(stdtrit(len(figures) - 1, 0.975)) * _error_between(figures)
    below = math.hypot(between, fmean(figure.mean - figure.low for figure in figures))
    above = math.hypot(between, fmean(figure.high - figure.mean for figure in figures))
    return Interval(mean, max(mean - below, least), min(mean + above, most))


def p_over_seeds(figures: Sequence[Interval], prompts: int) -> float:
    """Two-sided p of a difference from 0, given as by :func:`over_seeds` of three or more seeds on so many prompts.

    One minus the level of the interval that ends at 0: its parts are the same, Student's t over seeds and over prompts.
    Never below ``2^(1 - prompts)``, the least that so many signs can show.
    """
    mean, between = fmean(figure.mean for figure in figures), _error_between(figures)
    if mean == 0:
        return 1.0
    freedom = max(1, prompts - 1)
    towards_0 = fmean(figure.mean - figure.low if mean > 0 else figure.high - figure.mean for figure in figures)
    within = towards_0 / float(stdtrit(freedom, 0.975))

    def beyond_0(log_tail: float) -> float:
        tail = math.exp(log_tail)
        over = stdtrit(len(figures) - 1, tail) * between
        return math.hypot(over, stdtrit(freedom, tail) * within) - abs(mean)

    least = max(2.0 ** (1 - prompts), _LEAST)
    log_least = math.log(least / 2)
    return least if beyond_0(log_least) < 0 else 2 * math.exp(brentq(beyond_0, log_least, math.log(0.5)))


def _error_between(figures: Sequence[Interval]) -> float:
    """Standard error of the mean over seeds."""
    return stdev(figure.mean for figure in figures) / math.sqrt(len(figures))


def farthest(distances: Tensor) -> Tensor:
    """Which method's picture of each prompt is farthest from what it should be, (M, N) -> (M, N).

    1 for the farthest of the M methods, 0 for the others; equal ones share. A method's mean over the N prompts is its
    hacking rate, and the rates of all methods add up to 1.
    """
    worst = (distances == distances.amax(0)).double()
    return worst / worst.sum(0)


def ratio_over_seeds(values: Sequence[float], references: Sequence[float]) -> Interval:
    """How many times a reference's a method's positive values are, both seed by seed: geometric mean, and an interval
    for other seeds by Student's t of the logarithms."""
    logs = [math.log(value / reference) for value, reference in zip(values, references, strict=True)]
    return Interval(*map(math.exp, over_seeds([Interval(log, log, log) for log in logs])))


def cost_at(level: float, costs: Sequence[float], values: Sequence[float]) -> float | None:
    """The cost at which a run first comes up to ``level``, between its measurements by a straight line; None: never.

    ``costs`` rise, and begin with what was spent on the untrained model.
    """
    if values[0] >= level:
        return costs[0]
    for (cost, value), (next_cost, next_value) in pairwise(zip(costs, values, strict=True)):
        if next_value >= level:
            return cost + (next_cost - cost) * (level - value) / (next_value - value)
    return None
