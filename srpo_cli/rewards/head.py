"""The head of the aesthetic predictors and of ImageReward: five linear maps to one number, nothing between them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from itertools import pairwise

from torch import nn

_WIDTHS = (1024, 128, 64, 16, 1)


def linear_head(width: int, places: Sequence[int]) -> nn.Sequential:
    """Maps features (B, width) to (B, 1).

    Args:
        width: that of the features.
        places: the five layers' numbers in the released file, which counts the dropouts between them as well.
    """
    layers = (nn.Linear(*sizes) for sizes in pairwise((width, *_WIDTHS)))
    return nn.Sequential(OrderedDict(zip(map(str, places), layers, strict=True)))
