"""How alike two pictures are, and whether a reward still ranks pictures as it ranks their originals."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from scipy.stats import spearmanr
from torch import Tensor
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

HIGHEST_PSNR = 100.0
"""dB; what equal pictures get in place of infinity, far above the 59 dB that rounding to 8 bits leaves."""

RANKS_KEPT = 0.9
"""Least rank correlation at which a reward is said to rank as before: about six of seven pairs keep their order."""

ENOUGH_PICTURES = 8
"""Fewest pictures that a rank correlation is taken of: eight reach 0.9 by chance once in 400 times, five once in 24."""


def psnr(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of pictures (B, 3, H, W) in [0, 1], (B,) dB, at most ``HIGHEST_PSNR``."""
    options = {"data_range": 1.0, "reduction": "none", "dim": (1, 2, 3)}
    return peak_signal_noise_ratio(images.float(), reference.float(), **options).clamp(max=HIGHEST_PSNR)


def ssim(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of pictures (B, 3, H, W) in [0, 1], (B,) in [-1, 1] (Gaussian window, sigma 1.5 px)."""
    return structural_similarity_index_measure(
        images.float(), reference.float(), data_range=1.0, reduction="none"
    ).reshape(len(images))


def rms(tensors: Tensor, reference: Tensor) -> Tensor:
    """Root mean squared difference of each (B, ...) sample, (B,)."""
    return (tensors - reference).flatten(1).square().mean(1).sqrt()


def rank_correlation(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """Spearman's rank correlation; None for fewer than ``ENOUGH_PICTURES`` values or values that are all the same."""
    if len(values) < ENOUGH_PICTURES or len(set(values)) == 1 or len(set(reference)) == 1:
        return None
    return float(spearmanr(values, reference).statistic)


def ranking_window(sigmas: Sequence[float], correlations: Sequence[float | None]) -> tuple[float, float] | None:
    """The widest run of neighbouring ``sigmas``, rising, whose correlation reaches ``RANKS_KEPT``.

    Of equally wide runs the noisier one. Returns its lowest and highest sigma, the same for a run of one; None where
    no sigma reaches it.
    """
    points = zip(sigmas, correlations, strict=True)
    runs = [
        [sigma for sigma, _ in run]
        for kept, run in groupby(points, lambda point: point[1] is not None and point[1] >= RANKS_KEPT)
        if kept
    ]
    if not runs:
        return None
    widest = max(reversed(runs), key=lambda run: round(run[-1] - run[0], 9))
    return widest[0], widest[-1]
