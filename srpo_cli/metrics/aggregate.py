"""From a table with a row a picture to figures, how sure they are, and what differs between models.

The table has the columns ``model`` (a label), ``item`` (id of the prompt), ``group`` (its style, task or category),
``image`` (number of the prompt's picture), and a column of numbers for each thing that was measured. Its first model is
the baseline. A column is empty, or not there, where it was not measured; for a model it is so as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from srpo_cli.errors import SrpoError
from srpo_cli.metrics.intervals import (
    DRAWS,
    Interval,
    difference_interval,
    holm,
    interval,
    p_value,
    rate_interval,
    resampled_counts,
)

ALL = "all"
"""What stands in place of a group's name for the figures over all groups."""

LEVEL = 0.05
"""Below this a Holm-corrected p value counts."""

SIGNALS = ("saturation", "contrast", "grid", "band_5", "highlights", "clipping")
"""Columns that hacking moves, in either direction; ``diversity:REWARD`` is one too, and hacking makes it fall."""

_DIVERSITY = "diversity:"
_NAMED = 3  # prompts that a message names


def first(means: Tensor) -> Tensor:
    """The mean of the first column, (..., K) -> (...)."""
    return means[..., 0]


def hundredfold(means: Tensor) -> Tensor:
    """A hundred times the mean of the first column, (..., K) -> (...)."""
    return 100 * means[..., 0]


def mean(means: Tensor) -> Tensor:
    """The mean over the columns, (..., K) -> (...)."""
    return means.mean(-1)


def mean_absolute(means: Tensor) -> Tensor:
    """The mean over the columns of the absolute values of their means, (..., K) -> (...)."""
    return means.abs().mean(-1)


REDUCTIONS = {function.__name__: function for function in (first, hundredfold, mean, mean_absolute)}
"""What a measure may do with the means of its columns, by the name that results know it by."""


@dataclass(frozen=True)
class Measure:
    """A figure that is computed from the means of columns.

    Attributes:
        name: how results and ``--metric`` call it.
        title: heading of its column in tables.
        columns: of the table, in the order in which ``reduce`` takes their means; none for what belongs to all pictures
            together, as a FID does.
        reduce: one of ``REDUCTIONS``, means (..., K) in float64 -> (...).
        better: "higher", "lower", or "" where neither is.
        digits: decimals that are shown.
        note: one line on scale or origin.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    reduce: Callable[[Tensor], Tensor] = first
    better: Literal["higher", "lower", ""] = "higher"
    digits: int = 3
    note: str = ""


class Figure(NamedTuple):
    """An estimate, the ends of its 95 % interval, None of a single prompt, and the number of prompts behind it."""

    mean: float
    low: float | None
    high: float | None
    count: int


class Comparison(NamedTuple):
    """A model's figure minus the baseline's, with the ends of its 95 % interval, None of a single prompt.

    ``p`` is two-sided, ``p_holm`` corrected for its family, and ``wins`` is the share of prompts on which the model has
    the higher figure, ties half.
    """

    baseline: str
    model: str
    group: str
    measure: str
    difference: float
    low: float | None
    high: float | None
    p: float
    p_holm: float
    wins: float


class Batches(NamedTuple):
    """Mean and population standard deviation of a figure over batches, each of so many prompts on average."""

    mean: float
    std: float
    prompts: float


class Signal(NamedTuple):
    """How far a statistic that hacking moves is from the baseline's.

    ``base`` and ``value`` are figures, ``low`` and ``high`` the ends of the difference's 95 % interval, and ``spread``
    is the standard deviation of the baseline's pictures.
    """

    model: str
    signal: str
    base: float
    value: float
    difference: float
    low: float | None
    high: float | None
    p_holm: float
    spread: float
    crossed: bool
    text: str


@dataclass(frozen=True)
class Figures:
    """What a table says.

    Attributes:
        groups: in the table's order; none where there is one only.
        figures: by model, group and measure. The group ``ALL`` is always there, a measure where it was measured.
        comparisons: of each further model with the baseline, over all prompts and by group.
        watched: those over all prompts that are the family of statistics, see :func:`aggregate`.
    """

    groups: tuple[str, ...]
    figures: dict[str, dict[str, dict[str, Figure]]]
    comparisons: list[Comparison]
    watched: list[Comparison]


def aggregate(
    table: pd.DataFrame,
    measures: Sequence[Measure],
    overall: Literal["pictures", "groups"] = "pictures",
    draws: int = DRAWS,
    seed: int = 0,
) -> Figures:
    """Figures of every model, over all prompts and in each group, and how they differ from the baseline's.

    Intervals are percentiles of a bootstrap, widened where prompts are few. What it resamples is the prompt with all
    its pictures, within its group, whose size stays; prompts of one text are one. It resamples the same prompts for all
    models, so that comparisons are paired. Over all groups a mean is that of all pictures, or where ``overall`` is
    "groups" that of the groups' means; there, groups of one prompt are resampled together, as one group.

    P values (see ``p_value``) are corrected by Holm's rule in families: over all prompts those of what has a better
    side, which is what a claim rests on, and those of statistics, which have none, and of diversity; and two more such
    families group by group, for a closer look. What is another measure times a hundred is the same test, and no further
    member of its family.

    SrpoError where models have different prompts, a column has gaps, or a picture is there twice.
    """
    measures = [measure for measure in measures if measure.columns]
    models, strata = _read(table, _columns_of(measures))
    groups = tuple(stratum.group for stratum in strata) if len(strata) > 1 else ()
    shares = {measure.name for measure in measures if is_share(measure, table)}
    figures: dict[str, dict[str, dict[str, Figure]]] = {model: {ALL: {}} for model in models}
    over_all: list[Comparison] = []
    by_group: list[Comparison] = []
    for sample in _samples(strata, measures, overall, draws, seed):
        intervals = [_intervals(sample, model, measures, shares) for model in range(len(models))]
        for model, own in zip(models, intervals, strict=True):
            figures[model][sample.group] = {name: _figure(each, sample.prompts) for name, each in own.items()}
        comparisons = over_all if sample.group == ALL else by_group
        comparisons += _comparisons(sample, models, measures, shares, intervals)
    (over_all, watched), (by_group, _) = (_corrected(each, measures) for each in (over_all, by_group))
    return Figures(groups, figures, over_all + by_group, watched)


def batch_figures(
    table: pd.DataFrame, measures: Sequence[Measure], batches: int
) -> dict[str, dict[str, dict[str, Batches]]]:
    """Each model's and group's figures over so many ``batches`` of consecutive prompts, as HPS publishes them of 80.

    A group with fewer prompts than batches is left out; a single one is called ``ALL``. Batches differ by at most one
    prompt.
    """
    measures = [measure for measure in measures if measure.columns]
    models, strata = _read(table, _columns_of(measures))
    result: dict[str, dict[str, dict[str, Batches]]] = {model: {} for model in models}
    for stratum in strata:
        for model, sums in zip(models, stratum.sums, strict=True):
            if len(sums) < batches:
                continue
            totals = torch.stack([batch.sum(0) for batch in sums.tensor_split(batches)])
            values = _measured(_means(totals), measures)
            pairs = zip(values.mean(0).tolist(), values.std(0, correction=0).tolist(), strict=True)
            result[model][stratum.group if len(strata) > 1 else ALL] = {
                measure.name: Batches(*pair, len(sums) / batches)
                for measure, pair in zip(measures, pairs, strict=True)
                if not math.isnan(pair[0])
            }
    return result


def hacking_signals(found: Figures, table: pd.DataFrame) -> list[Signal]:
    """How far each further model's ``SIGNALS`` and diversity are from the baseline's, of the figures of a table.

    A signal has ``crossed`` when its difference is significant within the family of statistics and larger than half a
    standard deviation of the baseline's pictures. Diversity that rises never has.
    """
    signals = []
    for comparison in found.watched:
        if comparison.measure in SIGNALS or comparison.measure.startswith(_DIVERSITY):
            base, value = (found.figures[label][ALL][comparison.measure].mean for label in comparison[:2])
            spread = float(table.loc[table["model"] == comparison.baseline, comparison.measure].std(ddof=0))
            signals.append(_signal(comparison, base, value, spread))
    return signals


def _signal(comparison: Comparison, base: float, value: float, spread: float) -> Signal:
    difference, name = comparison.difference, comparison.measure
    harmless = name.startswith(_DIVERSITY) and difference > 0
    crossed = comparison.p_holm < LEVEL and abs(difference) > spread / 2 and not harmless
    text = f"{name} {base:.3g} -> {value:.3g}"
    if spread:
        text += f", {abs(difference) / spread:.1f} standard deviations of {comparison.baseline}'s pictures"
    return Signal(
        comparison.model,
        name,
        base,
        value,
        difference,
        comparison.low,
        comparison.high,
        comparison.p_holm,
        spread,
        crossed,
        text,
    )


@dataclass(frozen=True)
class _Stratum:
    """A group's prompts: for each model their numbers of pictures and over these the sums of columns, (N, 1 + C).

    ``texts`` (N,) numbers the different texts among them.
    """

    group: str
    sums: list[Tensor]
    texts: Tensor

    @property
    def by_text(self) -> list[Tensor]:
        """The sums with prompts of one text taken together, which are not independent of each other."""
        count = int(self.texts.max()) + 1
        return [own.new_zeros(count, own.shape[1]).index_add_(0, self.texts, own) for own in self.sums]


@dataclass(frozen=True)
class _Sample:
    """Measures of a group's prompts.

    Attributes:
        values: of the prompts as they are and of each resample of them, (1 + draws, M, K).
        wins: the share of prompts on which each further model is higher, ties half, (M - 1, K).
        prompts: how many they are.
        freedom: degrees of freedom of the resamples' spread; None: one fewer than prompts.
    """

    group: str
    values: Tensor
    wins: Tensor
    prompts: int
    freedom: float | None = None


def _columns_of(measures: Sequence[Measure]) -> list[str]:
    """Every column that a measure reads, once."""
    return list(dict.fromkeys(column for measure in measures for column in measure.columns))


def _read(table: pd.DataFrame, columns: Sequence[str]) -> tuple[list[str], list[_Stratum]]:
    """The models, and the sums of their pictures' columns for each group and prompt, all in the table's order."""
    if table.duplicated(["model", "item", "image"]).any():
        raise SrpoError("the table holds a picture of a model, prompt and number twice: start from an empty folder")
    model, models = pd.factorize(table["model"])
    item, items = pd.factorize(table["item"])
    cell = model * len(items) + item

    def summed(values: np.ndarray | None) -> np.ndarray:
        return np.bincount(cell, values, minlength=len(models) * len(items)).reshape(len(models), len(items))

    pictures = summed(None)
    for name, own in zip(models, pictures, strict=True):
        _check_prompts(name, items[own == 0])
    sums = np.empty((len(models), len(items), 1 + len(columns)))
    sums[..., 0] = pictures
    for number, column in enumerate(columns, start=1):
        values = _numbers(table, column)
        _check_gaps(column, models, model, values)
        sums[..., number] = summed(values)
    first_row = np.unique(item, return_index=True)[1]
    group, groups = pd.factorize(table["group"].iloc[first_row])
    if len(groups) > 1 and ALL in groups:
        raise SrpoError(f"a group is called {ALL!r}, like the figures over all groups: give it another name")
    prompts = table["prompt"].iloc[first_row].to_numpy()
    strata = []
    for number, name in enumerate(groups):
        rows = np.flatnonzero(group == number)
        texts = torch.from_numpy(pd.factorize(prompts[rows])[0])
        strata.append(_Stratum(name, [torch.from_numpy(each[rows]) for each in sums], texts))
    return list(models), strata


def _numbers(table: pd.DataFrame, column: str) -> np.ndarray:
    """A column as float64; nothing but NaN where it is not there."""
    if column not in table:
        return np.full(len(table), np.nan)
    return table[column].to_numpy(np.float64, na_value=np.nan)


def _check_prompts(model: str, missing: Sequence[str]) -> None:
    if len(missing):
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        named = ", ".join(map(str, missing[:_NAMED])) + more
        raise SrpoError(f"{model} has no picture of prompts that other models have: {named}; draw them and try again")


def _check_gaps(column: str, models: Sequence[str], model: np.ndarray, values: np.ndarray) -> None:
    """SrpoError for a column that has numbers for some pictures of a model only: a mean would leave out the others."""
    count = np.bincount(model)
    known = np.bincount(model, np.isfinite(values)).astype(int)
    absent = np.bincount(model, np.isnan(values)).astype(int)
    for name, all_of_it, numbers, nothing in zip(models, count, known, absent, strict=True):
        if numbers < all_of_it and nothing < all_of_it:
            gaps = all_of_it - numbers
            raise SrpoError(f"{column} is no number for {gaps} of the {all_of_it} pictures of {name}: judge them again")


def is_share(measure: Measure, table: pd.DataFrame) -> bool:
    """Whether a measure is a share of yes and no, of which half a yes may be one."""
    return measure.reduce in (first, mean) and all(
        column in table and column not in SIGNALS and table[column].dropna().isin((0, 0.5, 1)).all()
        for column in measure.columns
    )


def _samples(
    strata: Sequence[_Stratum],
    measures: Sequence[Measure],
    overall: Literal["pictures", "groups"],
    draws: int,
    seed: int,
) -> Iterator[_Sample]:
    """The measures of each group, where there are several, and then those of all of them."""
    generator = torch.Generator().manual_seed(seed)
    sums = [stratum.by_text for stratum in strata]
    sizes = [len(own[0]) for own in sums]
    prompts, pools = sum(sizes), _pools(sizes)
    whole, whole_wins, weights = torch.zeros(()), torch.zeros(()), []

    def add(pool: Sequence[Tensor], means: Tensor) -> None:
        nonlocal whole
        weights.append(torch.stack([own[:, :1].sum(0) for own in pool]))
        whole = whole + weights[-1] * means

    for number, (stratum, own) in enumerate(zip(strata, sums, strict=True)):
        means, wins = _resampled(own, draws, generator), _wins(own, measures)
        if len(strata) > 1:
            yield _Sample(stratum.group, _measured(means, measures), wins, sizes[number])
        whole_wins = whole_wins + wins * (1 / len(strata) if overall == "groups" else sizes[number] / prompts)
        if overall == "groups":  # each group as if it were one picture
            sums[number] = [each / each[:, 0].sum() for each in own]
        if [number] in pools:
            add(sums[number], means)
    for pool in pools:
        if len(pool) > 1:
            together = [torch.cat(parts) for parts in zip(*(sums[number] for number in pool), strict=True)]
            add(together, _resampled(together, draws, generator))
    freedom = _freedom([sum(sizes[number] for number in pool) for pool in pools], [float(each[0]) for each in weights])
    yield _Sample(ALL, _measured(whole / sum(weights), measures), whole_wins, prompts, freedom)


def _pools(sizes: Sequence[int]) -> list[list[int]]:
    """The numbers of the groups that are resampled together: those of one prompt, of which the only one would be in
    every resample, with the smallest other group if there is one alone; each other group by itself."""
    single = [number for number, size in enumerate(sizes) if size == 1]
    others = sorted((number for number, size in enumerate(sizes) if size > 1), key=sizes.__getitem__)
    if len(single) == 1 and others:
        single.append(others.pop(0))
    return [*([number] for number in sorted(others)), *([single] if single else [])]


def _freedom(sizes: Sequence[int], weights: Sequence[float]) -> float:
    """Welch and Satterthwaite's degrees of freedom of a weighted sum of the means of so many prompts, all alike."""
    parts = [(weight**2 / size, max(1, size - 1)) for size, weight in zip(sizes, weights, strict=True)]
    return sum(variance for variance, _ in parts) ** 2 / sum(variance**2 / freedom for variance, freedom in parts)


def _resampled(sums: Sequence[Tensor], draws: int, generator: torch.Generator) -> Tensor:
    """Means over M models' prompts, of sums (N, 1 + C) each, as they are and for each resample: (1 + draws, M, C).

    A total is a product of matrices. One product for each model, all of one shape: equal models get means that are
    equal to the bit.
    """
    parts = [torch.stack([own.sum(0) for own in sums])[None]]
    for times in resampled_counts(len(sums[0]), draws, generator):
        parts.append(torch.stack([times @ own for own in sums], 1))
    return _means(torch.cat(parts))


def _means(totals: Tensor) -> Tensor:
    """Means of columns, of numbers of pictures and sums (..., 1 + C) -> (..., C)."""
    return totals[..., 1:] / totals[..., :1]


def _measured(means: Tensor, measures: Sequence[Measure]) -> Tensor:
    """Measures of the means of their columns (..., C) -> (..., K)."""
    place = {column: number for number, column in enumerate(_columns_of(measures))}
    values = means.new_empty(*means.shape[:-1], len(measures))
    for number, measure in enumerate(measures):
        values[..., number] = measure.reduce(means[..., [place[column] for column in measure.columns]])
    return values


def _wins(sums: Sequence[Tensor], measures: Sequence[Measure]) -> Tensor:
    """The share of prompts on which each further model is higher than the first, ties half, (M - 1, K)."""
    baseline = _measured(_means(sums[0]), measures)
    shares = torch.zeros(len(sums) - 1, len(measures), dtype=torch.float64)
    for number, own in enumerate(sums[1:]):
        values = _measured(_means(own), measures)
        shares[number] = ((values > baseline).double() + (values == baseline).double() / 2).mean(0)
    return shares


def _intervals(
    sample: _Sample, model: int, measures: Sequence[Measure], shares: Collection[str]
) -> dict[str, Interval]:
    """One model's measures by name, without those that it has no numbers for."""
    found = {}
    for measure, values in zip(measures, sample.values[:, model].T.numpy(), strict=True):
        if not np.isnan(values[0]):
            make = rate_interval if measure.name in shares else interval
            found[measure.name] = make(float(values[0]), values[1:], sample.prompts, sample.freedom)
    return found


def _figure(found: Interval, prompts: int) -> Figure:
    return Figure(found.mean, *_ends(found, prompts), prompts)


def _ends(found: Interval, prompts: int) -> tuple[float | None, float | None]:
    """The ends of an interval; one prompt says nothing of others."""
    return found[1:] if prompts > 1 else (None, None)


def _comparisons(
    sample: _Sample,
    models: Sequence[str],
    measures: Sequence[Measure],
    shares: Collection[str],
    intervals: Sequence[Mapping[str, Interval]],
) -> list[Comparison]:
    """Each further model against the first, by every measure that both have; not yet corrected."""
    values, shape = sample.values.numpy(), (sample.prompts, sample.freedom)
    comparisons = []
    for number, model in enumerate(models[1:], 1):
        for place, measure in enumerate(measures):
            if not all(measure.name in own for own in (intervals[0], intervals[number])):
                continue
            differences = values[:, number, place] - values[:, 0, place]
            difference, drawn = float(differences[0]), differences[1:]
            if measure.name in shares:
                both = intervals[0][measure.name], intervals[number][measure.name]
                found = difference_interval(*both, drawn, *shape)
            else:
                found = interval(difference, drawn, *shape)
            p, wins = p_value(difference, drawn, *shape), float(sample.wins[number - 1, place])
            ends = _ends(found, sample.prompts)
            comparisons.append(Comparison(models[0], model, sample.group, measure.name, found.mean, *ends, p, p, wins))
    return comparisons


def _corrected(
    comparisons: Sequence[Comparison], measures: Sequence[Measure]
) -> tuple[list[Comparison], list[Comparison]]:
    """All comparisons, and those of the family of statistics, corrected within their families."""
    named = {measure.name: measure for measure in measures}

    def test(comparison: Comparison) -> tuple[Any, ...]:
        """What is the same for a measure and for that times a hundred."""
        measure = named[comparison.measure]
        reduce = first if measure.reduce is hundredfold else measure.reduce
        return comparison.model, comparison.group, measure.columns, reduce

    def family(members: Sequence[Comparison]) -> dict[tuple[Any, ...], float]:
        p = {test(comparison): comparison.p for comparison in reversed(members)}  # the first one's of equal tests
        return dict(zip(p, holm(list(p.values())), strict=True))

    def with_p(members: Sequence[Comparison], p: Mapping[tuple[Any, ...], float]) -> list[Comparison]:
        return [comparison._replace(p_holm=p[test(comparison)]) for comparison in members]

    directed = family([each for each in comparisons if named[each.measure].better])
    watched = [each for each in comparisons if not named[each.measure].better or each.measure.startswith(_DIVERSITY)]
    of_watched = family(watched)
    return with_p(comparisons, {**of_watched, **directed}), with_p(watched, of_watched)
