"""Random changes to a picture before a reward sees it, so that a reward's pixel grid cannot be written into it.

Without them SRPO draws the patch grid of the reward's vision tower into the pictures: invisible to the
reward, visible to people.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Augment:
    """Random translation, then pixel noise; differentiable, and random only through the generator it is given.

    Attributes:
        shift: largest translation in px, each sample and axis on its own; borders are filled by reflection.
        noise: standard deviation of the pixel noise, in [0, 1] pixel units.
    """

    shift: int = 0
    noise: float = 0.0

    def __call__(self, images: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None = None) -> Tensor:
        """Change ``images`` (B, 3, H, W), drawing from a CPU ``generator`` or from one for each picture.

        Same shape; noise may leave [0, 1].
        """
        if isinstance(generator, Sequence):
            draws = [self._draw(torch.Size([1, *images.shape[1:]]), own) for own in generator]
        else:
            draws = [self._draw(images.shape, generator)]
        corners, noises = zip(*draws, strict=True)
        if self.shift:
            images = self._translate(images, torch.cat(corners))
        if self.noise:
            images = images + self.noise * torch.cat(noises).to(images, non_blocking=True)
        return images

    def _draw(self, shape: torch.Size, generator: torch.Generator | None) -> tuple[Tensor | None, Tensor | None]:
        """Corners (B, 2) and noise (B, 3, H, W) float32 of pictures of this shape; None for what is not asked."""
        corners = torch.randint(2 * self.shift + 1, (shape[0], 2), generator=generator) if self.shift else None
        noise = torch.randn(shape, generator=generator, dtype=torch.float32) if self.noise else None
        return corners, noise

    def _translate(self, images: Tensor, corners: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        padded = F.pad(images, [self.shift] * 4, mode="reflect")
        crops = zip(padded, corners.tolist(), strict=True)
        return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in crops])
