"""The command tree of ``srpo`` on one screen."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from srpo_cli import __version__
from srpo_cli.cli import eval as evaluation
from srpo_cli.cli import presets
from srpo_cli.cli.doctor import doctor
from srpo_cli.cli.errors import one_line_errors
from srpo_cli.cli.export import EXAMPLES as EXPORT_EXAMPLES
from srpo_cli.cli.export import export
from srpo_cli.cli.recover import EXAMPLES as RECOVER_EXAMPLES
from srpo_cli.cli.recover import recover
from srpo_cli.cli.sample import EXAMPLES as SAMPLE_EXAMPLES
from srpo_cli.cli.sample import sample
from srpo_cli.cli.score import EXAMPLES as SCORE_EXAMPLES
from srpo_cli.cli.score import score
from srpo_cli.cli.train import EXAMPLES as TRAIN_EXAMPLES
from srpo_cli.cli.train import train

EXIT_CODES = (
    "Exit codes: 0 done, 1 failed run, 2 bad usage, 3 done in part, 4 missing weights, dependency or device, "
    "5 a bound of srpo eval is missed, 130 or 143 interrupted."
)

app = typer.Typer(
    name="srpo",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,  # a bug shows the plain traceback that a report needs
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("train", epilog=TRAIN_EXAMPLES)(train)
app.command("sample", epilog=SAMPLE_EXAMPLES)(sample)
app.command("recover", epilog=RECOVER_EXAMPLES)(recover)
app.command("score", epilog=SCORE_EXAMPLES)(score)
app.command("export", epilog=EXPORT_EXAMPLES)(export)
app.command("doctor")(doctor)
app.add_typer(evaluation.app, name="eval")
app.add_typer(presets.app, name="presets")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"srpo {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and exit."),
    ] = False,
) -> None:
    """Align a text-to-image model with a human preference, and see whether it worked."""
    _quiet_imports()


def _quiet_imports() -> None:
    """Keep what libraries say while they are imported off the terminal; ``runtime.quiet`` sees to the rest."""
    import logging

    for library in ("DIFFUSERS", "TRANSFORMERS"):
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    for library in ("bitsandbytes", "torch.utils._pytree"):
        logging.getLogger(library).setLevel(logging.ERROR)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``srpo`` with ``arguments``, the process's own where None, and leave with its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    with one_line_errors():
        sys.exit(app(args=evaluation.with_run(given), prog_name="srpo", standalone_mode=False))
