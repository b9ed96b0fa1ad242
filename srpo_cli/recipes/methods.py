"""Training methods by name: each made, with where it takes its gradients, from what a configuration says of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch

from srpo_cli.algorithms.alignprop import AlignProp, TruncationDraws
from srpo_cli.algorithms.base import ControlWords
from srpo_cli.algorithms.direct_align import DirectAlign
from srpo_cli.algorithms.draft import DRaFT, RenoisedDraws, TailDraws
from srpo_cli.algorithms.grpo import GRPO, StepDraws
from srpo_cli.algorithms.injection import Draws, ReferenceDraws, SigmaDraws
from srpo_cli.algorithms.judging import DirectMethod, Judging
from srpo_cli.algorithms.refl import LateDraws, ReFL
from srpo_cli.algorithms.srpo import SRPO
from srpo_cli.config.schema import AlgorithmConfig, TrainConfig
from srpo_cli.core.relative import Branch
from srpo_cli.core.sde import sde_step
from srpo_cli.models.flux import Flux
from srpo_cli.registry import ALGORITHMS
from srpo_cli.rewards.augment import Augment
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.mixed import MixedReward

M = TypeVar("M", bound=Judging)


class AnyDraws(Protocol):
    """Where a method takes its gradients; see :class:`srpo_cli.algorithms.injection.Draws`."""

    def pairs(self, generators: Sequence[torch.Generator], count: int) -> list[list[Any]]: ...


class Method(NamedTuple):
    """A training method and where it takes its gradients."""

    algorithm: Judging
    draws: AnyDraws


@dataclass(frozen=True)
class Given:
    """What every method is made of."""

    config: TrainConfig
    model: Flux
    reward: Reward
    words: ControlWords

    def judging(self, kind: type[M], **options: Any) -> M:
        """A method of this kind."""
        augment = Augment(self.config.reward.shift, self.config.reward.noise)
        return kind(
            self.model,
            self.reward,
            self.words,
            guidance=self.config.algorithm.guidance,
            augment=augment if augment.shift or augment.noise else None,
            **options,
        )

    def direct(self, kind: type[DirectMethod]) -> DirectMethod:
        """A method that follows the gradient of the plain or of the relative reward."""
        algorithm = self.config.algorithm
        return self.judging(kind, hinge=algorithm.hinge, relative=algorithm.relative)


def make_method(config: TrainConfig, model: Flux, reward: Reward, words: ControlWords) -> Method:
    """The method that ``algorithm.name`` says, over a model and a reward."""
    return ALGORITHMS.get(config.algorithm.name)(Given(config, model, reward, words))


def make_draws(config: AlgorithmConfig, branches: Sequence[Branch] | None = None) -> Draws:
    """Where a known noise is injected, in either schedule mode; ``branches`` in place of the configured ones."""
    branches = branches or config.branches
    if config.schedule == "reference":
        return ReferenceDraws(branches=branches, **config.reference.model_dump())
    return SigmaDraws(
        window=config.window,
        delta_sigma=config.delta_sigma,
        branches=branches,
        semantic_weight=config.semantic_weight,
        common_weight=config.common_weight,
    )


def srpo(given: Given) -> Method:
    """The relative reward, denoising and inverting."""
    algorithm = given.config.algorithm
    return Method(given.judging(SRPO, hinge=algorithm.hinge), make_draws(algorithm))


def direct_align(given: Given) -> Method:
    """SRPO's recovery under the plain reward; relative, the paper's direct reward form without inversion."""
    return Method(given.direct(DirectAlign), make_draws(given.config.algorithm, ("denoise",)))


def refl(given: Given) -> Method:
    """The reward of a one-step prediction late in the sampling."""
    return Method(given.direct(ReFL), LateDraws(given.config.algorithm.refl.steps_left))


def draft(given: Given) -> Method:
    """DRaFT-K, or with noises DRaFT-LV."""
    config = given.config.algorithm.draft
    draws = RenoisedDraws(config.noises, config.include_last) if config.noises else TailDraws(config.last_steps)
    return Method(given.direct(DRaFT), draws)


def alignprop(given: Given) -> Method:
    """The gradient through the whole sampler, truncated at random."""
    steps = given.config.rollout.steps
    low, high = given.config.algorithm.alignprop.truncation or (0, steps)
    return Method(given.direct(AlignProp), TruncationDraws(steps, low, high))


def dance_grpo(given: Given) -> Method:
    """DanceGRPO: constant noise; as published random steps, and each group's own deviation."""
    return _grpo(given, "dance")


def flow_grpo(given: Given) -> Method:
    """Flow-GRPO: noise that grows with sigma; as published all steps but the last, and the batch's deviation."""
    return _grpo(given, "flow")


def _grpo(given: Given, kind: Literal["dance", "flow"]) -> Method:
    config, reward = given.config.algorithm.policy, given.reward
    apart = config.mix == "advantages" and isinstance(reward, MixedReward) and len(reward.parts) > 1
    algorithm = given.judging(
        GRPO,
        sde=sde_step(kind, config.noise_level),
        group=config.group,
        over=config.over,
        advantage_clip=config.advantage_clip,
        clip=config.clip,
        kl=config.kl,
        reference_velocity=given.model.untrained_velocity if config.kl else None,
        mixed=reward.parts if apart else (),
        relative=given.config.algorithm.relative,
    )
    return Method(algorithm, StepDraws(given.config.rollout.steps, config.fraction, config.order))
