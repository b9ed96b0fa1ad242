"""Which model is better, by how much, and is that sure: the answer in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from srpo_cli.metrics.aggregate import ALL, LEVEL
from srpo_cli.pages.writing import interval, is_number, isolated, listed, number, p_value, percent

_PARTS_OF = {"caption_accuracy": {f"{part}_accuracy" for part in ("shape", "colour", "ground", "light")}}
_DIRECTED = ("higher", "lower")


def judged(comparison: Mapping[str, Any], measure: Mapping[str, Any]) -> str:
    """``better``, ``worse``, ``changed`` (where no direction is better) or ``same`` (no difference is shown)."""
    p, difference = comparison.get("p_holm"), comparison.get("difference")
    if p is None or difference is None or not p < LEVEL or difference == 0:
        return "same"
    if measure["better"] not in _DIRECTED:
        return "changed"
    return "better" if (difference > 0) == (measure["better"] == "higher") else "worse"


def main_measures(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The measures of which one direction is better, each thing once.

    Left out are the parts of a measure that is there as a whole and what is another one times a hundred.
    """
    names, parts = {measure["name"] for measure in result["measures"]}, parts_of_others(result)
    again = {f"sgp_x100:{name.removeprefix('sgp:')}" for name in names if name.startswith("sgp:")}
    return [
        measure
        for measure in result["measures"]
        if measure["better"] in _DIRECTED and measure["name"] not in parts | again
    ]


def parts_of_others(result: Mapping[str, Any]) -> set[str]:
    """Names of the measures that are a part of one which is there as a whole."""
    names = {measure["name"] for measure in result["measures"]}
    return set().union(*(parts for whole, parts in _PARTS_OF.items() if whole in names)) & names


def compared_models(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(baseline, model) of every pair that was compared over all prompts, in order."""
    return list(dict.fromkeys((c["baseline"], c["model"]) for c in result["comparisons"] if c["group"] == ALL))


def verdict(result: Mapping[str, Any]) -> list[str]:
    """A sentence for each model that was compared, which ones lead where they are many, and who may have hacked.

    ``result`` is that of ``results.json``. A difference is named where its Holm-corrected p-value over all prompts is
    below ``LEVEL``; what is not shown to differ is said to be so, and is never called equal.
    """
    pairs = compared_models(result)
    if not pairs:
        labels = listed(isolated(model["label"]) for model in result["models"])
        return [f"Nothing was compared: the figures below are those of {labels}."]
    return [_sentence(result, *pair) for pair in pairs] + _leaders(result) + _hacking(result)


def _sentence(result: Mapping[str, Any], baseline: str, model: str) -> str:
    found: dict[str, list[str]] = {"better": [], "worse": [], "same": []}
    overall = {
        c["measure"]: c
        for c in result["comparisons"]
        if (c["baseline"], c["model"], c["group"]) == (baseline, model, ALL)
    }
    for measure in main_measures(result):
        if comparison := overall.get(measure["name"]):
            kind = judged(comparison, measure)
            found[kind].append(_named(comparison, measure, kind))
    model, baseline = isolated(model), isolated(baseline)
    parts = []
    if found["better"]:
        parts.append(f"{model} is better than {baseline} on {listed(found['better'])}")
    if found["worse"]:
        start = "its" if parts else f"Against {baseline}, {model} is better on nothing that was measured; its"
        parts.append(f"{start} {listed(found['worse'])}")
    if found["same"]:
        start = "no difference is shown in" if parts else f"No difference between {model} and {baseline} is shown in"
        parts.append(f"{start} {listed(found['same'])}")
    nothing = f"{model} and {baseline} share no measure of which one direction is better"
    return "; ".join(parts or [nothing]) + "."


def _named(comparison: Mapping[str, Any], measure: Mapping[str, Any], kind: str) -> str:
    digits = measure["digits"]
    figures = f"{number(comparison['difference'], digits, sign=True)} {interval(comparison, digits, sign=True)}"
    if kind == "better":
        return f"{measure['title']} ({figures}, {p_value(comparison['p_holm'])})"
    if kind == "worse":
        direction = "higher" if comparison["difference"] > 0 else "lower"
        return f"{measure['title']} is {direction} ({figures}, {p_value(comparison['p_holm'])})"
    return f"{measure['title']} ({figures})"


def _leaders(result: Mapping[str, Any]) -> list[str]:
    """Which model has the best mean of each measure; of two models the comparison says it."""
    led: dict[str, list[str]] = {}
    for measure in main_measures(result):
        means = {}
        for model in result["models"]:
            figure = result["figures"].get(model["label"], {}).get(ALL, {}).get(measure["name"])
            if figure and is_number(figure["mean"]):
                means[model["label"]] = figure["mean"]
        best = max if measure["better"] == "higher" else min
        leaders = [label for label, mean in means.items() if mean == best(means.values())]
        if len(means) > 2 and len(leaders) == 1:
            led.setdefault(leaders[0], []).append(measure["title"])
    parts = [f"{isolated(label)} on {listed(titles)}" for label, titles in led.items()]
    return [f"By the means alone the best is {'; '.join(parts)}."] if parts else []


def _hacking(result: Mapping[str, Any]) -> list[str]:
    titles = {measure["name"]: measure["title"] for measure in result["measures"]}
    moved: dict[str, list[str]] = {}
    for signal in result["hacking"]:
        if signal["crossed"]:
            direction = "rose" if signal["difference"] > 0 else "fell"
            moved.setdefault(signal["model"], []).append(
                f"{titles.get(signal['signal'], signal['signal'])} {direction}"
            )
    alike: dict[str, list[str]] = {}
    for model, signals in moved.items():
        alike.setdefault(listed(signals), []).append(isolated(model))
    return [
        f"Look at the pictures of {listed(models)} before you believe {'their' if len(models) > 1 else 'its'} "
        f"rewards: {signals} by more than half a standard deviation of the baseline's pictures."
        for signals, models in alike.items()
    ]


def study_verdict(study: Mapping[str, Any]) -> list[str]:
    """What the people said, a sentence for each arm that is compared with the first, or each pair of arms."""
    if study["mode"] == "pairs":
        return [_pair_sentence(pair) for pair in study["pairs"]["win_rates"]]
    titles = {dimension["name"]: dimension["title"] for dimension in study["dimensions"]}
    sentences = []
    for baseline, arm in dict.fromkeys((d["baseline"], d["arm"]) for d in study["differences"]):
        found: dict[str, list[str]] = {"more": [], "less": [], "same": []}
        for difference in study["differences"]:
            if (difference["baseline"], difference["arm"]) == (baseline, arm):
                kind = _often(difference)
                found[kind].append(_points(difference, titles[difference["dimension"]], kind))
        arm, baseline = isolated(arm), isolated(baseline)
        parts = [
            f"{arm} is graded Excellent {kind} often than {baseline} on {listed(found[kind])}"
            for kind in ("more", "less")
            if found[kind]
        ]
        if found["same"]:
            start = "no difference is shown on" if parts else f"No difference between {arm} and {baseline} is shown on"
            parts.append(f"{start} {listed(found['same'])}")
        sentences.append("; ".join(parts) + ".")
    return sentences


def _often(difference: Mapping[str, Any]) -> str:
    if difference["p_holm"] is None or not difference["p_holm"] < LEVEL or not difference["difference"]:
        return "same"
    return "more" if difference["difference"] > 0 else "less"


def _points(difference: Mapping[str, Any], title: str, kind: str) -> str:
    percentages = {key: 100 * difference[key] for key in ("low", "high") if difference[key] is not None}
    figures = f"{number(100 * difference['difference'], 1, sign=True)} points {interval(percentages, 1, sign=True)}"
    return f"{title} ({figures})" if kind == "same" else f"{title} ({figures}, {p_value(difference['p_holm'])})"


def _pair_sentence(row: Mapping[str, Any]) -> str:
    rate, arm, against = row["rate"], isolated(row["arm"]), isolated(row["against"])
    figures = f"{percent(rate['mean'])} [{percent(rate['low'])}, {percent(rate['high'])}], ties counted half"
    if row["p_holm"] is None or not row["p_holm"] < LEVEL:
        return f"No preference between {arm} and {against} is shown ({arm} wins {figures})."
    figures += f", {p_value(row['p_holm'])}"
    if rate["mean"] > 0.5:
        return f"{arm} is preferred to {against} ({figures})."
    return f"{against} is preferred to {arm} ({arm} wins {figures})."
