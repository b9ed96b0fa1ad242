"""How a picture of any size becomes what a vision tower takes; the same weights score differently behind each way.

Three ways are in circulation for HPSv2 alone, so a reward says which one its published numbers used, and every
score records the one that made it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as V
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image
from torch import Tensor

Images = Tensor | Sequence[Tensor]
"""(B, 3, H, W) in [0, 1], or B pictures (3, H, W), each of its own size."""

Mode = Literal["crop", "crop-pil", "pad", "pad-antialias", "squash", "squash-pil"]
"""``crop``: the shorter side to the tower's size, then the centre. ``pad``: the longer side to it, then black around.
``squash``: both sides to it. All bicubic. On tensors with antialias, but for ``pad``, which the HPSv2 package of its
time resized without; ``-pil`` through Pillow on 8-bit pixels, as most published numbers were made: no gradient."""


@dataclass(frozen=True)
class Preprocess:
    """Resize and normalise; every mode but the ``-pil`` ones is differentiable.

    Attributes:
        size: side of the square that the tower takes, px.
        mode: one of :data:`Mode`.
        mean, std: per channel, in [0, 1] units.
    """

    size: int
    mode: Mode = "crop"
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    std: tuple[float, ...] = OPENAI_DATASET_STD

    @property
    def differentiable(self) -> bool:
        return not self.mode.endswith("-pil")

    def __call__(self, images: Images) -> Tensor:
        """Pictures in [0, 1] to the tower's input, (B, 3, size, size)."""
        if not isinstance(images, Tensor):
            return torch.cat([self(image[None]) for image in images])
        squares = (
            torch.stack([self._by_pillow(image) for image in images])
            if not self.differentiable
            else (self._by_tensors(images))
        )
        mean, std = (squares.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (squares - mean) / std

    def _by_tensors(self, images: Tensor) -> Tensor:
        size, (height, width) = self.size, images.shape[-2:]
        if self.mode == "squash":
            return _resize(images, (size, size))
        if self.mode == "crop":
            short = min(height, width)
            images = _resize(images, (int(size * height / short), int(size * width / short)))
            top, left = (round((edge - size) / 2) for edge in images.shape[-2:])
            return images[..., top : top + size, left : left + size]
        scale = size / max(height, width)
        images = _resize(images, (round(height * scale), round(width * scale)), antialias=self.mode == "pad-antialias")
        down, across = (size - edge for edge in images.shape[-2:])
        return F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))

    def _by_pillow(self, image: Tensor) -> Tensor:
        """A picture (3, H, W) through Pillow's resize, (3, size, size)."""
        pixels = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        edges = [self.size, self.size] if self.mode == "squash-pil" else self.size
        resized = V.resize(Image.fromarray(pixels), edges, V.InterpolationMode.BICUBIC)
        return V.to_tensor(V.center_crop(resized, [self.size, self.size])).to(image.device)


def _resize(images: Tensor, size: tuple[int, int], antialias: bool = True) -> Tensor:
    """Bicubic; with antialias every pixel of a large picture has a gradient."""
    size = (max(1, size[0]), max(1, size[1]))
    return F.interpolate(images, size, mode="bicubic", align_corners=False, antialias=antialias)
