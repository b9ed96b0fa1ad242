"""ReFL on a linear velocity model and a colour-mean reward: one call late in the sampling, its exact gradient."""

from __future__ import annotations

from dataclasses import replace

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
