"""Relative rewards: how the rewards for a desired and an undesired text make the one that is trained.

Every form is a pair of weights on ``r_positive = q f.C_pos`` and ``r_negative = q f.C_neg``, the rewards of
one picture for "<positive word>. <prompt>" and "<negative word>. <prompt>" (arXiv:2509.06942, section 3.2).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from torch import Tensor

Branch = Literal["denoise", "invert"]


class WordWeights(NamedTuple):
    """Signed weights of the two rewards; numbers or (B,)."""

    positive: Tensor | float
    negative: Tensor | float


def relative_reward(r_positive: Tensor, r_negative: Tensor, weights: WordWeights) -> Tensor:
    """The weighted sum of the rewards for the desired and the undesired text, all (B,)."""
    return weights.positive * r_positive + weights.negative * r_negative


def sgp() -> WordWeights:
    """Semantic-Guided Preference: the reward for the desired text alone."""
    return WordWeights(1.0, 0.0)


def srp() -> WordWeights:
    """Semantic-Relative Preference: desired minus undesired."""
    return WordWeights(1.0, -1.0)


def guided(k: Tensor | float) -> WordWeights:
    """The paper's guidance form, ``(1 - k) C_neg + k C_pos``."""
    return WordWeights(k, 1 - k)


def upstream(k: Tensor | float) -> WordWeights:
    """The reference code's form, ``(1 + k) C_pos - C_neg``; it calls the paper's "less stable"."""
    return WordWeights(1 + k, -1.0)


def swapped(weights: WordWeights) -> WordWeights:
    """The same form with desired and undesired text exchanged."""
    return WordWeights(weights.negative, weights.positive)


def branch_weights(branch: Branch, semantic: Tensor, common: Tensor) -> WordWeights:
    """Weights that move the picture along ``semantic * (C_pos - C_neg) + common * C_pos`` in either branch.

    Denoising raises ``r = (s + c) r_positive - s r_negative``. Inverting enters the picture with the opposite
    sign, so it pushes the same ``r`` down: its reward is ``-r``, the words with their roles swapped. A pair
    therefore weighs the meaning of the words by ``2 s`` and the plain reward by ``2 c``.

    The reference code is inside this family, with its own curves per branch: ``1 + k_d`` while denoising is
    ``s = 1, c = k_d``; ``1 + k_i`` on the swapped words while inverting is ``s = 1 + k_i, c = -k_i``. Its
    plain reward thus weighs ``k_d - k_i`` per pair: negative at the clean end of the window, positive at the
    noisy end, which is what holds reward hacking back.
    """
    sign = 1 if branch == "denoise" else -1
    return WordWeights(sign * (semantic + common), -sign * semantic)
