"""Statistics of a picture that hacking moves: colour, light, grain, and the spectrum. No learned judge among them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

STATISTICS = (
    "grain",
    "saturation",
    "chroma",
    "highlights",
    "brightness",
    "contrast",
    "grid",
    "band_1",
    "band_2",
    "band_3",
    "band_4",
    "band_5",
)
"""Columns of ``picture_statistics``."""

_LUMA = (0.299, 0.587, 0.114)
_GRID = 8  # pixels between token borders of the miniature; FLUX's are 16


def picture_statistics(images: Tensor, grid: int = _GRID) -> Tensor:
    """Measure pictures, (B, 3, H, W) in [0, 1] -> (B, len(STATISTICS)) float32.

    ``grain``: median over 6 x 6 blocks of the standard deviation of what a 3 x 3 mean leaves of the luma, robust to
    edges. ``saturation``: mean HSV saturation. ``chroma``: mean distance of the channels from their mean.
    ``highlights``: share of colourless pixels far brighter than their surroundings. ``brightness``, ``contrast``:
    mean and standard deviation of the luma. ``grid``: autocorrelation of the luma's detail at ``grid`` pixels above
    that at its neighbours. ``band_1`` to ``band_5``: log power of the luma in five rings of frequency, low to high.
    """
    images = images.float()
    luma = (images * images.new_tensor(_LUMA)[None, :, None, None]).sum(1)
    detail = luma - _local_mean(luma, 1)
    high, low = images.amax(1), images.amin(1)
    blocks = F.unfold(detail[:, None], 6, stride=6)
    return torch.stack(
        [
            blocks.std(1).median(1).values,
            ((high - low) / high.clamp(min=1e-3)).mean((1, 2)),
            (images - images.mean(1, keepdim=True)).square().mean(1).sqrt().mean((1, 2)),
            ((luma - _local_mean(luma, 4) > 0.12) & (high - low < 0.35)).float().mean((1, 2)),
            luma.mean((1, 2)),
            luma.std((1, 2)),
            _grid_correlation(detail, grid),
            *_spectrum(luma, 5).unbind(1),
        ],
        1,
    )


def _local_mean(plane: Tensor, radius: int) -> Tensor:
    padded = F.pad(plane[:, None], (radius,) * 4, mode="reflect")
    return F.avg_pool2d(padded, 2 * radius + 1, 1)[:, 0]


def _grid_correlation(detail: Tensor, period: int) -> Tensor:
    """Autocorrelation at ``period`` pixels minus the mean of that one pixel to either side, both axes, (B,)."""

    def correlation(lag: int) -> Tensor:
        across = (detail[:, :, lag:] * detail[:, :, :-lag]).mean((1, 2))
        down = (detail[:, lag:] * detail[:, :-lag]).mean((1, 2))
        return (across + down) / 2

    peak = correlation(period) - (correlation(period - 1) + correlation(period + 1)) / 2
    return peak / detail.square().mean((1, 2)).clamp(min=1e-8)


def _spectrum(luma: Tensor, bands: int) -> Tensor:
    """Log mean power of the luma in ``bands`` rings of equal width up to the Nyquist frequency, (B, bands)."""
    height, width = luma.shape[-2:]
    power = torch.fft.rfft2(luma - luma.mean((1, 2), keepdim=True), norm="ortho").abs().square()
    fy = torch.fft.fftfreq(height, device=luma.device).abs()[:, None]
    fx = torch.fft.rfftfreq(width, device=luma.device)[None]
    radius = (fy**2 + fx**2).sqrt().clamp(max=0.4999) / 0.5
    ring = (radius * bands).long().flatten()
    sums = luma.new_zeros(len(luma), bands).index_add_(1, ring, power.flatten(1))
    return (sums / torch.bincount(ring, minlength=bands) + 1e-8).log()
