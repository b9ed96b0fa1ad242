"""Weight curves and the hinge."""

from __future__ import annotations

import torch

from srpo_cli.core.curves import hinge, linear_curve


def test_a_curve_is_linear_inside_its_window_and_flat_outside() -> None:
    sigma = torch.tensor([0.1, 0.3, 0.6, 0.9, 1.0])
    weights = linear_curve(sigma, (0.3, 0.9), (-0.2, 0.4))
    torch.testing.assert_close(weights, torch.tensor([-0.2, -0.2, 0.1, 0.4, 0.4]))


def test_hinge_is_exactly_flat_beyond_its_margin() -> None:
    reward = torch.tensor([0.5, 0.9], requires_grad=True)
    loss = hinge(reward, 0.7)
    loss.sum().backward()
    torch.testing.assert_close(loss.detach(), torch.tensor([0.2, 0.0]))
    assert reward.grad.tolist() == [-1, 0]


def test_without_a_margin_the_loss_is_the_negative_reward() -> None:
    assert hinge(torch.tensor([0.5, -0.9]), None).tolist() == [-0.5, torch.tensor(0.9).item()]
