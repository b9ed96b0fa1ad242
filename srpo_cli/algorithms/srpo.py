"""SRPO on Direct-Align (arXiv:2509.06942): a known noise, one model call, one relative reward, one gradient.

A rollout is re-noised to a level that the draws pick, the model is called once, the known noise is removed in
closed form, and the picture that comes out is judged against a desired and an undesired text. Denoising draws
step down in noise and raise the relative reward; inverting draws step up and push it down. Both train the
model the same way.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from srpo_cli.algorithms.base import ControlWords, ImageTransform, Model, Reward
from srpo_cli.algorithms.direct_align import DirectAlign
from srpo_cli.algorithms.injection import Injection
from srpo_cli.algorithms.judging import Verdict
from srpo_cli.core.relative import relative_reward


class SRPO(DirectAlign):
    """Accumulates SRPO's gradients into a model: Direct-Align both ways, under the two words as each draw weighs them.

    Args:
        model, reward, control_words, guidance, hinge, augment: as for
            :class:`srpo_cli.algorithms.judging.DirectMethod`; the reward has to compare pictures with texts.
    """

    def __init__(
        self,
        model: Model,
        reward: Reward,
        control_words: ControlWords,
        *,
        guidance: float,
        hinge: float | None = None,
        augment: ImageTransform | None = None,
    ) -> None:
        super().__init__(model, reward, control_words, guidance=guidance, hinge=hinge, augment=augment, relative=True)

    def verdict(self, rewards: Sequence[Tensor], draws: Sequence[Injection]) -> Verdict:
        """The reward in each draw's mixture of the step's words, and the gap between the words."""
        r_positive, r_negative = rewards
        weights = Injection.join(draws).to(r_positive.device).word_weights
        return Verdict(relative_reward(r_positive, r_negative, weights), r_positive - r_negative)

    def direction(self, draws: Sequence[Injection]) -> Tensor:
        """Inverting enters the picture with the opposite sign; :func:`srpo_cli.core.relative.branch_weights`."""
        return Injection.join(draws).delta_sigma.sign()
