"""Training runs to measure, and hand-written loops that start from the same weights, texts and seeds."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from benchmarks.given import Given
from srpo_cli.config.load import load_train_config
from srpo_cli.config.schema import TrainConfig
from srpo_cli.miniature import WEIGHTS
from srpo_cli.models.flux import Flux
from srpo_cli.recipes.resume import Resumed
from srpo_cli.recipes.train import Run
from srpo_cli.rewards.clip import ClipReward
from srpo_cli.runtime.distributed import ALONE, Ranks
from srpo_cli.runtime.folder import RunFolder
from srpo_cli.runtime.seeding import generator

QUIET = ("evaluation.prompts=0", "samples.count=0", "algorithm.target=null")
SMALL_LAYOUT = {
    "num_layers": 2,
    "num_single_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "axes_dims_rope": (8, 12, 12),
    "in_channels": 64,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 96,
    "guidance_embeds": True,
}
"""A transformer of 2.35 M parameters in FLUX's layout, for the miniature's latents and texts."""

_TEXT_TOKENS = 32


def miniature_config(*overrides: str) -> TrainConfig:
    """The preset ``realism`` on the miniature, of two prompts that the first step has seen, and measured nowhere."""
    wanted = ["model.name=miniature", *QUIET, *overrides]
    return load_train_config("realism", overrides=wanted, miniature=True).config


def random_config(folder: Path, *overrides: str) -> TrainConfig:
    """The preset ``realism`` as it is for FLUX.1-dev, on the random pipeline of :func:`write_random_pipeline`."""
    wanted = [f"model.name={folder}", "model.size=[128, 128]", "model.dtype=float32", "reward.name=miniature"]
    wanted += ["prompts.source=miniature", "prompts.cache=null", *QUIET, *overrides]
    return load_train_config("realism", overrides=wanted).config


def write_random_pipeline(folder: Path, **layout: Any) -> Path:
    """A pipeline with a random transformer between the miniature's other parts, whose prompts have 32 tokens.

    256 image tokens are 128 x 128 px. Returns ``folder``.
    """
    shutil.copytree(WEIGHTS / "pipeline", folder, ignore=lambda _, names: [n for n in names if n == "transformer"])
    tokenizer = folder / "tokenizer_2" / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "model_max_length": _TEXT_TOKENS}))
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(**{**SMALL_LAYOUT, **layout})
    randomise(transformer)
    transformer.save_pretrained(folder / "transformer")
    return folder


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """Every parameter normal with a deviation of 0.02, never zero: kernels are quicker on zeros."""
    for parameter in module.parameters():
        parameter.normal_(std=0.02)


def make_run(
    config: TrainConfig,
    folder: Path,
    ranks: Ranks = ALONE,
    say: Callable[[str], None] = lambda _: None,
) -> Run:
    """The product's run; its ``take_step`` is what is measured."""
    return Run(config, RunFolder(folder), Resumed(None, config.train.batch_size * ranks.size), ranks, say)


def take_step(run: Run) -> dict[str, Any]:
    """One step of a run; returns its record."""
    record = run.take_step()
    run.step += 1
    return record


def given_of(run: Run, twin: bool = True) -> Given:
    """What a hand-written loop needs to take the steps that ``run`` takes.

    Args:
        run: a run of the miniature's or another CLIP reward.
        twin: with a copy of the transformer; False: with the run's own, where there is no room for two.
    """
    model, reward, config = run.model, run.parts.reward, run.config
    _check(model, reward)
    transformer = copy.deepcopy(model.transformer) if twin else model.transformer
    words = run.algorithm.control_words
    prompts = list(dict.fromkeys(run.prompts.trained_on))
    texts = [*prompts, *(text for word in words.all for text in words.texts(word, prompts))]
    return Given(
        config=config,
        transformer=transformer,
        vae=model.vae,
        clip=reward.tower,
        prompts=run.prompts.train,
        encoded={prompt: model.encode_one(prompt) for prompt in prompts}.__getitem__,
        features=dict(zip(texts, reward.text_features(texts), strict=True)),
        encode_texts=encoder_of(reward),
        sigmas=model.sigmas(config.rollout.steps, config.model.size, config.rollout.shift),
        side=reward.preprocess.size,
        mean=reward.preprocess.mean,
        std=reward.preprocess.std,
        seeded=generator,
    )


def encoder_of(reward: ClipReward) -> Callable[[list[str]], Tensor]:
    """The reward's text tower without its cache."""

    @torch.no_grad()
    def encode(texts: list[str]) -> Tensor:
        tokens = reward.tokenizer(list(texts)).to(reward.device)
        return nn.functional.normalize(reward.tower.encode_text(tokens).float(), dim=-1)

    return encode


def _check(model: Flux, reward: Any) -> None:
    """The hand-written loops know one family and one way to a vision tower."""
    if not isinstance(model, Flux) or not isinstance(reward, ClipReward) or reward.preprocess.mode != "crop":
        raise TypeError(f"the hand-written loops know no {model.name} with {reward.name}")


def one_thread() -> None:
    """Compute on one thread, so that CPU time is what the arithmetic takes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
