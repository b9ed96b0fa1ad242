"""Direct-Align's recovery: exact for a perfect model, and off by gain times error for any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from srpo_cli.core.recover import Prediction, add_noise, gain, recover, recover_from, split
from srpo_cli.core.schedule import AlphaSigma, flow, variance_preserving

PREDICTIONS: tuple[Prediction, ...] = ("velocity", "epsilon", "v_prediction")
STEPS = [(0.9, 0.1), (0.5, -0.2), (0.97, 0.97), (0.6, 0.0)]
generator = torch.Generator().manual_seed(0)
x_0, eps, error = torch.randn(3, 2, 5, generator=generator, dtype=torch.float64)


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def levels(prediction: Prediction, sigma: float, sigma_next: float) -> tuple[AlphaSigma, AlphaSigma]:
    if prediction == "velocity":
        return flow(scalar(sigma)), flow(scalar(sigma_next))
    return variance_preserving(scalar(1 - sigma**2)), variance_preserving(scalar(1 - sigma_next**2))


def target(prediction: Prediction, s: AlphaSigma) -> Tensor:
    return {"velocity": eps - x_0, "epsilon": eps, "v_prediction": s.alpha * eps - s.sigma * x_0}[prediction]


@pytest.mark.parametrize(("sigma", "delta_sigma"), STEPS)
def test_a_perfect_velocity_recovers_x_0_exactly(sigma: float, delta_sigma: float) -> None:
    x_t = add_noise(x_0, eps, scalar(sigma))
    torch.testing.assert_close(recover(x_t, eps, eps - x_0, scalar(sigma), scalar(delta_sigma)), x_0)


def test_recover_by_hand() -> None:  # x_t = 0.5, one step of 0.25 at v = -2 -> 1.0; (1.0 + 0.25) / 0.75
    args = [torch.tensor(v) for v in (0.5, -1.0, -2.0, 0.5, 0.25)]
    torch.testing.assert_close(recover(*args), torch.tensor(5 / 3))


def test_without_a_step_the_model_does_not_matter() -> None:
    x_t = add_noise(x_0, eps, scalar(0.8))
    torch.testing.assert_close(recover(x_t, eps, error, scalar(0.8), scalar(0.0)), x_0)


def test_inverting_then_denoising_returns_home() -> None:
    low, high = scalar(0.5), scalar(0.7)
    x_low = add_noise(x_0, eps, low)
    x_high = x_low + (high - low) * error
    torch.testing.assert_close(recover(x_high, eps, error, high, high), recover(x_low, eps, error, low, low))


@pytest.mark.parametrize(("sigma", "delta_sigma"), STEPS)
def test_the_gradient_is_the_negative_gain_and_turns_sign_with_the_branch(sigma: float, delta_sigma: float) -> None:
    model_out = error.clone().requires_grad_()
    x_t = add_noise(x_0, eps, scalar(sigma))
    recover(x_t, eps, model_out, scalar(sigma), scalar(delta_sigma)).sum().backward()
    expected = -delta_sigma / (1 - (sigma - delta_sigma))
    torch.testing.assert_close(model_out.grad, torch.full_like(error, expected))
    torch.testing.assert_close(
        gain("velocity", flow(scalar(sigma)), flow(scalar(sigma - delta_sigma))), scalar(-expected)
    )


def test_each_sample_has_its_own_step() -> None:
    sigma, delta = torch.tensor([[0.9], [0.4]]).double(), torch.tensor([[0.1], [-0.3]]).double()
    together = recover(add_noise(x_0, eps, sigma), eps, error, sigma, delta)
    for i in range(2):
        alone = recover(add_noise(x_0, eps, sigma[i])[i], eps[i], error[i], sigma[i], delta[i])
        torch.testing.assert_close(together[i], alone)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("sigma", "sigma_next"), [(0.9, 0.7), (0.4, 0.8)])
def test_every_prediction_recovers_x_0_up_to_gain_times_error(
    prediction: Prediction, sigma: float, sigma_next: float
) -> None:
    s, t = levels(prediction, sigma, sigma_next)
    x_s = add_noise(x_0, eps, s.sigma, s.alpha)
    model_out = target(prediction, s) + error
    x_0_hat = recover_from(prediction, model_out, x_s, eps, s, t)
    torch.testing.assert_close(x_0_hat, x_0 - gain(prediction, s, t) * error)
    assert (gain(prediction, s, t) > 0) == (sigma > sigma_next)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_model_tells_picture_and_noise_apart(prediction: Prediction) -> None:
    s, _ = levels(prediction, 0.6, 0.5)
    x_s = add_noise(x_0, eps, s.sigma, s.alpha)
    for told, true in zip(split(prediction, target(prediction, s), x_s, s), (x_0, eps), strict=True):
        torch.testing.assert_close(told, true)


def test_general_and_flow_recovery_agree() -> None:
    sigma, delta = scalar(0.8), scalar(0.15)
    x_t = add_noise(x_0, eps, sigma)
    general = recover_from("velocity", error, x_t, eps, flow(sigma), flow(sigma - delta))
    torch.testing.assert_close(general, recover(x_t, eps, error, sigma, delta))


def test_velocity_is_recoverable_from_pure_noise() -> None:
    s, t = flow(scalar(1.0)), flow(scalar(0.9))
    torch.testing.assert_close(recover_from("velocity", eps - x_0, eps, eps, s, t), x_0)
    torch.testing.assert_close(gain("velocity", s, t), scalar(1.0))


def test_epsilon_gain_is_a_difference_of_noise_ratios_and_v_gain_weighs_it_by_alpha() -> None:
    s, t = levels("epsilon", 0.9, 0.7)
    difference = s.sigma / s.alpha - t.sigma / t.alpha
    torch.testing.assert_close(gain("epsilon", s, t), difference)
    torch.testing.assert_close(gain("v_prediction", s, t), s.alpha * difference)


def test_an_unknown_prediction_is_named() -> None:
    with pytest.raises(ValueError, match="'sample'"):
        gain("sample", flow(scalar(0.5)), flow(scalar(0.4)))
