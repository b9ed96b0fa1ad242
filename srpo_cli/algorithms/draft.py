"""DRaFT (arXiv:2309.17400): the reward's gradient through the last steps of the sampler.

DRaFT-K keeps the graph of the sampler's last K steps; with K as many as the sampler takes it is DRaFT itself, with
K = 1 ReFL at the last step. DRaFT-LV lowers the variance of K = 1: the finished picture is noised to the last step's
level several times over, and the gradients of the one-step predictions from there are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from srpo_cli.algorithms.base import Rollout
from srpo_cli.algorithms.judging import DirectMethod
from srpo_cli.core.recover import add_noise
from srpo_cli.core.sampling import euler_sample
from srpo_cli.errors import UsageError


@dataclass(frozen=True)
class Tail:
    """The sampler's last ``steps`` steps, from where the rollout came by."""

    kind: ClassVar[str] = "tail"

    steps: int

    def start(self, rollout: Rollout) -> Tensor:
        """Latents before the first of these steps, (B, ...)."""
        return rollout.path[-1 - self.steps]


@dataclass(frozen=True)
class Renoised:
    """The sampler's last step from the finished picture with fresh noise; ``seed`` is that of each sample's, (B,)."""

    kind: ClassVar[str] = "renoised"
    steps: ClassVar[int] = 1

    seed: Tensor

    def start(self, rollout: Rollout) -> Tensor:
        """``x_0`` noised to the level of the last step, (B, ...)."""
        x_0 = rollout.x_0
        noises = [
            torch.randn(x_0.shape[1:], generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
            for seed in self.seed.tolist()
        ]
        return add_noise(x_0, torch.stack(noises).to(x_0, non_blocking=True), rollout.sigmas[-2])


@dataclass(frozen=True)
class TailDraws:
    """DRaFT-K; nothing in it is random, so that every lot of a rollout is the same.

    Attributes:
        steps: the K of DRaFT-K, at least 1.
    """

    steps: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps is {self.steps}: DRaFT keeps the gradient of at least 1 step, the last")

    def pairs(self, generators: Sequence[torch.Generator], count: int) -> list[list[Tail]]:
        """``count`` lots of one draw."""
        return [[Tail(self.steps)] for _ in range(count)]


@dataclass(frozen=True)
class RenoisedDraws:
    """DRaFT-LV: one lot is several noises in the same pictures, whose gradients are averaged.

    Attributes:
        noises: how many, at least 1; the paper takes 2.
        include_last: count the sampler's own last step as one more, as the code of FlowBP does.
    """

    noises: int = 2
    include_last: bool = False

    def __post_init__(self) -> None:
        if self.noises < 1:
            raise UsageError(f"noises is {self.noises}: DRaFT-LV noises a picture at least once; without is DRaFT-1")

    def pairs(self, generators: Sequence[torch.Generator], count: int) -> list[list[Tail | Renoised]]:
        """``count`` lots, every sample's noise from its own generator."""
        last = [Tail(1)] if self.include_last else []
        return [[*last, *(self._draw(generators) for _ in range(self.noises))] for _ in range(count)]

    def _draw(self, generators: Sequence[torch.Generator]) -> Renoised:
        return Renoised(torch.cat([torch.randint(2**63 - 1, (1,), generator=own) for own in generators]))


class DRaFT(DirectMethod):
    """Accumulates DRaFT's gradients into a model; the arguments are those of :class:`DirectMethod`."""

    keeps_path = True

    def calls(self, draw: Tail | Renoised, samples: int) -> int:
        return samples * draw.steps

    def predict(self, rollout: Rollout, draws: Sequence[Tail | Renoised]) -> Tensor:
        """The sampler's own last steps from where the draws start, with the graph of all of them kept.

        The draws of one pass take equally many steps.
        """
        steps = draws[0].steps
        _, sigmas = self._path(rollout, reach=steps)
        start = torch.cat([draw.start(rollout) for draw in draws]).detach()
        return euler_sample(self._flow(rollout, len(draws)), start, sigmas[-1 - steps :])
