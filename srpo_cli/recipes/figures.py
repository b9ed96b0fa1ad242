"""What the guard measures of a picture: its statistics, and what rewards say of it that training does not optimise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.metrics.pictures import STATISTICS, picture_statistics
from srpo_cli.rewards.base import Reward

CLIPPING, REWARD, CAPTION_MARGIN, GAP = "clipping", "reward", "caption_margin", "sgp_gap"


class OtherPrompts:
    """Wrong captions: for each of the known prompts those that come after it, round and round."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self._known = list(dict.fromkeys(prompts))
        self._places = {prompt: place for place, prompt in enumerate(self._known)}

    def __len__(self) -> int:
        """How many wrong captions every prompt has."""
        return max(0, len(self._known) - 1)

    def of(self, prompts: Sequence[str], count: int = 1) -> list[list[str]]:
        """``count`` columns of wrong captions, fewer where there are not so many."""
        places = [self._places[prompt] for prompt in prompts]
        return [
            [self._known[(place + step) % len(self._known)] for place in places]
            for step in range(1, min(count, len(self)) + 1)
        ]


class Figures:
    """Measures pictures.

    Args:
        trained: the reward that is optimised; asked about a picture as it is, without augmentation.
        held_out: rewards that are not, by name.
        words: control words.
        prompts: whatever pictures may have been drawn for; another one is a wrong caption, to see how much better its
            own one fits a picture.
        grid: pixels between the model's tokens.
    """

    def __init__(
        self, trained: Reward, held_out: Mapping[str, Reward], words: ControlWords, prompts: Sequence[str], grid: int
    ) -> None:
        self.trained, self.held_out, self.words, self.grid = trained, held_out, words, grid
        self._others = OtherPrompts(prompts)
        known = list(dict.fromkeys(prompts))
        texts = [*known, *(text for word in words.all for text in words.texts(word, known))]
        for reward in held_out.values():
            reward.prepare(texts)

    @property
    def names(self) -> list[str]:
        """Columns of :meth:`measure`; a held-out reward's begin with its name and a slash."""
        held_out = [f"{name}/{own}" for name, reward in self.held_out.items() for own in self._names(reward, gap=True)]
        return [*STATISTICS, CLIPPING, *self._names(self.trained, gap=False), *held_out]

    def captions(self, prompts: Sequence[str]) -> list[Sequence[str]]:
        """What the trained reward is asked about pictures of these prompts: the prompts, then wrong captions."""
        return [prompts, *self._others.of(prompts)] if self._reads(self.trained) else [prompts]

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: Sequence[str], rewards: Sequence[Tensor] | None = None) -> Tensor:
        """Figures of pictures, (B, 3, H, W) in [0, 1] -> (B, len(names)) float32 on their device.

        ``rewards`` are the trained reward's for :meth:`captions`, where somebody has asked already.
        """
        images = images.float()
        clipped = ((images <= 1 / 255) | (images >= 254 / 255)).float().mean((1, 2, 3))
        # Most pictures clip nothing and a few much: on a logarithm their mean is not that of the few.
        columns = [*picture_statistics(images, self.grid).unbind(1), (clipped + 1e-3).log()]
        columns += _margin(*(rewards or self.trained.scores(images, *self.captions(prompts))))
        for reward in self.held_out.values():
            columns += self._judge(reward, images, prompts)
        return torch.stack([column.to(images.device, torch.float32) for column in columns], 1)

    def _reads(self, reward: Reward) -> bool:
        return reward.tells_prompts and len(self._others) > 0

    def _names(self, reward: Reward, gap: bool) -> Iterator[str]:
        yield REWARD
        if self._reads(reward):
            yield CAPTION_MARGIN
            if gap:
                yield GAP

    def _judge(self, reward: Reward, images: Tensor, prompts: Sequence[str]) -> list[Tensor]:
        """A held-out reward itself, how much higher it is than with a wrong caption, and the gap of the words."""
        images = images.to(reward.device)
        if not self._reads(reward):
            return [reward.scores(images, prompts)[0]]
        (wrong,) = self._others.of(prompts)
        texts = [self.words.texts(word, prompts) for word in self.words.all]
        own, other, *terms = reward.scores(images, prompts, wrong, *texts)
        return [*_margin(own, other), self.words.gap(terms)]


def _margin(own: Tensor, *wrong: Tensor) -> list[Tensor]:
    return [own, *(own - other for other in wrong)]
