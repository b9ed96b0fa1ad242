"""``srpo sample``: pictures from prompts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from srpo_cli.cli.launch import (
    GpusOption,
    NodeRankOption,
    NodesOption,
    RendezvousOption,
    plan_launch,
    refuse_standard_input,
    speaker,
    start,
    told_once,
)
from srpo_cli.cli.models import BaseOption, ModelOption, default_model, find_sources, label_models
from srpo_cli.cli.options import DownloadOption, OutputOption
from srpo_cli.errors import UsageError

EXAMPLES = """Examples:

srpo sample "a red sphere on a wooden table" --num-images 4

srpo sample --model runs/realism --prompts prompts.txt --output out

srpo sample --model style.safetensors --base miniature "a blue cone"

grep sphere prompts.txt | srpo sample --prompts - --seed 7 | jq -r .file

srpo sample "a blue cone" --compare miniature --compare runs/realism

srpo sample "a blue cone" --model runs/lora --lora-scale 0,0.5,1

srpo sample --model flux.1-dev --prompts prompts.csv --gpus 8"""

_LAST_SEED = 2**53  # the largest whole number that every reader of the JSON rows keeps exactly
_LARGEST_LORA_SCALE = 10  # 0 to 2 are of use; what is far beyond is a slip, as 50 for 0.5

PromptsArgument = Annotated[list[str] | None, typer.Argument(metavar="PROMPT", help="Prompts to draw.")]
PromptsOption = Annotated[
    str | None,
    typer.Option("--prompts", metavar="FILE|-", help="Prompts from a .txt, .jsonl or .csv, or stdin."),
]
CompareOption = Annotated[
    list[str] | None,
    typer.Option("--compare", metavar="[LABEL=]MODEL", help="Draw the same seeds side by side; give it twice or more."),
]
LoraScaleOption = Annotated[
    str | None,
    typer.Option(
        "--lora-scale", metavar="A[,A...]", help="How much of the LoRA to add; several, as 0,0.5,1, side by side."
    ),
]
CountOption = Annotated[
    int, typer.Option("--num-images", "-n", metavar="N", min=1, help="Pictures of each prompt; the seeds count up.")
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="Seed of a prompt's first picture.")]
StepsOption = Annotated[
    int | None,
    typer.Option("--steps", metavar="N", min=1, help="Sampling steps; if not given 50, on the miniature 12."),
]
GuidanceOption = Annotated[float, typer.Option("--guidance", metavar="G", min=0, help="Distilled guidance scale.")]
SizeOption = Annotated[
    str | None, typer.Option("--size", metavar="N|HxW", help="Picture size in px; if not given the model's own.")
]


def sample(
    prompt: PromptsArgument = None,
    prompts: PromptsOption = None,
    model: ModelOption = None,
    base: BaseOption = None,
    compare: CompareOption = None,
    lora_scale: LoraScaleOption = None,
    output: OutputOption = None,
    seed: SeedOption = 0,
    num_images: CountOption = 1,
    steps: StepsOption = None,
    guidance: GuidanceOption = 3.5,
    size: SizeOption = None,
    download: DownloadOption = False,
    gpus: GpusOption = 1,
    nodes: NodesOption = None,
    rdzv: RendezvousOption = None,
    node_rank: NodeRankOption = None,
) -> None:
    """Draw pictures from prompts; what is already there is not drawn again.

    Writes PNGs that carry their settings, grid.png and samples.jsonl, and one JSON line a picture to stdout.
    """
    launch = plan_launch(gpus, nodes, rdzv, node_rank)
    say = speaker(launch)
    with told_once():
        if prompts == "-":
            refuse_standard_input(launch, "--prompts -")
        from srpo_cli.runtime.prompts import read_prompts

        wanted = [*(prompt or []), *(read_prompts(prompts) if prompts else [])]
        if not wanted or not all(text.strip() for text in wanted):
            raise UsageError("srpo sample needs a prompt: give one as an argument, or --prompts FILE (or - for stdin)")
        if model and compare:
            raise UsageError("--model and --compare cannot be used together: name every model with --compare")
        if compare and len(compare) < 2:
            raise UsageError(f"--compare {compare[0]} alone compares nothing: give it twice or more")
        if compare and lora_scale:
            raise UsageError("--lora-scale and --compare cannot be used together: scale one LoRA, named with --model")
        if seed + num_images > _LAST_SEED:
            raise UsageError(f"--seed {seed} is too large: choose one below 2**53")
        parsed_size = parse_size(size) if size else None
        scales = [None] if lora_scale is None else parse_scales(lora_scale)
        labels = label_models(compare or [], "--compare")
        sources = find_sources(labels or {"": model or base or default_model("sampling from", say)}, base)
    if launch:
        start(launch)

    import json

    from srpo_cli.recipes import sample as recipe
    from srpo_cli.runtime.devices import best_device
    from srpo_cli.runtime.distributed import join_ranks

    request = recipe.Request(wanted, seed, num_images, steps, guidance, parsed_size, lora_scale=scales[0])
    folder = output or Path("samples")
    announce = say if download else None
    with join_ranks(best_device(), exchange="cpu") as ranks:
        if labels:
            rows = recipe.compare(sources, request, folder, ranks, announce)
        elif len(scales) > 1:
            rows = recipe.compare_scales(sources[""], scales, request, folder, ranks, announce)
        else:
            rows = recipe.sample(sources[""], request, folder, ranks, announce)
        try:
            for row in rows:
                if ranks.leads:
                    typer.echo(json.dumps(row))
        except KeyboardInterrupt:
            say("stopped: the same command draws what is missing")
            raise
        ranks.wait()
    for label, source in sources.items():
        name = labels.get(label, model)
        if source.weights and str(source.weights) != name:
            say(f"drawn by: {source.weights}")
    side_by_side = labels or len(scales) > 1
    say(f"pictures: {folder / (recipe.COMPARISON if side_by_side else recipe.GRID)}")


def parse_size(text: str) -> tuple[int, int]:
    """Height and width in px of ``--size``."""
    match = re.fullmatch(r"(\d{1,5})(?:x(\d{1,5}))?", text)
    if not match or 0 in (height := int(match[1]), width := int(match[2] or match[1])):
        raise UsageError(f"--size {text}: give one number, or height and width as in 720x1280")
    return height, width


def parse_scales(text: str) -> list[float]:
    """The scales of ``--lora-scale``, each once."""
    try:
        scales = [float(item) for item in text.split(",")]
    except ValueError:
        scales = []
    if not scales or not all(0 <= scale <= _LARGEST_LORA_SCALE for scale in scales):
        raise UsageError(f"--lora-scale {text}: give numbers from 0 to {_LARGEST_LORA_SCALE}, as in 0.5 or 0,0.5,1")
    return list(dict.fromkeys(map(abs, scales)))  # -0 is 0
