"""The parts of a report that come from a human study: grades, rates, agreement, raters, pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srpo_cli.metrics.aggregate import LEVEL
from srpo_cli.pages.charts import Mark, interval_plot, reach_of, stacked_bars, zero_bar
from srpo_cli.pages.verdict import study_verdict
from srpo_cli.pages.writing import NONE, interval, is_number, number, p_value, percent, plain

RULE = "Overall by the rule"
"""Heading of what the paper's rule makes of the grades on the other dimensions."""

Study = Mapping[str, Any]


def study_context(study: Study) -> dict[str, Any]:
    """What the templates show of an analysis."""
    graded = bool(study["grades"])
    return {
        "study_verdict": study_verdict(study),
        "study_facts": _facts(study),
        "grade_names": study["grade_names"][::-1],
        "grade_cards": _grade_cards(study) if graded else [],
        "excellent": _excellent(study) if graded else [],
        "excellent_card": _excellent_card(study) if graded else None,
        "study_differences": _differences(study),
        "pairs": _pairs(study["pairs"]) if study["pairs"] else None,
        "agreement": _agreement(study),
        "raters": [_rater(rater) for rater in study["raters_table"]],
        "bias_card": _bias_card(study),
    }


def _facts(study: Study) -> str:
    complete = "" if study["complete"] >= 1 else f", {percent(study['complete'])} of all that were asked"
    return (
        f"{_counted(study, 'rater')} and {_counted(study, 'expert')}, who did not know which model drew what; "
        f"{_counted(study, 'prompt')}, {_counted(study, 'picture')}, {_counted(study, 'answer')}{complete}."
    )


def _counted(study: Study, what: str) -> str:
    """How many of something there are, "1 expert" or "3 experts"."""
    count = study[f"{what}s"]
    return f"{count:,} {what}{'s' * (count != 1)}"


def _grade_cards(study: Study) -> list[dict[str, Any]]:
    names = study["grade_names"][::-1]
    cards = []
    for dimension in study["dimensions"]:
        found = {arm: of_arm.get(dimension["name"]) for arm, of_arm in study["grades"].items()}
        cards.append(_bars({arm: f["counts"] for arm, f in found.items() if f}, names, dimension["title"]))
    rule = {arm: each["counts"] for arm, each in study["overall_rule"].items()}
    return [*cards, _bars(rule, names, RULE)] if rule else cards


def _bars(counts: Mapping[str, list[int]], names: list[str], title: str) -> dict[str, Any]:
    rows = [(plain(arm), of_arm[::-1]) for arm, of_arm in counts.items()]
    return {"title": title, "note": "", "svg": stacked_bars(rows, names, f"Grades: {title}")}


def _excellent(study: Study) -> list[dict[str, Any]]:
    return [
        {
            "arm": plain(arm),
            "cells": [_rates(study["grades"][arm].get(dimension["name"])) for dimension in study["dimensions"]],
        }
        for arm in study["arms"]
        if arm in study["grades"]
    ]


def _rates(figures: Mapping[str, Any] | None) -> dict[str, str]:
    if not figures:
        return dict.fromkeys(("rate", "interval", "wilson", "good", "mean"), NONE)
    mean = figures["mean"]
    return {
        "rate": percent(figures["excellent"]["mean"], 1),
        "interval": _percents(figures["excellent"]),
        "wilson": _percents(figures["excellent_wilson"]),
        "good": f"{percent(figures['good_or_better']['mean'], 1)} {_percents(figures['good_or_better'])}",
        "mean": f"{number(mean['mean'], 2)} {interval(mean, 2)}",
    }


def _percents(figure: Mapping[str, Any], sign: bool = False) -> str:
    ends = {key: 100 * figure[key] for key in ("low", "high") if is_number(figure[key])}
    return interval(ends, 1, sign)


def _excellent_card(study: Study) -> dict[str, Any]:
    rows = [
        (dimension["title"], [_excellent_mark(study, arm, dimension["name"]) for arm in study["arms"]])
        for dimension in study["dimensions"]
    ]
    chart = interval_plot(rows, "Excellent rates, per cent", 1)
    return {"title": "Excellent, per cent", "note": "with intervals that know of the prompts", "svg": chart}


def _excellent_mark(study: Study, arm: str, dimension: str) -> Mark:
    figure = study["grades"][arm][dimension]["excellent"]
    low, high = (None if end is None else 100 * end for end in _ends(figure))
    return Mark(100 * figure["mean"], low, high, study["arms"].index(arm), arm)


def _differences(study: Study) -> list[dict[str, Any]]:
    titles = {dimension["name"]: dimension["title"] for dimension in study["dimensions"]}
    marks = [Mark(found["difference"], *_ends(found)) for found in study["differences"]]
    return [
        _difference(found, titles[found["dimension"]], reach_of(marks))
        for found in study["differences"]
        if is_number(found["difference"])
    ]


def _difference(found: Mapping[str, Any], title: str, reach: float) -> dict[str, Any]:
    p, points, ends = found["p_holm"], number(100 * found["difference"], 1, sign=True), _percents(found, sign=True)
    clear = is_number(p) and p < LEVEL
    mark = Mark(found["difference"], *_ends(found), title=f"{title}: {points} points {ends}")
    return {
        "arm": plain(found["arm"]),
        "baseline": plain(found["baseline"]),
        "title": title,
        "difference": points,
        "interval": ends,
        "kind": ("better" if found["difference"] > 0 else "worse") if clear else "same",
        "svg": zero_bar(mark, reach),
        "p": p_value(found["p"], named=False),
        "p_holm": p_value(p, named=False),
    }


def _pairs(pairs: Mapping[str, Any]) -> dict[str, Any]:
    rows, bars = [], []
    for row in pairs["win_rates"]:
        bars.append((plain(f"{row['arm']} / {row['against']}"), [row["wins"], row["ties"], row["losses"]]))
        rate = {"rate": percent(row["rate"]["mean"], 1), "interval": _percents(row["rate"])}
        rows.append({**row, **rate, "arm": plain(row["arm"]), "against": plain(row["against"])})
    marks = [
        (plain(arm), [Mark(figure["mean"], *_ends(figure), series, arm)])
        for series, (arm, figure) in enumerate(pairs["strengths"].items())
        if is_number(figure["mean"])
    ]
    outcomes = stacked_bars(bars, ["win", "tie", "loss"], "Outcomes of each pair of arms")
    strengths = interval_plot(marks, "Bradley-Terry strengths", 2, reference=0.0)
    cards = [
        {"title": "Outcomes", "note": "wins, ties and losses of the first arm", "svg": outcomes},
        {"title": "Strengths", "note": "higher is preferred more often", "svg": strengths},
    ]
    return {"rows": rows, "cards": cards}


def _agreement(study: Study) -> list[dict[str, str]]:
    rows = []
    for dimension in study["dimensions"]:
        if found := study["agreement"].get(dimension["name"]):
            known = is_number(found["alpha"])
            ends = interval(found, 2) if known and is_number(found["low"]) else ""
            alpha = number(found["alpha"], 2)
            rows.append({"title": dimension["title"], "alpha": alpha, "interval": ends, "label": found["label"]})
    return rows


def _rater(rater: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "rater": plain(rater["rater"]),
        "role": rater["role"],
        "answers": f"{rater['answers']:,}",
        "bias": number(rater["bias"], 2, sign=True),
        "interval": interval(rater, 2, sign=True) if is_number(rater["low"]) else "",
        "repeats": rater["repeats"],
        "repeat_agreement": percent(rater["repeat_agreement"]),
        "training_agreement": percent(rater["training_agreement"]),
        "seconds": NONE if rater["median_seconds"] is None else f"{rater['median_seconds']:.1f} s",
    }


def _bias_card(study: Study) -> dict[str, Any] | None:
    rows = [
        (plain(rater["rater"]), [Mark(rater["bias"], *_ends(rater), 1, rater["rater"])])
        for rater in study["raters_table"]
        if is_number(rater["bias"])
    ]
    if not rows:
        return None
    title, note = "Bias of each rater", "mean grade minus that of the others on the same pictures; lower is stricter"
    if study["mode"] == "pairs":
        note = "towards the right side (up to 1) or the left one (down to -1)"
    return {"title": title, "note": note, "svg": interval_plot(rows, title, 2, reference=0.0)}


def _ends(figure: Mapping[str, Any]) -> tuple[float | None, float | None]:
    low, high = (figure[key] if is_number(figure[key]) else None for key in ("low", "high"))
    return low, high
