"""``srpo eval rate``: the blind human study: make it, serve it to raters, see how far it is, and what it says."""

from __future__ import annotations

from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from srpo_cli.cli.options import FormatOption
from srpo_cli.cli.output import OutputFormat, note, print_rows
from srpo_cli.cli.rate_results import StudyArgument, analyze, export
from srpo_cli.errors import MissingError, UsageError

if TYPE_CHECKING:
    from srpo_cli.study.arms import Item

EXAMPLES = """Examples:

srpo eval rate new study --arm base=pictures/base --arm ours=pictures/ours

srpo eval rate new study --from results --mode pairs --raters 6 --per-prompt 3

srpo eval rate serve study

srpo eval rate status study"""

app = typer.Typer(no_args_is_help=True, help="Run a blind human study of pictures.", epilog=EXAMPLES)


class StudyMode(StrEnum):
    """What raters are asked."""

    GRADES = "grades"
    PAIRS = "pairs"


NewArgument = Annotated[Path, typer.Argument(metavar="STUDY", help="Folder to make.")]


@app.command("new")
def new(
    study: NewArgument,
    arm: Annotated[
        list[str] | None,
        typer.Option("--arm", metavar="NAME=DIR", help="Pictures to compare, repeatable; with --from: a model's name."),
    ] = None,
    result: Annotated[
        Path | None,
        typer.Option(
            "--from", metavar="RESULT", help="Folder or results.json of `srpo eval`, whose models are the arms."
        ),
    ] = None,
    mode: Annotated[
        StudyMode, typer.Option("--mode", help="Grade each picture on five dimensions, or choose between two.")
    ] = StudyMode.GRADES,
    raters: Annotated[int, typer.Option("--raters", min=1, max=999, metavar="N", help="Raters.")] = 10,
    experts: Annotated[
        int, typer.Option("--experts", min=0, max=999, metavar="N", help="Experts, who resolve what raters differ on.")
    ] = 3,
    per_prompt: Annotated[
        int | None, typer.Option("--per-prompt", min=1, metavar="N", help="Raters of each prompt: 5, or all if fewer.")
    ] = None,
    repeats: Annotated[
        float, typer.Option("--repeats", min=0, max=1, metavar="SHARE", help="Share of tasks that come once more.")
    ] = 0.05,
    training: Annotated[
        Path | None,
        typer.Option(
            "--training",
            metavar="FILE|DIR",
            help="JSONL of image, prompt and the right grades by dimension, shown first; or a folder with "
            "training.jsonl.",
        ),
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="FILE", help="What the arms' pictures show, if they do not say.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, metavar="N", help="Seed of who sees what in which order.")] = 0,
    name: Annotated[
        str | None, typer.Option("--name", help="Name of the study; raters do not see it. The folder's if not given.")
    ] = None,
) -> None:
    """Make a study of pictures from several models: blind, balanced, everyone's order drawn by a seed.

    A rater's pictures of one prompt come apart, 10 tasks or more from one to the next where there are enough prompts.
    """
    items = _items(arm or [], result, prompts)

    from srpo_cli.study.build import Options, new_study
    from srpo_cli.study.rubric import load_rubric
    from srpo_cli.study.training import read_training

    lessons = read_training(training, mode.value, load_rubric(mode.value)) if training else []
    options = Options(
        name=name or study.resolve().name,
        mode=mode.value,
        raters=raters,
        experts=experts,
        k=min(5, raters) if per_prompt is None else per_prompt,
        repeats=repeats,
        seed=seed,
    )
    facts = new_study(study, items, options, lessons, note)
    what = ("prompt", facts.prompts), ("picture", facts.pictures), ("rater", facts.raters)
    note(f"{study}: {', '.join(_counted(number, name) for name, number in what)}, {facts.k} for each prompt")
    if len(items[0].files) == 1:
        note(f"note: {next(iter(items[0].files))} is the only arm: its grades are compared with nothing")
    note(f"Next: srpo eval rate serve {study}")


@app.command("serve")
def serve(
    study: StudyArgument,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Address to listen on; 0.0.0.0 for all of the machine's.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, metavar="N", help="0: any that is free.")] = 8765,
    url: Annotated[
        str | None,
        typer.Option("--url", metavar="URL", help="Where raters reach it, if through a proxy or a tunnel."),
    ] = None,
) -> None:
    """Serve the rating page until it is interrupted, and print everyone's secret link."""
    try:
        from srpo_cli.study.server import serve as serve_study
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "uvicorn"):
            raise
        raise MissingError(f"the rating page needs {error.name}: pip install 'srpo-cli[rate]'") from error

    def announce(links: list[dict[str, str]]) -> None:
        print_rows(links, OutputFormat.TABLE)
        note("Give each link to one person. Ctrl-C stops the page; answers are stored, and serving again goes on.")

    serve_study(study, host, port, url, announce)


@app.command("status")
def status(study: StudyArgument, output_format: FormatOption = OutputFormat.TABLE) -> None:
    """Show how far everyone is, and how many pictures await the experts.

    A task is a picture, or a pair, with all its questions; repeated answers are those to tasks that came once more.
    """
    from srpo_cli.study.store import Store

    store = Store(study)
    everyone, waiting = store.progress(), store.waiting()
    if output_format is OutputFormat.JSON:
        import json

        document = {"raters": [asdict(progress) for progress in everyone], "disputed_pictures": asdict(waiting)}
        typer.echo(json.dumps(document, indent=2))
        return
    rows = [
        {
            "rater": each.rater,
            "role": each.role,
            "done": f"{each.done} of {each.total}",
            "median seconds": "" if each.median_seconds is None else f"{each.median_seconds:.1f}",
            "repeated answers": str(each.repeats),
        }
        for each in everyone
    ]
    print_rows(rows, output_format)
    if waiting.unresolved:
        note(f"raters differ on {_counted(waiting.unresolved, 'picture')}: srpo eval rate resolve {study}")
    if waiting.with_experts:
        note(f"pictures that await the experts' answers: {waiting.with_experts}")


@app.command("resolve")
def resolve(study: StudyArgument) -> None:
    """Give pictures whose grades differ by two or more on a dimension to the experts."""
    from srpo_cli.study.build import resolve as resolve_study

    new_ones = resolve_study(study)
    note(f"{_counted(new_ones, 'new picture')} for the experts, who find them by their links")


app.command("export")(export)
app.command("analyze")(analyze)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _items(arms: list[str], result: Path | None, prompts: str | None) -> list[Item]:
    """What is compared, by the flags that name it."""
    if result is not None:
        if prompts is not None:
            raise UsageError(f"--prompts {prompts} is of no use with --from: the result has the prompts")
        named = [arm for arm in arms if "=" in arm]
        if named:
            raise UsageError(f"--arm {named[0]} names a folder: with --from give the name of a model in the result")
        from srpo_cli.recipes.results import TABLE, read_result
        from srpo_cli.study.arms import items_of_result

        found = read_result(result)
        if found.table is None:
            raise UsageError(f"{found.folder} has no {TABLE}, which says what its pictures show: evaluate again")
        return items_of_result(found.table, found.folder, arms)
    folders: dict[str, Path] = {}
    for arm in arms:
        name, _, folder = arm.partition("=")
        if not (name and folder):
            raise UsageError(f"--arm {arm}: give NAME=DIR, as in --arm base=pictures/base")
        if name in folders:
            raise UsageError(f"--arm {name} is given twice: give each arm a name of its own")
        folders[name] = Path(folder)
    if not folders:
        raise UsageError("nothing to compare: give --arm NAME=DIR for each of the models, or --from RESULT")
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UsageError(f"--arm {name}={folder}: there is no such folder")
    from srpo_cli.study.arms import items_of_folders

    return items_of_folders(folders, prompts)
