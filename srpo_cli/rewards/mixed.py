"""A weighted sum of rewards, for training on several at once: what the paper compares as reward mixing.

Mixing trades the parts' biases against each other and removes none (arXiv:2509.06942, Figure 7, lower half).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.preprocess import Images


class MixedReward(Reward):
    """The sum of weight times reward. Its parts keep what is their own: preprocessing, text features, device.

    A part that reads no text gives all texts of a picture the same, so it cancels out of a difference of words.

    Args:
        parts: (weight, reward) pairs, at least one; a negative weight trains against its reward.
    """

    unit = "weighted sum"

    def __init__(self, parts: Iterable[tuple[float, Reward]]) -> None:
        self.parts = tuple(parts)
        rewards = [reward for _, reward in self.parts]
        self.name = formula((weight, reward.name) for weight, reward in self.parts)
        self.reads_text = any(reward.reads_text for reward in rewards)
        self.differentiable = all(reward.differentiable for reward in rewards)
        self.thread_safe = all(reward.thread_safe for reward in rewards)
        self.weights = "; ".join(reward.weights for reward in rewards if reward.weights)

    def scores(self, images: Images, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Sums (B,) for several lists of B texts; every part is asked once for all of them."""
        terms = [[weight * scores for scores in reward.scores(images, *texts)] for weight, reward in self.parts]
        return tuple(sum(column[1:], start=column[0]) for column in zip(*terms, strict=True))

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0].float()

    def prepare(self, texts: Sequence[str]) -> None:
        for _, reward in self.parts:
            reward.prepare(texts)

    def parameters(self) -> Iterator[nn.Parameter]:
        for _, reward in self.parts:
            yield from reward.parameters()

    @property
    def tells_prompts(self) -> bool:
        return any(reward.tells_prompts for _, reward in self.parts)

    @property
    def device(self) -> torch.device:
        """Where the first part with weights has them; the others judge a picture wherever it is."""
        with_weights = (reward for _, reward in self.parts if next(reward.parameters(), None) is not None)
        return next(with_weights, self.parts[0][1]).device

    def via(self, mode: str | None) -> Self:
        """The same sum with every part behind the preprocessing; a mode's own name is one that all of them know."""
        return type(self)((weight, reward.via(mode)) for weight, reward in self.parts)


def formula(parts: Iterable[tuple[float, str]]) -> str:
    """Weights and names as people write a sum: "hpsv2.1 + 0.5 pickscore"."""
    text = ""
    for weight, name in parts:
        sign = "-" if weight < 0 else "+"
        term = name if abs(weight) == 1 else f"{abs(weight):g} {name}"
        text = f"{text} {sign} {term}" if text else term if weight >= 0 else f"-{term}"
    return text
