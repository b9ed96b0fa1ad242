"""``srpo sample``: pictures from prompts."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated

import typer

from srpo_cli.cli.options import OutputOption
from srpo_cli.cli.output import note
from srpo_cli.errors import UsageError

EXAMPLES = """Examples:

srpo sample "a red sphere on a wooden table" --num-images 4

srpo sample --model runs/realism --prompts prompts.txt --output out

cat prompts.txt | srpo sample --prompts - --seed 7

srpo sample "a blue cone on snow" --compare base=miniature --compare tuned=runs/realism"""

PromptsArgument = Annotated[list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Prompts to draw.")]
PromptsOption = Annotated[
    str | None,
    typer.Option("--prompts", metavar="FILE|-", help="Prompts from a .txt, .jsonl or .csv, or stdin."),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL|RUN|DIR", help="Base model, run folder, checkpoint, weights or LoRA."),
]
BaseOption = Annotated[
    str | None, typer.Option("--base", metavar="MODEL", help="Base model of a LoRA or of bare weights.")
]
CompareOption = Annotated[
    list[str] | None,
    typer.Option("--compare", metavar="[LABEL=]MODEL", help="Draw the same seeds side by side; give it twice or more."),
]
CountOption = Annotated[int, typer.Option("--num-images", "-n", min=1, help="Seeds for each prompt.")]
SeedOption = Annotated[
    int, typer.Option("--seed", min=0, help="First seed; the pictures of a prompt count up from it.")
]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="Sampling steps; 50, on the miniature 12.")]
GuidanceOption = Annotated[float, typer.Option("--guidance", min=0, help="Distilled guidance scale.")]
SizeOption = Annotated[str | None, typer.Option("--size", metavar="N|HxW", help="Picture size in pixels.")]


def sample(
    prompt: PromptsArgument = None,
    prompts: PromptsOption = None,
    model: ModelOption = None,
    base: BaseOption = None,
    compare: CompareOption = None,
    output: OutputOption = None,
    seed: SeedOption = 0,
    num_images: CountOption = 1,
    steps: StepsOption = None,
    guidance: GuidanceOption = 3.5,
    size: SizeOption = None,
) -> None:
    """Draw pictures from prompts; what is already there is not drawn again.

    Writes PNGs that carry their settings, grid.png and samples.jsonl, and one JSON line a picture to stdout.
    """
    from srpo_cli.runtime.prompts import read_prompts

    wanted = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
    if not wanted or not all(text.strip() for text in wanted):
        raise UsageError("srpo sample needs a prompt: give one as an argument, or --prompts FILE (or - for stdin)")
    if model and compare:
        raise UsageError("--model and --compare cannot be used together: name every model with --compare")
    if compare and len(compare) < 2:
        raise UsageError(f"--compare {compare[0]} alone compares nothing: give it twice or more")
    parsed_size = _parse_size(size) if size else None
    labels = _labels(compare or [])

    from srpo_cli.recipes import sample as recipe

    default = base or _default_model(announce=not (model or compare))
    request = recipe.Request(wanted, seed, num_images, steps, guidance, parsed_size)
    folder = output or Path("samples")
    if compare:
        sources = {label: recipe.Source.find(name, default) for label, name in labels.items()}
        rows = recipe.compare(sources, request, folder)
    else:
        rows = recipe.sample(recipe.Source.find(model or default, default), request, folder)
    for row in rows:
        typer.echo(json.dumps(row))
    note(f"pictures: {folder / (recipe.COMPARISON if compare else recipe.GRID)}")


def _default_model(announce: bool) -> str:
    from srpo_cli.runtime.devices import has_accelerator

    if has_accelerator():
        return "flux.1-dev"
    if announce:
        note("no accelerator here: sampling from the built-in miniature (--model decides otherwise)")
    return "miniature"


def _labels(compare: list[str]) -> dict[str, str]:
    """Label to model: ``LABEL=MODEL``, or the last part of the model's name."""
    labels: dict[str, str] = {}
    for item in compare:
        label, separator, name = item.partition("=")
        name = name if separator else item
        label = label if separator else Path(item).name
        if not re.fullmatch(r"[\w.-]+", label) or label in labels or not name:
            raise UsageError(f"--compare {item}: give every model a label of its own, as in --compare base=miniature")
        labels[label] = name
    return labels


def _parse_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match or 0 in (height := int(match[1]), width := int(match[2] or match[1])):
        raise UsageError(f"--size {text}: give one number, or height and width as in 720x1280")
    return height, width
