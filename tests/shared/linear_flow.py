"""What the tests of methods share: a linear velocity model, a colour-mean reward, rollouts, and gradients by hand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from srpo_cli.algorithms.base import ControlWords, Rollout
from srpo_cli.algorithms.judging import DirectMethod
from srpo_cli.core.sampling import euler_path
from srpo_cli.core.schedule import expand_to, shifted_sigmas

SIZE = (8, 8)
STEPS = 6
CHANNELS = {"red": 0, "green": 1, "blue": 2}
PLAIN, RELATIVE = (0.0, 1.0, 0.0), (1.0, 0.0, -1.0)  # of the colours: what the prompt "green" and the two words ask


class LinearFlow(nn.Module):
    """Velocity of the flow to a grey of each sample's own, plus a learned linear map of the colours; decodes softly."""

    def __init__(self) -> None:
        super().__init__()
        self.colours = nn.Conv2d(3, 3, 1, dtype=torch.float64)
        nn.init.normal_(self.colours.weight, std=0.2, generator=seeded(9))
        nn.init.zeros_(self.colours.bias)
        self.asked: list[Tensor] = []

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Tensor, guidance: float, size: tuple[int, int]
    ) -> Tensor:
        self.asked.append(sigma)
        towards = (latents - expand_to(conditioning, latents)) / expand_to(sigma.expand(len(latents)), latents)
        return towards + self.colours(latents)

    def decode(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return latents.sigmoid()


class ColourMean:
    """The reward for a text is the mean of the colour that it begins with."""

    def scores(self, images: Tensor, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        means = images.mean((-2, -1))
        return tuple(
            torch.stack([mean[CHANNELS[text.split(".")[0]]] for mean, text in zip(means, column, strict=True)])
            for column in texts
        )


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(batch: int, seed: int = 0) -> list[torch.Generator]:
    return [seeded(100 * seed + sample) for sample in range(batch)]


def make_method(kind: type[DirectMethod], **options: object) -> DirectMethod:
    return kind(LinearFlow(), ColourMean(), ControlWords(["red"], ["blue"]), guidance=1.0, **options)


def velocity(model: LinearFlow, conditioning: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    return model.velocity(x, sigma, conditioning, 1.0, SIZE)


def roll_out(model: LinearFlow, batch: int = 3, seed: int = 0) -> Rollout:
    """Samples with the path that the sampler took to them."""
    noise = torch.randn(batch, 3, *SIZE, generator=seeded(seed), dtype=torch.float64)
    conditioning = torch.linspace(-0.5, 0.5, batch, dtype=torch.float64)
    sigmas = shifted_sigmas(STEPS, 2.0, torch.float64)
    with torch.no_grad():
        path = euler_path(partial(velocity, model, conditioning), noise, sigmas)
    model.asked.clear()
    return Rollout(path[-1], noise, ["green"] * batch, conditioning, SIZE, sigmas, path)


def sample_of(rollout: Rollout, sample: int) -> Rollout:
    own = slice(sample, sample + 1)
    parts = (rollout.x_0[own], rollout.eps[own], rollout.prompts[own], rollout.conditioning[own])
    return Rollout(*parts, SIZE, rollout.sigmas, rollout.path[:, own])


def gradient(method: DirectMethod, rollout: Rollout, draws: Sequence[object], **options: object) -> Tensor:
    method.model.zero_grad()
    method.backward(rollout, draws, 0, **options)
    return torch.cat([parameter.grad.flatten() for parameter in method.model.parameters()])


def uncut(model: LinearFlow, predictions: Sequence[Tensor], colours: Sequence[float], hinge: float | None) -> Tensor:
    """The gradient of the mean loss of single pictures' latents, by autograd alone."""
    weights = torch.tensor(colours, dtype=torch.float64)
    rewards = [(model.decode(x, SIZE).mean((-2, -1)) * weights).sum() for x in predictions]
    losses = [-reward if hinge is None else (hinge - reward).clamp(min=0) for reward in rewards]
    parts = torch.autograd.grad(sum(losses) / len(losses), list(model.parameters()))
    return torch.cat([part.flatten() for part in parts])


def same(first: Tensor, second: Tensor) -> None:
    assert second.norm() > 1e-5
    torch.testing.assert_close(first, second, rtol=1e-12, atol=1e-14)
