"""How a run draws: rollouts to train on, and the pictures of the untrained model that they are measured against."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from srpo_cli.algorithms.grpo import GRPO
from srpo_cli.config.schema import TrainConfig
from srpo_cli.core.sampling import euler_path, euler_sample
from srpo_cli.models.flux import Conditioning, Sampler
from srpo_cli.recipes.parts import Parts, chunks
from srpo_cli.runtime.seeding import generator
from srpo_cli.runtime.trained import Trained


class Drawing:
    """Samples the model as the configuration says rollouts are sampled.

    Args:
        parts: whose model.
        config: how.
        trained: the weights as they are held.
    """

    def __init__(self, parts: Parts, config: TrainConfig, trained: Trained) -> None:
        self.parts, self.config, self.trained = parts, config, trained
        self.model, self.size = parts.model, config.model.size
        self.policy = parts.algorithm if isinstance(parts.algorithm, GRPO) else None

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """The model as rollouts are sampled from it; in float8 its weights are rounded here, once for all of them."""
        if self.config.rollout.dtype != "float8":
            yield
            return
        self.trained.gather()
        with self.model.float8_rollouts():
            yield

    def latents(
        self,
        conditioning: Conditioning,
        noise: Tensor,
        draws: Sequence[torch.Generator],
    ) -> Tensor:
        """Clean latents from packed ``noise``; a policy's sampler adds noise of ``draws`` in every step."""
        return self.path(conditioning, noise, draws)[1][-1] if self.policy else self._sample(conditioning, noise)

    def path(
        self, conditioning: Conditioning, noise: Tensor, draws: Sequence[torch.Generator]
    ) -> tuple[Tensor, Tensor]:
        """The sampler's levels, (steps + 1,), and the latents at each of them, (steps + 1, B, ...)."""
        rollout = self.config.rollout
        sigmas = self.model.sigmas(rollout.steps, self.size, rollout.shift)
        if self.policy is None:
            return sigmas, self._sample(conditioning, noise, euler_path)
        with self.parts.arithmetic():
            return sigmas, self.policy.sample(conditioning, noise.to(self.model.device), self.size, sigmas, draws)

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of clean packed latents."""
        return self.model.decode(x_0, self.size)

    def pictures(self, prompts: Sequence[str], numbers: Sequence[int], purpose: str) -> Iterator[tuple[slice, Tensor]]:
        """Pictures for ``prompts``, a batch at a time, with the slice that it is of them.

        Args:
            prompts: what to draw.
            numbers: one for each prompt, that its noise comes from.
            purpose: what for; the same number has another noise for another purpose.
        """
        seed = self.config.train.seed
        with self.sampling():
            for part in chunks(len(prompts), self.parts.plan.micro_batch):
                own = numbers[part]
                noise = torch.cat([self.model.noise(1, self.size, generator(seed, purpose, i)) for i in own])
                draws = [generator(seed, f"{purpose} policy", i) for i in own]
                yield part, self.decode(self.latents(self.model.encode_prompts(prompts[part]), noise, draws))

    def _sample(self, conditioning: Conditioning, noise: Tensor, sampler: Sampler = euler_sample) -> Tensor:
        rollout = self.config.rollout
        with self.parts.arithmetic():
            return self.model.sample(
                conditioning,
                noise,
                self.size,
                rollout.steps,
                rollout.guidance,
                rollout.shift,
                truncate_time=self.config.algorithm.schedule == "reference",
                sampler=sampler,
            )
