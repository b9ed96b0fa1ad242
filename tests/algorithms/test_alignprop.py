"""AlignProp on a linear velocity model and a colour-mean reward: the sampler's exact gradient, cut where drawn."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from linear_flow import (
    PLAIN,
    RELATIVE,
    STEPS,
    generators,
    gradient,
    make_method,
    roll_out,
    same,
    sample_of,
    seeded,
    uncut,
    velocity,
)
from torch import nn

from srpo_cli.algorithms.alignprop import AlignProp, Truncation, TruncationDraws
from srpo_cli.algorithms.base import Rollout
from srpo_cli.algorithms.draft import DRaFT, Tail
from srpo_cli.algorithms.judging import DirectMethod
from srpo_cli.core.sampling import euler_sample
from srpo_cli.errors import UsageError

DRAWS = TruncationDraws(STEPS, 0, STEPS)


# --- the gradient -----------------------------------------------------------------------------------------------------


def with_rollout() -> tuple[DirectMethod, Rollout]:
    method = make_method(AlignProp)
    return method, roll_out(method.model)


@pytest.mark.parametrize(("relative", "hinge"), [(False, None), (False, 0.5), (True, None), (True, 0.1)])
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_that_of_a_plain_loop(seed: int, relative: bool, hinge: float | None) -> None:
    method = make_method(AlignProp, relative=relative, hinge=hinge)
    rollout, predictions = roll_out(method.model, 4), []
    ((draw,),) = DRAWS.pairs(generators(4, seed), 1)
    for sample in range(4):
        own = slice(sample, sample + 1)
        x = rollout.eps[own]
        for step in range(STEPS):
            sigma, sigma_next = rollout.sigmas[step], rollout.sigmas[step + 1]
            change = velocity(method.model, rollout.conditioning[own], x, sigma)
            x = x + (sigma_next - sigma) * (change if draw.kept[sample, step] else change.detach())
        predictions.append(x)
    expected = uncut(method.model, predictions, RELATIVE if relative else PLAIN, hinge)
    same(gradient(method, rollout, [draw]), expected)


def test_keeping_every_step_is_the_gradient_of_the_whole_sampler() -> None:
    method = make_method(AlignProp)
    rollout = roll_out(method.model)
    (draws,) = TruncationDraws(STEPS, 0, 0).pairs(generators(3), 1)
    x_0 = euler_sample(partial(velocity, method.model, rollout.conditioning), rollout.eps, rollout.sigmas)
    same(gradient(method, rollout, draws), uncut(method.model, x_0.split(1), PLAIN, None))


def test_keeping_the_last_step_is_draft_of_one() -> None:
    method = make_method(AlignProp)
    rollout = roll_out(method.model)
    (draws,) = TruncationDraws(STEPS, STEPS - 1, STEPS - 1).pairs(generators(3), 1)
    same(gradient(method, rollout, draws), gradient(make_method(DRaFT), rollout, [Tail(1)]))


def test_a_lot_that_keeps_nothing_has_a_gradient_of_zero() -> None:
    found = gradient(*with_rollout(), [Truncation(torch.zeros(3, STEPS, dtype=torch.bool))])
    assert torch.equal(found, torch.zeros_like(found))


def test_samples_do_not_meddle_with_one_another_after_an_update_either() -> None:
    """The model has moved since the rollout: a velocity that is not kept is still the rollout's, in any company."""
    method = make_method(AlignProp)
    rollout = roll_out(method.model, 2)
    nn.init.normal_(method.model.colours.weight, std=0.2, generator=seeded(8))
    kept = torch.tensor([[True, False, False, False, False, True], [False, False, False, True, False, False]])
    alone = [gradient(method, sample_of(rollout, own), [Truncation(kept[own : own + 1])]) for own in range(2)]
    same(gradient(method, rollout, [Truncation(kept)]), sum(alone) / 2)
    x, path, sigmas = rollout.path[0, :1], rollout.path[:, :1], rollout.sigmas
    x = x + (sigmas[1] - sigmas[0]) * velocity(method.model, rollout.conditioning[:1], x, sigmas[0])
    x = x + (path[5] - path[1])
    x = x + (sigmas[6] - sigmas[5]) * velocity(method.model, rollout.conditioning[:1], x, sigmas[5])
    same(alone[0], uncut(method.model, [x], PLAIN, None))


# --- where it is taken ------------------------------------------------------------------------------------------------


def test_the_model_is_called_where_a_sample_keeps_its_velocity_and_at_the_end() -> None:
    method, rollout = with_rollout()
    kept = torch.zeros(3, STEPS, dtype=torch.bool)
    kept[0, 3] = kept[2, 1] = True
    x_0_hat = method.predict(rollout, [Truncation(kept)])
    assert torch.equal(torch.stack(method.model.asked), rollout.sigmas[[1, 3, 5]])
    assert method.calls(Truncation(kept), 3) == 3 * 3
    assert method.calls(Truncation(torch.zeros(3, STEPS, dtype=torch.bool)), 3) == 3
    torch.testing.assert_close(x_0_hat.detach(), rollout.x_0, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("low", "high"), [(0, STEPS), (2, 5), (0, 3), (3, 3)])
def test_steps_are_kept_more_often_the_later_they_are_and_linearly_so(low: int, high: int) -> None:
    ((draw,),) = TruncationDraws(STEPS, low, high).pairs(generators(4000), 1)
    expected = ((torch.arange(STEPS) - low + 1) / (high - low + 1)).clamp(0, 1)
    torch.testing.assert_close(draw.kept.double().mean(0), expected.double(), rtol=0, atol=0.03)


def test_the_steps_of_a_sample_are_drawn_one_by_one() -> None:
    ((draw,),) = DRAWS.pairs(generators(4000), 1)
    second, fifth = draw.kept[:, 1].double(), draw.kept[:, 4].double()
    assert (second > fifth).any()  # one number for all steps would keep all after the first kept one
    assert torch.corrcoef(torch.stack([second, fifth]))[0, 1].abs() < 0.05


def test_lots_are_independent_and_a_sample_is_drawn_alike_in_a_batch_of_any_size() -> None:
    together = DRAWS.pairs(generators(3), 2)
    for sample in range(3):
        alone = DRAWS.pairs(generators(3)[sample : sample + 1], 2)
        for lot, own in zip(together, alone, strict=True):
            assert torch.equal(lot[-1].kept[sample], own[-1].kept[0])
    assert not torch.equal(together[0][-1].kept, together[1][-1].kept)


@pytest.mark.parametrize(("low", "high"), [(-1, 3), (4, 2), (0, STEPS + 1), (STEPS, STEPS)])
def test_impossible_truncations_are_refused(low: int, high: int) -> None:
    with pytest.raises(UsageError, match=r"^truncation \["):
        TruncationDraws(STEPS, low, high)


def test_draws_for_another_sampler_are_a_bug() -> None:
    method, rollout = with_rollout()
    with pytest.raises(ValueError, match="5 steps drawn for a sampler that takes 6"):
        method.predict(rollout, [Truncation(torch.ones(3, 5, dtype=torch.bool))])
