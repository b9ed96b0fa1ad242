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
``squash``: both sides to it. On tensors with antialias, but for ``pad``, which the HPSv2 package of its time resized
without; ``-pil`` through Pillow on 8-bit pixels, as most published numbers were made: no gradient."""

Interpolation = Literal["bicubic", "bilinear"]


@dataclass(frozen=True)
class Preprocess:
    """Resize and normalise; every mode but the ``-pil`` ones is differentiable.

    Attributes:
        size: side of the square that the tower takes, px.
        mode: one of :data:`Mode`.
        mean, std: per channel, in [0, 1] units.
        interpolation: the resize's kernel.
        centre: where a centred square starts when an odd number of pixels is left over: "round" to the nearest even
            one, as torchvision and open_clip do, or "floor", as transformers does.
    """

    size: int
    mode: Mode = "crop"
    mean: tuple[float, ...] = OPENAI_DATASET_MEAN
    std: tuple[float, ...] = OPENAI_DATASET_STD
    interpolation: Interpolation = "bicubic"
    centre: Literal["round", "floor"] = "round"

    @property
    def differentiable(self) -> bool:
        return not self.mode.endswith("-pil")

    def __call__(self, images: Images) -> Tensor:
        """Pictures in [0, 1] to the tower's input, (B, 3, size, size), float32 or wider."""
        if not isinstance(images, Tensor):
            return torch.cat([self(image[None]) for image in images])
        # Half precision has fewer levels near white than 8-bit pixels; the tower rounds again, once is enough.
        images = images.to(torch.promote_types(images.dtype, torch.float32))
        if self.differentiable:
            squares = self._by_tensors(images)
        else:
            squares = torch.stack([self._by_pillow(image) for image in images]).to(images)
        mean, std = (squares.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        return (squares - mean) / std

    def _by_tensors(self, images: Tensor) -> Tensor:
        size, (height, width) = self.size, images.shape[-2:]
        if self.mode == "squash":
            return self._resize(images, (size, size))
        if self.mode == "crop":
            images = self._resize(images, self._cover(height, width))
            top, left = (self._start(edge) for edge in images.shape[-2:])
            return images[..., top : top + size, left : left + size]
        scale = size / max(height, width)
        fitted = (max(1, round(height * scale)), max(1, round(width * scale)))
        images = self._resize(images, fitted, antialias=self.mode == "pad-antialias")
        down, across = (size - edge for edge in fitted)
        return F.pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))

    def _by_pillow(self, image: Tensor) -> Tensor:
        """A picture (3, H, W) through Pillow's resize, (3, size, size) in float32."""
        size = self.size
        pixels = (image.detach().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        edges = (size, size) if self.mode == "squash-pil" else self._cover(*pixels.shape[:2])
        kernel = Image.Resampling[self.interpolation.upper()]
        resized = V.to_tensor(Image.fromarray(pixels).resize(edges[::-1], kernel))
        top, left = (self._start(edge) for edge in edges)
        return resized[:, top : top + size, left : left + size]

    def _cover(self, height: int, width: int) -> tuple[int, int]:
        """Height and width whose shorter one is the tower's size; torchvision cuts the longer one off, unrounded."""
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)

    def _start(self, edge: int) -> int:
        """Where the centred square begins on an edge of this length."""
        return round((edge - self.size) / 2) if self.centre == "round" else (edge - self.size) // 2

    def _resize(self, images: Tensor, size: tuple[int, int], antialias: bool = True) -> Tensor:
        """Resized; with antialias every pixel of a large picture has a gradient."""
        if images.shape[-2:] == size:
            return images
        return F.interpolate(images, size, mode=self.interpolation, align_corners=False, antialias=antialias)
