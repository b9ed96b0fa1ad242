"""Direct-Align on a linear velocity model and a colour-mean reward: the plain reward, its exact gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from srpo_cli.algorithms.base import ControlWords, Rollout
from srpo_cli.algorithms.direct_align import DirectAlign
from srpo_cli.algorithms.judging import DirectMethod
from srpo_cli.algorithms.srpo import SRPO, ReferenceDraws, SigmaDraws
from srpo_cli.core.sampling import euler_sample
from srpo_cli.core.schedule import expand_to, shifted_sigmas
from srpo_cli.errors import UsageError
from srpo_cli.rewards.augment import Augment

SIZE = (8, 8)
STEPS = 6
CHANNELS = {"red": 0, "green": 1, "blue": 2}
PLAIN, RELATIVE = (0.0, 1.0, 0.0), (1.0, 0.0, -1.0)  # of the colours: what the prompt "green" and the two words ask
DRAWS = SigmaDraws(window=(0.3, 0.9), delta_sigma=0.1, branches=("denoise",))


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


def make_method(kind: type[DirectMethod] = DirectAlign, **options: object) -> DirectMethod:
    return kind(LinearFlow(), ColourMean(), ControlWords(["red"], ["blue"]), guidance=1.0, **options)


def velocity(model: LinearFlow, conditioning: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    return model.velocity(x, sigma, conditioning, 1.0, SIZE)


def roll_out(model: LinearFlow, batch: int = 3, seed: int = 0) -> Rollout:
    """Samples with the path that the sampler took to them."""
    noise = torch.randn(batch, 3, *SIZE, generator=seeded(seed), dtype=torch.float64)
    conditioning = torch.linspace(-0.5, 0.5, batch, dtype=torch.float64)
    sigmas, path = shifted_sigmas(STEPS, 2.0, torch.float64), [noise]
    flow = partial(velocity, model, conditioning)
    with torch.no_grad():
        for step in range(STEPS):
            path.append(euler_sample(flow, path[-1], sigmas[step : step + 2]))
    model.asked.clear()
    return Rollout(path[-1], noise, ["green"] * batch, conditioning, SIZE, sigmas, torch.stack(path))


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


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("relative", "hinge"), [(False, None), (False, 0.5), (True, None), (True, 0.1)])
def test_the_gradient_is_that_of_a_plain_loop(relative: bool, hinge: float | None) -> None:
    method = make_method(relative=relative, hinge=hinge)
    rollout, predictions = roll_out(method.model, 4), []
    (injection,) = DRAWS.at(torch.tensor([0.4, 0.5, 0.62, 0.8], dtype=torch.float64))
    for sample in range(4):
        own = slice(sample, sample + 1)
        x_0, eps, sigma = rollout.x_0[own], rollout.eps[own], injection.sigma[sample]
        x_t = (1 - sigma) * x_0 + sigma * eps
        sigma_next = injection.sigma_recover[sample]
        x_next = x_t + (sigma_next - sigma) * velocity(method.model, rollout.conditioning[own], x_t, sigma)
        predictions.append((x_next - sigma_next * eps) / (1 - sigma_next))
    expected = uncut(method.model, predictions, RELATIVE if relative else PLAIN, hinge)
    same(gradient(method, rollout, [injection]), expected)


def test_the_relative_form_is_srpo_on_its_denoising_branch() -> None:
    relative, srpo = make_method(relative=True), make_method(SRPO)
    rollout = roll_out(relative.model)
    (draws,) = DRAWS.pairs(generators(3), 1)
    assert draws[0].positive_weight.eq(1).all() and draws[0].negative_weight.eq(-1).all()
    same(gradient(relative, rollout, draws), gradient(srpo, rollout, draws))


def test_the_word_weights_of_its_draws_are_not_read() -> None:
    method = make_method()
    rollout = roll_out(method.model)
    weighed = replace(DRAWS, common_weight=(3.0, -2.0), semantic_weight=(0.1, 0.2))
    found = [gradient(method, rollout, draws.pairs(generators(3), 1)[0]) for draws in (DRAWS, weighed)]
    same(*found)


def test_the_hinge_silences_the_samples_beyond_it() -> None:
    method = make_method()
    rollout = roll_out(method.model)
    ((draw, *_),) = DRAWS.pairs(generators(3), 1)
    (trace,) = method.backward_pass(rollout, [draw], 0)
    margin = trace.reward.mean().item()
    below = gradient(method, rollout, [draw], weights=(trace.reward < margin).double())
    method.hinge = margin
    same(gradient(method, rollout, [draw]), below)


def test_a_batch_and_its_samples_one_by_one_give_the_same_gradient() -> None:
    method = make_method()
    rollout = roll_out(method.model, 2)
    (draws,) = DRAWS.pairs(generators(2), 1)
    alone = [
        gradient(method, sample_of(rollout, sample), DRAWS.pairs(generators(2)[sample : sample + 1], 1)[0])
        for sample in range(2)
    ]
    assert not torch.allclose(alone[0], alone[1], rtol=1e-3)
    same(gradient(method, rollout, draws), sum(alone) / 2)


def test_several_draws_give_the_mean_of_their_gradients_in_one_pass_or_many() -> None:
    method = make_method()
    rollout, weights = roll_out(method.model), torch.tensor([1.0, -0.5, 0.2])
    draws = [draw for lot in DRAWS.pairs(generators(3), 3) for draw in lot]
    alone = [gradient(method, rollout, [draw], weights=weights) for draw in draws]
    for batched in (False, True):
        same(gradient(method, rollout, draws, weights=weights, batched=batched), sum(alone) / len(alone))
    same(gradient(method, rollout, draws, weights=weights, scale=1.0), sum(alone))


def test_what_belongs_to_the_rollout_is_constant() -> None:
    method = make_method()
    rollout = roll_out(method.model)
    constants = (rollout.x_0, rollout.eps, rollout.path)
    for tensor in constants:
        tensor.requires_grad_()
    method.backward(rollout, DRAWS.pairs(generators(3), 1)[0], 0)
    assert all(tensor.grad is None for tensor in constants)


def test_the_augmentation_is_as_random_as_its_generators_and_the_same_in_one_pass() -> None:
    method = make_method(augment=Augment(shift=2, noise=0.1))
    rollout = roll_out(method.model)
    draws = [draw for lot in DRAWS.pairs(generators(3), 2) for draw in lot]
    options = [(1, False), (1, True), (2, False)]
    first, again, other = (
        gradient(method, rollout, draws, generator=generators(3, seed), batched=batched) for seed, batched in options
    )
    same(again, first)
    assert not torch.allclose(other, first, rtol=1e-6)


def test_twenty_steps_raise_the_reward() -> None:
    method = make_method()
    optimizer = torch.optim.AdamW(method.model.parameters(), lr=0.03)
    rewards = []
    for step in range(21):
        rollout = roll_out(method.model, 4, seed=step)
        plain, _ = method.measure(method.model.decode(rollout.x_0, SIZE), rollout.prompts)
        rewards.append(plain.mean().item())
        for draws in DRAWS.pairs(generators(4, step), 2):
            optimizer.zero_grad()
            method.backward(rollout, draws, step)
            optimizer.step()
    assert rewards[-1] > rewards[0] + 0.05


# --- where it is taken ------------------------------------------------------------------------------------------------


def test_the_reference_draws_tell_the_model_a_truncated_time() -> None:
    method = make_method()
    draws = ReferenceDraws(branches=("denoise",))
    metrics = method.backward(roll_out(method.model), draws.at(500, 3), 0)
    assert method.model.asked[0].tolist() == [0.878] * 3
    assert set(metrics) == {"loss", "denoise/loss", "denoise/reward"}


def test_inverting_draws_are_refused() -> None:
    method = make_method()
    with pytest.raises(UsageError, match=r"only denoises.*\[denoise\]"):
        method.backward(roll_out(method.model), SigmaDraws((0.3, 0.9), 0.1).draw(3, seeded()), 0)


# --- what is asked of the reward --------------------------------------------------------------------------------------


def picture() -> Tensor:
    """One picture of 60 % red, 20 % green and 10 % blue."""
    return torch.tensor([0.6, 0.2, 0.1]).view(1, 3, 1, 1).expand(1, 3, *SIZE)


def test_what_is_trained_is_the_plain_reward_or_the_difference_of_the_words() -> None:
    plain, relative = make_method(), make_method(relative=True)
    relative.control_words = ControlWords(["red", "green"], ["blue"])
    torch.testing.assert_close(plain.judge(picture(), ["green"], 1), torch.tensor([0.2]))
    torch.testing.assert_close(relative.judge(picture(), ["green"], 0), torch.tensor([0.6 - 0.1]))
    torch.testing.assert_close(relative.judge(picture(), ["green"], 1), torch.tensor([0.2 - 0.1]))


@pytest.mark.parametrize("augment", [None, Augment(shift=2)])
def test_what_is_measured_is_the_plain_reward_and_the_gap_over_all_words(augment: Augment | None) -> None:
    method = make_method(augment=augment)
    method.control_words = ControlWords(["red", "green"], ["blue"])
    reward, gap = method.measure(picture(), ["green"], generator=seeded())
    torch.testing.assert_close(reward, torch.tensor([0.2]))
    torch.testing.assert_close(gap, torch.tensor([(0.6 + 0.2) / 2 - 0.1]))


def test_reward_and_gap_see_augmented_pictures_and_the_measured_reward_does_not() -> None:
    method = make_method(augment=lambda images, generator: images / 2)
    torch.testing.assert_close(method.judge(picture(), ["green"], 0), torch.tensor([0.1]))
    reward, gap = method.measure(picture(), ["green"])
    torch.testing.assert_close(reward, torch.tensor([0.2]))
    torch.testing.assert_close(gap, torch.tensor([(0.6 - 0.1) / 2]))
