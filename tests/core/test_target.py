"""The target of the semantic gap: weights, learning rate, the moment it is reached, captions held, and resume."""

from __future__ import annotations

import json
import math

import pytest
import torch

from srpo_cli.core.target import CaptionMargin, Target, caption_margin
from srpo_cli.errors import UsageError


def test_the_target_lies_beyond_what_the_model_draws_when_asked() -> None:
    assert Target.from_positive_mode(-0.13, 0.19, reach=1.35).value == pytest.approx(0.302)


@pytest.mark.parametrize(("base", "value"), [(-0.13, 0.30), (-0.5, -0.1), (0.002, 0.005)])
def test_weights_run_from_pushing_at_the_base_to_pulling_beyond_the_target(base: float, value: float) -> None:
    way = value - base
    gaps = base + way * torch.tensor([-1.0, 0.0, 0.5, 1.0, 1.5, 9.0], dtype=torch.float64)
    expected = torch.tensor([1.0, 1.0, 0.5, 0.0, -0.5, -1.0], dtype=torch.float64)
    torch.testing.assert_close(Target(base, value).weights(gaps), expected)


def test_the_learning_rate_fades_with_the_running_mean_but_never_dies() -> None:
    target = Target(base=0.0, value=1.0)
    assert target.lr_scale == 1
    target.update(0.5)
    assert target.mean_gap == pytest.approx(0.3 * 0.5)
    assert target.lr_scale == pytest.approx(0.85)
    for _ in range(100):
        target.update(2.0)
    assert target.lr_scale == 0.02


def test_a_gap_that_falls_back_does_not_raise_the_learning_rate_above_its_own() -> None:
    target = Target(base=0.0, value=1.0)
    target.update(-5.0)
    assert target.lr_scale == 1


def test_it_is_reached_within_ten_per_cent_of_the_way() -> None:
    target = Target(base=-0.5, value=-0.1)
    assert not target.reached
    target.mean_gap = -0.1 - 0.101 * 0.4
    assert not target.reached
    target.mean_gap = -0.1 - 0.099 * 0.4
    assert target.reached
    target.mean_gap = 0.0
    assert target.reached


def test_a_target_that_is_no_improvement_is_refused() -> None:
    with pytest.raises(UsageError, match=r"0\.1000 is not above the untrained model's 0\.2000"):
        Target.from_positive_mode(base=0.2, positive_mode=0.1, reach=1.0)


def test_a_caption_margin_is_over_the_mean_of_wrong_captions() -> None:
    own, first, second = torch.tensor([[0.7, 0.2], [0.1, 0.4], [0.3, 0.2]])
    torch.testing.assert_close(caption_margin(own, first, second), torch.tensor([0.5, -0.1]))
    torch.testing.assert_close(caption_margin(own, first), torch.tensor([0.6, -0.2]))


BASE, ASKED = (-0.1, 0.6), (0.2, 0.5)
"""Gap and caption margin of what the untrained model draws, unasked and asked for the word."""


def held() -> Target:
    return Target(base=-0.1, value=0.3, captions=CaptionMargin(BASE, ASKED))


def test_captions_are_expected_as_asking_for_the_word_leaves_them_and_no_worse() -> None:
    captions = CaptionMargin(BASE, ASKED)
    assert [captions.expected(gap) for gap in (-0.5, -0.1, 0.05, 0.2, 0.3)] == pytest.approx([0.6, 0.6, 0.55, 0.5, 0.5])
    assert CaptionMargin(BASE, BASE).expected(0.3) == 0.6


def test_a_tenth_of_the_margin_missing_has_full_weight_and_a_surplus_none() -> None:
    captions = CaptionMargin(BASE, ASKED)
    weights = []
    for mean in (0.7, 0.55, 0.52, 0.49, 0.1):
        captions.mean = mean
        weights.append(captions.weight(gap=0.05))
    assert weights == pytest.approx([0, 0, 0.5, 1, 1])


def test_a_margin_that_asking_raises_is_not_asked_of_anyone() -> None:
    assert CaptionMargin(BASE, (0.2, 0.75)).expected(0.2) == 0.6


def test_the_weight_falls_with_the_gap_as_what_is_expected_does() -> None:
    target = held()
    target.captions.mean = 0.5
    assert target.captions_weight == 1
    target.mean_gap = 0.2
    assert target.captions_weight == 0
    assert Target(base=-0.1, value=0.3).captions_weight == 0


def test_chance_alone_hardly_moves_the_weight() -> None:
    """Batches of eight pictures that have lost nothing, with the spread of the miniature's: 0.15 each."""
    draw = torch.Generator().manual_seed(0)
    error = 0.15 / math.sqrt(8)

    def mean_weight(told: float) -> float:
        captions, weights = CaptionMargin((0.0, 0.65), (0.3, 0.55), told), []
        for noise in (error * torch.randn(4000, generator=draw)).tolist():
            captions.update(0.55 + noise)
            weights.append(captions.weight(gap=0.3))
        return sum(weights) / len(weights)

    assert mean_weight(told=error) < 0.03
    assert mean_weight(told=0.0) > 0.09, "what the band takes away"


def test_what_is_lost_beyond_chance_is_seen() -> None:
    captions = CaptionMargin((0.0, 0.65), (0.3, 0.55), error=0.05)
    for _ in range(60):
        captions.update(0.5)
    band = 0.05 * math.sqrt(0.2 / 1.8)
    assert captions.weight(gap=0.3) == pytest.approx((0.05 - band) / 0.065, rel=1e-3)


@pytest.mark.parametrize("base, asked", [(-0.01, 0.1), (math.nan, 0.1), (0.6, math.nan)])
def test_a_reward_that_tells_no_prompt_from_another_cannot_hold_captions(base: float, asked: float) -> None:
    with pytest.raises(UsageError, match=r"caption margin .* is \S+, and .* does not tell"):
        CaptionMargin((-0.1, base), (0.2, asked))


@pytest.mark.parametrize("with_captions", [False, True])
def test_a_resumed_target_continues_exactly(with_captions: bool) -> None:
    def fresh() -> Target:
        return Target(-0.1, 0.3, CaptionMargin(BASE, ASKED) if with_captions else None)

    seen = [(0.11, 0.5), (0.27, 0.3), (0.31, 0.35)]
    whole, first = fresh(), fresh()
    for gap, margin in seen:
        whole.update(gap, margin)
    first.update(*seen[0])
    second = Target.from_state_dict(json.loads(json.dumps(first.state_dict())))
    for gap, margin in seen[1:]:
        second.update(gap, margin)
    assert second.state_dict() == whole.state_dict()
    assert second.lr_scale == whole.lr_scale
    assert (second.captions_weight > 0) is with_captions
