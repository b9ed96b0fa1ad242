"""Where Direct-Align puts its known noise in and takes it out again (arXiv:2509.06942): draws of SRPO and Direct-Align.

They come in two schedule modes: :class:`SigmaDraws`, in the model's own noise levels, and :class:`ReferenceDraws`, in
the indices and the float32 arithmetic of the authors' training script.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from srpo_cli.core.curves import linear_curve
from srpo_cli.core.relative import Branch, WordWeights, branch_weights, swapped, upstream
from srpo_cli.core.schedule import shifted_sigmas, truncate_to_clock
from srpo_cli.errors import UsageError

BRANCHES: tuple[Branch, ...] = ("denoise", "invert")


@dataclass(frozen=True)
class Injection:
    """One call of the model: where noise goes in, where the rest is taken out, how the words weigh. All (B,).

    Attributes:
        branch: "denoise" (recovers below ``sigma``) or "invert" (above).
        sigma: noise level that the model is shown, in (0, 1].
        sigma_model: noise level that the model is told.
        sigma_recover: level at which the known noise is removed, in [0, 1).
        positive_weight, negative_weight: signed weights of the rewards for the two texts.
    """

    branch: Branch
    sigma: Tensor
    sigma_model: Tensor
    sigma_recover: Tensor
    positive_weight: Tensor
    negative_weight: Tensor

    @property
    def delta_sigma(self) -> Tensor:
        """Length of the step; positive while denoising, negative while inverting."""
        return self.sigma - self.sigma_recover

    @property
    def word_weights(self) -> WordWeights:
        return WordWeights(self.positive_weight, self.negative_weight)

    @classmethod
    def join(cls, injections: Sequence[Injection]) -> Injection:
        """The samples of several calls in one; ``branch`` is that of the first."""
        if len(injections) == 1:
            return injections[0]
        return injections[0]._each(lambda *values: torch.cat(values), *injections[1:])

    def to(self, device: torch.device) -> Injection:
        """The same on another device; the host does not wait for it."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def _each(self, change: Callable[..., Tensor], *others: Injection) -> Injection:
        names = [name for name in vars(self) if name != "branch"]
        tensors = {name: change(*(getattr(one, name) for one in (self, *others))) for name in names}
        return replace(self, **tensors)


class Draws:
    """Where in the schedule the gradient pairs of a rollout are taken: one :class:`Injection` per branch."""

    shared: bool = False

    def draw(self, batch: int, generator: torch.Generator) -> list[Injection]:
        """One pair for ``batch`` samples, drawn from a CPU ``generator``."""
        raise NotImplementedError

    def pairs(self, generators: Sequence[torch.Generator], count: int) -> list[list[Injection]]:
        """``count`` pairs for one rollout: independent draws, or one for all of them where ``shared``.

        Every sample draws from its own generator, so that it is drawn alike in a batch of any size.
        """
        draws = [self._draw_each(generators) for _ in range(1 if self.shared else count)]
        return draws * count if self.shared else draws

    def _draw_each(self, generators: Sequence[torch.Generator]) -> list[Injection]:
        samples = [self.draw(1, generator) for generator in generators]
        return [Injection.join(branch) for branch in zip(*samples, strict=True)]


@dataclass(frozen=True)
class SigmaDraws(Draws):
    """Draws in noise levels: each sample gets its own, uniform over a window.

    Both branches of a pair recover at the same level, where their gains are equal and opposite; denoising
    comes from ``delta_sigma`` above it, inverting from ``delta_sigma`` below, and both calls stay inside the
    window. They reach every level of the window if ``delta_sigma`` is at most a quarter of its width.

    Attributes:
        window: lowest and highest sigma at which the model is called, in (0, 1).
        delta_sigma: length of the one model step, in sigma; at most half of the window's width.
        branches: which branches a pair has.
        semantic_weight: weight of desired minus undesired, at the low and the high end of the window.
        common_weight: weight of the plain reward, likewise; :func:`srpo_cli.core.relative.branch_weights`.
        shared: one draw for all pairs of a rollout.
    """

    window: tuple[float, float]
    delta_sigma: float
    branches: Sequence[Branch] = BRANCHES
    semantic_weight: tuple[float, float] = (1.0, 1.0)
    common_weight: tuple[float, float] = (0.0, 0.0)
    shared: bool = False

    def __post_init__(self) -> None:
        low, high = self.window
        if not 0 < low < high < 1:
            raise UsageError(f"window {list(self.window)} must be two rising noise levels in (0, 1).")
        if not 0 < 2 * self.delta_sigma <= high - low:
            raise UsageError(
                f"delta_sigma {self.delta_sigma} must be positive and at most {(high - low) / 2:.4g}, "
                f"half the width of the window {list(self.window)}."
            )

    def draw(self, batch: int, generator: torch.Generator) -> list[Injection]:
        return self._pair(torch.rand(batch, generator=generator))

    def _draw_each(self, generators: Sequence[torch.Generator]) -> list[Injection]:
        return self._pair(torch.cat([torch.rand(1, generator=generator) for generator in generators]))

    def _pair(self, uniform: Tensor) -> list[Injection]:
        """The pair that recovers at these places of the window, (B,) in [0, 1)."""
        low, high = self.window[0] + self.delta_sigma, self.window[1] - self.delta_sigma
        return self.at(low + (high - low) * uniform)

    def at(self, sigma_recover: Tensor) -> list[Injection]:
        """The pair that recovers at the given levels, (B,)."""
        semantic = linear_curve(sigma_recover, self.window, self.semantic_weight)
        common = linear_curve(sigma_recover, self.window, self.common_weight)
        pair = []
        for branch in self.branches:
            sigma = sigma_recover + (self.delta_sigma if branch == "denoise" else -self.delta_sigma)
            weights = branch_weights(branch, semantic, common)
            pair.append(Injection(branch, sigma, sigma, sigma_recover, *weights))
        return pair


@dataclass(frozen=True)
class ReferenceDraws(Draws):
    """The draws of the authors' FLUX script: one integer timestep for all pairs of a rollout.

    A timestep counts upwards with the noise, an index into ``sigmas`` counts downwards. All tables and
    differences are float32, in the script's order of operations; where the step is short they are small
    differences of nearly equal numbers, and float64 would give other gradients.

    Attributes:
        train_timestep: indices into the shifted sampling schedule that bound the window, noisy end first.
        schedule_steps, shift: that schedule.
        timestep_length: points of the linear grid over the window.
        groundtruth_ratio: share of the window that is covered by the known noise; the model covers the rest.
        discount_pos, discount_inv: ``k`` of the two branches, at the clean and the noisy end of the window.
        minimum_timestep: timesteps nearer than this to either end of the grid are not drawn.
        branches: which branches a pair has.
    """

    train_timestep: tuple[int, int] = (5, 25)
    schedule_steps: int = 50
    shift: float = 3.0
    timestep_length: int = 1000
    groundtruth_ratio: float = 0.9
    discount_pos: tuple[float, float] = (0.1, 0.25)
    discount_inv: tuple[float, float] = (0.3, 0.01)
    minimum_timestep: int = 5
    branches: Sequence[Branch] = BRANCHES
    shared: bool = True

    @cached_property
    def sigmas(self) -> Tensor:
        """The window's noise levels, decreasing, (timestep_length,) float32."""
        schedule = shifted_sigmas(self.schedule_steps, self.shift)
        first, last = self.train_timestep
        return torch.linspace(schedule[first], schedule[last], self.timestep_length)

    def discounts(self, branch: Branch) -> Tensor:
        """``k`` by timestep, (timestep_length,) float32."""
        ends = self.discount_pos if branch == "denoise" else self.discount_inv
        return torch.linspace(*ends, self.timestep_length)

    def draw(self, batch: int, generator: torch.Generator) -> list[Injection]:
        last = self.timestep_length - self.minimum_timestep
        return self.at(int(torch.randint(self.minimum_timestep, last + 1, (), generator=generator)), batch)

    def at(self, timestep: int, batch: int = 1) -> list[Injection]:
        """The pair at a given timestep, the same for all ``batch`` samples."""
        step = math.floor((1 - self.groundtruth_ratio) * self.timestep_length) + 1
        step = min(step, self.timestep_length - timestep, timestep)
        return [self._injection(branch, timestep, step, batch) for branch in self.branches]

    def _injection(self, branch: Branch, timestep: int, step: int, batch: int) -> Injection:
        clean = timestep if branch == "denoise" else max(timestep - step, 1)
        noisy = min(clean + step, self.timestep_length)
        called, recovered = (noisy, clean) if branch == "denoise" else (clean, noisy)
        sigma = self.sigmas[self.timestep_length - called].expand(batch)
        sigma_recover = self.sigmas[self.timestep_length - recovered].expand(batch)
        weights = upstream(self.discounts(branch)[clean])
        if branch == "invert":
            weights = swapped(weights)
        expanded = (torch.as_tensor(weight).float().expand(batch) for weight in weights)
        return Injection(branch, sigma, truncate_to_clock(sigma), sigma_recover, *expanded)
