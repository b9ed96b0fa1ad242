"""What came out of a comparison: figures over seeds, hacking rates, costs, and the page that shows them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from srpo_cli import __version__
from srpo_cli.config.comparison import BASE
from srpo_cli.errors import SrpoError
from srpo_cli.metrics.aggregate import ALL, LEVEL, Measure, is_share, mean_absolute
from srpo_cli.metrics.comparison import FEWEST_SEEDS, cost_at, farthest, over_seeds, p_over_seeds, ratio_over_seeds
from srpo_cli.metrics.intervals import DRAWS, Interval, difference_interval, holm, interval, rate_interval, resample
from srpo_cli.pages.writing import MINUS, NONE, number
from srpo_cli.recipes.compare import COMPARISON, GRADIENT_PASS, Cell, Table
from srpo_cli.recipes.results import TABLE, Result, as_measure, markdown, markdown_table, read_result, shown
from srpo_cli.recipes.score import to_images
from srpo_cli.runtime.checkpoints import Checkpoint, list_checkpoints
from srpo_cli.runtime.folder import write_atomically
from srpo_cli.runtime.pictures import open_picture, save_grid

PAGE, GRID = "table.md", "grid.png"

_DISTANCE = "photo_distance"  # the measure by which pictures are near photographs, or far
UNITS = {"passes": "forwards", "cpu_seconds": "CPU seconds"}
"""What costs are told in."""

_DIGITS = 3  # in tables, whose columns are many and whose intervals are wider than more would tell
_STAR = "a star: Holm-corrected p below 0.05"
_SHOWN = 8  # prompts in the picture grid
_COSTS = {
    "steps": "steps",
    "forwards": "forwards",
    "gradient_passes": "gradient passes",
    "reward_calls": "reward calls",
    "cpu_seconds": "CPU s",
    "peak_memory_gib": "peak GiB",
}


def summarise(table: Table, failed: Mapping[str, str]) -> dict[str, Any]:
    """What ``comparison.json`` holds, out of the finished runs and their evaluations."""
    comparison, rates = table.comparison, table.rates()
    folders = {seed: table.evaluation(seed) for seed in comparison.seeds}
    results = {seed: read_result(folder) for seed, folder in folders.items() if (folder / TABLE).exists()}
    cells = [cell for cell in table.cells(rates) if cell.is_finished and _is_in(cell, results)]
    if not cells:
        why = "; ".join(f"{name}: {reason}" for name, reason in failed.items())
        raise SrpoError(f"no run of {comparison.name} was trained and measured, see {table.output / 'logs'} ({why})")
    measures = {each["name"]: each for result in results.values() for each in result.data["measures"]}
    columns = [name for name in comparison.columns if name in measures]
    trained = [method.label for method in comparison.methods if any(cell.label == method.label for cell in cells)]
    methods = {
        label: _method(label, table, [cell for cell in cells if cell.label == label], results, columns, rates)
        for label in (BASE, *trained)
    }
    groups = {name: [label for label in labels if label in trained] for name, labels in comparison.groups.items()}
    groups = {name: labels for name, labels in groups.items() if labels}
    return {
        "srpo": __version__,
        "comparison": comparison.model_dump(mode="json"),
        "measures": [measures[name] for name in columns],
        "methods": methods,
        "groups": {name: _hacking([BASE, *labels], results, measures) for name, labels in groups.items()},
        "differences": {
            name: differences(labels, comparison.reference, results, [as_measure(measures[each]) for each in columns])
            for name, labels in groups.items()
        },
        "tuning": _tuning(table, rates),
        "costs": _costs(table, cells),
        "failed": dict(failed),
    }


def _is_in(cell: Cell, results: Mapping[int, Result]) -> bool:
    """Whether a run was measured: not where its evaluation has failed, and what is there is older."""
    return cell.seed in results and cell.model in results[cell.seed].data["figures"]


def _method(
    label: str,
    table: Table,
    cells: Sequence[Cell],
    results: Mapping[int, Result],
    columns: Sequence[str],
    rates: Mapping[str, float],
) -> dict[str, Any]:
    """A method's figures over its seeds, and the mean costs of its runs; the untrained model has none."""
    models = {seed: BASE for seed in results} if label == BASE else {cell.seed: cell.model for cell in cells}
    of_seeds = {
        name: {seed: results[seed].data["figures"][model][ALL][name] for seed, model in models.items()}
        for name in columns
    }
    figures = {
        name: over_seeds(
            [Interval(figure["mean"], figure["low"], figure["high"]) for figure in own.values()],
            *_scale(name, results),
        )._asdict()
        for name, own in of_seeds.items()
    }
    found: dict[str, Any] = {
        "figures": figures,
        "seeds": {name: {seed: figure["mean"] for seed, figure in own.items()} for name, own in of_seeds.items()},
    }
    if label == BASE:
        return found
    summaries = [cell.summary() for cell in cells]
    costs = {name: fmean(each["ledger"][name] for each in summaries) for name in _COSTS if name != "steps"}
    method = table.comparison.method(label)
    return {
        **found,
        "preset": method.preset,
        "set": method.set,
        "note": method.note,
        "lr": cells[0].resolved.config.optimizer.lr,
        "tuned": table.comparison.rate_owner(label) in rates,
        "asked_steps": table.steps(label),
        "stopped_by": sorted({each["stopped_by"] for each in summaries}),
        "costs": {"steps": fmean(each["steps"] for each in summaries), **costs},
    }


def differences(
    labels: Sequence[str], reference: str | None, results: Mapping[int, Result], measures: Sequence[Measure]
) -> dict[str, dict[str, Any]]:
    """What sets each method of a table apart from ``reference``, or its first one where that is none of them.

    Runs of a seed share their prompts and noises, and so does what measures them: told seed by seed and prompt by
    prompt, with intervals for other seeds and prompts, from three seeds on. P values are corrected by Holm's rule in
    two families, as a benchmark's are: of what has a better side, and of what has none.
    """
    reference = reference if reference in labels else labels[0]
    found: dict[str, dict[str, Any]] = {}
    p: dict[tuple[str, str], float] = {}
    for label in labels:
        there = [
            (result.table, f"{label}.{seed}", f"{reference}.{seed}")
            for seed, result in results.items()
            if {f"{label}.{seed}", f"{reference}.{seed}"} <= set(result.table["model"])
        ]
        if label != reference and len(there) >= FEWEST_SEEDS:
            seeds = {each.name: [_difference(each, *seed) for seed in there] for each in measures}
            texts = there[0][0]["prompt"].nunique()
            p |= {(label, name): p_over_seeds(own, texts) for name, own in seeds.items()}
            found[label] = {"against": reference, **{name: over_seeds(own)._asdict() for name, own in seeds.items()}}
    for has_better_side in (True, False):
        names = [each.name for each in measures if bool(each.better) == has_better_side]
        family = [(label, name) for label in found for name in names]
        for (label, name), corrected in zip(family, holm([p[test] for test in family]), strict=True):
            found[label][name] |= {"p": p[label, name], "p_holm": corrected}
    return found


def _difference(measure: Measure, pictures: pd.DataFrame, model: str, reference: str) -> Interval:
    """A measure of one model minus that of another, with an interval over the prompts, those of one text together."""
    columns, sums = list(measure.columns), []
    for name in (model, reference):
        by_text = pictures[pictures["model"] == name].groupby("prompt", sort=True)
        sums += [by_text[columns].sum().to_numpy(), by_text.size().to_numpy()[:, None]]
    together = np.concatenate(sums, axis=1)
    texts, width = len(together), len(columns) + 1

    def values(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        means = [rows[:, at : at + width - 1] / rows[:, at + width - 1 : at + width] for at in (0, width)]
        own, other = (measure.reduce(torch.from_numpy(each)).numpy() for each in means)
        return own, other

    (own,), (other,) = values(together.sum(0)[None])
    own_drawn, other_drawn = values(resample(together, DRAWS, seed=0))
    drawn = own_drawn - other_drawn
    if not is_share(measure, pictures):
        return interval(own - other, drawn, texts)
    shares = (rate_interval(other, other_drawn, texts), rate_interval(own, own_drawn, texts))
    return difference_interval(*shares, drawn, texts)


def _scale(name: str, results: Mapping[int, Result]) -> tuple[float, float]:
    """The ends of a measure's scale."""
    for result in results.values():
        for record in result.data["measures"]:
            if record["name"] == name:
                measure = as_measure(record)
                if measure.reduce is mean_absolute:
                    return 0.0, math.inf
                return (0.0, 1.0) if is_share(measure, result.table) else (-math.inf, math.inf)
    raise KeyError(name)


def _hacking(
    labels: Sequence[str], results: Mapping[int, Result], measures: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """By label for what share of the prompts its picture is the farthest from photographs, of all and than the base's.

    None where that is not measured.
    """
    farthest_of_all: dict[str, list[Interval]] = {label: [] for label in labels}
    than_base: dict[str, list[Interval]] = {label: [] for label in labels}
    for seed, result in results.items():
        models = [label if label == BASE else f"{label}.{seed}" for label in labels]
        if _DISTANCE not in measures or not set(models) <= {model["label"] for model in result.data["models"]}:
            continue  # a run of this seed failed, and the others' shares would be larger for it
        distances = torch.stack([_distances(result.table, model, measures[_DISTANCE]["columns"]) for model in models])
        for label, share, own in zip(labels, farthest(distances), distances, strict=True):
            farthest_of_all[label].append(_share(share))
            if label != BASE:
                than_base[label].append(_share((own > distances[labels.index(BASE)]).double()))
    return {
        label: {
            "farthest": over_seeds(farthest_of_all[label], 0, 1)._asdict() if farthest_of_all[label] else None,
            "than_base": over_seeds(than_base[label], 0, 1)._asdict() if than_base[label] else None,
        }
        for label in labels
    }


def _share(values: Tensor) -> Interval:
    """The mean of values in [0, 1], (N,), with its interval; where they are all 0 or all 1 that of so few answers."""
    count = len(values)
    drawn = resample(values.numpy()[:, None], DRAWS, seed=0)[:, 0] / max(1, count - 1)
    return rate_interval(values.mean().item(), drawn, count)


def _distances(pictures: pd.DataFrame, model: str, columns: Sequence[str]) -> Tensor:
    """Of each picture of a model the mean absolute deviation from photographs of its prompt, (N,)."""
    own = pictures[pictures["model"] == model].sort_values(["item", "image"])[list(columns)]
    return torch.from_numpy(own.abs().mean(axis=1).to_numpy())


def _tuning(table: Table, rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """A record for every finished trial, with all figures that rates could have been chosen by."""
    tunings = {method.label: method.tuning for method in table.comparison.methods}
    return [
        {
            "label": cell.label,
            "lr": cell.lr,
            "end": tunings[cell.label].end(cell.lr),
            "chosen": cell.lr == rates.get(cell.label),
            "by": tunings[cell.label].by,
            "figures": {name: _finite(figure["mean"]) for name, figure in cell.summary()["tuned"].items()},
        }
        for cell in table.trials
        if cell.is_finished
    ]


def _finite(figure: float) -> float | None:
    """A figure, or None for that of a model whose pictures are no numbers any more."""
    return figure if math.isfinite(figure) else None


def passes(ledger: Mapping[str, float]) -> float:
    """A cost in forwards of the transformer, a pass with a gradient counted as three."""
    return ledger["forwards"] + GRADIENT_PASS * ledger["gradient_passes"]


def _costs(table: Table, cells: Sequence[Cell]) -> dict[str, Any] | None:
    """What it took each method with several checkpoints to come up to each level, seed by seed; None: not compared.

    Levels that the untrained model is at are left out.
    """
    comparison = table.comparison
    if comparison.rate is None:
        return None
    bases: list[float] = []
    curves: dict[str, dict[int, list[dict[str, float]]]] = {}
    for seed in comparison.seeds:
        folder = table.curves(seed)
        if not (folder / TABLE).exists():
            continue
        figures = read_result(folder).data["figures"]
        values = {model: own[ALL][comparison.rate]["mean"] for model, own in figures.items()}
        bases.append(values[BASE])
        for cell in cells:
            checkpoints = list_checkpoints(cell.folder / "checkpoints")
            if cell.seed != seed or not table.has_curve(cell):
                continue
            if {cell.point(checkpoint.step) for checkpoint in checkpoints} <= values.keys():  # else it is older
                curves.setdefault(cell.label, {})[seed] = _curve(cell, checkpoints, values)
    if not curves:
        return None
    levels = [level for level in comparison.levels if level > max(bases)]
    reached = {
        label: {
            f"{level:g}": {
                unit: {
                    seed: cost_at(level, [point[unit] for point in curve], [point["value"] for point in curve])
                    for seed, curve in own.items()
                }
                for unit in UNITS
            }
            for level in levels
        }
        for label, own in curves.items()
    }
    return {
        "base": fmean(bases),
        "curves": curves,
        "reached": reached,
        "ratios": _ratios(reached, comparison.reference),
    }


def _curve(cell: Cell, checkpoints: Sequence[Checkpoint], values: Mapping[str, float]) -> list[dict[str, float]]:
    """Cost and value at each checkpoint of a run, after those of the untrained model when training began.

    By then a method with a target has spent what it takes to measure it.
    """
    began = checkpoints[0].state()["prepared"]
    curve = [{"step": 0, **_spent(began), "value": values[BASE]}]
    for checkpoint in checkpoints:
        spent = _spent(checkpoint.state()["ledger"])
        curve.append({"step": checkpoint.step, **spent, "value": values[cell.point(checkpoint.step)]})
    return curve


def _spent(ledger: Mapping[str, float]) -> dict[str, float]:
    return {"passes": passes(ledger), "cpu_seconds": ledger["cpu_seconds"]}


def _ratios(reached: Mapping[str, Any], reference: str) -> dict[str, Any]:
    """How many times the reference's each method's costs are, where both come up to a level from every seed."""
    found: dict[str, Any] = {}
    for label, levels in reached.items():
        for level, units in levels.items():
            for unit, costs in units.items():
                own = reached.get(reference, {}).get(level, {}).get(unit, {})
                known = label != reference and own.keys() == costs.keys()
                if known and None not in costs.values() and None not in own.values():
                    ratio = ratio_over_seeds([costs[seed] for seed in costs], [own[seed] for seed in costs])
                    found.setdefault(label, {}).setdefault(level, {})[unit] = ratio._asdict()
    return found


# --- shown --------------------------------------------------------------------------------------------------------


def figure_rows(data: Mapping[str, Any], group: str) -> list[dict[str, str]]:
    """A row a method with its figures and intervals, and its hacking rate."""
    hacking = data["groups"][group]
    rows = []
    for label, rate in hacking.items():
        figures = data["methods"][label]["figures"]
        cells = {each["title"]: shown(figures[each["name"]], min(each["digits"], _DIGITS)) for each in data["measures"]}
        rates = {"worse than base": shown(rate["than_base"], 3), "hacking rate": shown(rate["farthest"], 3)}
        rows.append({"method": label, **cells, **rates})
    return rows


def difference_rows(data: Mapping[str, Any], group: str) -> list[dict[str, str]]:
    """A row a method with its differences from the group's reference, over seeds; empty where seeds are too few.

    A star: Holm-corrected p below 0.05.
    """
    rows = []
    for label, own in data["differences"][group].items():
        measures = {each["title"]: (own[each["name"]], min(each["digits"], _DIGITS)) for each in data["measures"]}
        cells = {
            title: shown(figure, digits, sign=True) + " *" * (figure["p_holm"] < LEVEL)
            for title, (figure, digits) in measures.items()
        }
        rows.append({"method": label, "minus": own["against"], **cells})
    return rows


def cost_rows(data: Mapping[str, Any], group: str) -> list[dict[str, str]]:
    """A row a method with the mean costs of its runs."""
    labels = [label for label in data["groups"][group] if label != BASE]
    return [
        {
            "method": label,
            "lr": f"{data['methods'][label]['lr']:g}",
            **{title: _rounded(data["methods"][label]["costs"][name]) for name, title in _COSTS.items()},
        }
        for label in labels
    ]


def level_rows(data: Mapping[str, Any], unit: str) -> list[dict[str, str]]:
    """A row a method: its mean cost at each level, and how many times the reference's that is, with an interval.

    Of a level that not all seeds come up to no mean is told, but how many do.
    """
    reached, ratios = data["costs"]["reached"], data["costs"]["ratios"]
    return [
        {
            "method": label,
            **{
                level: _at_level(list(units[unit].values()), ratios.get(label, {}).get(level, {}).get(unit))
                for level, units in levels.items()
            },
        }
        for label, levels in reached.items()
    ]


def _at_level(costs: Sequence[float | None], ratio: Mapping[str, float] | None) -> str:
    if None in costs:
        count = sum(cost is not None for cost in costs)
        return f"{count} of {len(costs)} seeds" if count else NONE
    times = f"; {ratio['mean']:.1f} x [{ratio['low']:.1f}, {ratio['high']:.1f}]" if ratio else ""
    return f"{_rounded(fmean(costs))}{times}"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 or value == int(value) else number(value, 2)


def tuning_rows(data: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row a trial, the chosen one of a method with a star."""
    names = ("reward", "sgp_gap", _DISTANCE, "photo_rate", "caption_accuracy")
    return [
        {
            "method": trial["label"],
            "lr": f"{trial['lr']:g}{' *' if trial['chosen'] else ''}",
            "chosen by": trial["by"].replace("_", " "),
            **{name.replace("_", " "): number(trial["figures"].get(name)).replace(MINUS, "-") for name in names},
        }
        for trial in data["tuning"]
    ]


def unbracketed(data: Mapping[str, Any]) -> list[str]:
    """The methods whose rate is the lowest or highest that was tried."""
    return [trial["label"] for trial in data["tuning"] if trial["chosen"] and trial["end"]]


class Part(NamedTuple):
    """A table of the comparison: its title where it stands alone, and on the page what leads to it."""

    title: str
    lead: str
    rows: list[dict[str, str]]


def tables(data: Mapping[str, Any]) -> Iterator[Part]:
    """Everything that was compared."""
    for group in data["groups"]:
        yield Part(group, f"## {markdown(group)}", figure_rows(data, group))
        if rows := difference_rows(data, group):
            title = f"{group}: differences seed by seed [95 % interval, uncorrected]; {_STAR}"
            lead = "Differences seed by seed [95 % interval for other seeds and prompts, uncorrected]"
            families = "among all of the table that have a better side, or those that have none"
            yield Part(title, f"{lead}; {_STAR}, {families}:", rows)
        yield Part(f"{group}: what a run cost", "What a run cost:", cost_rows(data, group))
    if data["costs"]:
        rate = data["comparison"]["rate"].replace("_", " ")
        lead = (
            f"## Cost of a {markdown(rate)}\n\nWhere a run first comes up to it, between its checkpoints by a straight "
            "line, mean over seeds, with what it took to measure a target; then how many times what "
            f"{markdown(data['comparison']['reference'])} takes from the same seed, geometric mean [95 % interval for "
            f"other seeds]. The untrained model has {data['costs']['base']:.3f}.\n\n"
        )
        for unit, title in UNITS.items():
            yield Part(f"{title} for a {rate}", f"{lead}In {title}:", level_rows(data, unit))
            lead = ""


def write(table: Table, data: Mapping[str, Any]) -> None:
    """Write ``comparison.json``, ``table.md`` and the picture grid."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(table.output / COMPARISON, text + "\n")
    write_atomically(table.output / PAGE, "\n\n".join(_page(data)) + "\n")
    _draw_grid(table, data)


def _page(data: Mapping[str, Any]) -> Iterator[str]:
    comparison = data["comparison"]
    seeds = ", ".join(map(str, comparison["seeds"]))
    yield f"# {markdown(comparison['name'])}"
    yield f"{markdown(comparison['description'])}."
    of_what = "seeds and prompts" if len(comparison["seeds"]) >= FEWEST_SEEDS else "prompts"
    yield (
        f"Benchmark {markdown(comparison['benchmark'])}; seeds {seeds}; a run may spend about {comparison['budget']:,} "
        f"forwards of the transformer for one picture, a pass with a gradient counted as {GRADIENT_PASS}; what it "
        f"takes to measure a target comes on top. Mean [95 % interval for other {of_what}]. Hacking rate: the share of "
        "prompts of which a method's picture is the one farthest from photographs among those of the table; worse than "
        "base: that is farther than the base's."
    )
    for part in tables(data):
        yield part.lead
        yield markdown_table(part.rows)
    if data["tuning"]:
        yield "## Learning rates"
        yield (
            f"Each tried on the whole budget from seed {comparison['tuning_seed']} and measured on "
            f"{comparison['tuning_prompts']} prompts of the validation split; a star: taken."
        )
        yield markdown_table(tuning_rows(data))
        if ends := unbracketed(data):
            yield f"At an end of what was tried, beyond which better ones may lie: {', '.join(map(markdown, ends))}."
    yield "## Settings"
    yield markdown_table(_setting_rows(data))
    if data["failed"]:
        yield "## Failed"
        yield "\n".join(f"- {markdown(name)}: {markdown(reason)}" for name, reason in data["failed"].items())


def _setting_rows(data: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "method": label,
            "preset": method["preset"],
            "changed": ", ".join(f"{key}={json.dumps(value)}" for key, value in method["set"].items()) or NONE,
            "steps at most": str(method["asked_steps"]),
            "ended by": ", ".join(method["stopped_by"]),
            "note": method["note"] or NONE,
        }
        for label, method in data["methods"].items()
        if label != BASE
    ]


def _draw_grid(table: Table, data: Mapping[str, Any]) -> None:
    """The pictures of a few prompts from the first seed that was measured, a row a method of the first table."""
    folders = {seed: table.evaluation(seed) for seed in data["comparison"]["seeds"]}
    seed, folder = next(each for each in folders.items() if (each[1] / TABLE).exists())
    pictures = read_result(folder).table
    known = set(pictures["model"])
    labels = [label for label in next(iter(data["groups"].values())) if label == BASE or f"{label}.{seed}" in known]
    rows, captions = [], []
    for label in labels:
        own = pictures[pictures["model"] == (label if label == BASE else f"{label}.{seed}")]
        own = own.drop_duplicates("prompt").iloc[:_SHOWN]
        captions = list(own["prompt"])
        pixels = [torch.from_numpy(np.array(open_picture(folder / file))) for file in own["file"]]
        rows.append(to_images(torch.stack(pixels)))
    save_grid(rows, table.output / GRID, labels, captions)
