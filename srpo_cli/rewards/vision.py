"""What rewards with a vision tower of their own share: the way from pictures to unit features, and to a rating."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.preprocess import Images, Mode, Preprocess


class VisionReward(Reward):
    """What reads a picture through a frozen vision tower; higher is better.

    Args:
        tower: holds the tower's weights. Frozen here.
        preprocess: how pictures come to it.
        modes: the preprocessings that may be asked for, reference first, the one for training last.
        unit, name, weights: as for every :class:`Reward`.
    """

    thread_safe = True

    def __init__(
        self,
        tower: nn.Module,
        *,
        preprocess: Preprocess,
        modes: tuple[Mode, ...],
        unit: str,
        name: str,
        weights: str,
    ) -> None:
        self.tower = tower.requires_grad_(False).eval()
        self.preprocess = preprocess
        self.modes = modes
        self.unit, self.name, self.weights = unit, name, weights

    @property
    def dtype(self) -> torch.dtype:
        """What the tower computes in."""
        return next(self.tower.parameters()).dtype

    @abstractmethod
    def encode_image(self, pixels: Tensor) -> Tensor:
        """Features (B, D) of what :class:`Preprocess` makes, of any length."""

    def image_features(self, images: Images) -> Tensor:
        """Unit features (B, D) of pictures in [0, 1]; float32 or wider, differentiable."""
        pixels = self.preprocess(images).to(self.device, self.dtype)
        with self._own_precision():
            return unit_vectors(self.encode_image(pixels))

    def _own_precision(self) -> torch.autocast:
        """Keeps a caller's autocast out: differences of cosines need the digits, the text cache needs one value."""
        return torch.autocast(self.device.type, enabled=False)


class RatingReward(VisionReward):
    """The predicted rating of a picture, from a head on its unit features; reads no text.

    Args:
        tower: holds the tower's weights. Frozen here.
        head: maps unit features (B, D) to ratings (B, 1), in float32 or wider. Frozen here.
        preprocess, modes, name, weights: as for every :class:`VisionReward`.
    """

    reads_text = False

    def __init__(
        self,
        tower: nn.Module,
        head: nn.Module,
        *,
        preprocess: Preprocess,
        modes: tuple[Mode, ...],
        name: str,
        weights: str = "",
    ) -> None:
        super().__init__(tower, preprocess=preprocess, modes=modes, unit="1 to 10", name=name, weights=weights)
        self.head = head.requires_grad_(False).eval()

    def ratings(self, images: Images) -> Tensor:
        """Ratings (B,) of pictures in [0, 1]; float32 or wider, differentiable."""
        features = self.image_features(images)
        with self._own_precision():
            return self.head(features).squeeze(-1)

    def scores(self, images: Images, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        """The same ratings (B,) for every list of texts, computed once."""
        return (self.ratings(images),) * len(texts)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self.ratings(images).float()


def unit_vectors(features: Tensor) -> Tensor:
    """Unit vectors in float32 or wider: the difference of two cosines has no digits left in bfloat16."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
