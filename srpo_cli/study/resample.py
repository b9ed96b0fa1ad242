"""Intervals and p values of a study: whole prompts are resampled, for the grades of one prompt are not independent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy import ndarray
from scipy.stats import binomtest

LEVEL = 0.95
_CHUNK = 1000  # draws at a time


def resample(sums: ndarray, draws: int, seed: int) -> ndarray:
    """Sums (prompts, ...) over as many prompts drawn with replacement, once for each draw: (draws, ...).

    All of a prompt's grades go together, whatever the arm, so that what differs between arms is compared on the same
    prompts. The same ``seed`` and number of prompts draw the same prompts.
    """
    flat = sums.reshape(len(sums), -1).astype(float)
    drawn = [counts @ flat for counts in _counts(len(sums), draws, seed)]
    return np.concatenate(drawn).reshape(draws, *sums.shape[1:])


def prompt_counts(prompts: int, draws: int, seed: int) -> ndarray:
    """How often each draw takes each prompt, (draws, prompts); for what is no sum over prompts."""
    return np.concatenate(list(_counts(prompts, draws, seed)))


def _counts(prompts: int, draws: int, seed: int) -> Iterator[ndarray]:
    generator = np.random.default_rng(seed)
    for first in range(0, draws, _CHUNK):
        yield generator.multinomial(prompts, np.full(prompts, 1 / prompts), min(_CHUNK, draws - first))


def interval(estimate: float, drawn: ndarray) -> dict[str, Any]:
    """An estimate with the percentile interval of its draws (R,), in which it may be undefined (NaN)."""
    tail = (1 - LEVEL) / 2
    low, high = np.nanquantile(drawn, [tail, 1 - tail])
    return {"mean": float(estimate), "low": float(low), "high": float(high)}


def wilson(hits: int, count: int) -> dict[str, Any]:
    """A share with Wilson's interval, as if each of ``count`` were drawn on its own."""
    ends = binomtest(int(hits), int(count)).proportion_ci(LEVEL, method="wilson")
    return {"mean": hits / count, "low": float(ends.low), "high": float(ends.high)}


def rate_interval(rate: float, drawn: ndarray, prompts: int) -> dict[str, Any]:
    """A share in [0, 1] with the interval of its draws; where these are all the same, as those of a share of 0 are,
    Wilson's as if each prompt were one grade."""
    if np.nanmin(drawn) < np.nanmax(drawn):
        return interval(rate, drawn)
    return {**wilson(round(rate * prompts), prompts), "mean": float(rate)}


def difference_interval(baseline: dict[str, Any], other: dict[str, Any], drawn: ndarray) -> dict[str, Any]:
    """``other`` minus ``baseline``, two shares with intervals, with the interval of the draws of the difference; where
    these are all the same, Newcombe's out of the intervals of the two."""
    difference = other["mean"] - baseline["mean"]
    if np.nanmin(drawn) < np.nanmax(drawn):
        return interval(difference, drawn)
    below = np.hypot(other["mean"] - other["low"], baseline["high"] - baseline["mean"])
    above = np.hypot(other["high"] - other["mean"], baseline["mean"] - baseline["low"])
    return {"mean": difference, "low": float(difference - below), "high": float(difference + above)}


def p_value(drawn: ndarray, prompts: int) -> float:
    """Two-sided p of "no difference" from the draws of a difference.

    Twice the smaller share of draws on one side of 0, with one draw more for what was observed, but not less than
    2 / 2**prompts: so often all of so many prompts point the same way where there is nothing.
    """
    defined = drawn[~np.isnan(drawn)]
    beyond = min((defined <= 0).sum(), (defined >= 0).sum())
    return float(min(1.0, max(2 * (1 + beyond) / (1 + len(defined)), 2.0 ** (1 - prompts))))
