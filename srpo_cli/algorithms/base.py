"""What every training method works with: a model family, a reward, control words, and rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from srpo_cli.errors import UsageError

Generators = torch.Generator | Sequence[torch.Generator] | None
"""CPU generators: one for all samples, or one for each, so that a sample's draws do not depend on its batch."""


class Model(Protocol):
    """What a method asks of a model family; see :class:`srpo_cli.models.flux.Flux`."""

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Any, guidance: float, size: tuple[int, int]
    ) -> Tensor: ...

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor: ...


class Reward(Protocol):
    """What a method asks of a reward; see :class:`srpo_cli.rewards.clip.ClipReward`."""

    def scores(self, images: Tensor, *texts: Sequence[str]) -> tuple[Tensor, ...]: ...


class ImageTransform(Protocol):
    """A random, differentiable change of pictures; see :class:`srpo_cli.rewards.augment.Augment`."""

    def __call__(self, images: Tensor, generator: Generators) -> Tensor: ...


@dataclass(frozen=True)
class Rollout:
    """Clean latents and all that belongs to them.

    Attributes:
        x_0: clean latents, (B, ...), from the sampler or from real pictures; constant.
        eps: noise to mix into them, shaped like ``x_0``: the rollout's own start, or fresh.
        prompts: B prompts, without control words.
        conditioning: the model's encoding of the prompts.
        size: height and width of the pictures, px.
        sigmas, path: levels of the sampler, (steps + 1,) decreasing, and the latents at each of them, (steps + 1, B,
            ...); the last ones are ``x_0``. None where no method asked for them.
        advantages: of each picture over the others of its group, (B,); None without groups.
    """

    x_0: Tensor
    eps: Tensor
    prompts: Sequence[str]
    conditioning: Any
    size: tuple[int, int]
    sigmas: Tensor | None = None
    path: Tensor | None = None
    advantages: Tensor | None = None

    def repeat(self, count: int) -> Rollout:
        """All samples ``count`` times over, one whole batch after the other."""
        if count == 1:
            return self
        x_0, eps = (tensor.repeat(count, *[1] * (tensor.ndim - 1)) for tensor in (self.x_0, self.eps))
        conditioning = None if self.conditioning is None else self.conditioning.repeat(count)
        return Rollout(x_0, eps, [*self.prompts] * count, conditioning, self.size)


@dataclass(frozen=True)
class ControlWords:
    """Lists of desired and undesired words, of which step ``n`` uses the n-th, round and round.

    ``template`` makes the text that the reward reads; the model itself only sees the plain prompt.
    """

    positive: Sequence[str]
    negative: Sequence[str]
    template: str = "{word}. {prompt}"

    def __post_init__(self) -> None:
        if not self.positive or not self.negative:
            raise UsageError("control_words needs at least one positive and one negative word.")

    def at(self, step: int) -> tuple[str, str]:
        """The positive and the negative word of a step."""
        return self.positive[step % len(self.positive)], self.negative[step % len(self.negative)]

    def texts(self, word: str, prompts: Sequence[str]) -> list[str]:
        """Each prompt with ``word`` put to it."""
        return [self.template.format(word=word, prompt=prompt) for prompt in prompts]

    def asked(self, prompts: Sequence[str]) -> list[str]:
        """Each prompt with a positive word put to it, taken in turn: what to ask a model for to see the word."""
        words = [self.positive[i % len(self.positive)] for i in range(len(prompts))]
        return [text for word, prompt in zip(words, prompts, strict=True) for text in self.texts(word, [prompt])]

    @property
    def all(self) -> tuple[str, ...]:
        """Every word, the positive ones first."""
        return (*self.positive, *self.negative)

    def gap(self, rewards: Sequence[Tensor]) -> Tensor:
        """Mean reward for the positive words minus that for the negative ones, (B,), from one (B,) for each of all."""
        stacked = torch.stack(list(rewards))
        return stacked[: len(self.positive)].mean(0) - stacked[len(self.positive) :].mean(0)
