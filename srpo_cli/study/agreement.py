"""How far the raters of a study can be relied on: agreement with each other, with themselves, and with the known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy import ndarray

from srpo_cli.errors import MissingError
from srpo_cli.metrics.intervals import interval, resample, resampled_counts

if TYPE_CHECKING:
    from pandas import DataFrame

GOOD, TENTATIVE = 0.8, 0.667  # Krippendorff's own customary limits


def krippendorff_alpha(counts: ndarray) -> float:
    """Ordinal alpha of (units, values) counts of grades; NaN where it is undefined: all grades equal, or no unit has
    two. MissingError without the library."""
    try:
        import krippendorff
    except ImportError as error:
        raise MissingError("agreement needs krippendorff, which is not here: pip install 'srpo-cli[rate]'") from error
    pairable = counts[counts.sum(1) > 1]
    if np.count_nonzero(pairable.sum(0)) < 2:
        return math.nan
    return float(krippendorff.alpha(value_counts=pairable, level_of_measurement="ordinal"))


def agreement(answers: DataFrame, levels: int, draws: int, seed: int) -> dict[str, Any]:
    """Krippendorff's alpha over raters and units of one dimension's grades 0 to ``levels`` - 1, with its interval over
    prompts and a label; None and "undefined" where there is no alpha."""
    units, unit = np.unique(answers["unit"], return_inverse=True)
    prompts, prompt = np.unique(answers["prompt_id"], return_inverse=True)
    counts = np.zeros((len(units), levels), dtype=int)
    np.add.at(counts, (unit, answers["value"].to_numpy()), 1)
    prompt_of = np.zeros(len(units), dtype=int)
    prompt_of[unit] = prompt
    alpha = krippendorff_alpha(counts)
    if math.isnan(alpha):
        return {"alpha": None, "low": None, "high": None, "label": "undefined"}
    taken = resampled_counts(len(prompts), draws, torch.Generator().manual_seed(seed))
    drawn = [
        krippendorff_alpha(np.repeat(counts, times[prompt_of], axis=0))
        for part in taken
        for times in part.int().numpy()
    ]
    _, low, high = interval(alpha, np.array(drawn), len(prompts), most=1)
    # Of a few prompts all resamples can lie to one side of the whole.
    return {"alpha": alpha, "low": min(low, alpha), "high": max(high, alpha), "label": _label(alpha)}


def _label(alpha: float) -> str:
    return "good" if alpha >= GOOD else "tentative" if alpha >= TENTATIVE else "poor"


def raters_table(answers: DataFrame, training: DataFrame, pairs: bool, draws: int, seed: int) -> list[dict[str, Any]]:
    """A row for each rater who has answered, see :func:`srpo_cli.study.analysis.analyze`.

    The bias of a rater is the mean of the differences between a grade and the mean of the others' grades of the same
    picture on the same dimension; for pairs it is how much more often the right one is preferred than the left one,
    from -1 to 1.
    """
    items = answers[answers["kind"] == "item"]
    bias = _biases(items.assign(lean=items["side"] - 1.0 if pairs else _beside_the_others(items)), draws, seed)
    rows = []
    for rater, own in answers.groupby("rater"):
        known = training[(training["rater"] == rater) & training["known"].notna()]
        rows.append(
            {
                "rater": rater,
                "role": own["role"].iloc[0],
                "answers": len(own),
                **bias.get(rater, dict.fromkeys(("bias", "low", "high"))),
                **_consistency(own),
                "training_agreement": float((known["value"] == known["known"]).mean()) if len(known) else None,
                "median_seconds": float(own["ms"].median() / 1000),
            }
        )
    return rows


def _beside_the_others(items: DataFrame) -> ndarray:
    """Each grade minus the mean of the other raters' grades of the same; NaN where there is none."""
    same = items.groupby(["unit", "dimension"])["value"]
    others = same.transform("count") - 1
    return items["value"] - (same.transform("sum") - items["value"]) / others.where(others > 0)


def _biases(items: DataFrame, draws: int, seed: int) -> dict[str, dict[str, float]]:
    """By rater, the mean of ``lean`` with its interval over prompts."""
    leaning = items[items["lean"].notna()]
    if leaning.empty:
        return {}
    prompts, prompt = np.unique(leaning["prompt_id"], return_inverse=True)
    raters, rater = np.unique(leaning["rater"], return_inverse=True)
    sums = np.zeros((len(prompts), len(raters), 2))
    np.add.at(sums, (prompt, rater), np.stack([leaning["lean"], np.ones(len(leaning))], axis=1))
    drawn, total = resample(sums, draws, seed), sums.sum(0)
    with np.errstate(invalid="ignore"):  # a draw may hold none of a rater's prompts
        means, drawn_means = total[:, 0] / total[:, 1], drawn[..., 0] / drawn[..., 1]
    own_prompts = np.count_nonzero(sums[..., 1], axis=0)
    found = [interval(*each) for each in zip(means, drawn_means.T, own_prompts, strict=True)]
    return {
        str(name): dict(zip(("bias", "low", "high"), each, strict=True))
        for name, each in zip(raters, found, strict=True)
    }


def _consistency(own: DataFrame) -> dict[str, Any]:
    """How one rater's answers to hidden repeats compare with the first ones."""
    columns = ["unit", "dimension", "value"]
    both = own.loc[own["kind"] == "repeat", columns].merge(
        own.loc[own["kind"] == "item", columns], on=["unit", "dimension"], suffixes=("", "_first")
    )
    return {
        "repeats": len(both),
        "repeat_agreement": float((both["value"] == both["value_first"]).mean()) if len(both) else None,
    }
