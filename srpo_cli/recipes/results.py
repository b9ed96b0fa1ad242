"""Results of a benchmark: what a table of pictures says, as plain data; read again, put side by side, and shown."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from srpo_cli import __version__
from srpo_cli.config.benchmark import Benchmark
from srpo_cli.errors import UsageError, one_line
from srpo_cli.metrics.aggregate import ALL, LEVEL, REDUCTIONS, Measure, aggregate, batch_figures, hacking_signals
from srpo_cli.metrics.intervals import FEW
from srpo_cli.pages.results import published_note, published_rows
from srpo_cli.pages.writing import MINUS, interval, number, p_value
from srpo_cli.runtime.folder import disk_errors, environment, write_atomically

RESULTS, TABLE = "results.json", "images.parquet"
FORMAT = 1

_KEYS = (
    "benchmark",
    "description",
    "protocol",
    "protocol_digest",
    "models",
    "counts",
    "notes",
    "measures",
    "groups",
    "figures",
    "batches",
    "comparisons",
    "hacking",
    "skipped",
    "published",
    "cost",
)
_COLUMNS = ("model", "item", "group", "prompt", "image", "file")
_NAMED = 3  # differences between protocols that a message names
_VALUE = 60  # characters of a value that it shows
_NOTHING = "-"
_MINUS = re.compile(r"(?<![\w.])-(?=\d)")
_ACTIVE = re.compile(r"[\\|*`]|<(?=[A-Za-z/!?])")  # what Markdown, or the HTML in it, would take for its own
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


class Result(NamedTuple):
    """A result: what ``results.json`` holds, the table with a row a picture where it is there, and their folder."""

    data: dict[str, Any]
    table: pd.DataFrame | None
    folder: Path


def summarise(
    table: pd.DataFrame,
    measures: Sequence[Measure],
    benchmark: Benchmark,
    protocol: Mapping[str, Any],
    models: Sequence[Mapping[str, Any]],
    skipped: Sequence[tuple[str, str]] = (),
    sets: Mapping[str, Mapping[str, float]] | None = None,
    cost: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, Any]:
    """What ``results.json`` holds.

    Args:
        table: a row a picture, the models in the order of ``models``; the first one is the baseline.
        measures: what to make of its columns, and those without columns, whose figures are in ``sets``.
        protocol: all that has to be equal where results are compared.
        models: of each its label, and what is known of it.
        skipped: metrics that were left out, each with the reason.
        sets: by label and measure, figures of all of a model's pictures together.
        cost: by label, seconds and pictures drawn.
    """
    published = benchmark.published
    return {
        "format": FORMAT,
        "srpo": __version__,
        "benchmark": benchmark.name,
        "description": benchmark.description,
        "protocol": dict(protocol),
        "protocol_digest": protocol_digest(protocol),
        "models": [dict(model) for model in models],
        **_computed(table, measures, benchmark.overall, benchmark.batches, sets or {}),
        "skipped": [{"metric": metric, "reason": reason} for metric, reason in skipped],
        "published": published.model_dump(mode="json") if published else None,
        "environment": environment(),
        "cost": {label: dict(spent) for label, spent in (cost or {}).items()},
    }


def _computed(
    table: pd.DataFrame,
    measures: Sequence[Measure],
    overall: Literal["pictures", "groups"],
    batches: int | None,
    sets: Mapping[str, Mapping[str, float]],
) -> dict[str, Any]:
    """The keys of a result that follow from its table, and the figures of whole sets among them."""
    found = aggregate(table, measures, overall)
    figures = {
        label: {group: {name: figure._asdict() for name, figure in own.items()} for group, own in groups.items()}
        for label, groups in found.figures.items()
    }
    texts = {group: len(own.drop_duplicates("prompt")) for group, own in table.groupby("group", sort=False)}
    counts = {"prompts": int(table["item"].nunique()), "texts": sum(texts.values())}
    for label, own in sets.items():
        for name, value in own.items():
            figures[label][ALL][name] = {"mean": value, "low": None, "high": None, "count": counts["texts"]}
    known = set(chain.from_iterable(groups[ALL] for groups in figures.values()))
    in_batches = batch_figures(table, measures, batches) if batches else {}
    return {
        "counts": counts,
        "notes": _notes(texts),
        "measures": [_record(measure) for measure in measures if measure.name in known],
        "groups": list(found.groups),
        "figures": figures,
        "batches": {
            label: {group: {name: batch._asdict() for name, batch in own.items()} for group, own in groups.items()}
            for label, groups in in_batches.items()
        },
        "comparisons": [comparison._asdict() for comparison in found.comparisons],
        "hacking": [signal._asdict() for signal in hacking_signals(found, table)],
    }


def _notes(texts: Mapping[str, int]) -> list[str]:
    """What a reader has to know about figures of so many different prompts a group, a sentence each."""
    count, least = sum(texts.values()), min(texts.values())
    rough = "intervals and p values of so few are rough"
    if count < FEW:
        return [f"Only {count} different prompt{'' if count == 1 else 's'}: {rough}."]
    return [f"Group by group there are as few as {least} different prompts: {rough}."] if least < FEW else []


def _record(measure: Measure) -> dict[str, Any]:
    """A measure as plain data, by which :func:`as_measure` makes it again."""
    names = [name for name, function in REDUCTIONS.items() if function is measure.reduce]
    if not names:
        raise ValueError(
            f"measure {measure.name} reduces by none of {', '.join(REDUCTIONS)}: no result could be merged"
        )
    return {
        "name": measure.name,
        "title": measure.title,
        "better": measure.better,
        "digits": measure.digits,
        "note": measure.note,
        "columns": list(measure.columns),
        "reduce": names[0],
    }


def as_measure(record: Mapping[str, Any]) -> Measure:
    """The measure that a result's record is of."""
    reduce = REDUCTIONS[record["reduce"]]
    return Measure(**{**record, "columns": tuple(record["columns"]), "reduce": reduce})


def protocol_digest(protocol: Mapping[str, Any]) -> str:
    """Short name of a protocol: 16 hex digits."""
    canonical = json.dumps(protocol, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def write_result(result: Result) -> None:
    """Write ``results.json`` and the table beside it."""
    with disk_errors(result.folder):
        result.folder.mkdir(parents=True, exist_ok=True)
    if result.table is not None:
        write_atomically(result.folder / TABLE, result.table.to_parquet(index=False))
    text = json.dumps(result.data, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(result.folder / RESULTS, text + "\n")


def read_result(path: Path) -> Result:
    """The result of a ``results.json`` or of its folder; UsageError for what is none."""
    file = path / RESULTS if path.is_dir() else path
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{file} does not exist: give the results.json of srpo eval, or its folder") from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} is no result of srpo eval ({one_line(error)}): give its results.json") from error
    missing = [key for key in _KEYS if key not in data] if isinstance(data, dict) else list(_KEYS)
    if missing:
        raise UsageError(f"{file} is no result of srpo eval (it has no {missing[0]}): give its results.json")
    if data.get("format") != FORMAT:
        raise UsageError(f"{file} has format {data.get('format')}, and this srpo reads {FORMAT}: evaluate again")
    return Result(data, _read_table(file.with_name(TABLE), data), file.parent)


def _read_table(file: Path, data: Mapping[str, Any]) -> pd.DataFrame | None:
    if not file.exists():
        return None
    try:
        table = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read ({one_line(error)}): evaluate again") from error
    missing = [column for column in _COLUMNS if column not in table]
    if missing:
        raise UsageError(f"{file} has no column {missing[0]}: evaluate again")
    labels = [model["label"] for model in data["models"]]
    if list(dict.fromkeys(table["model"])) != labels:
        raise UsageError(f"{file} is not of the models {', '.join(labels)} of the {RESULTS} beside it: evaluate again")
    return table


def merge(
    results: Sequence[Result], output: Path | None = None, allow_different: bool = False
) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """Results side by side: all their models, measured anew and in pairs over the prompts that they have in common.

    The first model of the first result is the baseline. A model that is in several results is taken once, unless their
    protocols differ; different models of one label get the name of their folder before it. Files are named relative to
    ``output``, None: to the working directory. A single result keeps its figures.

    UsageError where protocols differ and that was not allowed, where a table is missing, and where no prompt is common.
    """
    differences = _check_protocols(results, allow_different)
    labels = _labels(results, keep_all=bool(differences))
    places = [os.path.relpath(result.folder, output or ".") for result in results]
    tables = [_relabelled(*each) for each in zip(results, labels, places, strict=True)]
    models = [
        {**model, "label": own[model["label"]], "folder": _moved(model.get("folder"), place)}
        for result, own, place in zip(results, labels, places, strict=True)
        for model in result.data["models"]
        if model["label"] in own
    ]
    if len(results) == 1:
        return {**results[0].data, "models": models}, tables[0]
    table = _common_prompts(_checked_tables(results, tables))
    pictures = table["model"].value_counts()
    records: dict[str, dict[str, Any]] = {}
    for record in chain.from_iterable(result.data["measures"] for result in results):
        records.setdefault(record["name"], record)
    first = results[0].data
    protocol = {**first["protocol"], **({"mixed": differences} if differences else {})}
    benchmark = protocol["benchmark"]
    skipped = {(each["metric"], each["reason"]): each for result in results for each in result.data["skipped"]}
    merged = {
        **first,
        "protocol": protocol,
        "protocol_digest": protocol_digest(protocol),
        "models": [{**model, "pictures": int(pictures[model["label"]])} for model in models],
        **_computed(
            table,
            [as_measure(record) for record in records.values()],
            benchmark["overall"],
            benchmark["batches"],
            _sets(results, labels, table),
        ),
        "skipped": list(skipped.values()),
        "cost": {
            own[label]: spent
            for result, own in zip(results, labels, strict=True)
            for label, spent in result.data["cost"].items()
            if label in own
        },
    }
    return merged, table


def _check_protocols(results: Sequence[Result], allow_different: bool) -> list[str]:
    """In what the protocols differ from the first one, a line each."""
    first, *others = results
    found: list[str] = []
    for other in others:
        differing = settings_that_differ(first.data["protocol"], other.data["protocol"])
        differences = [f"{key} is {one} and {two}" for key, one, two in differing]
        if differences and not allow_different:
            more = f" and {len(differences) - _NAMED} more" if len(differences) > _NAMED else ""
            raise UsageError(
                f"{first.folder} and {other.folder} have different protocols: {'; '.join(differences[:_NAMED])}{more}. "
                "Evaluate both by one protocol, or give --allow-different"
            )
        found += differences
    return list(dict.fromkeys(found))


def settings_that_differ(one: Any, other: Any, key: str = "") -> Iterator[tuple[str, str, str]]:
    """In what two protocols or configurations differ, with both values, by dotted keys in the first one's order."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in [*one, *(name for name in other if name not in one)]:
            yield from settings_that_differ(one.get(name), other.get(name), f"{key}.{name}" if key else name)
    elif one != other:
        yield key, _brief(one), _brief(other)


def _brief(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _VALUE else f"{text[:_VALUE]}..."


def _labels(results: Sequence[Result], keep_all: bool) -> list[dict[str, str]]:
    """For each result the models that are taken, by their label there, with their label in the merged one."""
    taken: list[list[str]] = []
    known: set[tuple[str, str]] = set()
    for result in results:
        models = [(model["label"], model.get("fingerprint")) for model in result.data["models"]]
        taken.append([label for label, weights in models if keep_all or not weights or (label, weights) not in known])
        known.update(models)
    holders = Counter(chain.from_iterable(taken))
    folders = _folder_names([result.folder for result in results])
    return [
        {label: f"{folder}/{label}" if holders[label] > 1 else label for label in own}
        for folder, own in zip(folders, taken, strict=True)
    ]


def _folder_names(folders: Sequence[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for path, count in Counter(paths).items():
        if count > 1:
            raise UsageError(f"{path} is given {count} times: give each result once")
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = [Path(*path.parts[-length:]).as_posix() for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _moved(file: str | None, folder: str) -> str | None:
    """A file of a result's folder, as it is called from where the folder is called ``folder``."""
    return None if file is None else os.path.normpath(os.path.join(folder, file))


def _relabelled(result: Result, labels: Mapping[str, str], place: str) -> pd.DataFrame | None:
    """The rows of the models that are taken, with their new labels and files."""
    if result.table is None:
        return None
    rows = result.table[result.table["model"].isin(list(labels))]
    files = [_moved(file, place) for file in rows["file"]]
    return rows.assign(model=rows["model"].map(labels), file=files)


def _checked_tables(results: Sequence[Result], tables: Sequence[pd.DataFrame | None]) -> pd.DataFrame:
    """The rows of all tables; UsageError where one is missing."""
    for result, table in zip(results, tables, strict=True):
        if table is None:
            raise UsageError(f"{result.folder} has no {TABLE}, which comparing takes: evaluate again, or show it alone")
    return pd.concat(tables, ignore_index=True)


def _common_prompts(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the prompts that all models have pictures of."""
    holders = table.groupby(["item", "group", "prompt"], sort=False, dropna=False)["model"].transform("nunique")
    common = table[holders == table["model"].nunique()]
    if common.empty:
        raise UsageError("the results have no prompt in common: show them one by one")
    return common.reset_index(drop=True)


def _sets(
    results: Sequence[Result], labels: Sequence[Mapping[str, str]], table: pd.DataFrame
) -> dict[str, dict[str, float]]:
    """Figures of whole sets, of the models whose pictures are all still there."""
    pictures = table["model"].value_counts()
    kept: dict[str, dict[str, float]] = {}
    for result, own in zip(results, labels, strict=True):
        names = [record["name"] for record in result.data["measures"] if not record["columns"]]
        for model in result.data["models"]:
            label = own.get(model["label"])
            if label and pictures[label] == model["pictures"]:
                figures = result.data["figures"][model["label"]][ALL]
                kept[label] = {name: figures[name]["mean"] for name in names if name in figures}
    return kept


def shown(figure: Mapping[str, Any] | None, digits: int, sign: bool = False) -> str:
    """A figure as text, ``0.289 [0.285, 0.293]``; without an interval where it has none, ``-`` where there is none."""
    if figure is None:
        return _NOTHING
    ends = "" if figure.get("low") is None else f" {interval(figure, digits, sign)}"
    return (number(figure["mean"], digits, sign) + ends).replace(MINUS, "-")


def measure_rows(result: Mapping[str, Any], group: str = ALL) -> list[dict[str, str]]:
    """The table in the paper's form: a row a model, a column a measure; over all prompts, published rows come last."""
    return _model_rows(result, group, _headings(result["measures"]))


def mean_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """:func:`measure_rows` as short as a terminal is narrow: no intervals, and no measure that has no better side."""
    headings = {heading: each for heading, each in _headings(result["measures"]).items() if each["better"]}
    rows = _model_rows(result, ALL, headings)
    return [{heading: cell.partition(" [")[0] for heading, cell in row.items()} for row in rows]


def interval_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row a measure with each model's figure and interval, and between two models their difference.

    Of more models, those that differ from the first one (Holm-corrected p below 0.05) have a star.
    """
    labels = [model["label"] for model in result["models"]]
    compared = {(each["model"], each["measure"]): each for each in result["comparisons"] if each["group"] == ALL}
    rows = []
    for heading, each in _headings(result["measures"]).items():
        row = {"measure": heading}
        for label in labels:
            comparison = compared.get((label, each["name"]))
            star = " *" if len(labels) > 2 and comparison and comparison["p_holm"] < LEVEL else ""
            row[label] = shown(result["figures"][label][ALL].get(each["name"]), each["digits"]) + star
        if len(labels) == 2:
            comparison = compared.get((labels[1], each["name"]))
            row["difference"] = shown(comparison and _difference(comparison), each["digits"], sign=True)
            row["p (Holm)"] = p_value(comparison["p_holm"], named=False) if comparison else _NOTHING
        rows.append({**row, "better is": each["better"]})
    return rows


def _model_rows(
    result: Mapping[str, Any], group: str, headings: Mapping[str, Mapping[str, Any]]
) -> list[dict[str, str]]:
    def cells(figures: Mapping[str, Any]) -> dict[str, str]:
        return {heading: shown(figures.get(each["name"]), each["digits"]) for heading, each in headings.items()}

    rows = [
        {"model": model["label"], **cells(result["figures"][model["label"]].get(group, {}))}
        for model in result["models"]
    ]
    for model, figures in published_rows(result, list(headings.values())) if group == ALL else []:
        rows.append(
            {"model": f"{model} (published)", **cells({name: {"mean": value} for name, value in figures.items()})}
        )
    return rows


def _difference(comparison: Mapping[str, Any]) -> dict[str, float]:
    return {"mean": comparison["difference"], "low": comparison["low"], "high": comparison["high"]}


def difference_rows(result: Mapping[str, Any], group: str = ALL) -> list[dict[str, str]]:
    """A row for each model and measure that was compared with the baseline: the difference, and how sure it is."""
    headings = {each["name"]: (heading, each["digits"]) for heading, each in _headings(result["measures"]).items()}
    rows = []
    for comparison in result["comparisons"]:
        if comparison["group"] == group:
            heading, digits = headings[comparison["measure"]]
            rows.append(
                {
                    "model": comparison["model"],
                    "against": comparison["baseline"],
                    "measure": heading,
                    "difference": shown(_difference(comparison), digits, sign=True),
                    "p (Holm)": p_value(comparison["p_holm"], named=False),
                    "higher on": f"{100 * comparison['wins']:.0f} %",
                }
            )
    return rows


def _batch_rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row a model and group: mean and standard deviation over batches of prompts."""
    headings = _headings(result["measures"])
    rows = []
    for label, groups in result["batches"].items():
        for group, figures in groups.items():
            cells = {}
            for heading, each in headings.items():
                batch, digits = figures.get(each["name"]), each["digits"]
                cells[heading] = f"{batch['mean']:.{digits}f} ± {batch['std']:.{digits}f}" if batch else _NOTHING
            size = next(iter(figures.values()))["prompts"] if figures else 0
            rows.append({"model": label, "group": group, "prompts a batch": f"{size:g}", **cells})
    return rows


def _headings(measures: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Measures by the heading of their column: the title, or the name where several share a title."""
    titles = Counter(measure["title"] for measure in measures)
    return {each["title"] if titles[each["title"]] == 1 else each["name"]: each for each in measures}


def write_tables(result: Mapping[str, Any], folder: Path) -> None:
    """Write ``table.md``, with all that was compared, and ``table.tex``, a ``tabular`` that needs no package."""
    write_atomically(folder / "table.md", _markdown_page(result))
    write_atomically(folder / "table.tex", _latex_table(result))


def _caption(result: Mapping[str, Any]) -> str:
    prompts, texts = (result["counts"][key] for key in ("prompts", "texts"))
    different = f", {texts} different texts" if texts < prompts else ""
    return (
        f"{result['benchmark']}, {prompts} prompts{different}, protocol {result['protocol_digest']}: "
        "mean [95 % interval, bootstrap over prompts]"
    )


def _markdown_page(result: Mapping[str, Any]) -> str:
    parts = [f"# {markdown(result['benchmark'])}", markdown(result["description"])]
    rows = measure_rows(result)
    parts += [f"{markdown(_caption(result))}.", *map(markdown, result["notes"]), markdown_table(rows)]
    if rows[len(result["models"]) :]:
        parts.append(f"Published, not measured here: {markdown(published_note(result))}")
    if differences := difference_rows(result):
        parts += ["## Differences", markdown_table(differences)]
    for group in result["groups"]:
        parts += [f"## {markdown(group)}", markdown_table(measure_rows(result, group))]
    if batches := _batch_rows(result):
        title = "## Mean and standard deviation over batches of consecutive prompts"
        parts += [title, markdown_table(batches)]
    if result["skipped"]:
        left_out = [f"- {markdown(each['metric'])}: {markdown(each['reason'])}" for each in result["skipped"]]
        parts += ["## Left out", "\n".join(left_out)]
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
    columns = list(rows[0])
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *([*row.values()] for row in rows)]
    escaped = [line if number == 1 else [markdown(cell) for cell in line] for number, line in enumerate(lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def _latex_table(result: Mapping[str, Any]) -> str:
    rows = measure_rows(result)
    measured = len(result["models"])
    notes = [_caption(result), *result["notes"]]
    if rows[measured:]:
        notes.append(f"published rows: {published_note(result)}")
    lines = [*(f"% {' '.join(note.split())}" for note in notes), f"\\begin{{tabular}}{{l{'r' * (len(rows[0]) - 1)}}}"]
    lines += ["\\hline", _latex_row(list(rows[0])), "\\hline"]
    lines += [_latex_row(list(row.values())) for row in rows[:measured]]
    if rows[measured:]:
        lines += ["\\hline", *(_latex_row(list(row.values())) for row in rows[measured:])]
    return "\n".join([*lines, "\\hline", "\\end{tabular}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    first, *others = map(latex, cells)
    # In braces, since the \\ before it would take a [ or * that it begins with for its own.
    cells = [f"{{{first}}}", *(_MINUS.sub("$-$", cell) for cell in others)]
    return f"{' & '.join(cells)} \\\\"


def latex(text: str) -> str:
    """Any text, so that LaTeX prints it as it is, on one line."""
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def markdown(text: str) -> str:
    """Any text, so that Markdown shows it as it is, in one cell of a table."""
    return _ACTIVE.sub(r"\\\g<0>", " ".join(text.split()))
