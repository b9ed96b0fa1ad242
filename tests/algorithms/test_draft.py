"""DRaFT on a linear velocity model and a colour-mean reward: the last steps, their exact gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_flow import (
    PLAIN,
    RELATIVE,
    STEPS,
    LinearFlow,
    generators,
    gradient,
    make_method,
    roll_out,
    same,
    uncut,
    velocity,
)

from srpo_cli.algorithms.direct_align import DirectAlign
from srpo_cli.algorithms.draft import DRaFT, Renoised, RenoisedDraws, Tail, TailDraws
from srpo_cli.algorithms.injection import Injection
from srpo_cli.algorithms.refl import Late, ReFL
from srpo_cli.errors import UsageError

DRAWS = RenoisedDraws(noises=2, include_last=True)


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, STEPS])
@pytest.mark.parametrize(("relative", "hinge"), [(False, None), (False, 0.5), (True, None), (True, 0.1)])
def test_the_gradient_is_that_of_a_plain_loop(steps: int, relative: bool, hinge: float | None) -> None:
    method = make_method(DRaFT, relative=relative, hinge=hinge)
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
    method = make_method(DRaFT)
    rollout = roll_out(method.model)
    assert torch.equal(method.predict(rollout, [Tail(3)]), rollout.x_0)


@pytest.mark.parametrize("draw", [Tail(1), Tail(3), Renoised(torch.tensor([5, 6, 7]))])
def test_the_calls_of_a_draw_are_those_that_it_makes(draw: Tail | Renoised) -> None:
    method = make_method(DRaFT)
    method.predict(roll_out(method.model), [draw])
    assert method.calls(draw, 3) == 3 * len(method.model.asked)


def test_one_step_is_refl_at_the_last_step() -> None:
    draft, refl = make_method(DRaFT), make_method(ReFL)
    rollout = roll_out(draft.model)
    same(gradient(draft, rollout, [Tail(1)]), gradient(refl, rollout, [Late(torch.ones(3, dtype=torch.long))]))


@pytest.mark.parametrize("relative", [False, True])
def test_one_noise_is_direct_align_from_the_last_level_to_zero(relative: bool) -> None:
    draft, direct_align = make_method(DRaFT, relative=relative), make_method(DirectAlign, relative=relative)
    rollout = roll_out(draft.model)
    ((renoised,),) = RenoisedDraws(noises=1).pairs(generators(3), 1)
    sigma = rollout.sigmas[-2].expand(3)
    eps = (renoised.start(rollout) - (1 - sigma[0]) * rollout.x_0) / sigma[0]
    injection = Injection("denoise", sigma, sigma, torch.zeros(3), torch.ones(3), torch.zeros(3))
    expected = gradient(direct_align, replace(rollout, eps=eps), [injection])
    same(gradient(draft, rollout, [renoised]), expected)


def test_low_variance_is_the_mean_over_its_noises_and_the_last_step() -> None:
    method = make_method(DRaFT)
    rollout = roll_out(method.model)
    (draws,) = DRAWS.pairs(generators(3), 1)
    assert [draw.kind for draw in draws] == ["tail", "renoised", "renoised"]
    last = gradient(method, rollout, [Tail(1)])
    noises = [gradient(method, rollout, [draw]) for draw in draws[1:]]
    same(gradient(method, rollout, draws), (last + sum(noises)) / 3)
    (without,) = RenoisedDraws(noises=2).pairs(generators(3), 1)
    same(gradient(method, rollout, without), sum(noises) / 2)


def test_metrics_are_means_by_kind_of_draw() -> None:
    method = make_method(DRaFT)
    rollout = roll_out(method.model)
    (draws,) = DRAWS.pairs(generators(3), 1)
    metrics = method.backward(rollout, draws, 0)
    assert set(metrics) == {"loss"} | {f"{kind}/{name}" for kind in ("tail", "renoised") for name in ("loss", "reward")}
    torch.testing.assert_close(metrics["loss"], metrics["tail/loss"] + 2 * metrics["renoised/loss"])
    torch.testing.assert_close(metrics["renoised/loss"], -metrics["renoised/reward"] / 3)


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
    method = make_method(DRaFT)
    with pytest.raises(UsageError, match="DRaFT goes back 7 steps from the end, and the sampler takes 6"):
        method.backward(roll_out(method.model), [Tail(7)], 0)
