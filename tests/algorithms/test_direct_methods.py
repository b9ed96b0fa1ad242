"""What is true of every method that follows the reward's gradient, on a linear velocity model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from linear_flow import SIZE, STEPS, generators, gradient, make_method, roll_out, same, sample_of

from srpo_cli.algorithms.alignprop import AlignProp, TruncationDraws
from srpo_cli.algorithms.direct_align import DirectAlign
from srpo_cli.algorithms.draft import DRaFT, RenoisedDraws
from srpo_cli.algorithms.injection import SigmaDraws
from srpo_cli.algorithms.judging import DirectMethod
from srpo_cli.algorithms.refl import LateDraws, ReFL

METHODS = {
    "refl": (ReFL, LateDraws((1, 4))),
    "draft": (DRaFT, RenoisedDraws(noises=2, include_last=True)),
    "alignprop": (AlignProp, TruncationDraws(STEPS, 0, STEPS)),
    "direct-align": (DirectAlign, SigmaDraws(window=(0.3, 0.9), delta_sigma=0.1, branches=("denoise",))),
}
EVERY = pytest.mark.parametrize(("kind", "draws_of"), METHODS.values(), ids=METHODS)


@EVERY
def test_the_hinge_silences_the_samples_beyond_it(kind: type[DirectMethod], draws_of: Any) -> None:
    method = make_method(kind)
    rollout = roll_out(method.model)
    ((draw, *_),) = draws_of.pairs(generators(3), 1)
    (trace,) = method.backward_pass(rollout, [draw], 0)
    margin = trace.reward.mean().item()
    below = gradient(method, rollout, [draw], weights=(trace.reward < margin).double())
    method.hinge = margin
    same(gradient(method, rollout, [draw]), below)


@EVERY
def test_a_batch_and_its_samples_one_by_one_give_the_same_gradient(kind: type[DirectMethod], draws_of: Any) -> None:
    method = make_method(kind)
    rollout = roll_out(method.model, 2)
    (draws,) = draws_of.pairs(generators(2), 1)
    alone = [
        gradient(method, sample_of(rollout, sample), draws_of.pairs(generators(2)[sample : sample + 1], 1)[0])
        for sample in range(2)
    ]
    assert not torch.allclose(alone[0], alone[1], rtol=1e-3)
    same(gradient(method, rollout, draws), sum(alone) / 2)


@EVERY
def test_several_draws_give_the_mean_of_their_gradients_in_one_pass_or_many(
    kind: type[DirectMethod], draws_of: Any
) -> None:
    method = make_method(kind)
    rollout, weights = roll_out(method.model), torch.tensor([1.0, -0.5, 0.2])
    draws = [draw for lot in draws_of.pairs(generators(3), 3) for draw in lot]
    alone = [gradient(method, rollout, [draw], weights=weights) for draw in draws]
    for batched in (False, True):
        same(gradient(method, rollout, draws, weights=weights, batched=batched), sum(alone) / len(alone))
    same(gradient(method, rollout, draws, weights=weights, scale=1.0), sum(alone))


@EVERY
def test_what_belongs_to_the_rollout_is_constant(kind: type[DirectMethod], draws_of: Any) -> None:
    method = make_method(kind)
    rollout = roll_out(method.model)
    constants = (rollout.x_0, rollout.eps, rollout.path)
    for tensor in constants:
        tensor.requires_grad_()
    method.backward(rollout, draws_of.pairs(generators(3), 1)[0], 0)
    assert all(tensor.grad is None for tensor in constants)


@EVERY
def test_twenty_steps_raise_the_reward(kind: type[DirectMethod], draws_of: Any) -> None:
    method = make_method(kind)
    optimizer = torch.optim.AdamW(method.model.parameters(), lr=0.03)
    rewards = []
    for step in range(21):
        rollout = roll_out(method.model, 4, seed=step)
        plain, _ = method.measure(method.model.decode(rollout.x_0, SIZE), rollout.prompts)
        rewards.append(plain.mean().item())
        for draws in draws_of.pairs(generators(4, step), 2):
            optimizer.zero_grad()
            method.backward(rollout, draws, step)
            optimizer.step()
    assert rewards[-1] > rewards[0] + 0.05
