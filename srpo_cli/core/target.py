"""A target for the semantic gap, so that nobody has to know the step at which to stop.

The gap of a picture is ``q f.(C_pos - C_neg)``. Plain SRPO pushes it up without end, past the point where
pictures look right. A target bounds it by measurement: samples beyond it are pulled back, and the learning
rate fades as the running mean comes near. The target itself is measured too, on what the untrained model
draws when it is simply asked for the positive word.

Two-sided weights hold the gap, and not the pictures: the word is followed at the cost of what the prompts say.
:class:`CaptionMargin` brings that back. Methods of this project, not of arXiv:2509.06942.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from srpo_cli.errors import UsageError

_EMA_DECAY = 0.7  # a lag of about three steps: a run is twenty to forty long
_MARGIN_DECAY = 0.8  # slower: it is a brake, and should not act on chance
_LR_FLOOR = 0.02
_MARGIN_LOST = 0.1  # of the untrained model's: so much less than expected is brought back with full weight
_REACHED = 0.1  # of the way: nearer, the faded rate would take longer than the rest of the run


def caption_margin(own: Tensor, *wrong: Tensor) -> Tensor:
    """How much better pictures fit their own prompts than wrong ones: one reward minus the others' mean, (B,) each."""
    return own - torch.stack(wrong).mean(0)


class CaptionMargin:
    """Holds the caption margin where asking for the word leaves it.

    Pictures of the positive word may have less of it than others, so what is expected falls with the gap, from that of
    the untrained model's pictures to that of its pictures when asked for the word.

    Args:
        base: mean gap and mean margin of the untrained model's pictures.
        asked: those of its pictures when asked for the word.
        error: standard error of the mean margin of one batch of rollouts, by which it varies where nothing is lost.

    Raises UsageError if the margin of ``base`` is not above 0: there is nothing to hold.
    """

    def __init__(self, base: tuple[float, float], asked: tuple[float, float], error: float = 0.0) -> None:
        if not (base[1] > 0 and all(map(math.isfinite, (*base, *asked, error)))):
            raise UsageError(
                f"the caption margin of the untrained model's pictures is {base[1]:.4f}, and {asked[1]:.4f} when asked "
                "for the positive word, so the reward does not tell their prompts from others"
            )
        self.base, self.asked, self.error = base, asked, error
        self.mean = base[1]

    def update(self, margin: float) -> None:
        """Take the mean margin of one more batch of rollouts (over all ranks) into the running mean."""
        self.mean = _MARGIN_DECAY * self.mean + (1 - _MARGIN_DECAY) * margin

    def expected(self, gap: float) -> float:
        """The margin that pictures of this gap should have; beyond the two that are known, as there."""
        (low, margin), (high, asked) = self.base, self.asked
        way = (gap - low) / (high - low) if high > low else 0.0
        return margin + min(max(way, 0.0), 1.0) * min(asked - margin, 0.0)

    def weight(self, gap: float) -> float:
        """Weight of the margin beside the reward: 0 while it is as expected, 1 where a tenth of the base's is missing.

        What is missing is counted beyond one standard error of the running mean, since chance alone would be taken for
        a loss half of the time. Never below 0: a margin that is larger than expected is no harm, one that is raised
        without end is a hack.
        """
        band = self.error * math.sqrt((1 - _MARGIN_DECAY) / (1 + _MARGIN_DECAY))
        return min(max((self.expected(gap) - band - self.mean) / (_MARGIN_LOST * self.base[1]), 0.0), 1.0)

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs."""
        return {"base": [*self.base], "asked": [*self.asked], "error": self.error, "mean": self.mean}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> CaptionMargin:
        """Continue from :meth:`state_dict`."""
        captions = cls(tuple(state["base"]), tuple(state["asked"]), state["error"])
        captions.mean = state["mean"]
        return captions


class Target:
    """Two-sided sample weights and a learning-rate scale from the distance to a gap.

    Args:
        base: mean gap of the untrained model's pictures.
        value: the gap to reach, above ``base``. Both may be negative.
        captions: what is held on the way; None for nothing.

    Raises UsageError if ``value`` is not above ``base``: there is no way to go.
    """

    def __init__(self, base: float, value: float, captions: CaptionMargin | None = None) -> None:
        if not value > base:
            raise UsageError(
                f"target gap {value:.4f} is not above the untrained model's {base:.4f}: the reward does not see "
                "the positive word in its pictures; choose other control words, or give the target gap as a number"
            )
        self.base = base
        self.value = value
        self.mean_gap = base
        self.captions = captions

    @classmethod
    def from_positive_mode(
        cls, base: float, positive_mode: float, reach: float = 1.35, captions: CaptionMargin | None = None
    ) -> Target:
        """``reach`` times the way from ``base`` to the gap of pictures drawn for the positive word.

        At reach 1 the reward is satisfied before the pictures' statistics have followed.
        """
        return cls(base, base + reach * (positive_mode - base), captions)

    def update(self, gap: float, margin: float | None = None) -> None:
        """Take the mean gap, and caption margin, of one more batch of rollouts (over all ranks) into running means."""
        self.mean_gap = _EMA_DECAY * self.mean_gap + (1 - _EMA_DECAY) * gap
        if self.captions and margin is not None:
            self.captions.update(margin)

    def weights(self, gaps: Tensor) -> Tensor:
        """Loss weight of each sample from its gap, both (B,): 1 at the base, 0 on target, -1 far beyond."""
        return ((self.value - gaps) / (self.value - self.base)).clamp(-1, 1)

    @property
    def remaining(self) -> float:
        """Share of the way that the running mean still has to go: 1 at the base, 0 on target."""
        return (self.value - self.mean_gap) / (self.value - self.base)

    @property
    def captions_weight(self) -> float:
        """Weight of the caption margin beside the reward, in [0, 1]; 0 where nothing is held.

        The learning rate is not to fade below it: what is lost is to be brought back.
        """
        return self.captions.weight(self.mean_gap) if self.captions else 0.0

    @property
    def lr_scale(self) -> float:
        """Factor on the learning rate, in [0.02, 1]."""
        return min(max(self.remaining, _LR_FLOOR), 1.0)

    @property
    def reached(self) -> bool:
        """Whether the running mean is within 10 % of the way, or beyond."""
        return self.remaining <= _REACHED

    def state_dict(self) -> dict[str, Any]:
        """All that an exact resume needs."""
        captions = self.captions.state_dict() if self.captions else None
        return {"base": self.base, "value": self.value, "mean_gap": self.mean_gap, "captions": captions}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Target:
        """Continue from :meth:`state_dict`."""
        captions = CaptionMargin.from_state_dict(state["captions"]) if state["captions"] else None
        target = cls(state["base"], state["value"], captions)
        target.mean_gap = state["mean_gap"]
        return target
