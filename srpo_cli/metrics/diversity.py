"""How unlike each other the pictures of one prompt are: a model that is over-trained draws the same one again."""

from __future__ import annotations

from torch import Tensor


def mean_pairwise_distance(features: Tensor) -> float:
    """Mean cosine distance over all pairs of unit features (N, D), N >= 2; in [0, 2], 0 for copies of one picture."""
    count = len(features)
    total = features.double().sum(0).square().sum().item()  # over all ordered pairs, each with itself among them
    return 1 - (total - count) / (count * (count - 1))
