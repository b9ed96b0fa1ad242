"""DRaFT on a linear velocity model and a colour-mean reward: the last steps, their exact gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from srpo_cli.algorithms.base import ControlWords, Rollout
from srpo_cli.algorithms.direct_align import DirectAlign
from srpo_cli.algorithms.draft import DRaFT, Renoised, RenoisedDraws, Tail, TailDraws
from srpo_cli.algorithms.judging import DirectMethod
from srpo_cli.algorithms.refl import Late, ReFL
from srpo_cli.algorithms.srpo import Injection
from srpo_cli.core.sampling import euler_sample
from srpo_cli.core.schedule import expand_to, shifted_sigmas
from srpo_cli.errors import UsageError

SIZE = (8, 8)
STEPS = 6
CHANNELS = {"red": 0, "green": 1, "blue": 2}
PLAIN, RELATIVE = (0.0, 1.0, 0.0), (1.0, 0.0, -1.0)  # of the colours: what the prompt "green" and the two words ask
DRAWS = RenoisedDraws(noises=2, include_last=True)


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


def make_method(kind: type[DirectMethod] = DRaFT, **options: object) -> DirectMethod:
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


@pytest.mark.parametrize("steps", [1, 3, STEPS])
@pytest.mark.parametrize(("relative", "hinge"), [(False, None), (False, 0.5), (True, None), (True, 0.1)])
def test_the_gradient_is_that_of_a_plain_loop(steps: int, relative: bool, hinge: float | None) -> None:
    method = make_method(relative=relative, hinge=hinge)
    rollout, predictions = roll_out(method.model, 4), []
    for sample in range(4):
        own = slice(sample, sample + 1)
        x = rollout.path[STEPS - steps, own]
        for step in range(STEPS - steps, STEPS):
            sigma, sigma_next = rollout.sigmas[step], rollout.sigmas[step + 1]
            x = x + (sigma_next - sigma) * velocity(method.model, rollout.conditioning[own], x, sigma)
        predictions.append(x)
    expected = uncut(method.model, predictions, RELATIVE if relative else PLAIN, hinge)
    (draws,) = TailDraws(steps).pairs(generators(4), 1)
    same(gradient(method, rollout, draws), expected)


def test_the_tail_ends_where_the_rollout_did() -> None:
    method = make_method()
    rollout = roll_out(method.model)
    assert torch.equal(method.predict(rollout, [Tail(3)]), rollout.x_0)


@pytest.mark.parametrize("draw", [Tail(1), Tail(3), Renoised(torch.tensor([5, 6, 7]))])
def test_the_calls_of_a_draw_are_those_that_it_makes(draw: Tail | Renoised) -> None:
    method = make_method()
    method.predict(roll_out(method.model), [draw])
    assert method.calls(draw, 3) == 3 * len(method.model.asked)


def test_one_step_is_refl_at_the_last_step() -> None:
    draft, refl = make_method(), make_method(ReFL)
    rollout = roll_out(draft.model)
    same(gradient(draft, rollout, [Tail(1)]), gradient(refl, rollout, [Late(torch.ones(3, dtype=torch.long))]))


@pytest.mark.parametrize("relative", [False, True])
def test_one_noise_is_direct_align_from_the_last_level_to_zero(relative: bool) -> None:
    draft, direct_align = make_method(relative=relative), make_method(DirectAlign, relative=relative)
    rollout = roll_out(draft.model)
    ((renoised,),) = RenoisedDraws(noises=1).pairs(generators(3), 1)
    sigma = rollout.sigmas[-2].expand(3)
    eps = (renoised.start(rollout) - (1 - sigma[0]) * rollout.x_0) / sigma[0]
    injection = Injection("denoise", sigma, sigma, torch.zeros(3), torch.ones(3), torch.zeros(3))
    expected = gradient(direct_align, replace(rollout, eps=eps), [injection])
    same(gradient(draft, rollout, [renoised]), expected)


def test_low_variance_is_the_mean_over_its_noises_and_the_last_step() -> None:
    method = make_method()
    rollout = roll_out(method.model)
    (draws,) = DRAWS.pairs(generators(3), 1)
    assert [draw.kind for draw in draws] == ["tail", "renoised", "renoised"]
    last = gradient(method, rollout, [Tail(1)])
    noises = [gradient(method, rollout, [draw]) for draw in draws[1:]]
    same(gradient(method, rollout, draws), (last + sum(noises)) / 3)
    (without,) = RenoisedDraws(noises=2).pairs(generators(3), 1)
    same(gradient(method, rollout, without), sum(noises) / 2)


def test_metrics_are_means_by_kind_of_draw() -> None:
    method = make_method()
    rollout = roll_out(method.model)
    (draws,) = DRAWS.pairs(generators(3), 1)
    metrics = method.backward(rollout, draws, 0)
    assert set(metrics) == {"loss"} | {f"{kind}/{name}" for kind in ("tail", "renoised") for name in ("loss", "reward")}
    torch.testing.assert_close(metrics["loss"], metrics["tail/loss"] + 2 * metrics["renoised/loss"])
    torch.testing.assert_close(metrics["renoised/loss"], -metrics["renoised/reward"] / 3)


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


def test_noises_are_unit_normal_at_the_level_of_the_last_step() -> None:
    rollout = roll_out(LinearFlow(), 64)
    ((renoised,),) = RenoisedDraws(noises=1).pairs(generators(64), 1)
    sigma = rollout.sigmas[-2]
    noise = (renoised.start(rollout) - (1 - sigma) * rollout.x_0) / sigma
    assert noise.mean().item() == pytest.approx(0, abs=0.03)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert torch.corrcoef(noise.flatten(1)).fill_diagonal_(0).abs().max() < 0.4


def test_lots_are_independent_and_a_sample_is_drawn_alike_in_a_batch_of_any_size() -> None:
    together = DRAWS.pairs(generators(3), 2)
    for sample in range(3):
        alone = DRAWS.pairs(generators(3)[sample : sample + 1], 2)
        for lot, own in zip(together, alone, strict=True):
            assert torch.equal(lot[-1].seed[sample], own[-1].seed[0])
    assert not torch.equal(together[0][-1].seed, together[1][-1].seed)


def test_the_noises_of_a_lot_differ() -> None:
    _, first, second = DRAWS.pairs(generators(3), 1)[0]
    assert not (first.seed == second.seed).any()


@pytest.mark.parametrize(("make", "options"), [(TailDraws, {"steps": 0}), (RenoisedDraws, {"noises": 0})])
def test_nothing_to_take_a_gradient_of_is_refused(make: type, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(options))} is 0"):
        make(**options)


def test_a_tail_longer_than_the_sampler_is_refused() -> None:
    method = make_method()
    with pytest.raises(UsageError, match="DRaFT goes back 7 steps from the end, and the sampler takes 6"):
        method.backward(roll_out(method.model), [Tail(7)], 0)
