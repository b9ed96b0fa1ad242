"""GRPO for flow models (DanceGRPO, arXiv:2505.07818; Flow-GRPO, arXiv:2505.05470): a reward without a gradient trains.

A sampler with noise in its steps draws several pictures of one prompt from one start. Pictures that the reward likes
more than the others of their group have the steps that led to them made more probable, the others less. Neither decoder
nor reward is differentiated, so any judge will do, the semantic-relative one included (which arXiv:2509.06942 leaves to
future work).

How probable a step has become, against what it was when it was taken, is a ratio, clipped so that no update goes far.
Until the weights change it is exactly 1 here, whatever batch the rollout was drawn in: a rollout's first update
compares the policy with a detached copy of itself, and for later ones :meth:`GRPO.remember` asks the model ahead of the
first, in the very calls that the updates will make. A log-probability that the sampler stored would be off in its last
bits wherever its calls were others: another batch, a rounded time, quantised weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from srpo_cli.algorithms.base import ControlWords, Generators, ImageTransform, Model, Reward, Rollout
from srpo_cli.algorithms.judging import Judging, passes
from srpo_cli.core.schedule import expand_to
from srpo_cli.core.sde import Gaussian, SdeStep, gaussian_kl, log_prob, sde_path
from srpo_cli.errors import UsageError

ModelVelocity = Callable[[Tensor, Tensor, Any, float, tuple[int, int]], Tensor]
"""What :meth:`srpo_cli.algorithms.base.Model.velocity` is."""


def advantages(
    rewards: Tensor,
    group: int,
    over: Literal["group", "batch"] = "group",
    clip: float = 5.0,
    weights: Sequence[float] | None = None,
) -> Tensor:
    """How much better each picture is than its group, in standard deviations.

    Args:
        rewards: (N,), the pictures of a group side by side; with ``weights`` (R, N), R rewards of each picture.
        group: pictures in a group.
        over: what the standard deviation is of: the group (DanceGRPO), or all N (Flow-GRPO), by which a group of nearly
            equal rewards counts for little. It is the unbiased one, though Flow-GRPO's code divides by N.
        clip: largest absolute value, of each reward's.
        weights: of R rewards, whose clipped advantages are added, as in DanceGRPO: no reward outweighs another by its
            scale. (Its code adds losses, each with a ratio clip of its own: the same while the ratio is in range.)

    Returns (N,) in the dtype of ``rewards``; 0 where all rewards are equal.
    """
    if group < 2:
        raise UsageError(f"group {group}: an advantage is over the other pictures of a prompt, so give at least 2")
    if rewards.shape[-1] % group:
        raise UsageError(
            f"{rewards.shape[-1]} rollouts in a step are no whole number of groups of {group}: "
            "make train.batch_size a multiple of the group"
        )
    # Equal float32 rewards are exactly their mean in float64; what float32 leaves of them the division would blow up.
    grouped = rewards.double().unflatten(-1, (-1, group))
    dims = -1 if over == "group" else (-2, -1)
    normal = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.std(dims, keepdim=True) + 1e-8)
    normal = normal.flatten(-2).clamp(-clip, clip)
    if weights is not None:
        normal = torch.as_tensor(weights).to(normal) @ normal
    return normal.to(rewards.dtype)


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """PPO's loss, ``-min(ratio * A, clip(ratio, 1 - clip, 1 + clip) * A)`` (arXiv:1707.06347, eq. 7); all (B,).

    It has no gradient where the ratio is beyond the range on the side that the advantage drives it to.
    """
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


@dataclass(frozen=True)
class Transition:
    """One step of each sample's path, (B,).

    Attributes:
        index: the step from ``path[index]`` to ``path[index + 1]``; int64.
        lot: how many updates are made on the rollout before this draw's.
        old_log_prob: of the step under the policy that took it; None in the first lot, whose policy that is.
    """

    kind: ClassVar[str] = "policy"

    index: Tensor
    lot: int = 0
    old_log_prob: Tensor | None = None


@dataclass(frozen=True)
class StepDraws:
    """Which of the sampler's steps train: some of all but the last, which has no noise.

    Attributes:
        steps: of the sampler.
        fraction: share of the ``steps - 1`` that is drawn, rounded down. DanceGRPO takes 0.6; Flow-GRPO's 0.99 of all
            ``steps`` is 1 here, all but the last.
        order: "random" draws them without replacement, each sample its own (DanceGRPO); "first" takes the noisiest.
    """

    steps: int
    fraction: float = 0.6
    order: Literal["random", "first"] = "random"

    def __post_init__(self) -> None:
        if self.steps < 2:
            raise UsageError(
                f"rollout.steps {self.steps} leaves no step with noise: GRPO trains those before the last, so give at "
                "least 2"
            )
        if not 0 < self.fraction <= 1:
            raise UsageError(
                f"timestep fraction {self.fraction:g} must be above 0 and at most 1: a share of the sampler's steps"
            )

    @property
    def drawn(self) -> int:
        """Steps that are drawn of each sample; at least one."""
        return max(1, math.floor(self.fraction * (self.steps - 1) + 1e-9))  # 0.29 * 100 is 28.999999999999996

    def pairs(self, generators: Sequence[torch.Generator], count: int) -> list[list[Transition]]:
        """The drawn steps of a rollout in ``count`` lots, whose sizes differ by one at most.

        Every sample draws from its own generator, so that it is drawn alike in a batch of any size. Each lot takes
        every ``count``-th of the drawn steps, so that all lots of "first" reach from early to late.
        """
        if count > self.drawn:
            raise UsageError(
                f"{count} updates per rollout need as many steps to train, and {self.drawn} of the sampler's "
                f"{self.steps} are drawn: lower the one or raise the other"
            )
        index = torch.stack([self._draw(generator) for generator in generators])
        return [[Transition(one, lot) for one in index[:, lot::count].unbind(1)] for lot in range(count)]

    def _draw(self, generator: torch.Generator) -> Tensor:
        """The steps of one sample, (drawn,)."""
        if self.order == "first":
            return torch.arange(self.drawn)
        return torch.randperm(self.steps - 1, generator=generator)[: self.drawn]


@dataclass(frozen=True)
class Trace:
    """What one draw computed, detached, (B,) each.

    ``surrogate`` is the clipped loss of the policy and ``kl`` the divergence from the reference, None without one;
    ``loss`` is their sum, the divergence weighed, after sample weights and before the batch mean and ``scale``.
    """

    log_prob: Tensor
    ratio: Tensor
    surrogate: Tensor
    kl: Tensor | None
    loss: Tensor


@dataclass(frozen=True)
class _Taken:
    """Steps that samplers took, and what they were conditioned on."""

    x: Tensor
    x_next: Tensor
    sigma: Tensor
    sigma_next: Tensor
    conditioning: Any

    @classmethod
    def of(cls, rollout: Rollout, draws: Sequence[Transition]) -> _Taken:
        """Those of all draws, one whole batch after the other."""
        if rollout.path is None or rollout.sigmas is None:
            raise UsageError(
                "GRPO learns from the steps that its sampler drew at random, and these rollouts have none: train it on "
                "pictures that the model draws, or train given ones with srpo or direct-align"
            )
        path, sigmas = rollout.path.detach(), rollout.sigmas.to(rollout.path.device)
        index = torch.cat([draw.index for draw in draws]).to(path.device, non_blocking=True)
        sample = torch.arange(path.shape[1], device=path.device).repeat(len(draws))
        x, x_next = path[index, sample], path[index + 1, sample]
        return cls(x, x_next, sigmas[index], sigmas[index + 1], rollout.repeat(len(draws)).conditioning)


class GRPO(Judging):
    """Accumulates the clipped policy gradient into a model.

    Args:
        model, reward, control_words, guidance, augment, relative: as for :class:`Judging`; ``guidance`` is that of the
            sampler too, which is the policy.
        sde: the sampler's step, :func:`srpo_cli.core.sde.sde_step`.
        group, over, advantage_clip: how pictures are compared, see :func:`advantages`.
        clip: the ratio counts within ``1 - clip`` and ``1 + clip``.
        kl: weight of the divergence from the reference, :func:`srpo_cli.core.sde.gaussian_kl`.
        reference_velocity: the velocity of the untrained model, called as the model's own; needed unless ``kl`` is 0.
        mixed: weights and rewards of which pictures are compared one by one and the advantages added, as DanceGRPO
            does; none: by ``reward``, which may be a sum itself.
    """

    keeps_path = True

    def __init__(
        self,
        model: Model,
        reward: Reward,
        control_words: ControlWords,
        *,
        guidance: float,
        sde: SdeStep,
        group: int = 12,
        over: Literal["group", "batch"] = "group",
        advantage_clip: float = 5.0,
        clip: float = 1e-4,
        kl: float = 0.0,
        reference_velocity: ModelVelocity | None = None,
        mixed: Sequence[tuple[float, Reward]] = (),
        augment: ImageTransform | None = None,
        relative: bool = False,
    ) -> None:
        super().__init__(model, reward, control_words, guidance=guidance, augment=augment, relative=relative)
        if kl and reference_velocity is None:
            raise UsageError(
                f"kl {kl:g} holds the model to the untrained one, which is not there: set it to 0, or train a LoRA, "
                "without which the model is the untrained one"
            )
        self.sde = sde
        self.group, self.over, self.advantage_clip = group, over, advantage_clip
        self.clip = clip
        self.kl = kl
        self.reference_velocity = reference_velocity
        self.mixed = tuple(mixed)

    @torch.no_grad()
    def sample(
        self,
        conditioning: Any,
        noise: Tensor,
        size: tuple[int, int],
        sigmas: Tensor,
        generators: Sequence[torch.Generator],
    ) -> Tensor:
        """The path of a rollout, (steps + 1, B, ...), by the policy that is trained; see :func:`sde_path`."""

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            return self.model.velocity(latents, sigma, conditioning, self.guidance, size)

        return sde_path(velocity, noise, sigmas.to(noise.device), self.sde, generators)

    def judge(self, images: Tensor, prompts: Sequence[str], step: int, *, generator: Generators = None) -> Tensor:
        """As :meth:`Judging.judge`; of R rewards that are mixed each by itself, (R, B), on the same augmentation."""
        if not self.mixed:
            return super().judge(images, prompts, step, generator=generator)
        images, texts = self._augmented(images, generator), self.texts(prompts, step)
        return torch.stack([self._trained(reward.scores(images, *texts)) for _, reward in self.mixed])

    def advantages(self, rewards: Tensor) -> Tensor:
        """Of all N pictures of a step, those of a group side by side, (N,), out of what :meth:`judge` gave of them.

        See :func:`advantages`.
        """
        weights = [weight for weight, _ in self.mixed] or None
        return advantages(rewards, self.group, self.over, self.advantage_clip, weights)

    @torch.no_grad()
    def remember(
        self, rollout: Rollout, lots: Sequence[Sequence[Transition]], *, batched: bool = False
    ) -> list[list[Transition]]:
        """The same lots, with what the policy thinks of their steps before it is updated.

        To be called before the first lot's update, with ``batched`` as for :meth:`backward`. It costs one forward for
        each draw but the first lot's, which need none.
        """
        first, *later = lots
        return [[*first], *([*self._remembered(rollout, lot, batched)] for lot in later)]

    def _remembered(self, rollout: Rollout, lot: Sequence[Transition], batched: bool) -> Iterator[Transition]:
        for group in passes(lot, batched):
            taken = _Taken.of(rollout, group)
            old = log_prob(taken.x_next, self._gaussian(self.model.velocity, taken, rollout.size))
            for draw, own in zip(group, old.chunk(len(group)), strict=True):
                yield replace(draw, old_log_prob=own)

    def backward(
        self,
        rollout: Rollout,
        draws: Sequence[Transition],
        step: int,
        *,
        weights: Tensor | None = None,
        scale: float | None = None,
        generator: Generators = None,
        batched: bool = False,
    ) -> dict[str, Tensor]:
        """Add the gradient of one lot of draws to the model's parameters.

        Args:
            rollout: B samples with their paths and advantages.
            draws: the steps to train on; those of a later lot went through :meth:`remember`.
            step, generator: of no use here; pictures have been judged before.
            weights: loss weight per sample, (B,); 1 if not given.
            scale: factor on each draw's mean loss; ``1 / len(draws)`` if not given.
            batched: all draws in one pass of the model, which changes the order of sums and nothing else.

        Returns scalars on the model's device: the loss summed over draws; the policy's part of it, before sample
        weights; mean ratio; share of ratios beyond the clip range; and with ``kl`` the mean divergence.
        """
        scale = 1 / len(draws) if scale is None else scale
        traces = [
            trace for group in passes(draws, batched) for trace in self.backward_pass(rollout, group, weights, scale)
        ]
        ratio = torch.cat([trace.ratio for trace in traces])
        metrics = {
            "loss": sum(scale * trace.loss.mean() for trace in traces),
            "policy/loss": sum(scale * trace.surrogate.mean() for trace in traces),
            "policy/ratio": ratio.mean(),
            "policy/clipped": ((ratio - 1).abs() > self.clip).to(ratio).mean(),
        }
        if self.kl:
            metrics["policy/kl"] = torch.cat([trace.kl for trace in traces]).mean()
        return metrics

    def backward_pass(
        self, rollout: Rollout, draws: Sequence[Transition], weights: Tensor | None = None, scale: float = 1.0
    ) -> list[Trace]:
        """:meth:`backward` for the draws of one pass of the model, with all that was computed for each."""
        count, taken = len(draws), _Taken.of(rollout, draws)
        gaussian = self._gaussian(self.model.velocity, taken, rollout.size)
        now = log_prob(taken.x_next, gaussian)
        ratio = (now - self._old(draws, now)).exp()
        surrogate = clipped_surrogate(ratio, rollout.advantages.to(ratio).repeat(count), self.clip)
        kl = self._divergence(gaussian, taken, rollout.size) if self.kl else None
        loss = surrogate if kl is None else surrogate + self.kl * kl
        if weights is not None:
            loss = weights.to(loss).repeat(count) * loss
        (scale * count * loss.mean()).backward()

        computed = (now, ratio, surrogate, kl, loss)
        columns = ([None] * count if one is None else one.detach().chunk(count) for one in computed)
        return [Trace(*values) for values in zip(*columns, strict=True)]

    def _old(self, draws: Sequence[Transition], now: Tensor) -> Tensor:
        """Log-probabilities under the policy that took the steps, of all draws of a pass."""
        if draws[0].old_log_prob is not None:
            return torch.cat([draw.old_log_prob for draw in draws])
        if draws[0].lot:
            raise ValueError("a rollout's later lots must go through remember() before its first update")
        return now.detach()

    def _gaussian(self, velocity: ModelVelocity, taken: _Taken, size: tuple[int, int]) -> Gaussian:
        """Where the steps were to lead by a given velocity."""
        out = velocity(taken.x, taken.sigma, taken.conditioning, self.guidance, size)
        return self.sde(taken.x, out, expand_to(taken.sigma, taken.x), expand_to(taken.sigma_next, taken.x))

    def _divergence(self, gaussian: Gaussian, taken: _Taken, size: tuple[int, int]) -> Tensor:
        """KL divergence from the untrained model at the same latents, (B,)."""
        with torch.no_grad():
            reference = self._gaussian(self.reference_velocity, taken, size)
        return gaussian_kl(gaussian.mean, reference.mean, gaussian.std)
