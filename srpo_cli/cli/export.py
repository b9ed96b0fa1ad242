"""``srpo export``: a run's weights for other programs."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from srpo_cli.cli.options import OutputOption
from srpo_cli.cli.output import OutputFormat, note, print_rows
from srpo_cli.errors import UsageError

EXAMPLES = """Examples:

srpo export runs/realism

srpo export runs/realism --format extract --rank 64 --dtype bfloat16

srpo export runs/realism/checkpoints/step-000020 --output realism-step-20"""

_LAYERS = ("layers", "left_out_what")  # what has a table of its own


class ExportFormat(StrEnum):
    """What is written."""

    LORA = "lora"
    FULL = "full"
    MERGED = "merged"
    EXTRACT = "extract"


class ExportDtype(StrEnum):
    """What the tensors are written in."""

    BFLOAT16 = "bfloat16"
    FLOAT32 = "float32"
    FLOAT16 = "float16"


RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, or of one of its checkpoints.")]
FormatOption = Annotated[
    ExportFormat | None,
    typer.Option(
        "--format",
        help="lora: the LoRA that was trained; full: all weights; merged: the LoRA folded into the base; extract: the "
        "difference of all weights to the base as a LoRA. If not given, lora or full, as trained.",
    ),
]
RankOption = Annotated[
    int | None, typer.Option("--rank", metavar="N", min=1, help="Rank of what extract makes; if not given 32.")
]
DtypeOption = Annotated[
    ExportDtype | None,
    typer.Option("--dtype", help="If not given float32 for a LoRA, else what the run computed in."),
]
CheckpointOption = Annotated[
    int | None,
    typer.Option(
        "--checkpoint",
        metavar="STEP",
        min=0,
        help="Which one; if not given the best, the last where the run's guard knows none.",
    ),
]
NoEmaOption = Annotated[
    bool, typer.Option("--no-ema", help="The weights themselves where the run kept their moving average.")
]
ReportOption = Annotated[OutputFormat, typer.Option("--report", help="Table for people, JSON for scripts.")]


def export(
    run: RunArgument,
    output: OutputOption = None,
    export_format: FormatOption = None,
    rank: RankOption = None,
    dtype: DtypeOption = None,
    checkpoint: CheckpointOption = None,
    no_ema: NoEmaOption = False,
    report: ReportOption = OutputFormat.TABLE,
) -> None:
    """Write what a run trained in the layout that diffusers and ComfyUI read, with a model card.

    Nothing is there until all of it is; the card names the licence, the exact commands and the run's figures.
    """
    if not run.is_dir():
        raise UsageError(f"{run} is no folder: name that of a run, or one of its checkpoints/step-* folders")
    if rank is not None and export_format is not ExportFormat.EXTRACT:
        raise UsageError(f"--rank {rank} is of no use here: only --format extract makes a LoRA of a rank of choice")

    from srpo_cli.recipes import export as recipe

    request = recipe.Request(run, output, export_format, rank, dtype, checkpoint, ema=not no_ema)
    print_export(recipe.export(request, say=note), report)


def print_export(result: dict[str, Any], report: OutputFormat) -> None:
    """Write what was exported; of an extracted LoRA the layers first, what they come to last."""
    if report is OutputFormat.JSON:
        import json

        typer.echo(json.dumps(result, indent=2, ensure_ascii=False))
        return
    if "layers" in result:
        print_rows(result["layers"], report)
        typer.echo()
    print_rows([{key: value for key, value in result.items() if key not in _LAYERS and value is not None}], report)
