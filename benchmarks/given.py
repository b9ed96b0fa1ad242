"""What a hand-written loop starts from: weights, encoded texts, seeds, and the noise levels drawn from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Generators = Sequence[torch.Generator]


@dataclass
class Given:
    """What a loop starts from.

    Attributes:
        config: the settings, a ``TrainConfig`` whose ``algorithm.target`` is null and ``algorithm.update`` "pair".
        transformer, vae, clip: of diffusers, and the reward's network; the transformer is trained.
        optimizer: of the transformer's parameters; None: torch's AdamW as configured.
        prompts: training prompts.
        encoded: T5 states (L, D) and pooled CLIP (D') by prompt.
        features: the reward's unit features (D) by text; missing ones are made by ``encode_texts``.
        encode_texts: features of N texts, (N, D).
        sigmas: sampling noise levels, (steps + 1,).
        side, mean, std: the reward's input: its size in px and how it is normalised.
        seeded: a CPU generator for a purpose and counters.
    """

    config: Any
    transformer: nn.Module
    vae: nn.Module
    clip: nn.Module
    prompts: Sequence[str]
    encoded: Callable[[str], tuple[Tensor, Tensor]]
    features: Mapping[str, Tensor]
    encode_texts: Callable[[Sequence[str]], Tensor]
    sigmas: Tensor
    side: int
    mean: Sequence[float]
    std: Sequence[float]
    seeded: Callable[..., torch.Generator]
    optimizer: torch.optim.Optimizer | None = None

    def draw(self, seeds: Generators) -> list[tuple[Tensor, ...]]:
        """For each branch sigma of the call, as told, of the recovery, and the two words' weights, all (B,)."""
        each = [self._place(seed) for seed in seeds]
        return [tuple(map(torch.stack, zip(*branch, strict=True))) for branch in zip(*each, strict=True)]

    def _place(self, seed: torch.Generator) -> list[tuple[Tensor, ...]]:
        algorithm, one = self.config.algorithm, torch.ones(())
        if algorithm.schedule == "sigma":
            (low, high), delta = algorithm.window, algorithm.delta_sigma
            at = low + delta + (high - low - 2 * delta) * torch.rand((), generator=seed)
            weight = algorithm.semantic_weight[0] * one
            return [(at + s * delta, at + s * delta, at, s * weight, -s * weight) for s in (1, -1)]
        options, length = algorithm.reference, algorithm.reference.timestep_length
        line = torch.linspace(1, 0, options.schedule_steps + 1)
        schedule = options.shift * line / (1 + (options.shift - 1) * line)
        grid = torch.linspace(*(schedule[index] for index in options.train_timestep), length)
        lowest = options.minimum_timestep
        time = int(torch.randint(lowest, length - lowest + 1, (), generator=seed))
        reach = min(math.floor((1 - options.groundtruth_ratio) * length) + 1, length - time, time)
        cleaner, upper, lower = max(time - reach, 1), grid[length - min(time + reach, length)], grid[length - time]
        higher, below = grid[length - min(cleaner + reach, length)], grid[length - cleaner]
        more, less = (torch.linspace(*ends, length) for ends in (options.discount_pos, options.discount_inv))
        denoise = (upper, (upper * 1000).floor() / 1000, lower, 1 + more[time], -one)
        return [denoise, (below, (below * 1000).floor() / 1000, higher, -one, 1 + less[cleaner])]
