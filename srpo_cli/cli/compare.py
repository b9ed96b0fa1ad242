"""``srpo eval compare``: train methods under one budget from several seeds, and print how they differ."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srpo_cli.cli.options import DryRunOption, FormatOption, TrustOption
from srpo_cli.cli.output import OutputFormat, note, print_rows
from srpo_cli.cli.plugins import admit_plugin

if TYPE_CHECKING:  # commands import it when they are called, like all of its room
    from srpo_cli.recipes.compare import Table

EXAMPLES = """Examples:

srpo eval compare --preset table1 --dry-run

srpo eval compare --preset table1 --jobs 2 --output evals/table1

srpo eval compare --preset mine.yaml --format json"""

_FAILED = 1


def _comparison_names() -> list[str]:
    from srpo_cli.config.comparison import comparison_names

    return comparison_names()


ComparisonOption = Annotated[
    str,
    typer.Option(
        "--preset",
        "-p",
        metavar="NAME|FILE",
        help="table1, the methods of the paper's Table 1 on the miniature; or a .yaml like it.",
        autocompletion=_comparison_names,
    ),
]
OutputOption = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="DIR", help="Folder to write to; if not given evals/NAME."),
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "--jobs", "-j", metavar="N", min=1, help="Processes at a time; if not given one a core on the miniature, or 1."
    ),
]


def compare(
    preset: ComparisonOption = "table1",
    output: OutputOption = None,
    jobs: JobsOption = None,
    trust: TrustOption = False,
    dry_run: DryRunOption = False,
    output_format: FormatOption = OutputFormat.TABLE,
) -> None:
    """Train methods under one budget from several seeds, and print how they differ and what they cost.

    Chooses learning rates, trains every cell, measures all of them on one benchmark.

    Writes comparison.json, table.md, grid.png, and below them every run and evaluation.

    The same command goes on where it stopped: what is finished is kept.
    """
    from srpo_cli.config.comparison import load_comparison

    comparison = load_comparison(preset)
    folder = output or Path("evals") / comparison.name

    from srpo_cli.recipes.compare import COMPARISON, Table, is_miniature
    from srpo_cli.recipes.compare import compare as run
    from srpo_cli.recipes.comparison import GRID, PAGE, summarise, tables, write
    from srpo_cli.runtime.quiet import quiet_libraries
    from srpo_cli.runtime.signals import stop_on_signals

    quiet_libraries()
    table = Table(comparison, folder)
    if dry_run:
        table.check()
        _print_commands(table)
        return
    for reward in comparison.rewards:
        admit_plugin(reward, trust, note)
    at_once = jobs or (len(os.sched_getaffinity(0)) if is_miniature(comparison) else 1)
    with stop_on_signals() as stop:
        ended = run(table, at_once, stop, note)
    if ended.exit_code:
        note("stopped: the same command goes on with what is missing")
        raise typer.Exit(ended.exit_code)
    data = summarise(table, ended.failed)
    write(table, data)
    if output_format is OutputFormat.JSON:
        import json

        typer.echo(json.dumps(data, indent=2, ensure_ascii=False))
    else:
        for number, part in enumerate(tables(data)):
            typer.echo(f"{chr(10) if number else ''}{part.title}")
            print_rows(part.rows, output_format)
    for name in (PAGE, GRID, COMPARISON):
        note(f"written: {folder / name}")
    if ended.failed:
        note(f"failed: {', '.join(ended.failed)}; the same command tries again")
        raise typer.Exit(_FAILED)


def _print_commands(table: Table) -> None:
    """The commands of all runs that are missing; rates that trials choose may not be known yet."""
    trials = [cell for cell in table.trials if not cell.is_finished]
    unknown = {cell.label: cell.lr for cell in trials}
    cells = [cell for cell in table.cells({**table.rates(), **unknown}) if not cell.is_finished]
    for cell in [*trials, *cells]:
        is_open = cell.lr is None and table.comparison.rate_owner(cell.label) in unknown
        typer.echo(f"{cell.job(table.output / 'logs')}{'  # at the rate that is chosen' if is_open else ''}")
    note(
        f"{len(trials)} run{'s' * (len(trials) != 1)} to choose learning rates by and {len(cells)} of the table, of "
        f"about {table.comparison.budget:,} forwards each, where no target ends one earlier, and what it takes to "
        "measure the target; then all are measured"
    )
