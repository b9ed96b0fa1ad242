"""What methods ask of a reward, and how those that follow its gradient bring it into the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from srpo_cli.algorithms.base import ControlWords, Generators, ImageTransform, Model, Reward, Rollout
from srpo_cli.core.curves import hinge
from srpo_cli.core.relative import relative_reward, srp
from srpo_cli.core.target import caption_margin
from srpo_cli.errors import UsageError

D = TypeVar("D")

Velocity = Callable[[Tensor, Tensor], Tensor]
"""Latents (B, ...) and their sigma, a scalar or (B,), to ``eps - x_0``, (B, ...)."""


class Judging:
    """Asks a reward about pictures: for what is trained, and for what is measured of every rollout.

    Args:
        model: the family that is trained.
        reward: any reward; the relative form and the gap need one that compares pictures with texts.
        control_words: the words whose difference is the gap, and with ``relative`` what is trained.
        guidance: distilled guidance of the training forward.
        augment: random change of the pictures before the reward sees them; None for none.
        relative: train the reward for the step's positive word minus that for its negative one, the semantic-relative
            preference of arXiv:2509.06942, section 3.2; otherwise the reward for the plain prompt.
    """

    keeps_path: ClassVar[bool] = False
    """Whether rollouts have to keep the sampler's latents."""

    def __init__(
        self,
        model: Model,
        reward: Reward,
        control_words: ControlWords,
        *,
        guidance: float,
        augment: ImageTransform | None = None,
        relative: bool = False,
    ) -> None:
        self.model = model
        self.reward = reward
        self.control_words = control_words
        self.guidance = guidance
        self.augment = augment
        self.relative = relative

    def judge(self, images: Tensor, prompts: Sequence[str], step: int, *, generator: Generators = None) -> Tensor:
        """The reward that is trained, (B,), higher is better.

        Args:
            images: (B, 3, H, W) in [0, 1].
            prompts: B prompts, without control words.
            step: number of the step, which picks the control words of the relative form.
            generator: of the augmentation.
        """
        return self._trained(self._scores(images, self.texts(prompts, step), generator))

    def texts(self, prompts: Sequence[str], step: int) -> list[Sequence[str]]:
        """What the reward is asked for, to judge: the prompts, or each with the two words of the step in turn."""
        if not self.relative:
            return [prompts]
        return [self.control_words.texts(word, prompts) for word in self.control_words.at(step)]

    def _trained(self, rewards: Sequence[Tensor]) -> Tensor:
        """The reward that is trained, (B,), of those for :meth:`texts`."""
        return relative_reward(*rewards, srp()) if self.relative else rewards[0]

    def calls(self, draw: Any, samples: int) -> int:
        """Calls of the model with gradient that a draw makes for so many ``samples``, counted in samples."""
        return samples

    @torch.no_grad()
    def gap(self, images: Tensor, prompts: Sequence[str], *, generator: Generators = None) -> Tensor:
        """Semantic gap of decoded pictures, over all control words so that every step measures the same.

        Args:
            images: (B, 3, H, W) in [0, 1].
            prompts: B prompts, without control words.
            generator: of the augmentation, which the pictures go through as in training.

        Returns the mean reward for the positive texts minus that for the negative ones, (B,).
        """
        words = self.control_words
        return words.gap(self._scores(images, [words.texts(word, prompts) for word in words.all], generator))

    @torch.no_grad()
    def measure(
        self, images: Tensor, prompts: Sequence[str], *others: Sequence[str], generator: Generators = None
    ) -> tuple[Tensor, ...]:
        """Plain reward of decoded pictures as they are, for their prompts and any ``others``, and last :meth:`gap`.

        (B,) each; one look where it serves all of them.
        """
        if self.augment:
            return *self.reward.scores(images, prompts, *others), self.gap(images, prompts, generator=generator)
        words = self.control_words
        texts = [prompts, *others, *(words.texts(word, prompts) for word in words.all)]
        scores = self.reward.scores(images, *texts)
        plain = 1 + len(others)
        return *scores[:plain], words.gap(scores[plain:])

    def _scores(self, images: Tensor, texts: Sequence[Sequence[str]], generator: Generators) -> tuple[Tensor, ...]:
        """Rewards (B,) of the pictures, augmented once, for each column of texts."""
        return self.reward.scores(self._augmented(images, generator), *texts)

    def _augmented(self, images: Tensor, generator: Generators) -> Tensor:
        return self.augment(images, generator) if self.augment else images


class Verdict(NamedTuple):
    """What a reward says of the pictures of one pass, (B,) each.

    ``gap`` is the reward for the step's positive word minus that for its negative one, where a method trains another
    mixture of the two than that; otherwise None.
    """

    reward: Tensor
    gap: Tensor | None = None


class Captions(NamedTuple):
    """What brings pictures back to their prompts: their caption margin is raised beside the reward.

    ``weight`` is that of :func:`srpo_cli.core.target.caption_margin`; ``wrong`` are one or more columns of B prompts.
    """

    weight: float
    wrong: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Trace:
    """What one draw computed, detached; (B, ...) tensors in the order in which they came to be.

    ``loss`` is per sample, after sample weights and captions and before the batch mean and ``scale``;
    ``x_0_hat_grad`` is the gradient of the scaled loss, the one tensor that the transformer's backward pass starts
    from.
    """

    kind: str
    x_0_hat: Tensor
    images: Tensor
    reward: Tensor
    gap: Tensor | None
    loss: Tensor
    x_0_hat_grad: Tensor


class DirectMethod(Judging):
    """A method that follows the reward's own gradient through the picture into the model.

    A subclass says in :meth:`predict` which latents a draw leads to, and may say in :meth:`verdict` what of them is
    maximised. All else is shared: loss, weights, scale, and the cut of the graph between the two.

    Args:
        model, reward, control_words, guidance, augment, relative: as for :class:`Judging`.
        hinge: margin of the loss, see :func:`srpo_cli.core.curves.hinge`; None for the plain negative reward.
    """

    def __init__(
        self,
        model: Model,
        reward: Reward,
        control_words: ControlWords,
        *,
        guidance: float,
        hinge: float | None = None,
        augment: ImageTransform | None = None,
        relative: bool = False,
    ) -> None:
        super().__init__(model, reward, control_words, guidance=guidance, augment=augment, relative=relative)
        self.hinge = hinge

    def predict(self, rollout: Rollout, draws: Sequence[Any]) -> Tensor:
        """Clean latents that each draw leads to, (len(draws) * B, ...), one whole batch after the other.

        They carry the gradient of the model's parameters and of nothing else; what belongs to the rollout is constant.
        """
        raise NotImplementedError

    def verdict(self, rewards: Sequence[Tensor], draws: Sequence[Any]) -> Verdict:
        """What is maximised of the rewards for :meth:`texts` of all len(draws) * B pictures of :meth:`predict`."""
        return Verdict(self._trained(rewards))

    def direction(self, draws: Sequence[Any]) -> Tensor | float:
        """1 where raising what a predicted picture is worth trains the model to draw such pictures, -1 where lowering
        it does; one for all, or (len(draws) * B,)."""
        return 1.0

    def kind(self, draw: Any) -> str:
        """What the metrics of a draw are called."""
        return draw.kind

    def backward(
        self,
        rollout: Rollout,
        draws: Sequence[Any],
        step: int,
        *,
        weights: Tensor | None = None,
        captions: Captions | None = None,
        scale: float | None = None,
        generator: Generators = None,
        batched: bool = False,
    ) -> dict[str, Tensor]:
        """Add the gradient of one or more draws to the model's parameters.

        Args:
            rollout: B samples.
            draws: the draws to run, in order; usually one lot.
            step: number of the step, which picks the control words.
            weights: loss weight per sample, (B,); 1 if not given. See
                :meth:`srpo_cli.core.target.Target.weights`.
            captions: raised beside the reward, whatever ``weights`` are; None for nothing.
            scale: factor on each draw's mean loss; ``1 / len(draws)`` if not given.
            generator: of the augmentation.
            batched: all draws in one pass of the model, which changes the order of sums and nothing else.

        Returns scalars on the model's device: the loss summed over draws, and by kind of draw the mean loss (scaled),
        reward and, where the method knows it, gap (reward of the positive text minus that of the negative).
        """
        scale = 1 / len(draws) if scale is None else scale
        options = {"weights": weights, "captions": captions, "scale": scale, "generator": generator}
        traces = [
            trace for group in passes(draws, batched) for trace in self.backward_pass(rollout, group, step, **options)
        ]
        metrics: dict[str, Tensor] = {"loss": sum(scale * trace.loss.mean() for trace in traces)}
        for kind in dict.fromkeys(trace.kind for trace in traces):
            own = [trace for trace in traces if trace.kind == kind]
            metrics[f"{kind}/loss"] = scale * torch.cat([trace.loss for trace in own]).mean()
            metrics[f"{kind}/reward"] = torch.cat([trace.reward for trace in own]).mean()
            if own[0].gap is not None:
                metrics[f"{kind}/gap"] = torch.cat([trace.gap for trace in own]).mean()
        return metrics

    def backward_pass(
        self,
        rollout: Rollout,
        draws: Sequence[Any],
        step: int,
        *,
        weights: Tensor | None = None,
        captions: Captions | None = None,
        scale: float = 1.0,
        generator: Generators = None,
    ) -> list[Trace]:
        """:meth:`backward` for the draws of one pass of the model, with all that was computed for each.

        The graph is cut at ``x_0_hat``: picture and reward are differentiated first and their graph freed,
        then the transformer is, once. The gradient is exact, and what a checkpointed transformer recomputes
        for its backward pass never shares the memory with the graph of VAE and reward.
        """
        count = len(draws)
        x_0_hat = self.predict(rollout, draws)

        leaf = x_0_hat.detach().requires_grad_()
        images = self.model.decode(leaf, rollout.size)
        generators = generator if generator is None or isinstance(generator, torch.Generator) else [*generator] * count
        prompts = [*rollout.prompts] * count
        texts = self.texts(prompts, step)
        fitting = [prompts, *([*column] * count for column in captions.wrong)] if captions else []
        rewards = self._scores(images, [*texts, *fitting], generators)
        verdict = self.verdict(rewards[: len(texts)], draws)
        loss = hinge(verdict.reward, self.hinge)
        if weights is not None:
            loss = weights.to(loss).repeat(count) * loss
        if captions:
            direction = torch.as_tensor(self.direction(draws)).to(loss, non_blocking=True)
            loss = loss - captions.weight * direction * caption_margin(*rewards[len(texts) :])
        (scale * count * loss.mean()).backward(inputs=leaf)
        x_0_hat.backward(leaf.grad)

        computed = (leaf, images, *verdict, loss, leaf.grad)
        columns = ([None] * count if one is None else one.detach().chunk(count) for one in computed)
        by_draw = zip(*columns, strict=True)
        return [Trace(self.kind(draw), *tensors) for draw, tensors in zip(draws, by_draw, strict=True)]

    def _path(self, rollout: Rollout, reach: int = 1) -> tuple[Tensor, Tensor]:
        """The sampler's latents and levels; UsageError if it has none or takes fewer steps than ``reach``."""
        name = type(self).__name__
        if rollout.path is None or rollout.sigmas is None:
            raise UsageError(
                f"{name} goes back along the sampler's path, and these rollouts have none: train it on pictures that "
                "the model draws, or train given ones with srpo or direct-align"
            )
        steps = len(rollout.sigmas) - 1
        if reach > steps:
            raise UsageError(
                f"{name} goes back {reach} steps from the end, and the sampler takes {steps}: lower the one or raise "
                "the other"
            )
        return rollout.path.detach(), rollout.sigmas.to(rollout.path.device, non_blocking=True)

    def _flow(self, rollout: Rollout, count: int) -> Velocity:
        """Velocity at (latents, sigma) for the rollout's prompts ``count`` times over, in the dtype of the latents."""
        conditioning = rollout.repeat(count).conditioning

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            return self.model.velocity(latents, sigma, conditioning, self.guidance, rollout.size).to(latents.dtype)

        return velocity


def passes(draws: Sequence[D], batched: bool) -> list[list[D]]:
    """The draws of each pass of the model: all in one, or one in each."""
    return [[*draws]] if batched else [[draw] for draw in draws]
