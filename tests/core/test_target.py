"""The target of the semantic gap: weights, learning rate, the moment it is reached, and resume."""

from __future__ import annotations

import pytest
import torch

from srpo_cli.core.target import Target
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


def test_a_resumed_target_continues_exactly() -> None:
    gaps = [0.11, 0.27, 0.31]
    whole = Target(-0.1, 0.3)
    for gap in gaps:
        whole.update(gap)
    first = Target(-0.1, 0.3)
    first.update(gaps[0])
    second = Target(0.0, 1.0)
    second.load_state_dict(first.state_dict())
    for gap in gaps[1:]:
        second.update(gap)
    assert second.state_dict() == whole.state_dict()
