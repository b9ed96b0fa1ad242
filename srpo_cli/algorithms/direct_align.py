"""Direct-Align (arXiv:2509.06942, section 3.1): a known noise, one model call, the plain reward, one gradient.

What is left of SRPO without its inversion and its two words: the recovery of equation 5 under the reward of equation
7. With ``relative`` it is the paper's direct reward form without inversion, the difference of the two words on the
denoising branch alone. Its draws are SRPO's own with ``branches=("denoise",)``; their word weights are not read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from srpo_cli.algorithms.base import Rollout
from srpo_cli.algorithms.injection import Injection
from srpo_cli.algorithms.judging import DirectMethod, Verdict
from srpo_cli.core.recover import add_noise, recover
from srpo_cli.core.schedule import expand_to
from srpo_cli.errors import UsageError


class Recovery(NamedTuple):
    """One model call on a known noise, (B, ...) each: what it was shown, what it said, what is recovered."""

    x_t: Tensor
    model_out: Tensor
    x_0_hat: Tensor


class DirectAlign(DirectMethod):
    """Accumulates Direct-Align's gradients into a model; the arguments are those of :class:`DirectMethod`."""

    def recovery(self, rollout: Rollout, draws: Sequence[Injection]) -> Recovery:
        """Noise goes in, the model is called once for all draws, and what is left of the known noise comes out."""
        repeated, injection = rollout.repeat(len(draws)), Injection.join(draws).to(rollout.x_0.device)
        x_0, eps = repeated.x_0.detach(), repeated.eps.detach()
        sigma, delta_sigma = expand_to(injection.sigma, x_0), expand_to(injection.delta_sigma, x_0)
        x_t = add_noise(x_0, eps, sigma)
        model_out = self.model.velocity(x_t, injection.sigma_model, repeated.conditioning, self.guidance, rollout.size)
        return Recovery(x_t, model_out, recover(x_t, eps, model_out, sigma, delta_sigma))

    def predict(self, rollout: Rollout, draws: Sequence[Injection]) -> Tensor:
        return self.recovery(rollout, draws).x_0_hat

    def verdict(self, rewards: Sequence[Tensor], draws: Sequence[Injection]) -> Verdict:
        """As for every method; UsageError for an inverting draw, through which a reward raised would sink."""
        if any(draw.branch == "invert" for draw in draws):
            raise UsageError("direct-align only denoises, and a draw inverts: set branches to [denoise], or use srpo")
        return super().verdict(rewards, draws)

    def kind(self, draw: Injection) -> str:
        return draw.branch
