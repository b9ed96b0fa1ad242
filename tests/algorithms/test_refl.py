"""ReFL on a linear velocity model and a colour-mean reward: one call late in the sampling, its exact gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_flow import (
    PLAIN,
    RELATIVE,
    SIZE,
    STEPS,
    generators,
    gradient,
    make_method,
    roll_out,
    same,
    sample_of,
    uncut,
    velocity,
)

from srpo_cli.algorithms.refl import Late, LateDraws, ReFL
from srpo_cli.errors import UsageError

DRAWS = LateDraws((1, 4))


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("relative", "hinge"), [(False, None), (False, 0.5), (True, None), (True, 0.1)])
def test_the_gradient_is_that_of_a_plain_loop(relative: bool, hinge: float | None) -> None:
    method = make_method(ReFL, relative=relative, hinge=hinge)
    model, steps_left = method.model, [1, 3, 6, 2]
    rollout = roll_out(model, 4)
    predictions = []
    for sample, left in enumerate(steps_left):
        own = slice(sample, sample + 1)
        x, sigma = rollout.path[STEPS - left, own], rollout.sigmas[STEPS - left]
        predictions.append(x - sigma * velocity(model, rollout.conditioning[own], x, sigma))
    expected = uncut(model, predictions, RELATIVE if relative else PLAIN, hinge)
    same(gradient(method, rollout, [Late(torch.tensor(steps_left))]), expected)


def test_the_hinge_silences_the_samples_beyond_it() -> None:
    method = make_method(ReFL)
    rollout = roll_out(method.model)
    ((draw, *_),) = DRAWS.pairs(generators(3), 1)
    (trace,) = method.backward_pass(rollout, [draw], 0)
    margin = trace.reward.mean().item()
    below = gradient(method, rollout, [draw], weights=(trace.reward < margin).double())
    method.hinge = margin
    same(gradient(method, rollout, [draw]), below)


def test_a_batch_and_its_samples_one_by_one_give_the_same_gradient() -> None:
    method = make_method(ReFL)
    rollout = roll_out(method.model, 2)
    (draws,) = DRAWS.pairs(generators(2), 1)
    alone = [
        gradient(method, sample_of(rollout, sample), DRAWS.pairs(generators(2)[sample : sample + 1], 1)[0])
        for sample in range(2)
    ]
    assert not torch.allclose(alone[0], alone[1], rtol=1e-3)
    same(gradient(method, rollout, draws), sum(alone) / 2)


def test_several_draws_give_the_mean_of_their_gradients_in_one_pass_or_many() -> None:
    method = make_method(ReFL)
    rollout, weights = roll_out(method.model), torch.tensor([1.0, -0.5, 0.2])
    draws = [draw for lot in DRAWS.pairs(generators(3), 3) for draw in lot]
    alone = [gradient(method, rollout, [draw], weights=weights) for draw in draws]
    for batched in (False, True):
        same(gradient(method, rollout, draws, weights=weights, batched=batched), sum(alone) / len(alone))
    same(gradient(method, rollout, draws, weights=weights, scale=1.0), sum(alone))


def test_what_belongs_to_the_rollout_is_constant() -> None:
    method = make_method(ReFL)
    rollout = roll_out(method.model)
    constants = (rollout.x_0, rollout.eps, rollout.path)
    for tensor in constants:
        tensor.requires_grad_()
    method.backward(rollout, DRAWS.pairs(generators(3), 1)[0], 0)
    assert all(tensor.grad is None for tensor in constants)


def test_twenty_steps_raise_the_reward() -> None:
    method = make_method(ReFL)
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


def test_the_model_is_called_once_at_the_drawn_levels() -> None:
    method = make_method(ReFL)
    rollout = roll_out(method.model)
    metrics = method.backward(rollout, [Late(torch.tensor([1, 2, 6]))], 0)
    (asked,) = method.model.asked
    assert torch.equal(asked, rollout.sigmas[[5, 4, 0]])
    assert method.calls(Late(torch.tensor([1, 2, 6])), 3) == len(asked) == 3
    assert set(metrics) == {"loss", "late/loss", "late/reward"}


def test_every_step_of_the_window_is_drawn_alike_and_no_other() -> None:
    ((draw,),) = LateDraws((2, 5)).pairs(generators(4000), 1)
    steps, counts = draw.steps_left.unique(return_counts=True)
    assert steps.tolist() == [2, 3, 4, 5]
    assert counts.min() > 900 and counts.max() < 1100


def test_lots_are_independent_and_a_sample_is_drawn_alike_in_a_batch_of_any_size() -> None:
    draws = LateDraws((1, 50))
    together = draws.pairs(generators(3), 2)
    for sample in range(3):
        alone = draws.pairs(generators(3)[sample : sample + 1], 2)
        for lot, own in zip(together, alone, strict=True):
            assert torch.equal(lot[-1].steps_left[sample], own[-1].steps_left[0])
    assert not torch.equal(together[0][-1].steps_left, together[1][-1].steps_left)


@pytest.mark.parametrize("window", [(0, 3), (4, 2)])
def test_impossible_windows_are_refused(window: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match=r"^window \["):
        LateDraws(window)


def test_a_window_longer_than_the_sampler_and_pictures_without_a_path_are_refused() -> None:
    method = make_method(ReFL)
    rollout = roll_out(method.model)
    with pytest.raises(UsageError, match="goes back 7 steps from the end, and the sampler takes 6"):
        method.backward(rollout, [Late(torch.tensor([1, 7, 2]))], 0)
    with pytest.raises(UsageError, match="ReFL goes back along the sampler's path"):
        method.backward(replace(rollout, path=None), [Late(torch.tensor([1, 1, 1]))], 0)
