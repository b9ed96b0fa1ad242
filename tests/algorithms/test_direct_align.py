"""Direct-Align on a linear velocity model and a colour-mean reward: the plain reward, its exact gradient."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_flow import (
    PLAIN,
    RELATIVE,
    SIZE,
    generators,
    gradient,
    make_method,
    roll_out,
    same,
    seeded,
    uncut,
    velocity,
)
from torch import Tensor

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.algorithms.direct_align import DirectAlign
from srpo_cli.algorithms.injection import ReferenceDraws, SigmaDraws
from srpo_cli.algorithms.srpo import SRPO
from srpo_cli.errors import UsageError
from srpo_cli.rewards.augment import Augment

DRAWS = SigmaDraws(window=(0.3, 0.9), delta_sigma=0.1, branches=("denoise",))


# --- the gradient -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("relative", "hinge"), [(False, None), (False, 0.5), (True, None), (True, 0.1)])
def test_the_gradient_is_that_of_a_plain_loop(relative: bool, hinge: float | None) -> None:
    method = make_method(DirectAlign, relative=relative, hinge=hinge)
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
    relative, srpo = make_method(DirectAlign, relative=True), make_method(SRPO)
    rollout = roll_out(relative.model)
    (draws,) = DRAWS.pairs(generators(3), 1)
    assert draws[0].positive_weight.eq(1).all() and draws[0].negative_weight.eq(-1).all()
    same(gradient(relative, rollout, draws), gradient(srpo, rollout, draws))


def test_the_word_weights_of_its_draws_are_not_read() -> None:
    method = make_method(DirectAlign)
    rollout = roll_out(method.model)
    weighed = replace(DRAWS, common_weight=(3.0, -2.0), semantic_weight=(0.1, 0.2))
    found = [gradient(method, rollout, draws.pairs(generators(3), 1)[0]) for draws in (DRAWS, weighed)]
    same(*found)


def test_the_augmentation_is_as_random_as_its_generators_and_the_same_in_one_pass() -> None:
    method = make_method(DirectAlign, augment=Augment(shift=2, noise=0.1))
    rollout = roll_out(method.model)
    draws = [draw for lot in DRAWS.pairs(generators(3), 2) for draw in lot]
    options = [(1, False), (1, True), (2, False)]
    first, again, other = (
        gradient(method, rollout, draws, generator=generators(3, seed), batched=batched) for seed, batched in options
    )
    same(again, first)
    assert not torch.allclose(other, first, rtol=1e-6)


# --- where it is taken ------------------------------------------------------------------------------------------------


def test_the_reference_draws_tell_the_model_a_truncated_time() -> None:
    method = make_method(DirectAlign)
    draws = ReferenceDraws(branches=("denoise",))
    metrics = method.backward(roll_out(method.model), draws.at(500, 3), 0)
    assert method.model.asked[0].tolist() == [0.878] * 3
    assert set(metrics) == {"loss", "denoise/loss", "denoise/reward"}


def test_inverting_draws_are_refused() -> None:
    method = make_method(DirectAlign)
    with pytest.raises(UsageError, match=r"only denoises.*\[denoise\]"):
        method.backward(roll_out(method.model), SigmaDraws((0.3, 0.9), 0.1).draw(3, seeded()), 0)


# --- what is asked of the reward --------------------------------------------------------------------------------------


def picture() -> Tensor:
    """One picture of 60 % red, 20 % green and 10 % blue."""
    return torch.tensor([0.6, 0.2, 0.1]).view(1, 3, 1, 1).expand(1, 3, *SIZE)


def test_what_is_trained_is_the_plain_reward_or_the_difference_of_the_words() -> None:
    plain, relative = make_method(DirectAlign), make_method(DirectAlign, relative=True)
    relative.control_words = ControlWords(["red", "green"], ["blue"])
    torch.testing.assert_close(plain.judge(picture(), ["green"], 1), torch.tensor([0.2]))
    torch.testing.assert_close(relative.judge(picture(), ["green"], 0), torch.tensor([0.6 - 0.1]))
    torch.testing.assert_close(relative.judge(picture(), ["green"], 1), torch.tensor([0.2 - 0.1]))


@pytest.mark.parametrize("augment", [None, Augment(shift=2)])
def test_what_is_measured_is_the_plain_reward_and_the_gap_over_all_words(augment: Augment | None) -> None:
    method = make_method(DirectAlign, augment=augment)
    method.control_words = ControlWords(["red", "green"], ["blue"])
    reward, gap = method.measure(picture(), ["green"], generator=seeded())
    torch.testing.assert_close(reward, torch.tensor([0.2]))
    torch.testing.assert_close(gap, torch.tensor([(0.6 + 0.2) / 2 - 0.1]))


def test_reward_and_gap_see_augmented_pictures_and_the_measured_reward_does_not() -> None:
    method = make_method(DirectAlign, augment=lambda images, generator: images / 2)
    torch.testing.assert_close(method.judge(picture(), ["green"], 0), torch.tensor([0.1]))
    reward, gap = method.measure(picture(), ["green"])
    torch.testing.assert_close(reward, torch.tensor([0.2]))
    torch.testing.assert_close(gap, torch.tensor([(0.6 - 0.1) / 2]))
