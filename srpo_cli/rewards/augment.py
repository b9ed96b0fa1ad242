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
            return torch.cat([self(image[None], own) for image, own in zip(images, generator, strict=True)])
        if self.shift:
            images = self._translate(images, generator)
        if self.noise:
            noise = torch.randn(images.shape, generator=generator, dtype=torch.float32)
            images = images + self.noise * noise.to(images)
        return images

    def _translate(self, images: Tensor, generator: torch.Generator | None) -> Tensor:
        batch, _, height, width = images.shape
        corners = torch.randint(2 * self.shift + 1, (batch, 2), generator=generator).tolist()
        padded = F.pad(images, [self.shift] * 4, mode="reflect")
        crops = zip(padded, corners, strict=True)
        return torch.stack([image[:, y : y + height, x : x + width] for image, (y, x) in crops])
