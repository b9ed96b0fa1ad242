"""What the guard measures of a picture: its statistics, and what rewards say of it that training does not optimise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.metrics.pictures import STATISTICS, picture_statistics
from srpo_cli.rewards.base import Reward

CLIPPING, REWARD, CAPTION_MARGIN, GAP = "clipping", "reward", "caption_margin", "sgp_gap"


class Figures:
    """Measures pictures.

    Args:
        trained: the reward that is optimised; asked about a picture as it is, without augmentation.
        held_out: rewards that are not, by name.
        words: control words.
        prompts: whatever pictures may have been drawn for. The prompt after a picture's own serves as a wrong caption,
            to see how much better its own one fits.
        grid: pixels between the model's tokens.
    """

    def __init__(
        self, trained: Reward, held_out: Mapping[str, Reward], words: ControlWords, prompts: Sequence[str], grid: int
    ) -> None:
        self.trained, self.held_out, self.words, self.grid = trained, held_out, words, grid
        known = list(dict.fromkeys(prompts))
        self._wrong = dict(zip(known, [*known[1:], *known[:1]], strict=True)) if len(known) > 1 else {}
        texts = [*known, *(text for word in words.all for text in words.texts(word, known))]
        for reward in held_out.values():
            reward.prepare(texts)

    @property
    def names(self) -> list[str]:
        """Columns of :meth:`measure`; a held-out reward's begin with its name and a slash."""
        held_out = [f"{name}/{own}" for name, reward in self.held_out.items() for own in self._names(reward, gap=True)]
        return [*STATISTICS, CLIPPING, *self._names(self.trained, gap=False), *held_out]

    @torch.no_grad()
    def measure(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Figures of pictures, (B, 3, H, W) in [0, 1] -> (B, len(names)) float32 on their device."""
        images = images.float()
        clipped = ((images <= 1 / 255) | (images >= 254 / 255)).float().mean((1, 2, 3))
        # Most pictures clip nothing and a few much: on a logarithm their mean is not that of the few.
        columns = [*picture_statistics(images, self.grid).unbind(1), (clipped + 1e-3).log()]
        columns += self._judge(self.trained, images, prompts, gap=False)
        for reward in self.held_out.values():
            columns += self._judge(reward, images, prompts, gap=True)
        return torch.stack([column.to(images.device, torch.float32) for column in columns], 1)

    def _reads(self, reward: Reward) -> bool:
        return reward.reads_text and bool(self._wrong)

    def _names(self, reward: Reward, gap: bool) -> Iterator[str]:
        yield REWARD
        if self._reads(reward):
            yield CAPTION_MARGIN
            if gap:
                yield GAP

    def _judge(self, reward: Reward, images: Tensor, prompts: Sequence[str], gap: bool) -> list[Tensor]:
        """The reward itself, how much higher it is than with a wrong caption, and the gap of the control words."""
        images = images.to(reward.device)
        if not self._reads(reward):
            return [reward.scores(images, prompts)[0]]
        texts = [self.words.texts(word, prompts) for word in self.words.all] if gap else []
        own, wrong, *terms = reward.scores(images, prompts, [self._wrong[prompt] for prompt in prompts], *texts)
        return [own, own - wrong, *([self.words.gap(terms)] if gap else [])]
