"""What a study says: how often each arm is Excellent, what differs between arms, and how far the raters agree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy import ndarray

from srpo_cli.errors import UsageError
from srpo_cli.metrics.intervals import (
    FEW,
    Interval,
    difference_interval,
    holm,
    interval,
    p_value,
    rate_interval,
    resample,
    wilson,
)
from srpo_cli.study.agreement import agreement, raters_table
from srpo_cli.study.export import GRADES, SIDES, Study
from srpo_cli.study.preference import PRIOR, preferences

if TYPE_CHECKING:
    from pandas import DataFrame

FORMAT = 1
FAIL, PASS, GOOD, EXCELLENT = range(len(GRADES))
OVERALL = "overall"
_RULE = "overall by the rule"  # stands among the dimensions while all are resampled together
_REFITS = 1000  # draws of what is computed anew in each, and of which no corrected p is asked


def analyze(frame: DataFrame, study: Study, draws: int = 10_000, seed: int = 0) -> dict[str, Any]:
    """All figures of a study as plain data.

    Grades count with their values, Fail 0 to Excellent 3. Where experts have resolved a picture on a dimension, their
    grade, the lower median of several, takes the place of each rater's; ``grades_before_resolution`` has the raters'
    own. Training counts for ``training_agreement`` only, repeats for the consistency of a rater only. Agreement and
    bias are of the raters' own grades.

    Rates come with a cluster bootstrap over prompts, which is the interval to quote, and with Wilson's interval, which
    takes the grades of one prompt for independent and is too narrow. ``differences`` are of Excellent rates, against
    the first arm on the same prompts; their p values are corrected by Holm over arms and dimensions together, those of
    win rates over the pairs of arms.

    Args:
        frame: the answers, as :func:`srpo_cli.study.export.read_answers` gives them.
        draws: of the bootstrap; agreement and strengths take 1000 at most.

    UsageError where no dimension has an answer for every arm; MissingError without krippendorff or choix.
    """
    training = frame[frame["kind"] == "training"]
    answers = _one_way_round(frame[frame["kind"] != "training"], study)
    items = answers[answers["kind"] == "item"]
    dimensions = {name: title for name, title in study.dimensions.items() if _complete(items, name, study)}
    if not dimensions:
        raise UsageError(
            f"study {study.name} has too few answers yet, {len(items)} and not one for every arm: `srpo eval rate "
            "status` says how far its raters are"
        )
    pairs = study.mode == "pairs"
    resolved, replaced = replace_resolved(answers)
    refits = min(draws, _REFITS)
    levels = len(SIDES if pairs else GRADES)
    given = int(answers["kind"].isin(["item", "repeat"]).sum())
    result = {
        "format": FORMAT,
        "study": study.name,
        "mode": study.mode,
        "arms": list(study.arms),
        "raters": study.raters,
        "experts": study.experts,
        "prompts": study.prompts,
        "pictures": study.pictures,
        "answers": given,
        "complete": given / study.due,
        "dimensions": [{"name": name, "title": title} for name, title in dimensions.items()],
        "grade_names": list(GRADES),
        "grades": {},
        "differences": [],
        "agreement": {name: agreement(items[items["dimension"] == name], levels, refits, seed) for name in dimensions},
        "raters_table": raters_table(answers, training, pairs, draws, seed),
        "overall_rule": {},
        "pairs": None,
        "notes": _notes(study, items, dimensions, given, replaced),
    }
    if pairs:
        asked = OVERALL if OVERALL in study.dimensions else list(study.dimensions)[-1]
        result["pairs"] = preferences(resolved[resolved["dimension"] == asked], study.arms, draws, refits, seed)
    else:
        result |= grade_figures(resolved, study.arms, list(dimensions), draws, seed)
        if replaced:
            before = grade_figures(items, study.arms, list(dimensions), draws, seed)
            result["grades_before_resolution"] = before["grades"]
    return result


def replace_resolved(answers: DataFrame) -> tuple[DataFrame, int]:
    """The raters' answers with the experts' in the place of each one that was resolved, and how many that are.

    The answer of several experts is the lower median of theirs.
    """
    items = answers[answers["kind"] == "item"]
    resolutions = answers[answers["kind"] == "resolution"]
    if resolutions.empty:
        return items, 0
    what = ["unit", "dimension"]
    consensus = resolutions.groupby(what)["value"].quantile(0.5, interpolation="lower")
    found = items.join(consensus.rename("consensus"), on=what)["consensus"]
    return items.assign(value=found.fillna(items["value"]).astype(int)), int(found.notna().sum())


def overall_rule(grades: ndarray) -> ndarray:
    """The paper's overall grade (N,) from the grades (N, dimensions) of a picture.

    Fail if any is Fail, Excellent if all are Excellent, Good if at least half are, else Pass.
    """
    excellent = grades == EXCELLENT
    conditions = [(grades == FAIL).any(1), excellent.all(1), excellent.mean(1) >= 0.5]
    return np.select(conditions, [FAIL, EXCELLENT, GOOD], PASS)


def grade_figures(
    answers: DataFrame, arms: Sequence[str], dimensions: Sequence[str], draws: int, seed: int
) -> dict[str, Any]:
    """``grades``, ``differences`` and ``overall_rule`` of :func:`analyze`, from one grade a row."""
    import pandas as pd

    asked = [name for name in dimensions if name != OVERALL]
    by_rule = _by_the_rule(answers, asked) if len(asked) > 1 else answers.iloc[:0]
    names = [*dimensions, *([_RULE] if set(by_rule["arm"]) == set(arms) else [])]
    table = _tally(pd.concat([answers, by_rule]), arms, names)
    drawn = resample(table, draws, seed)
    figures: dict[str, dict[str, Any]] = {arm: {} for arm in arms}
    for (place, name), (number, arm) in product(enumerate(names), enumerate(arms)):
        figures[arm][name] = _figures(table[:, place, number], drawn[:, place, number])
    rule = {arm: figures[arm].pop(_RULE) for arm in arms if _RULE in figures[arm]}
    return {"grades": figures, "differences": _differences(table, drawn, figures, dimensions), "overall_rule": rule}


def _by_the_rule(answers: DataFrame, dimensions: Sequence[str]) -> DataFrame:
    """A row of dimension ``_RULE`` for each picture and rater that has a grade on all ``dimensions``."""
    who = ["rater", "unit", "arm", "prompt_id"]
    wide = answers.set_index([*who, "dimension"])["value"].unstack("dimension").reindex(columns=dimensions).dropna()
    return wide.assign(value=overall_rule(wide.to_numpy()), dimension=_RULE).reset_index()


def _tally(answers: DataFrame, arms: Sequence[str], dimensions: Sequence[str]) -> ndarray:
    """How often each grade was given, (prompts, dimensions, arms, grades)."""
    known = answers[answers["dimension"].isin(dimensions)]
    prompts, prompt = np.unique(known["prompt_id"], return_inverse=True)
    places = [
        known[column].map({name: place for place, name in enumerate(names)}).to_numpy(int)
        for column, names in (("dimension", dimensions), ("arm", arms))
    ]
    table = np.zeros((len(prompts), len(dimensions), len(arms), len(GRADES)), dtype=int)
    np.add.at(table, (prompt, *places, known["value"].to_numpy(int)), 1)
    return table


def _share(counts: ndarray, least: int) -> ndarray:
    """Of counts (..., grades), the share of ``least`` and better, (...); NaN where there are none."""
    with np.errstate(invalid="ignore"):  # a draw may hold no graded prompt
        return counts[..., least:].sum(-1) / counts.sum(-1)


def _figures(table: ndarray, drawn: ndarray) -> dict[str, Any]:
    """Of one arm on one dimension: counts (prompts, grades), and their sums over the prompts of each draw."""
    counts, prompts = table.sum(0), int(table.any(1).sum())
    with np.errstate(invalid="ignore"):
        means = drawn @ range(len(GRADES)) / drawn.sum(-1)
    found = {
        "mean": interval(counts @ range(len(GRADES)) / counts.sum(), means, prompts, least=FAIL, most=EXCELLENT),
        "excellent": rate_interval(_share(counts, EXCELLENT), _share(drawn, EXCELLENT), prompts),
        "excellent_wilson": wilson(counts[EXCELLENT], counts.sum()),
        "good_or_better": rate_interval(_share(counts, GOOD), _share(drawn, GOOD), prompts),
    }
    return {"counts": counts.tolist(), **{name: each._asdict() for name, each in found.items()}}


def _differences(
    table: ndarray, drawn: ndarray, figures: Mapping[str, Mapping[str, Any]], dimensions: Sequence[str]
) -> list[dict[str, Any]]:
    baseline, *others = figures
    rates = _share(drawn, EXCELLENT)
    rows = []
    for (number, arm), (place, name) in product(enumerate(others, 1), enumerate(dimensions)):
        drawn_difference = rates[:, place, number] - rates[:, place, 0]
        prompts = int(table[:, place, [0, number]].any(-1).all(1).sum())
        both = [Interval(**figures[each][name]["excellent"]) for each in (baseline, arm)]
        difference, low, high = difference_interval(*both, drawn_difference, prompts)
        row = {"baseline": baseline, "arm": arm, "dimension": name, "difference": difference, "low": low, "high": high}
        rows.append({**row, "p": p_value(difference, drawn_difference, prompts)})
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = corrected
    return rows


def _one_way_round(answers: DataFrame, study: Study) -> DataFrame:
    """The answers with a column unit, what was judged, whoever did and whichever side it was on.

    Of pairs, the arms are in the study's order in columns first and second, and value is 0 where the first one is
    preferred; the side that was chosen stays in column side.
    """
    if study.mode == "grades":
        return answers.assign(unit=answers["picture"])
    place = {arm: number for number, arm in enumerate(study.arms)}
    swapped = answers["arm_left"].map(place) > answers["arm_right"].map(place)

    def in_order(left: str, right: str) -> Any:
        return answers[left].where(~swapped, answers[right])

    return answers.assign(
        first=in_order("arm_left", "arm_right"),
        second=in_order("arm_right", "arm_left"),
        unit=in_order("picture_left", "picture_right") + " " + in_order("picture_right", "picture_left"),
        side=answers["value"],
        value=answers["value"].where(~swapped, len(SIDES) - 1 - answers["value"]),
    )


def _complete(items: DataFrame, dimension: str, study: Study) -> bool:
    """Whether every arm has an answer on a dimension."""
    own = items[items["dimension"] == dimension]
    columns = ["first", "second"] if study.mode == "pairs" else ["arm"]
    return set(study.arms) <= {arm for column in columns for arm in own[column]}


def _notes(study: Study, items: DataFrame, dimensions: Mapping[str, str], given: int, replaced: int) -> list[str]:
    """What a reader has to know about the figures, a sentence or two each."""
    prompts = items["prompt_id"].nunique()
    notes = [
        "Intervals are 95 % cluster bootstrap intervals over prompts: they say what the same raters would find on "
        "other prompts, not what other raters would."
    ]
    if study.mode == "grades":
        notes += [
            "Quote these for Excellent rates. Wilson's interval takes the grades of one prompt for independent and is "
            "too narrow.",
            "Overall by the rule, from one rater's grades of one picture on the other dimensions: Fail if any is Fail, "
            "Excellent if all are, Good if at least half are Excellent, else Pass.",
        ]
    else:
        notes += [
            "A tie counts as half a win for both. A rater's bias is towards the right side, from -1 to 1.",
            "Strengths are Bradley-Terry's, in log odds around a mean of 0, slightly drawn together (choix, alpha "
            f"{PRIOR:g}: with two arms half a win each way more than counted), so that an arm which always wins has "
            "one; its interval says little then.",
        ]
    if prompts < FEW:
        notes.append(f"Only {prompts} prompts have answers: intervals and p values of so few are rough.")
    if given < study.due:
        notes.append(f"{given} of {study.due} answers are in: figures are of these.")
    if study.waiting.unresolved or study.waiting.with_experts:
        notes.append(
            f"Resolutions outstanding: {study.waiting.unresolved} to be given to the experts (`srpo eval rate "
            f"resolve`), {study.waiting.with_experts} to be answered by them; the raters' own grades count there."
        )
    if replaced:
        notes.append(f"{replaced} of {len(items)} grades are the experts' consensus in place of a rater's grade.")
    notes += [
        f"{title}: not every arm has an answer yet, so it is left out."
        for name, title in study.dimensions.items()
        if name not in dimensions
    ]
    return notes
