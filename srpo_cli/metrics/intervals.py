"""Bootstrap intervals over prompts: the unit that was drawn is the unit that is resampled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from scipy.stats import t as student
from torch import Tensor

DRAWS = 1000
"""Resamples behind an interval where nobody asks for more or fewer."""

_CHUNK = 2**22  # indices held at a time, 32 MB of them


class Interval(NamedTuple):
    """An estimate with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[Tensor], Tensor], count: int, draws: int = DRAWS, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile bootstrap over ``count`` prompts.

    ``statistic`` takes indices (R, count) into the prompts and returns one value for each row, (R,); the estimate
    is its value on the prompts as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([statistic(index).double() for index in resamples(count, draws, generator)])
    low, high = percentiles(values, level)
    return Interval(statistic(torch.arange(count)[None]).item(), low.item(), high.item())


def mean_interval(values: Tensor, **options) -> Interval:
    """Bootstrap interval of the mean of (count,) values."""
    return bootstrap(lambda index: values[index].mean(1), len(values), **options)


def resamples(count: int, draws: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of ``draws`` resamples of ``count`` prompts, (R, count) at a time; how many at a time changes none."""
    rows = max(1, _CHUNK // count)
    for first in range(0, draws, rows):
        yield torch.randint(count, (min(rows, draws - first), count), generator=generator)


def percentiles(values: Tensor, level: float = 0.95) -> Tensor:
    """Ends of the central ``level`` of resampled values (draws, ...), (2, ...) in float64."""
    if not values.numel():
        return torch.zeros(2, *values.shape[1:], dtype=torch.float64)
    tail = (1 - level) / 2
    return torch.quantile(values.double(), torch.tensor([tail, 1 - tail], dtype=torch.float64), dim=0)


def p_values(differences: Tensor, resampled: Tensor, prompts: int) -> Tensor:
    """Two-sided p values of differences (...) from 0, out of those of resamples (draws, ...) of so many ``prompts``.

    Twice the share of the resamples that lie at 0 or beyond it, seen from the difference, with one added to both:
    ``2 (beyond + 1) / (draws + 1)``. Where none does, the count says only that p is small, and a family of many tests
    could show nothing; there it is the tail of Student's t at the difference over the resamples' standard deviation,
    if that is smaller. It is never below ``2^(1 - prompts)``, the least that so many signs can show.
    """
    draws = len(resampled)
    beyond = torch.minimum((resampled <= 0).sum(0), (resampled >= 0).sum(0))
    counted = (2 * (beyond + 1) / (draws + 1)).double().clamp(max=1)
    freedom = max(prompts - 1, 1)
    # What a bootstrap shows of a standard error has been divided by n, and not by n - 1.
    error = resampled.double().std(0, correction=0) * (1 + 1 / freedom) ** 0.5
    tail = 2 * torch.as_tensor(student.sf(differences.double().abs() / error, freedom))
    p = torch.where(beyond == 0, torch.minimum(counted, tail), counted)
    return p.clamp(min=2.0 ** (1 - prompts))
