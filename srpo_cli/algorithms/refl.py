"""ReFL (ImageReward, arXiv:2304.05977, algorithm 1): the reward of a one-step prediction late in the sampling.

The sampler stops at a step drawn from a late window, the model is called once with gradient, and what it takes the
clean picture to be is judged: equation 2 of arXiv:2509.06942 in its velocity form. The original draws one of the last
10 of 40 steps, its flow version one of the last 11 of 25, and both train on a hinge.

The original multiplies the loss by 1e-3 and alternates with the pre-training loss, which its published trainer leaves
out. A factor on the loss is the learning rate's business here, and there is no second loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from srpo_cli.algorithms.base import Rollout
from srpo_cli.algorithms.judging import DirectMethod
from srpo_cli.core.schedule import expand_to
from srpo_cli.errors import UsageError


@dataclass(frozen=True)
class Late:
    """Where each sample's one call is made: ``steps_left`` steps of the sampler before its end, (B,), 1 the last."""

    kind: ClassVar[str] = "late"

    steps_left: Tensor


@dataclass(frozen=True)
class LateDraws:
    """Each sample's step, uniform over a window of the sampler's last ones.

    Attributes:
        window: fewest and most steps left when the model is called; (1, 10) is the original's last 10.
    """

    window: tuple[int, int]

    def __post_init__(self) -> None:
        first, last = self.window
        if not 1 <= first <= last:
            raise UsageError(
                f"window {list(self.window)} must be two rising numbers of steps that are left, 1 for the last: "
                "give [1, 10] for the last ten"
            )

    def pairs(self, generators: Sequence[torch.Generator], count: int) -> list[list[Late]]:
        """``count`` lots of one draw, every sample's from its own generator."""
        return [[self._draw(generators)] for _ in range(count)]

    def _draw(self, generators: Sequence[torch.Generator]) -> Late:
        first, last = self.window
        return Late(torch.cat([torch.randint(first, last + 1, (1,), generator=own) for own in generators]))


class ReFL(DirectMethod):
    """Accumulates ReFL's gradients into a model; the arguments are those of :class:`DirectMethod`."""

    keeps_path = True

    def predict(self, rollout: Rollout, draws: Sequence[Late]) -> Tensor:
        """``x_0_hat = x - sigma * velocity`` at each sample's place on the sampler's path."""
        steps_left = torch.cat([draw.steps_left for draw in draws])
        path, sigmas = self._path(rollout, reach=int(steps_left.max()))
        place = (len(sigmas) - 1 - steps_left).to(path.device, non_blocking=True)
        sample = torch.arange(path.shape[1], device=path.device).repeat(len(draws))
        x, sigma = path[place, sample], sigmas[place]
        return x - expand_to(sigma, x) * self._flow(rollout, len(draws))(x, sigma)
