"""A target for the semantic gap, so that nobody has to know the step at which to stop.

The gap of a picture is ``q f.(C_pos - C_neg)``. Plain SRPO pushes it up without end, past the point where
pictures look right. A target bounds it by measurement: samples beyond it are pulled back, and the learning
rate fades as the running mean comes near. The target itself is measured too, on what the untrained model
draws when it is simply asked for the positive word. A method of this project, not of arXiv:2509.06942.
"""

from __future__ import annotations

from torch import Tensor

from srpo_cli.errors import UsageError

_EMA_DECAY = 0.7  # a lag of about three steps: a run is twenty to forty long
_LR_FLOOR = 0.02
_REACHED = 0.1  # of the way: nearer, the faded rate would take longer than the rest of the run


class Target:
    """Two-sided sample weights and a learning-rate scale from the distance to a gap.

    Args:
        base: mean gap of the untrained model's pictures.
        value: the gap to reach, above ``base``. Both may be negative.

    Raises UsageError if ``value`` is not above ``base``: there is no way to go.
    """

    def __init__(self, base: float, value: float) -> None:
        if not value > base:
            raise UsageError(
                f"target gap {value:.4f} is not above the untrained model's {base:.4f}: the reward does not see "
                "the positive word in its pictures; choose other control words, or give the target gap as a number"
            )
        self.base = base
        self.value = value
        self.mean_gap = base

    @classmethod
    def from_positive_mode(cls, base: float, positive_mode: float, reach: float = 1.35) -> Target:
        """``reach`` times the way from ``base`` to the gap of pictures drawn for the positive word.

        At reach 1 the reward is satisfied before the pictures' statistics have followed.
        """
        return cls(base, base + reach * (positive_mode - base))

    def update(self, gap: float) -> None:
        """Take the mean gap of one more batch of rollouts (over all ranks) into the running mean."""
        self.mean_gap = _EMA_DECAY * self.mean_gap + (1 - _EMA_DECAY) * gap

    def weights(self, gaps: Tensor) -> Tensor:
        """Loss weight of each sample from its gap, both (B,): 1 at the base, 0 on target, -1 far beyond."""
        return ((self.value - gaps) / (self.value - self.base)).clamp(-1, 1)

    @property
    def remaining(self) -> float:
        """Share of the way that the running mean still has to go: 1 at the base, 0 on target."""
        return (self.value - self.mean_gap) / (self.value - self.base)

    @property
    def lr_scale(self) -> float:
        """Factor on the learning rate, in [0.02, 1]."""
        return min(max(self.remaining, _LR_FLOOR), 1.0)

    @property
    def reached(self) -> bool:
        """Whether the running mean is within 10 % of the way, or beyond."""
        return self.remaining <= _REACHED

    def state_dict(self) -> dict[str, float]:
        """All that an exact resume needs."""
        return {"base": self.base, "value": self.value, "mean_gap": self.mean_gap}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Continue from :meth:`state_dict`."""
        self.base, self.value, self.mean_gap = state["base"], state["value"], state["mean_gap"]
