"""Make the parts that a configuration names."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import get_type_hints

import torch
from huggingface_hub import try_to_load_from_cache
from torch import Tensor

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.algorithms.judging import Judging
from srpo_cli.config.schema import POLICY_METHODS, PromptsConfig, RewardConfig, TrainConfig
from srpo_cli.errors import MissingError, SrpoError, UsageError, one_line
from srpo_cli.miniature.world import SIZE, draw_prompts, parse
from srpo_cli.models.flux import Flux
from srpo_cli.recipes.methods import AnyDraws, make_method
from srpo_cli.recipes.placement import Loaded, arithmetic_of, load_model
from srpo_cli.registry import PROMPT_FILES, REWARDS
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.mixed import MixedReward
from srpo_cli.rewards.noised import NoisedPair
from srpo_cli.runtime.distributed import Ranks
from srpo_cli.runtime.fetch import fetch
from srpo_cli.runtime.plan import Settings
from srpo_cli.runtime.prompts import read_prompts

_PICTURES_AT_A_TIME = 8
HELD_OUT_SHARE = 8
"""Of a file's prompts every eighth is kept from training and used to evaluate."""

_WORLD_PROMPTS = 2048  # more than the world's captions; a run goes round and round


@dataclass(frozen=True)
class Parts:
    """The model, the reward and the algorithm over them."""

    loaded: Loaded
    reward: Reward
    algorithm: Judging
    draws: AnyDraws
    plan: Settings
    arithmetic: Callable[[], AbstractContextManager[object]]

    @property
    def model(self) -> Flux:
        return self.loaded.model

    @property
    def knows_only_the_world(self) -> bool:
        """Whether the model is the miniature, whose pictures the oracle can judge."""
        return self.model.name == "miniature"

    @property
    def pictures_at_a_time(self) -> int:
        """How many pictures are drawn or judged together outside the loop: as many as a rollout has in memory."""
        return min(self.plan.micro_batch, _PICTURES_AT_A_TIME)


def load_reward(
    name: str,
    weights: Path | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    announce: Callable[[str], None] | None = None,
) -> Reward:
    """The named reward, frozen, behind its reference preprocessing; see ``Reward.via`` for the others.

    Args:
        name: a name of the registry, of an installed plug-in, or the path of a plug-in's Python file.
        weights: where its weights are; None: the caches.
        device, dtype: where and in what it runs.
        announce: told about a download before it starts; None: nothing is downloaded.
    """
    return REWARDS.get(name)(name, weights, device, dtype, announce)


def load_training_reward(
    config: RewardConfig,
    words: ControlWords,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    announce: Callable[[str], None] | None = None,
    *,
    relative: bool = True,
    gradient: bool = True,
) -> Reward:
    """The reward to train on, or the weighted sum of several.

    Args:
        config: names it, or its parts.
        words: what tells a picture from its noised copy, where the configuration asks for such a pair.
        device, dtype, announce: as for :func:`load_reward`.
        relative: whether the method compares the rewards of two words, not only the prompt's own with others.
        gradient: whether the method differentiates it.

    Raises UsageError for a reward that cannot serve such a method.
    """
    check_pair(config, relative)
    loaded = {}
    for name, part in config.parts.items():
        reward = load_reward(name, part.weights, device, dtype, announce)
        loaded[name] = reward.via(part.preprocess or "training")
        if gradient:
            _refuse_without_gradient(loaded[name])
    _refuse_pair(config, {name: reward.reads_text for name, reward in loaded.items()}, relative)
    rewards = [_paired(reward, config, words) for reward in loaded.values()]
    weights = [part.weight for part in config.parts.values()]
    return rewards[0] if weights == [1] else MixedReward(zip(weights, rewards, strict=True))


def check_pair(config: RewardConfig, relative: bool = True) -> None:
    """UsageError for rewards that leave a relative method no pair, before any of them is looked for.

    Of other people's rewards it is known only when they are loaded.
    """
    if not any(REWARDS.plugin(name) for name in config.parts):
        makers = {name: get_type_hints(REWARDS.get(name)) for name in config.parts}
        _refuse_pair(config, {name: made["return"].reads_text for name, made in makers.items()}, relative)


def _refuse_pair(config: RewardConfig, reads_text: Mapping[str, bool], relative: bool) -> None:
    """:func:`check_pair`, given which rewards read text."""
    names, one = " and ".join(reads_text), len(reads_text) == 1
    if config.pair == "picture" and all(reads_text.values()):
        raise UsageError(
            f"reward.pair is picture, and {names} read{'s' * one} text, of which words make a pair: leave it out"
        )
    if relative and config.pair == "words" and not any(reads_text.values()):
        raise UsageError(
            f"reward {names} read{'s' * one} no text, so control words cannot move it: add --set reward.pair=picture, "
            "which compares a picture with a noised copy of it, or take the plain reward with --set "
            "algorithm.name=direct-align and algorithm.relative=false"
        )


def _refuse_without_gradient(reward: Reward) -> None:
    if not reward.differentiable or (reward.preprocess and not reward.preprocess.differentiable):
        mode = f" behind {reward.preprocess.mode}" if reward.preprocess else ""
        raise UsageError(
            f"reward {reward.name}{mode} has no gradient: take another reward, or add --set algorithm.name=dance-grpo, "
            "which needs none"
        )


def _paired(reward: Reward, config: RewardConfig, words: ControlWords) -> Reward:
    """The reward itself where words make its pair, else with the pair that the picture makes."""
    if config.pair == "words" or reward.reads_text:
        return reward
    return NoisedPair(reward, words.positive, words.negative, words.template, noise=config.pair_noise)


def fingerprint(parameters: Iterable[Tensor]) -> str:
    """Digest of weights spread evenly over every tensor: a name does not tell what is behind it."""
    digest = hashlib.sha256()
    for parameter in parameters:
        flat = parameter.detach().flatten()
        digest.update(flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def frozen_parameters(parts: Parts) -> Iterator[Tensor]:
    """All that a training reads and never changes; under a LoRA the base transformer too."""
    model = parts.model
    modules = (model.transformer, model.vae, model.text_encoder, model.text_encoder_2)
    parameters = chain(*(module.parameters() for module in modules if module), parts.reward.parameters())
    return (parameter for parameter in parameters if not parameter.requires_grad)


def make_parts(
    config: TrainConfig,
    plan: Settings,
    ranks: Ranks,
    tuned: Path | None = None,
    *,
    text_encoders: bool = True,
    announce: Callable[[str], None] | None = None,
) -> Parts:
    """All parts of a training run; UsageError for a size that the model cannot make.

    Args:
        config: names them.
        plan: what the memory plan settled.
        ranks: whose device they are on.
        tuned, text_encoders, announce: as for :func:`srpo_cli.recipes.placement.load_model`.
    """
    if config.model.name == "miniature" and config.model.size != (SIZE, SIZE):
        raise UsageError(f"model.size is {list(config.model.size)}: the miniature draws [{SIZE}, {SIZE}] and no other")
    check_pair(config.reward, config.algorithm.compares_words)
    loaded = load_model(config, plan, ranks, tuned, text_encoders=text_encoders, announce=announce)
    model = loaded.model
    model.noise(1, config.model.size, torch.Generator())  # refuses a size
    # A frozen judge in bfloat16 moves a cosine by 1e-3 of itself; its features are normalised in float32 again.
    dtype = torch.float32 if ranks.device.type == "cpu" else getattr(torch, config.model.dtype)
    words = ControlWords(**config.control_words.model_dump())
    wanted = {"relative": config.algorithm.compares_words, "gradient": config.algorithm.name not in POLICY_METHODS}
    reward = load_training_reward(config.reward, words, ranks.device, dtype, announce, **wanted)
    algorithm, draws = make_method(config, model, reward, words)
    how = partial(arithmetic_of, config, plan, ranks.device)
    return Parts(loaded, reward, algorithm, draws, plan, how)


@dataclass(frozen=True)
class Prompts:
    """Prompts to train on and prompts that training never sees."""

    train: list[str]
    held_out: list[str]
    in_order: list[str] = field(default_factory=list)
    """Both as they came, where they came out of a file."""

    def batch(self, numbers: Iterable[int]) -> list[str]:
        """The prompts of the rollouts with these numbers, counted over the whole run: in order, round and round."""
        return [self.train[number % len(self.train)] for number in numbers]


def load_prompts(
    config: PromptsConfig,
    model: str,
    held_out: int,
    split: str,
    seed: int,
    announce: Callable[[str], None] | None = None,
) -> Prompts:
    """Training prompts and ``held_out`` prompts to evaluate on.

    The miniature's world draws both, from captions that never meet; "miniature-unlit" leaves the light open in all
    of them, and ``split`` says which captions are held out. Of a file, every eighth prompt is held out.
    """
    if config.source in ("miniature", "miniature-unlit"):
        lit = config.source == "miniature"
        train = draw_prompts(_WORLD_PROMPTS, seed, "train", lit)
        return Prompts(train[: config.limit], draw_prompts(held_out, 0, split, lit))
    prompts = _hpdv2(announce) if config.source == "hpdv2" else read_prompts(config.source)
    prompts = prompts[: config.limit]
    if model == "miniature":
        check_miniature_prompts(prompts)
    kept = [p for i, p in enumerate(prompts) if i % HELD_OUT_SHARE]
    spare = prompts[::HELD_OUT_SHARE]
    if not kept:
        raise UsageError(f"prompts.source {config.source} holds one prompt: give two or more, every eighth is held out")
    return Prompts(kept, spare[:held_out], prompts)


def check_miniature_prompts(prompts: list[str]) -> None:
    """Refuse prompts that the miniature's world cannot show."""
    for prompt in prompts:
        if parse(prompt) is None:
            raise UsageError(
                f"the miniature cannot draw {prompt!r}: it knows only prompts like "
                "'a red sphere on a wooden table, natural lighting' (see README.md)"
            )


def _hpdv2(announce: Callable[[str], None] | None) -> list[str]:
    files = PROMPT_FILES["hpdv2"]
    (name,) = files.files
    path = try_to_load_from_cache(files.repo, name, repo_type=files.repo_type)
    if not isinstance(path, str):
        if announce is None:
            raise MissingError(
                f"HPDv2's training prompts are not in the local cache: fetch them with `{files.download}`, add "
                "--download, or use a file with --set prompts.source=FILE"
            )
        path = fetch(files, announce) / name
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return list(dict.fromkeys(row["prompt"] for row in rows))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SrpoError(
            f"{path} is not HPDv2's list of prompts ({one_line(error)}): remove it, fetch it anew"
        ) from error


def chunks(count: int, size: int) -> Iterator[slice]:
    """Slices that cover ``range(count)`` in parts of ``size``."""
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


@torch.no_grad()
def draw_pictures(
    model: Flux,
    prompts: list[str],
    generators: list[torch.Generator],
    size: tuple[int, int],
    steps: int,
    guidance: float,
    batch_size: int,
) -> Tensor:
    """Sample one picture for each prompt from its own generator, (N, 3, H, W) in [0, 1] on the CPU."""
    pictures = []
    for part in chunks(len(prompts), batch_size):
        noise = torch.cat([model.noise(1, size, generator) for generator in generators[part]])
        latents = model.sample(model.encode_prompts(prompts[part]), noise, size, steps, guidance)
        pictures.append(model.decode(latents, size).cpu())
    return torch.cat(pictures)
