"""AlignProp (arXiv:2310.03739): the reward's gradient through the whole sampler, truncated at random.

At every step i of the sampler a number K_i is drawn, and the velocity is a constant there if i < K_i: the one that the
rollout had, whatever else is in its batch. As each step has a draw of its own, late steps keep their gradient more
often than early ones, linearly so. Only velocities are cut: the latents stay connected, so that what a kept step did to
them reaches the reward through all later steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from srpo_cli.algorithms.base import Rollout
from srpo_cli.algorithms.judging import DirectMethod
from srpo_cli.core.sampling import euler_sample
from srpo_cli.core.schedule import expand_to
from srpo_cli.errors import UsageError


@dataclass(frozen=True)
class Truncation:
    """Which velocities carry gradient: ``kept`` by sample and step of the sampler, (B, steps) bool."""

    kind: ClassVar[str] = "truncated"

    kept: Tensor

    @property
    def called(self) -> list[bool]:
        """By step, whether the model is called there: where any sample keeps its velocity, and at the last.

        The last is there for a lot that keeps nothing, so that its gradient is zero rather than none.
        """
        return [*self.kept[:, :-1].any(0).tolist(), True]


@dataclass(frozen=True)
class TruncationDraws:
    """K_i uniform over ``[low, high]`` for each sample and step; step i is kept if ``i >= K_i``.

    Its probability is ``(i - low + 1) / (high - low + 1)``, between 0 and 1. With ``low == high`` the truncation is
    fixed: ``steps - 1`` keeps the last step alone, 0 keeps all.

    Attributes:
        steps: how many steps the sampler takes.
        low, high: ends of the range, 0 <= low <= high <= steps; (0, 50) for 50 steps is the original.
    """

    steps: int
    low: int
    high: int

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= self.steps:
            raise UsageError(
                f"truncation [{self.low}, {self.high}] must be two rising numbers from 0 to the sampler's "
                f"{self.steps} steps: [0, {self.steps}] is the original, [0, 0] keeps every step"
            )
        if self.low == self.steps:
            raise UsageError(
                f"truncation [{self.low}, {self.high}] cuts every one of the sampler's {self.steps} steps: "
                f"[{self.steps - 1}, {self.steps - 1}] keeps the last"
            )

    def pairs(self, generators: Sequence[torch.Generator], count: int) -> list[list[Truncation]]:
        """``count`` lots of one draw, every sample's from its own generator."""
        return [[self._draw(generators)] for _ in range(count)]

    def _draw(self, generators: Sequence[torch.Generator]) -> Truncation:
        cuts = [torch.randint(self.low, self.high + 1, (self.steps,), generator=own) for own in generators]
        return Truncation(torch.arange(self.steps) >= torch.stack(cuts))


class AlignProp(DirectMethod):
    """Accumulates AlignProp's gradients into a model; the arguments are those of :class:`DirectMethod`."""

    keeps_path = True

    def calls(self, draw: Truncation, samples: int) -> int:
        return samples * sum(draw.called)

    def predict(self, rollout: Rollout, draws: Sequence[Truncation]) -> Tensor:
        """The sampler's steps once more, from the first whose velocity any sample keeps.

        The latents of a sample that does not keep it move as they did in the rollout; where none does, no model is
        called.
        """
        path, sigmas = self._path(rollout)
        drawn = Truncation(torch.cat([draw.kept for draw in draws]))
        called, kept = drawn.called, drawn.kept.to(path.device, non_blocking=True)
        if len(called) != len(sigmas) - 1:
            raise ValueError(f"{len(called)} steps drawn for a sampler that takes {len(sigmas) - 1}")
        velocity, first = self._flow(rollout, len(draws)), called.index(True)
        x = _times(path[first], len(draws))
        for step in range(first, len(called)):
            moved = x + _times(path[step + 1] - path[step], len(draws))
            if called[step]:
                own = euler_sample(velocity, x, sigmas[step : step + 2])
                moved = torch.where(expand_to(kept[:, step], x), own, moved)
            x = moved
        return x


def _times(latents: Tensor, count: int) -> Tensor:
    """A batch of latents ``count`` times over."""
    return torch.cat([latents] * count)
