"""The same step with the costs of the method's published training code, as far as one CPU process can have them.

Written from a description of that code, not from it. Anomaly detection stays on; the reward's texts are read anew in
every pass; the branches go one after the other, each through one graph from the loss to the weights; the sampling
clock lies on the device and the host reads it; every branch's loss and reward are read as they come. Nothing of a
rollout is decoded or judged. Gathering whole weights before each pass needs several processes and is only counted,
in :data:`GATHERS_PER_STEP`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.bare_loop import BareLoop

GATHERS_PER_STEP = 25 + 2 * 2
"""Of each block's float32 weights: for every rollout step, and for the forward and backward pass of each branch."""


class UpstreamLoop(BareLoop):
    """:class:`BareLoop` with these costs."""

    def step(self, step: int) -> list[dict[str, float]]:
        with torch.autograd.set_detect_anomaly(True):
            return super().step(step)

    @torch.no_grad()
    def rollout(self, noise: Tensor, texts: Any) -> Tensor:
        device_sigmas, x = self.given.sigmas.to(self.device), noise
        for index in range(len(device_sigmas) - 1):
            sigma, below = device_sigmas[index], device_sigmas[index + 1]
            tick = int(sigma * 1000) if self.config.algorithm.schedule == "reference" else float(sigma * 1000)
            time = torch.full((len(x),), tick / 1000, device=self.device)
            x = x + (below - sigma) * self.velocity(x, time, texts, self.config.rollout.guidance)
        return x

    def measure(self, *_: Any) -> dict[str, Tensor]:
        return {}

    def read(self, texts: Any) -> Tensor:
        return self.given.encode_texts(texts)

    def descend(self, x_0: Tensor, eps: Tensor, texts: Any, prompts: Any, draw: Any, step: int, seeds: Any) -> Tensor:
        total = 0.0
        for branch in draw:
            sigma, told, recovered, positive, negative = (column.to(self.device) for column in branch)
            sigma, recovered = sigma[:, None, None], recovered[:, None, None]
            x_t = sigma * eps + (1 - sigma) * x_0
            velocity = self.velocity(x_t, told, texts, self.config.algorithm.guidance)
            x_hat = (x_t - (sigma - recovered) * velocity - recovered * eps) / (1 - recovered)
            loss = self.loss(x_hat, prompts, positive, negative, step, seeds) / len(draw)
            loss.backward()
            total += loss.item()
        return torch.tensor(total, device=self.device)
