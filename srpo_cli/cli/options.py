"""Arguments and options that several commands share, declared once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from srpo_cli.cli.output import OutputFormat
from srpo_cli.config.load import preset_names

_PRESET = {"metavar": "NAME|FILE", "help": "Preset, or NAME:VARIANT.", "autocompletion": preset_names}

PresetArgument = Annotated[str, typer.Argument(**_PRESET)]

PresetOption = Annotated[str, typer.Option("--preset", "-p", **_PRESET)]

OptionalPresetOption = Annotated[str | None, typer.Option("--preset", "-p", **_PRESET)]

OverridesOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the preset; may be repeated."),
]

FormatOption = Annotated[OutputFormat, typer.Option("--format", help="Table for people, JSON for scripts.")]

OutputOption = Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.")]

ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="NAME|DIR", help="Model instead of the preset's; miniature is built in."),
]

SeedOption = Annotated[int | None, typer.Option("--seed", min=0, metavar="N", help="Seed of everything that is drawn.")]

DryRunOption = Annotated[bool, typer.Option("--dry-run", "-n", help="Show what would run, and run nothing.")]
