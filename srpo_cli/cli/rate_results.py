"""``srpo eval rate export`` and ``analyze``: the answers of a study as a table, and what they say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from srpo_cli.cli.options import FormatOption, OutputOption
from srpo_cli.cli.output import OutputFormat, note, print_rows
from srpo_cli.errors import UsageError

StudyArgument = Annotated[Path, typer.Argument(metavar="STUDY", help="Folder of `srpo eval rate new`.")]
TableOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Write a .csv, .jsonl or .parquet instead of to stdout."),
]
TextFormatOption = Annotated[
    Literal["csv", "jsonl"] | None,
    typer.Option("--format", help="On stdout, csv if not given; else FILE's ending says."),
]
BaselineOption = Annotated[
    str | None, typer.Option("--baseline", metavar="ARM", help="What the others are compared with; the first arm.")
]
ResultOption = Annotated[
    Path | None, typer.Option("--with", metavar="RESULT", help="Folder of `srpo eval` into whose report it goes.")
]


def export(study: StudyArgument, output: TableOption = None, text_format: TextFormatOption = None) -> None:
    """Write every answer with rater, arm, prompt, dimension, value and time, a row each.

    Training, repeats and resolutions are rows of their own, see column kind. Undone answers are left out.
    """
    from srpo_cli.study.export import csv_of, jsonl_of, read_answers, write_answers

    frame = read_answers(study)
    if output is None:
        typer.echo((jsonl_of if text_format == "jsonl" else csv_of)(frame), nl=False)
        return
    write_answers(frame, output, text_format)
    note(f"{len(frame)} answers: {output}")


def analyze(
    study: StudyArgument,
    output: OutputOption = None,
    result: ResultOption = None,
    baseline: BaselineOption = None,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Say how often each arm is Excellent or preferred, what is certain about it, and how far the raters agree.

    Writes analysis.json and report.html to --output, STUDY/analysis if not given, or into the folder of --with.
    """
    if output and result:
        raise UsageError(f"--output {output} is of no use with --with: the report goes into {result}")
    from srpo_cli.study import analysis
    from srpo_cli.study.export import read_answers, read_study

    facts = read_study(study, baseline)
    folder, measured, table = output or study / "analysis", None, None
    if result:
        from srpo_cli.recipes.results import read_result

        measured, table, folder = read_result(result)
        _check_arms(facts.arms, measured, result)
    found = analysis.analyze(read_answers(study), facts)
    if output_format is OutputFormat.JSON:
        import json

        typer.echo(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(found)
    _write(folder, found, measured, table)


def _check_arms(arms: Sequence[str], result: Mapping[str, Any], path: Path) -> None:
    """UsageError for a result of none of the study's arms; a note of those that it lacks."""
    labels = [model["label"] for model in result["models"]]
    others = [arm for arm in arms if arm not in labels]
    if len(others) == len(arms):
        raise UsageError(
            f"--with {path} is of {', '.join(labels)}, and the study of {', '.join(arms)}: name its own result"
        )
    if others:
        note(f"note: {', '.join(others)}: no model of {path}, so that only people have judged it")


def _write(folder: Path, analysis: dict[str, Any], result: dict[str, Any] | None, table: Any) -> None:
    import json

    from srpo_cli.pages.report import ANALYSIS, write_report
    from srpo_cli.runtime.folder import disk_errors, write_atomically

    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / ANALYSIS, json.dumps(analysis, indent=2, ensure_ascii=False) + "\n")
    with disk_errors(folder):
        note(f"report: {write_report(folder, result, table, study=analysis)}")


def _print(analysis: Mapping[str, Any]) -> None:
    """The analysis as tables for people."""
    titles = {each["name"]: each["title"] for each in analysis["dimensions"]}
    if analysis["grades"]:
        _section("Excellent, % of grades", _excellent_rows(analysis, titles))
        _section(
            "Difference of Excellent rates, points", [_difference_row(row, titles) for row in analysis["differences"]]
        )
    if analysis["pairs"]:
        _section("Preferred, % of answers, ties half", [_win_row(row) for row in analysis["pairs"]["win_rates"]])
        strengths = analysis["pairs"]["strengths"].items()
        _section("Strength, log odds", [{"arm": arm, "strength": _signed(each)} for arm, each in strengths])
    _section(
        "Agreement, Krippendorff's alpha",
        [
            {"dimension": titles[name], "alpha": _alpha(each), "agreement": each["label"]}
            for name, each in analysis["agreement"].items()
        ],
    )
    _section("Raters", [_rater_row(row) for row in analysis["raters_table"]])
    for line in analysis["notes"]:
        note(f"note: {line}")


def _section(title: str, rows: Sequence[dict[str, Any]]) -> None:
    if rows:
        typer.echo(f"{title}\n")
        print_rows(rows, OutputFormat.TABLE)
        typer.echo()


def _excellent_rows(analysis: Mapping[str, Any], titles: Mapping[str, str]) -> list[dict[str, Any]]:
    from srpo_cli.pages.study import RULE

    rows = []
    for arm, grades in analysis["grades"].items():
        row = {"arm": arm, **{title: _percent(grades[name]["excellent"]) for name, title in titles.items()}}
        if arm in analysis["overall_rule"]:
            row[RULE] = _percent(analysis["overall_rule"][arm]["excellent"])
        rows.append(row)
    return rows


def _difference_row(row: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    from srpo_cli.pages.writing import p_value

    return {
        "arm": row["arm"],
        "against": row["baseline"],
        "dimension": titles[row["dimension"]],
        "difference": _signed({**row, "mean": row["difference"]}, 100, 1),
        "p (Holm)": p_value(row["p_holm"], named=False),
    }


def _win_row(row: Mapping[str, Any]) -> dict[str, Any]:
    from srpo_cli.pages.writing import p_value

    counts = {name: str(row[name]) for name in ("wins", "ties", "losses")}
    return {
        "arm": row["arm"],
        "against": row["against"],
        "preferred": _percent(row["rate"]),
        **counts,
        "p (Holm)": p_value(row["p_holm"], named=False),
    }


def _rater_row(row: Mapping[str, Any]) -> dict[str, Any]:
    seconds = row["median_seconds"]
    return {
        "rater": row["rater"],
        "role": row["role"],
        "answers": str(row["answers"]),
        "bias": _signed({**row, "mean": row["bias"]}),
        "repeats": str(row["repeats"]),
        "same again": _share(row["repeat_agreement"]),
        "training": _share(row["training_agreement"]),
        "seconds": "" if seconds is None else f"{seconds:.1f}",
    }


def _percent(rate: Mapping[str, float]) -> str:
    return f"{100 * rate['mean']:.1f} [{100 * rate['low']:.1f}, {100 * rate['high']:.1f}]"


def _signed(figure: Mapping[str, Any], scale: float = 1, digits: int = 2) -> str:
    if figure["mean"] is None:
        return ""
    mean, low, high = (f"{scale * figure[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]"


def _alpha(each: Mapping[str, Any]) -> str:
    return "" if each["alpha"] is None else f"{each['alpha']:.2f} [{each['low']:.2f}, {each['high']:.2f}]"


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"
