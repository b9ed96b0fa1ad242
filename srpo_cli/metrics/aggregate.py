"""From a table with a row a picture to figures, how sure they are, and what differs between models.

The table has the columns ``model`` (a label), ``item`` (id of the prompt), ``group`` (its style, task or category),
``image`` (number of the prompt's picture), and a column of numbers for each thing that was measured. Its first model is
the baseline. A column is empty, or not there, where it was not measured; for a model it is so as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from srpo_cli.errors import SrpoError
from srpo_cli.metrics.intervals import DRAWS, p_values, percentiles, resamples

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
    """An estimate, the ends of its 95 % interval, and the number of prompts behind it."""

    mean: float
    low: float
    high: float
    count: int


class Comparison(NamedTuple):
    """A model's figure minus the baseline's, with the ends of its 95 % interval.

    ``p`` is two-sided, ``p_holm`` corrected for its family, and ``wins`` is the share of prompts on which the model has
    the higher figure, ties half.
    """

    baseline: str
    model: str
    group: str
    measure: str
    difference: float
    low: float
    high: float
    p: float
    p_holm: float
    wins: float


class Batches(NamedTuple):
    """Mean and population standard deviation of a figure over batches of prompts."""

    mean: float
    std: float


class Signal(NamedTuple):
    """How far a statistic that hacking moves is from the baseline's.

    ``base`` and ``value`` are means, ``low`` and ``high`` the ends of the difference's 95 % interval, and ``spread`` is
    the standard deviation of the baseline's pictures.
    """

    model: str
    signal: str
    base: float
    value: float
    difference: float
    low: float
    high: float
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
    """

    groups: tuple[str, ...]
    figures: dict[str, dict[str, dict[str, Figure]]]
    comparisons: list[Comparison]


def aggregate(
    table: pd.DataFrame,
    measures: Sequence[Measure],
    overall: Literal["pictures", "groups"] = "pictures",
    draws: int = DRAWS,
    seed: int = 0,
) -> Figures:
    """Figures of every model, over all prompts and in each group, and how they differ from the baseline's.

    Intervals are percentiles of a bootstrap. What it resamples is the prompt with all its pictures, within its group,
    whose size stays; prompts of one text are one. It resamples the same prompts for all models, so that comparisons
    are paired. Over all groups a
    mean is that of all pictures, or where ``overall`` is "groups" that of the groups' means.

    P values (see ``p_values``) are corrected by Holm's rule in two families: all measures and models over all prompts,
    which is what a claim rests on; and all measures, models and groups group by group, for a closer look.

    SrpoError where models have different prompts, a column has gaps, or a picture is there twice.
    """
    measures = [measure for measure in measures if measure.columns]
    models, strata = _read(table, _columns_of(measures))
    groups = tuple(stratum.group for stratum in strata) if len(strata) > 1 else ()
    figures: dict[str, dict[str, dict[str, Figure]]] = {model: {ALL: {}} for model in models}
    over_all: list[Comparison] = []
    by_group: list[Comparison] = []
    for sample in _samples(strata, measures, overall, draws, seed):
        for model, values in zip(models, sample.values.unbind(1), strict=True):
            figures[model][sample.group] = _figures(values, measures, sample.prompts)
        family = over_all if sample.group == ALL else by_group
        family += _comparisons(sample, models, measures)
    return Figures(groups, figures, _corrected(over_all) + _corrected(by_group))


def batch_figures(
    table: pd.DataFrame, measures: Sequence[Measure], batches: int
) -> dict[str, dict[str, dict[str, Batches]]]:
    """Each model's and group's figures over so many ``batches`` of consecutive prompts, as HPS publishes them.

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
            values = _measured(totals, measures)
            pairs = zip(values.mean(0).tolist(), values.std(0, correction=0).tolist(), strict=True)
            result[model][stratum.group if len(strata) > 1 else ALL] = {
                measure.name: Batches(*pair)
                for measure, pair in zip(measures, pairs, strict=True)
                if not math.isnan(pair[0])
            }
    return result


def hacking_signals(table: pd.DataFrame, draws: int = DRAWS, seed: int = 0) -> list[Signal]:
    """How far each further model's ``SIGNALS`` and diversity are from the baseline's; a family of its own for Holm.

    A signal has ``crossed`` when its difference is significant and larger than half a standard deviation of the
    baseline's pictures. Diversity that rises never has.
    """
    names = [name for name in map(str, table.columns) if name in SIGNALS or name.startswith(_DIVERSITY)]
    found = aggregate(table, [Measure(name, name, (name,)) for name in names], draws=draws, seed=seed)
    signals = []
    for comparison in found.comparisons:
        if comparison.group == ALL:
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
    """

    group: str
    values: Tensor
    wins: Tensor
    prompts: int


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


def _samples(
    strata: Sequence[_Stratum],
    measures: Sequence[Measure],
    overall: Literal["pictures", "groups"],
    draws: int,
    seed: int,
) -> Iterator[_Sample]:
    """The measures of each group, where there are several, and then those of all of them."""
    generator = torch.Generator().manual_seed(seed)
    prompts = sum(len(stratum.by_text[0]) for stratum in strata)
    whole, whole_wins = torch.zeros(()), torch.zeros(())
    for stratum in strata:
        sums = stratum.by_text
        count = len(sums[0])
        totals, wins = _resampled(sums, draws, generator), _wins(sums, measures)
        if len(strata) > 1:
            yield _Sample(stratum.group, _measured(totals, measures), wins, count)
        if overall == "groups":  # each group as if it were one picture
            totals, weight = totals / totals[..., :1], 1 / len(strata)
        else:
            weight = count / prompts
        whole, whole_wins = whole + totals, whole_wins + weight * wins
    yield _Sample(ALL, _measured(whole, measures), whole_wins, prompts)


def _resampled(sums: Sequence[Tensor], draws: int, generator: torch.Generator) -> Tensor:
    """Totals of M models' prompts, (N, 1 + C) each, as they are and for each resample: (1 + draws, M, 1 + C).

    A resample is how often each prompt is in it, so that a total is a product of matrices. One product for each model,
    all of one shape: equal models get totals that are equal to the bit.
    """
    prompts = len(sums[0])
    parts = [torch.stack([own.sum(0) for own in sums])[None]]
    for index in resamples(prompts, draws, generator):
        rows = torch.arange(len(index))[:, None] * prompts
        times = torch.bincount((index + rows).flatten(), minlength=index.numel()).view_as(index).double()
        parts.append(torch.stack([times @ own for own in sums], 1))
    return torch.cat(parts)


def _measured(totals: Tensor, measures: Sequence[Measure]) -> Tensor:
    """Measures of totals: pictures and sums of the measures' columns (..., 1 + C) -> (..., K)."""
    means = totals[..., 1:] / totals[..., :1]
    place = {column: number for number, column in enumerate(_columns_of(measures))}
    values = totals.new_empty(*totals.shape[:-1], len(measures))
    for number, measure in enumerate(measures):
        values[..., number] = measure.reduce(means[..., [place[column] for column in measure.columns]])
    return values


def _wins(sums: Sequence[Tensor], measures: Sequence[Measure]) -> Tensor:
    """The share of prompts on which each further model is higher than the first, ties half, (M - 1, K)."""
    baseline = _measured(sums[0], measures)
    shares = torch.zeros(len(sums) - 1, len(measures), dtype=torch.float64)
    for number, own in enumerate(sums[1:]):
        values = _measured(own, measures)
        shares[number] = ((values > baseline).double() + (values == baseline).double() / 2).mean(0)
    return shares


def _figures(values: Tensor, measures: Sequence[Measure], prompts: int) -> dict[str, Figure]:
    """One model's measures by name, of values (1 + draws, K); without those that it has no numbers for."""
    rows = torch.stack([values[0], *percentiles(values[1:])], 1).tolist()
    named = zip(measures, rows, strict=True)
    return {measure.name: Figure(*row, prompts) for measure, row in named if not math.isnan(row[0])}


def _comparisons(sample: _Sample, models: Sequence[str], measures: Sequence[Measure]) -> list[Comparison]:
    """Each further model against the first, by every measure that both have; not yet corrected."""
    if not sample.wins.numel():  # one model, or nothing measured
        return []
    differences = sample.values[:, 1:] - sample.values[:, :1]
    estimate, resampled = differences[0], differences[1:]
    columns = [estimate, *percentiles(resampled), p_values(estimate, resampled, sample.prompts), sample.wins]
    rows = torch.stack(columns, -1).tolist()
    return [
        Comparison(models[0], model, sample.group, measure.name, difference, low, high, p, p, wins)
        for model, of_model in zip(models[1:], rows, strict=True)
        for measure, (difference, low, high, p, wins) in zip(measures, of_model, strict=True)
        if not math.isnan(difference)
    ]


def _corrected(family: Sequence[Comparison]) -> list[Comparison]:
    corrected = holm([comparison.p for comparison in family])
    return [comparison._replace(p_holm=p) for comparison, p in zip(family, corrected, strict=True)]
