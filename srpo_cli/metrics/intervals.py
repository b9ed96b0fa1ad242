"""Intervals, p values and their correction; the unit that was drawn, the prompt, is the unit that is resampled."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy import ndarray
from scipy.special import ndtri, stdtr, stdtrit
from scipy.stats import binomtest
from torch import Tensor

DRAWS = 1000
"""Resamples behind an interval where nobody asks for more or fewer."""

FEW = 30
"""From so many prompts intervals and p values are about what they say, whatever the distribution."""

_LEVEL = 0.95
_TAILS = ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)
_CHUNK = 2**22  # indices held at a time, 32 MB of them


class Interval(NamedTuple):
    """An estimate with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[Tensor], Tensor], count: int, draws: int = DRAWS, seed: int = 0, level: float = _LEVEL
) -> Interval:
    """Plain percentile bootstrap over ``count`` prompts; too narrow where they are few.

    ``statistic`` takes indices (R, count) into the prompts and returns one value for each row, (R,); the estimate
    is its value on the prompts as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([statistic(index).double() for index in _indices(count, count, draws, generator)])
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(statistic(torch.arange(count)[None]).item(), low, high)


def mean_interval(values: Tensor, **options) -> Interval:
    """Bootstrap interval of the mean of (count,) values."""
    return bootstrap(lambda index: values[index].mean(1), len(values), **options)


def share_interval(hits: Tensor, **options) -> Interval:
    """:func:`mean_interval` of (count,) values of 0 and 1; where all are the same, Wilson's."""
    found = mean_interval(hits, **options)
    return found if found.low < found.high else wilson(round(hits.sum().item()), len(hits))


def _indices(count: int, size: int, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """``draws`` times ``size`` indices below ``count``, (R, size) at a time; how many at a time changes none."""
    rows = max(1, _CHUNK // count)
    for first in range(0, draws, rows):
        yield torch.randint(count, (min(rows, draws - first), size), generator=generator)


def resampled_counts(prompts: int, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """How often each resample holds each prompt, (R, prompts) in float64 at a time, ``draws`` in all.

    A resample is of one prompt fewer than there are, so that a mean varies over the resamples as much as it does over
    samples; with as many as there are its variance would be too small by (prompts - 1) / prompts (McCarthy and Snowden,
    The bootstrap and finite population sampling, 1985).
    """
    for index in _indices(prompts, max(1, prompts - 1), draws, generator):
        rows = torch.arange(len(index))[:, None] * prompts
        yield torch.bincount((index + rows).flatten(), minlength=len(index) * prompts).view(-1, prompts).double()


def resample(sums: ndarray, draws: int, seed: int) -> ndarray:
    """Sums (prompts, ...) over the prompts of each resample, (draws, ...).

    All that belongs to a prompt goes together, so that what differs is compared on the same prompts. The same ``seed``
    and number of prompts draw the same prompts.
    """
    flat = torch.from_numpy(sums.reshape(len(sums), -1).astype(float))
    counts = resampled_counts(len(sums), draws, torch.Generator().manual_seed(seed))
    return torch.cat([times @ flat for times in counts]).numpy().reshape(draws, *sums.shape[1:])


def interval(
    estimate: float,
    drawn: ndarray,
    prompts: int,
    freedom: float | None = None,
    least: float = -math.inf,
    most: float = math.inf,
) -> Interval:
    """An estimate with its interval, out of what it is of each resample (R,), NaN where it is undefined.

    The ends are the resamples' percentiles, as much further from the estimate as the quantile of Student's t is than
    that of the normal distribution; never beyond ``least`` and ``most``, the ends of the scale. ``freedom``: degrees of
    it, None: ``prompts`` - 1.
    """
    stretch = stdtrit(freedom or max(1, prompts - 1), _TAILS[1]) / ndtri(_TAILS[1])
    ends = estimate + stretch * (np.nanquantile(drawn, _TAILS) - estimate)
    return Interval(float(estimate), *np.clip(ends, least, most).tolist())


def wilson(hits: int, count: int) -> Interval:
    """A share with Wilson's interval, as if each of ``count`` were drawn on its own."""
    ends = binomtest(int(hits), int(count)).proportion_ci(_LEVEL, method="wilson")
    return Interval(hits / count, float(ends.low), float(ends.high))


def rate_interval(rate: float, drawn: ndarray, prompts: int, freedom: float | None = None) -> Interval:
    """A share in [0, 1] with its :func:`interval`; where the resamples are all the same, as those of a share of 0 are,
    Wilson's as if each prompt were one answer."""
    if np.nanmin(drawn) < np.nanmax(drawn):
        return interval(rate, drawn, prompts, freedom, 0, 1)
    return wilson(round(rate * prompts), prompts)._replace(mean=float(rate))


def difference_interval(
    baseline: Interval, other: Interval, drawn: ndarray, prompts: int, freedom: float | None = None
) -> Interval:
    """``other`` minus ``baseline``, two shares, with the :func:`interval` of the difference; where the resamples are
    all the same, Newcombe's out of the intervals of the two."""
    difference = other.mean - baseline.mean
    if np.nanmin(drawn) < np.nanmax(drawn):
        return interval(difference, drawn, prompts, freedom, -1, 1)
    below = math.hypot(other.mean - other.low, baseline.high - baseline.mean)
    above = math.hypot(other.high - other.mean, baseline.mean - baseline.low)
    return Interval(difference, difference - below, difference + above)


def p_value(difference: float, drawn: ndarray, prompts: int, freedom: float | None = None) -> float:
    """Two-sided p of a difference from 0, out of those of resamples (R,), NaN where they are undefined.

    That of Student's t, the difference over the resamples' standard deviation, with ``freedom`` degrees of freedom, or
    ``prompts`` - 1; never below ``2^(1 - prompts)``, the least that so many signs can show.
    """
    if difference == 0:
        return 1.0
    error = float(np.nanstd(drawn))
    tail = 2 * stdtr(freedom or max(1, prompts - 1), -abs(difference) / error) if error else 0.0
    return float(max(tail, 2.0 ** (1 - prompts)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction of the p values of one family of tests, in their order.

    The smallest of m is multiplied by m, the next one by m - 1 and so on; none becomes smaller than one before it,
    none larger than 1.
    """
    corrected = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = highest
    return corrected
