"""Arguments and options that several commands share, declared once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from srpo_cli.cli.output import OutputFormat
from srpo_cli.errors import UsageError


def _preset_names() -> list[str]:
    from srpo_cli.config.load import preset_names

    return preset_names()


_PRESET = {"metavar": "NAME|FILE", "help": "Preset, or NAME:VARIANT.", "autocompletion": _preset_names}

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

DownloadOption = Annotated[
    bool,
    typer.Option(
        "--download", help="Fetch from the Hugging Face Hub what is named and not here, told before it starts."
    ),
]

TrustOption = Annotated[
    bool, typer.Option("--trust", help="Let the Python file that is the reward run; needed once for each content.")
]

WeightsOption = Annotated[
    list[str] | None,
    typer.Option("--weights", metavar="NAME=PATH", help="Where a reward's weights are; may be repeated."),
]


def parse_weights(given: Sequence[str], rewards: Sequence[str]) -> dict[str, Path]:
    """Paths by the name of a reward, from ``--weights``; UsageError for one that is not among ``rewards``."""
    weights = {}
    for item in given:
        name, _, path = item.partition("=")
        if not (name and path):
            raise UsageError(f"--weights {item}: give NAME=PATH, as in --weights hpsv2.1=HPS_v2.1_compressed.pt")
        if name not in rewards:
            raise UsageError(f"--weights {item} is of no use without --reward {name}")
        weights[name] = Path(path)
    return weights
