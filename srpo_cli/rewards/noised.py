"""A relative pair for rewards that read no text: a picture against a slightly noised copy of itself.

Words cannot move such a reward, so arXiv:2509.06942 takes the difference from the picture: the reward of the clean
one minus that of the noised one. How much noise it does not say.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Self

import torch
from torch import Tensor, nn

from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.preprocess import Images


class NoisedPair(Reward):
    """A picture's own reward under every text but those of a negative word, and its noised copy's under these.

    Methods that compare words thereby compare the picture with its copy, and the plain prompt gets the plain reward.

    The copy's noise is a function of the prompt and the size: a sample has the same noise in a batch of any size,
    in both branches of a pair and in a run that goes on, and over many prompts no single pattern can be learnt.

    Args:
        reward: one that reads no text.
        positive, negative: the control words.
        template: text of a word, with {word} and {prompt} once each. Of several words that a text may have been made
            with, it is read as the longest's.
        noise: standard deviation, pictures being in [0, 1], which the copy may leave.
    """

    def __init__(
        self, reward: Reward, positive: Sequence[str], negative: Sequence[str], template: str, *, noise: float
    ) -> None:
        self.reward, self.noise = reward, noise
        self.name, self.unit, self.weights = reward.name, reward.unit, reward.weights
        self.differentiable, self.thread_safe = reward.differentiable, reward.thread_safe
        self.preprocess, self.modes = reward.preprocess, reward.modes
        self._arguments = (positive, negative, template)
        longest_first = sorted((*positive, *negative), key=len, reverse=True)
        self._made_with = [(_texts_of(word, template), word in negative) for word in longest_first]

    def scores(self, images: Images, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Rewards (B,) for several lists of B texts, at the price of one look at the pictures and one at the copies."""
        looks: dict[tuple[str | None, ...], Tensor] = {}
        columns = [tuple(self._noised_prompt(text) for text in column) for column in texts]
        for column, prompts in zip(columns, texts, strict=True):
            if column not in looks:
                (looks[column],) = self.reward.scores(self._copies(images, column), prompts)
        return tuple(looks[column] for column in columns)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0].float()

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.reward.parameters()

    @property
    def tells_prompts(self) -> bool:
        """No: a text only says whether the picture or its copy is meant."""
        return False

    @property
    def device(self) -> torch.device:
        return self.reward.device

    def via(self, mode: str | None) -> Self:
        return type(self)(self.reward.via(mode), *self._arguments, noise=self.noise)

    def _noised_prompt(self, text: str) -> str | None:
        """The prompt whose noise a picture gets under this text; None where it is judged as it is."""
        for texts, noised in self._made_with:
            if made := texts.fullmatch(text):
                return made["prompt"] if noised else None
        return None

    def _copies(self, images: Images, prompts: Sequence[str | None]) -> Images:
        """The pictures, noised where there is a prompt."""
        if not any(prompt is not None for prompt in prompts):
            return images
        copies = [
            image if prompt is None else image + self.noise * _noise(prompt, image.shape).to(image)
            for image, prompt in zip(images, prompts, strict=True)
        ]
        return torch.stack(copies) if isinstance(images, Tensor) else copies


def _texts_of(word: str, template: str) -> re.Pattern[str]:
    """Matches what ``template`` makes of a word and any prompt."""
    before, after = (re.escape(text) for text in template.format(word=word, prompt="\0").split("\0"))
    return re.compile(f"{before}(?P<prompt>.*){after}", re.DOTALL)


def _noise(prompt: str, shape: torch.Size) -> Tensor:
    """Standard normal noise of this shape, always the same for a prompt."""
    seed = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") >> 1
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
