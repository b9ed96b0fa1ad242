"""Relative rewards: four published forms, and what the two branches add up to."""

from __future__ import annotations

import pytest
import torch

from srpo_cli.core.relative import (
    WordWeights,
    branch_weights,
    guided,
    relative_reward,
    sgp,
    srp,
    swapped,
    upstream,
)

POSITIVE, NEGATIVE = torch.tensor([0.3, 0.2]).double(), torch.tensor([0.25, 0.26]).double()


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        (sgp(), [0.3, 0.2]),
        (srp(), [0.05, -0.06]),
        (guided(1.5), [0.325, 0.17]),  # -0.5 * 0.25 + 1.5 * 0.3, -0.5 * 0.26 + 1.5 * 0.2
        (upstream(0.1), [0.08, -0.04]),  # 1.1 * 0.3 - 0.25, 1.1 * 0.2 - 0.26
    ],
)
def test_published_forms_by_hand(weights: WordWeights, expected: list[float]) -> None:
    torch.testing.assert_close(relative_reward(POSITIVE, NEGATIVE, weights), torch.tensor(expected).double())


def test_guidance_form_joins_sgp_and_the_undesired_reward() -> None:
    assert guided(1.0) == sgp()
    assert guided(0.0) == WordWeights(0.0, 1.0)


def test_upstream_form_without_discount_is_srp() -> None:
    assert upstream(0.0) == srp()


def test_swapping_the_words_turns_srp_around() -> None:
    reward = relative_reward(POSITIVE, NEGATIVE, srp())
    torch.testing.assert_close(relative_reward(POSITIVE, NEGATIVE, swapped(srp())), -reward)


def test_the_branches_pull_the_same_way_because_their_gains_do_not() -> None:
    denoise, invert = (branch_weights(branch, 1.2, 0.1) for branch in ("denoise", "invert"))
    assert denoise == pytest.approx((1.3, -1.2))
    assert invert == pytest.approx((-1.3, 1.2))


@pytest.mark.parametrize(("k_denoise", "k_invert"), [(0.1, 0.3), (0.25, 0.01)])
def test_the_reference_discounts_are_curves_of_this_family(k_denoise: float, k_invert: float) -> None:
    assert branch_weights("denoise", 1.0, k_denoise) == pytest.approx(upstream(k_denoise))
    assert branch_weights("invert", 1.0 + k_invert, -k_invert) == pytest.approx(swapped(upstream(k_invert)))
