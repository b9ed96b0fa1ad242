"""How far a set of pictures is from a reference set, by their features: Fréchet and kernel distance."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from srpo_cli.errors import UsageError

_SUBSETS, _SUBSET_SIZE = 100, 1000  # as KID is published with (Binkowski et al., arXiv:1801.01401)
_ROWS = 1024  # features that are in float64 at a time


class Spread(NamedTuple):
    """Mean and standard deviation over subsets."""

    mean: float
    std: float


class _AsGiven(nn.Module):
    """Takes the place of the network in torchmetrics' classes, which are given features."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(reference: Tensor, features: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians fitted to features (N, D) and (M, D), N and M >= 2; FID on Inception's.

    UsageError for fewer.
    """
    _check_count("fid", 2, reference, features)
    # Whoever calls has gathered the features of all ranks; torchmetrics would add them up once more.
    metric = FrechetInceptionDistance(feature=_AsGiven(features.shape[1]), sync_on_compute=False)
    for rows, real in ((reference, True), (features, False)):
        for part in rows.cpu().split(_ROWS):
            metric.update(part.double(), real=real)
    return metric.compute().item()


def kernel_distance(reference: Tensor, features: Tensor, seed: int = 0) -> Spread:
    """Squared maximum mean discrepancy, cubic kernel, of features (N, D) and (M, D), N and M >= 4; KID on Inception's.

    Unbiased, so it may be below 0. Over 100 random subsets of 1,000 each, or of half of the smaller set. UsageError for
    fewer than four.
    """
    _check_count("kid", 4, reference, features)
    size = subset_size(len(reference), len(features))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that features are kept in memory, where they are already
        metric = KernelInceptionDistance(
            feature=_AsGiven(features.shape[1]), subsets=_SUBSETS, subset_size=size, sync_on_compute=False
        )
    metric.update(reference.cpu().double(), real=True)
    metric.update(features.cpu().double(), real=False)
    with torch.random.fork_rng(devices=[]):  # the subsets are drawn from torch's own generator
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return Spread(mean.item(), std.item())


def subset_size(*counts: int) -> int:
    """Pictures in each of the kernel distance's subsets."""
    return min(_SUBSET_SIZE, min(counts) // 2)


def _check_count(name: str, least: int, reference: Tensor, features: Tensor) -> None:
    for what, rows in (("the reference folder", reference), ("the model", features)):
        if len(rows) < least:
            raise UsageError(f"{name} needs {least} pictures or more, and {what} has {len(rows)}: give more")
