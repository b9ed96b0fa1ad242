"""The parts of a report that come from ``results.json``: tables, differences, plots, signals, protocol."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from srpo_cli.metrics.aggregate import ALL
from srpo_cli.pages.charts import Mark, interval_plot, zero_bar
from srpo_cli.pages.glossary import DIRECTIONS, READING, meaning, note_beside, signal_meaning
from srpo_cli.pages.verdict import compared_models, judged, main_measures, parts_of_others, verdict
from srpo_cli.pages.writing import NONE, interval, is_number, listed, number, p_value, percent, plain

_WORDS = {"better": "better", "worse": "worse", "changed": "changed", "same": "no difference shown"}

Result = Mapping[str, Any]


def results_context(result: Result, folder: Path) -> dict[str, Any]:
    """What the templates show of a result that lies in ``folder``."""
    measures = [_described(measure, number) for number, measure in enumerate(result["measures"])]
    parts, main = parts_of_others(result), {measure["name"] for measure in main_measures(result)}
    directed = [m for m in measures if m["better"] in DIRECTIONS and m["name"] not in parts] or measures
    others = [measure for measure in measures if measure not in directed]
    plotted = [measure for measure in measures if measure["name"] in main] or measures
    return {
        "heading": heading(result),
        "title": f"{listed(plain(model['label']) for model in result['models'])}: srpo eval",
        "models": [_model(result, model, folder) for model in result["models"]],
        "measures": measures,
        "facts": _facts(result),
        "verdict": verdict(result),
        "notes": result["notes"],
        "unverified": result.get("prompts", {}).get("unverified", ()),
        "unknown": _unknown(result),
        "mixed": result["protocol"].get("mixed", ()),
        "reading": READING,
        "miniature": of_the_miniature(result),
        "main": figures_table(result, directed, "Means over all prompts, with 95 % intervals", True),
        "statistics": figures_table(result, others, "Parts of these, and statistics of the pictures"),
        "batches": _batches(result, measures),
        "differences": [_pair(result, directed, others, *pair) for pair in compared_models(result)],
        "interval_cards": [card for measure in plotted if (card := _interval_card(result, measure))],
        "group_cards": _group_cards(result, plotted),
        "hacking": [_signal(result, signal) for signal in result["hacking"]],
        "protocol": list(flattened(result["protocol"])),
        "environment": list(flattened(result["environment"])),
        "commands": commands(result),
    }


def of_the_miniature(result: Result) -> bool:
    """Whether the figures are about the built-in miniature, which is no evidence about FLUX."""
    prompts = result["protocol"]["benchmark"].get("prompts") or {}
    drawn = any(model["model"] == "miniature" for model in result["models"])
    return drawn or result["benchmark"] == "miniature" or prompts.get("layout") == "world"


def commands(result: Result) -> list[str]:
    """What was typed for the result, or for each of those that it was put together from, where that is recorded."""
    typed = result.get("commands") or [result["environment"].get("command", [])]
    return [shlex.join(["srpo", *map(str, words[1:])]) for words in typed if words[1:2] == ["eval"]]


def flattened(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Nested plain data as (dotted name, text) rows, in order; lists of plain values stay together."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flattened(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for place, inner in enumerate(value):
            yield from flattened(inner, f"{name}.{place}")
    else:
        yield name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def figures_table(
    result: Result, measures: Sequence[Mapping[str, Any]], caption: str, with_published: bool = False
) -> dict[str, Any]:
    """Rows of models and columns of ``measures`` over all prompts, and the published rows where they have figures."""
    labels = [model["label"] for model in result["models"]]
    baselines = {baseline for baseline, _ in compared_models(result)}
    kinds = {
        (c["model"], c["measure"]): judged(c, measure)
        for measure in measures
        for c in result["comparisons"]
        if c["group"] == ALL and c["measure"] == measure["name"]
    }
    rows = []
    for series, label in enumerate(labels):
        cells = [
            _cell(_figure(result, label, ALL, measure), measure, kinds.get((label, measure["name"]), ""))
            for measure in measures
        ]
        rows.append({"label": plain(label), "series": series, "baseline": label in baselines, "cells": cells})
    published = _published(result, measures) if with_published else None
    return {"caption": caption, "measures": measures, "rows": rows, "published": published}


def _described(measure: Mapping[str, Any], place: int) -> dict[str, Any]:
    return {**measure, "anchor": f"m{place}", "meaning": meaning(measure), "note_beside": note_beside(measure)}


def _facts(result: Result) -> str:
    models, protocol, counts = result["models"], result["protocol"], result["counts"]
    parts = [f"{counts['prompts']:,} prompts"]
    if counts["texts"] < counts["prompts"]:
        parts.append(f"{counts['texts']:,} different texts")
    pictures = sum(model["pictures"] for model in models)
    parts.append(f"{pictures:,} pictures of {len(models)} model{'s' if len(models) > 1 else ''}")
    if protocol.get("steps"):
        parts.append(f"{protocol['steps']} steps")
    if protocol.get("size"):
        parts.append(f"{' by '.join(map(str, protocol['size']))} pixels")
    return ", ".join(parts) + "."


def _unknown(result: Result) -> str:
    """The models of which nobody knows how their pictures were drawn."""
    return listed(plain(model["label"]) for model in result["models"] if model.get("sampling") == "unknown")


def _model(result: Result, model: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A model with its cost, and its weights as they are found from the folder."""
    weights = model["weights"] or model.get("sampling", "its own")
    if os.path.isabs(weights):
        weights = os.path.relpath(weights, folder.resolve())
    return {**model, "weights": weights, "cost": _cost(result["cost"].get(model["label"], {}))}


def _figure(result: Result, label: str, group: str, measure: Mapping[str, Any]) -> Mapping[str, Any] | None:
    figure = result["figures"].get(label, {}).get(group, {}).get(measure["name"])
    return figure if figure and is_number(figure["mean"]) else None


def _cell(figure: Mapping[str, Any] | None, measure: Mapping[str, Any], kind: str) -> dict[str, str]:
    if not figure:
        return {"mean": NONE, "interval": "", "kind": ""}
    ends = interval(figure, measure["digits"]) if is_number(figure.get("low")) else ""
    return {"mean": number(figure["mean"], measure["digits"]), "interval": ends, "kind": kind}


def published_rows(result: Result, measures: Sequence[Mapping[str, Any]]) -> list[tuple[str, dict[str, float]]]:
    """Each published model that has any of ``measures``, with its figures by their names.

    Figures are stated by a measure's name or by its title in small letters, since a plug-in's name is its file's.
    """
    rows = []
    for row in result["published"]["rows"] if result["published"] else ():
        found = {m["name"]: row["figures"].get(m["name"], row["figures"].get(m["title"].lower())) for m in measures}
        if figures := {name: figure for name, figure in found.items() if figure is not None}:
            rows.append((row["model"], figures))
    return rows


def published_note(result: Result) -> str:
    """Where published rows are from and in what they may differ, also from a part of the prompts."""
    published = result["published"]
    parts = [published["source"], published["note"]]
    if any(chosen is not None for chosen in result.get("selection", {}).values()):
        parts.append("They are of the whole set, of which a part was measured here")
    return " ".join(f"{part.rstrip('.')}." for part in parts if part)


def _published(result: Result, measures: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    rows = [
        {"model": plain(label), "cells": [number(figures.get(m["name"]), m["digits"]) for m in measures]}
        for label, figures in published_rows(result, measures)
    ]
    return {"note": published_note(result), "rows": rows} if rows else None


def _batches(result: Result, measures: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    found = result["batches"]
    shown = [m for m in measures if any(m["name"] in group for label in found.values() for group in label.values())]
    rows = []
    for label, groups in found.items():
        for group, figures in groups.items():
            cells = []
            for measure in shown:
                figure, digits = figures.get(measure["name"]), measure["digits"]
                told = f"{number(figure['mean'], digits)} ± {number(figure['std'], digits + 1)}" if figure else NONE
                cells.append(told)
            size = f"{next(iter(figures.values()))['prompts']:g}" if figures else NONE
            rows.append({"label": plain(label), "group": plain(group), "size": size, "cells": cells})
    return {"measures": shown, "rows": rows} if rows else None


def _pair(
    result: Result,
    directed: Sequence[Mapping[str, Any]],
    others: Sequence[Mapping[str, Any]],
    baseline: str,
    model: str,
) -> dict[str, Any]:
    """The differences of one model from the baseline, and those in which no direction is better or that are parts."""
    series = [each["label"] for each in result["models"]].index(model)
    rows, more = (_difference_rows(result, measures, baseline, model) for measures in (directed, others))
    return {"baseline": plain(baseline), "model": plain(model), "series": series, "rows": rows, "more": more}


def _difference_rows(
    result: Result, measures: Sequence[Mapping[str, Any]], baseline: str, model: str
) -> list[dict[str, Any]]:
    of_pair = [c for c in result["comparisons"] if (c["baseline"], c["model"]) == (baseline, model)]
    overall = {c["measure"]: c for c in of_pair if c["group"] == ALL}
    rows = []
    for measure in measures:
        comparison = overall.get(measure["name"])
        if not comparison or not is_number(comparison["difference"]):
            continue
        kind = judged(comparison, measure)
        by_group = [c for c in of_pair if c["group"] != ALL and c["measure"] == measure["name"]]
        rows.append(
            {
                **_difference(comparison, measure["digits"], measure["title"]),
                "name": measure["name"],
                "title": measure["title"],
                "base": number(_mean(result, baseline, measure), measure["digits"]),
                "value": number(_mean(result, model, measure), measure["digits"]),
                "kind": kind,
                "words": _WORDS[kind],
                "wins": percent(comparison["wins"]),
                "groups": f"{sum(judged(c, measure) == kind for c in by_group)} of {len(by_group)}" if by_group else "",
            }
        )
    return rows


def _difference(found: Mapping[str, Any], digits: int, title: str) -> dict[str, Any]:
    """A difference as text and as a bar around zero."""
    ends = interval(found, digits, sign=True)
    told = f"{title}: {number(found['difference'], digits, sign=True)} {ends}"
    low, high = (found[key] if is_number(found[key]) else None for key in ("low", "high"))
    return {
        "difference": number(found["difference"], digits, sign=True),
        "interval": ends,
        "p": p_value(found["p_holm"], named=False),
        "svg": zero_bar(Mark(found["difference"], low, high, title=told)),
    }


def _mean(result: Result, label: str, measure: Mapping[str, Any]) -> float | None:
    figure = _figure(result, label, ALL, measure)
    return figure["mean"] if figure else None


def _mark(figure: Mapping[str, Any], series: int, title: str) -> Mark:
    low, high = (figure.get(key) if is_number(figure.get(key)) else None for key in ("low", "high"))
    return Mark(figure["mean"], low, high, series, title)


def _interval_card(result: Result, measure: Mapping[str, Any]) -> dict[str, Any] | None:
    rows = []
    for series, model in enumerate(result["models"]):
        if figure := _figure(result, model["label"], ALL, measure):
            rows.append((plain(model["label"]), [_mark(figure, series, model["label"])]))
    if not rows:
        return None
    reference = rows[0][1][0].mean if len(result["models"]) > 1 else None
    chart = interval_plot(rows, f"{measure['title']} of each model", measure["digits"], reference)
    return {"title": measure["title"], "note": DIRECTIONS.get(measure["better"], ""), "svg": chart}


def _group_cards(result: Result, measures: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if len(result["groups"]) < 2:
        return []
    cards = []
    for measure in measures:
        rows = []
        for group in result["groups"]:
            marks = [
                _mark(figure, series, model["label"])
                for series, model in enumerate(result["models"])
                if (figure := _figure(result, model["label"], group, measure))
            ]
            if marks:
                rows.append((plain(group), marks))
        if rows:
            chart = interval_plot(rows, f"{measure['title']} by group", measure["digits"])
            cards.append({"title": measure["title"], "note": DIRECTIONS.get(measure["better"], ""), "svg": chart})
    return cards


def _signal(result: Result, signal: Mapping[str, Any]) -> dict[str, Any]:
    named = {measure["name"]: measure for measure in result["measures"]}
    measure = named[signal["signal"]]
    digits = measure["digits"]
    return {
        **_difference(signal, digits, measure["title"]),
        "model": plain(signal["model"]),
        "series": [each["label"] for each in result["models"]].index(signal["model"]),
        "signal": signal["signal"],
        "title": measure["title"],
        "base": number(signal["base"], digits),
        "value": number(signal["value"], digits),
        "crossed": signal["crossed"],
        "size": _size(signal),
        "meaning": signal_meaning(signal["signal"], signal["difference"]),
    }


def _size(signal: Mapping[str, Any]) -> str:
    """How large a signal's difference is beside what the baseline's pictures differ by among themselves."""
    if not signal["spread"]:
        return "The baseline's pictures are all alike in it."
    return f"{number(abs(signal['difference']) / signal['spread'], 1)} standard deviations of the baseline's pictures."


def _cost(cost: Mapping[str, Any]) -> str:
    parts = []
    if is_number(cost.get("seconds")):
        parts.append(f"{cost['seconds']:,.0f} s")
    if is_number(cost.get("pictures_drawn")):
        parts.append(f"{cost['pictures_drawn']:,} drawn")
    return ", ".join(parts) or NONE


def heading(result: Result) -> str:
    """What the report is about, as its headline."""
    labels = [plain(model["label"]) for model in result["models"]]
    if len(labels) == 1:
        return f"How good is {labels[0]}?"
    if len(labels) == 2:
        return f"Is {labels[1]} better than {labels[0]}?"
    return f"Which of {len(labels)} models is better?"


def sentence(text: str) -> str:
    """A line with a capital at its start and a stop at its end."""
    text = re.sub(r"[.\s]+$", "", plain(text))
    return f"{text[:1].upper()}{text[1:]}." if text else ""
