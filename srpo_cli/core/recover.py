"""Direct-Align's recovery: one model step from a known noise level, then removal of the known noise.

With ``s`` the level where the model is called and ``t`` the level where the noise is removed, every family
obeys ``x_0_hat = x_0 - gain * (model_out - target)``: a perfect model recovers ``x_0`` from any level, the
gain is small, and its sign is that of the step. Denoising (``t`` below ``s``) has a positive gain, inverting
a negative one. Everything here divides by alpha at ``t``, as the reference code does; equation 5 of
arXiv:2509.06942, read literally, divides by alpha at ``s``.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from srpo_cli.core.schedule import AlphaSigma

Prediction = Literal["velocity", "epsilon", "v_prediction"]


def add_noise(x_0: Tensor, eps: Tensor, sigma: Tensor, alpha: Tensor | None = None) -> Tensor:
    """Mix ``sigma`` parts of noise into clean latents (arXiv:2509.06942, eq. 3).

    Args:
        x_0, eps: clean latents and unit noise, both (B, ...).
        sigma: scalar or (B, 1, ...), in [0, 1].
        alpha: weight of ``x_0``, shaped like ``sigma``; rectified flow (``1 - sigma``) if not given.

    Returns the noisy latents, (B, ...).
    """
    return sigma * eps + (1 - sigma if alpha is None else alpha) * x_0


def recover(x_t: Tensor, eps_gt: Tensor, model_out: Tensor, sigma: Tensor, delta_sigma: Tensor) -> Tensor:
    """Estimate ``x_0`` from ``x_t`` with one velocity and the known noise (Direct-Align, arXiv:2509.06942).

    Takes one Euler step of length ``delta_sigma``, then undoes the remaining noise in closed form. Positive
    ``delta_sigma`` denoises (eq. 12), negative inverts (eq. 13). Exact for any step when
    ``model_out == eps_gt - x_0``.

    Args:
        x_t, eps_gt: noisy latents and the noise that made them, both (B, ...).
        model_out: predicted velocity, (B, ...); the only input that carries gradient.
        sigma, delta_sigma: (B, 1, ...) or scalar, with ``sigma - delta_sigma`` in [0, 1).

    Returns the estimated clean latents, (B, ...).
    """
    sigma_next = sigma - delta_sigma
    x_next = x_t - delta_sigma * model_out
    return (x_next - sigma_next * eps_gt) / (1 - sigma_next)


def split(prediction: Prediction, model_out: Tensor, x_s: Tensor, s: AlphaSigma) -> tuple[Tensor, Tensor]:
    """What the model believes about ``x_s``: its picture and its noise.

    Args:
        prediction: "velocity" is ``eps - x_0``, "epsilon" ``eps``, "v_prediction" ``alpha eps - sigma x_0``.
        model_out, x_s: model output and noisy latents, both (B, ...).
        s: noise level of ``x_s``; alpha must not be 0 for "epsilon".

    Returns predicted ``x_0`` and ``eps``, both (B, ...).
    """
    alpha, sigma = s
    norm = _norm(prediction, s)
    if prediction == "v_prediction":
        return (alpha * x_s - sigma * model_out) / norm, (sigma * x_s + alpha * model_out) / norm
    eps = model_out if prediction == "epsilon" else (x_s + alpha * model_out) / norm
    return (x_s - sigma * model_out) / norm, eps


def recover_from(
    prediction: Prediction, model_out: Tensor, x_s: Tensor, eps_gt: Tensor, s: AlphaSigma, t: AlphaSigma
) -> Tensor:
    """:func:`recover` for any schedule and prediction: one DDIM step from ``s`` to ``t``, up or down.

    Args:
        prediction, model_out, x_s, s: as for :func:`split`.
        eps_gt: the noise in ``x_s``, (B, ...).
        t: noise level where ``eps_gt`` is removed; alpha must not be 0.

    Returns the estimated clean latents, (B, ...).
    """
    x_0, eps = split(prediction, model_out, x_s, s)
    return x_0 + t.sigma / t.alpha * (eps - eps_gt)


def gain(prediction: Prediction, s: AlphaSigma, t: AlphaSigma) -> Tensor:
    """The ``G`` of ``x_0_hat = x_0 - G * (model_out - target)`` for a step from ``s`` to ``t``.

    Positive downwards in noise. Rectified flow: ``(sigma_s - sigma_t) / (1 - sigma_t)``; "epsilon": the
    difference of ``sigma / alpha``.
    """
    return (s.sigma - s.alpha * t.sigma / t.alpha) / _norm(prediction, s)


def _norm(prediction: Prediction, s: AlphaSigma) -> Tensor:
    """What both parts of :func:`split` are divided by; 1 for either v form on its own schedule."""
    if prediction == "velocity":
        return s.alpha + s.sigma
    if prediction == "epsilon":
        return s.alpha
    if prediction == "v_prediction":
        return s.alpha**2 + s.sigma**2
    raise ValueError(f"unknown prediction {prediction!r}; one of velocity, epsilon, v_prediction")
