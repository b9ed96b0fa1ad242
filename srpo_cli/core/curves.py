"""Weight curves over sigma, and the loss that turns a reward into something to minimise."""

from __future__ import annotations

from torch import Tensor


def linear_curve(sigma: Tensor, window: tuple[float, float], ends: tuple[float, float]) -> Tensor:
    """Weight that runs linearly over ``window``, from ``ends[0]`` (low) to ``ends[1]`` (high).

    Constant outside the window. Returns the shape of ``sigma``.
    """
    low, high = window
    fraction = ((sigma - low) / (high - low)).clamp(0, 1)
    return ends[0] + fraction * (ends[1] - ends[0])


def hinge(reward: Tensor, margin: float | None) -> Tensor:
    """Loss of a reward (B,): ``max(0, margin - reward)``, or ``-reward`` where ``margin`` is None.

    The reference code uses 0.7, which a raw HPS cosine never reaches: there the hinge is only a constant.
    """
    return -reward if margin is None else (margin - reward).relu()
