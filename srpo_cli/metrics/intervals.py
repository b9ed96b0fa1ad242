"""Bootstrap intervals over prompts: the unit that was drawn is the unit that is resampled."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Interval(NamedTuple):
    """An estimate with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[Tensor], Tensor], count: int, draws: int = 1000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Percentile bootstrap over ``count`` prompts.

    ``statistic`` takes indices (R, count) into the prompts and returns one value for each row, (R,); the estimate
    is its value on the prompts as they are.
    """
    index = torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))
    values = statistic(index).double()
    tail = (1 - level) / 2
    low, high = torch.quantile(values, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(statistic(torch.arange(count)[None]).item(), low, high)


def mean_interval(values: Tensor, **options) -> Interval:
    """Bootstrap interval of the mean of (count,) values."""
    return bootstrap(lambda index: values[index].mean(1), len(values), **options)
