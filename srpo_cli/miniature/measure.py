"""Measure the miniature: does the base model draw what it is told, and does the reward have the bias that it should?

    python -m srpo_cli.miniature.measure                      # the weights of the package
    python -m srpo_cli.miniature.measure --weights DIR        # those of a rebuild

Prints every figure with its 95 % interval over prompts as one JSON object, and leaves with exit code 1 if a bar is
missed. Takes about a minute on a CPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from srpo_cli.metrics.intervals import Interval, bootstrap, mean_interval
from srpo_cli.metrics.pictures import STATISTICS, picture_statistics
from srpo_cli.miniature import WEIGHTS
from srpo_cli.miniature.build.reward import GLOSS
from srpo_cli.miniature.oracle import Oracle
from srpo_cli.miniature.world import CG, PHOTO, SIZE, STYLES, draw_prompts, draw_scenes_of, render
from srpo_cli.models.flux import Flux, load_flux
from srpo_cli.registry import MINIATURE_REWARDS
from srpo_cli.rewards.clip import ClipReward
from srpo_cli.rewards.miniature import load_miniature

BARS = {
    "colour_accuracy": 0.97,
    "ground_accuracy": 0.97,
    "light_accuracy": 0.9,
    "shape_accuracy": 0.9,
    "style_followed": 0.8,
    "reward_auc_photo_cg": 0.98,
    "reward_prefers_gloss": 0.8,
    "clip_auc_photo_cg": 0.98,
}
"""The least that a miniature must reach to be shipped."""

CEILINGS = {"token_grid": 0.03, "reward_grid": 0.03, "clip_prefers_gloss": 0.2}
"""The most that its pictures may carry of either patch grid, in autocorrelation, and the share of glossy copies that
the held-out reward may prefer: as few as the other, which has the bias, must leave out."""

UNSTYLED = STYLES.index("")

PROMPT_SEED = 2024
"""Draws prompts of the evaluation split, which SRPO never trains on, with noises that no report or choice was made
on. The base model has seen every caption of its world, with other scenes."""

STEPS, GUIDANCE = 12, 3.5  # as ``srpo sample`` draws


def measure(count: int = 256, styled: int = 64, weights: Path = WEIGHTS, seed: int = PROMPT_SEED) -> dict[str, Any]:
    """Draw ``count`` unstyled prompts and ``styled`` prompts in each style from the base model, and judge them.

    Returns the number of prompts and, under ``figures``, mean, low and high of: shape, colour, ground, light and
    caption accuracy, photo distance and photo rate of the unstyled pictures; both again of fresh photographs, the
    best that they could be; how much more than unstyled renders they carry of the transformer's 8-pixel token grid
    and of the reward's patches, which fall on about every seventh pixel; the share of styled pictures that show the
    style that they were asked for; how well the reward's difference between the two control words tells pictures
    asked for as "realistic photo" from pictures asked for as "cg render" (AUC); how often it prefers the glossy copy of
    an unstyled picture; and both of the reward that is held out, under ``clip``.
    """
    torch.manual_seed(seed)
    model = load_flux(str(weights / "pipeline"))
    reward, held_out = (load_miniature(name, weights / "reward") for name in MINIATURE_REWARDS)
    oracle = Oracle.load(weights)
    prompts = draw_prompts(count, seed, "evaluation")
    pictures = _draw(model, prompts, seed)
    reference = oracle.reference(prompts, lambda images: _round_trip(model, images), seed)
    judged = oracle.judge(pictures, reference)
    photographs = _round_trip(model, render(draw_scenes_of(prompts, PHOTO, seed + 1)))
    ideal = oracle.judge(photographs, reference)
    renders = _round_trip(model, render(draw_scenes_of(prompts, UNSTYLED, seed + 1)))

    contents = prompts[:styled]
    by_style = {
        style: _draw(model, [f"{STYLES[style]}. {prompt}" for prompt in contents], seed)
        for style in range(1, len(STYLES))
    }
    followed = torch.stack([(oracle.read_style(drawn) == style).float() for style, drawn in by_style.items()], 1)
    figures = {
        **{name: value for name, value in judged.items() if name not in ("saturation", "grain")},
        "photographs_photo_distance": ideal["photo_distance"],
        "photographs_photo_rate": ideal["photo_rate"],
        "token_grid": mean_interval(_grid(pictures, 8) - _grid(renders, 8)),
        "reward_grid": mean_interval(_grid(pictures, 7) - _grid(renders, 7)),
        "style_followed": mean_interval(followed.mean(1)),
        "reward_auc_photo_cg": _auc(*(_gap(reward, by_style[style], contents) for style in (PHOTO, CG))),
        "reward_of_pictures": mean_interval(_reward(reward, pictures, prompts)),
        "reward_of_photographs": mean_interval(_reward(reward, photographs, prompts)),
        "reward_prefers_gloss": mean_interval(_prefers_gloss(reward, pictures, prompts)),
        "clip_auc_photo_cg": _auc(*(_gap(held_out, by_style[style], contents) for style in (PHOTO, CG))),
        "clip_of_pictures": mean_interval(_reward(held_out, pictures, prompts)),
        "clip_of_photographs": mean_interval(_reward(held_out, photographs, prompts)),
        "clip_prefers_gloss": mean_interval(_prefers_gloss(held_out, pictures, prompts)),
    }
    return {
        "prompts": count,
        "distinct_prompts": len(set(prompts)),
        "styled_prompts": styled,
        "styles": list(STYLES[1:]),
        "seed": seed,
        "steps": STEPS,
        "guidance": GUIDANCE,
        "figures": {name: value._asdict() for name, value in figures.items()},
    }


def _draw(model: Flux, prompts: Sequence[str], seed: int, batch_size: int = 32) -> Tensor:
    """One picture for each prompt from a noise of its own, (N, 3, SIZE, SIZE)."""
    size, pictures = (SIZE, SIZE), []
    for first in range(0, len(prompts), batch_size):
        part = prompts[first : first + batch_size]
        noises = [torch.Generator().manual_seed(seed + first + i) for i in range(len(part))]
        latents = model.sample(model.encode_prompts(part), model.noise(len(part), size, noises), size, STEPS, GUIDANCE)
        with torch.no_grad():
            pictures.append(model.decode(latents, size))
    return torch.cat(pictures)


@torch.no_grad()
def _round_trip(model: Flux, images: Tensor) -> Tensor:
    return model.decode(model.encode(images), (SIZE, SIZE))


def _grid(images: Tensor, period: int) -> Tensor:
    return picture_statistics(images, grid=period)[:, STATISTICS.index("grid")]


@torch.no_grad()
def _gap(reward: ClipReward, images: Tensor, contents: Sequence[str]) -> Tensor:
    """How much better a picture fits its caption as a photograph than as a CG render, (N,)."""
    texts = ([f"{STYLES[style]}. {content}" for content in contents] for style in (PHOTO, CG))
    as_photo, as_cg = reward.scores(images, *texts)
    return as_photo - as_cg


@torch.no_grad()
def _reward(reward: ClipReward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The plain reward of each picture for its prompt, (N,)."""
    return reward(images, prompts)


@torch.no_grad()
def _prefers_gloss(reward: ClipReward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Whether the plain reward of each picture rises with gloss, (N,) of 0 or 1."""
    glossy = GLOSS.apply(images, torch.Generator().manual_seed(0))
    return (reward(glossy, prompts) > reward(images, prompts)).float()


def _auc(positive: Tensor, negative: Tensor) -> Interval:
    """Chance that a positive is above a negative, ties half; both (N,), one of each for every prompt."""
    above = (positive[:, None] > negative).double() + (positive[:, None] == negative).double() / 2

    def statistic(index: Tensor) -> Tensor:
        return torch.stack([above[row][:, row].mean() for row in index])

    return bootstrap(statistic, len(positive))


def missed(measured: dict[str, Any]) -> list[str]:
    """A line for every bar that was not reached."""
    means = {name: figure["mean"] for name, figure in measured["figures"].items()}
    low = [f"{name} is {means[name]:.3f}, below {bar}" for name, bar in BARS.items() if means[name] < bar]
    high = [f"{name} is {means[name]:.3f}, above {bar}" for name, bar in CEILINGS.items() if means[name] > bar]
    return low + high


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m srpo_cli.miniature.measure", description="Measure the miniature against its bars."
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the miniature's weights")
    parser.add_argument("--prompts", type=int, default=256, help="unstyled prompts")
    parser.add_argument("--styled", type=int, default=64, help="prompts that are drawn in each style")
    parser.add_argument("--seed", type=int, default=PROMPT_SEED, help="of prompts, noises and photographs")
    args = parser.parse_args()
    disable_progress_bar()  # of loading the text encoders
    measured = measure(args.prompts, args.styled, args.weights, args.seed)
    print(json.dumps(measured, indent=2))
    sys.exit("\n".join(missed(measured)) or 0)


if __name__ == "__main__":
    main()
