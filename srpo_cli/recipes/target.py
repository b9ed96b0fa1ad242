"""Set the target of a run by what the untrained model draws, with and without the positive word."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from srpo_cli.config.schema import AlgorithmConfig
from srpo_cli.core.target import CaptionMargin, Target
from srpo_cli.errors import UsageError
from srpo_cli.recipes.figures import OtherPrompts
from srpo_cli.rewards.base import Reward

WRONG_CAPTIONS = 3
"""Other prompts that a picture's own is held against: one alone may differ in a word or in all, and says little."""

_CLEAR = 3  # standard errors that the base's margin is above 0

Say = Callable[[str], None]


def holds_captions(config: AlgorithmConfig, reward: Reward, others: OtherPrompts, warn: Say) -> bool:
    """Whether pictures are to be held to their prompts, and the reward can tell prompts apart.

    UsageError where it cannot and the user asked for it by name.
    """
    if not config.holds_captions or (reward.tells_prompts and len(others)):
        return config.holds_captions
    why = "the reward tells no prompt from another" if len(others) else "there is one prompt to train on"
    return _go_without(config, UsageError(f"{why}, so captions cannot be held; set algorithm.captions=free"), warn)


def make_target(config: AlgorithmConfig, base: Tensor, asked: Tensor, rollouts: int, say: Say, warn: Say) -> Target:
    """The target that ``config.target`` gives, or that is measured.

    Args:
        config: of the method.
        base: gap, and where it is held caption margin, of pictures that the untrained model draws, (N, 1 or 2).
        asked: likewise when it is asked for the positive word; of no use where the target is given and nothing is held.
        rollouts: of a step, that differ.
        say, warn: where lines for the user go.

    Raises UsageError where the gap cannot be reached, or captions that the user asked for not be held.
    """
    gap = _means(base)[0]
    captions = _captions(config, base, asked, rollouts, warn) if base.shape[1] > 1 else None
    if config.target != "auto":
        return Target(gap, config.target, captions)
    wanted = _means(asked)[0]
    target = Target.from_positive_mode(gap, wanted, config.target_reach, captions)
    say(
        f"target: semantic gap {gap:+.3f} now, {wanted:+.3f} when asked for the positive word, "
        f"so train to {target.value:+.3f}"
    )
    if captions:
        now, then = captions.base[1], captions.asked[1]
        say(f"target: caption margin {now:.3f} now, {then:.3f} when asked for the positive word, so hold it on the way")
    return target


def _captions(config: AlgorithmConfig, base: Tensor, asked: Tensor, rollouts: int, warn: Say) -> CaptionMargin | None:
    margins = base[:, 1]
    deviation = margins.std().item()
    try:
        captions = CaptionMargin(_means(base), _means(asked), deviation / math.sqrt(rollouts))
        if margins.mean().item() <= _CLEAR * deviation / math.sqrt(len(margins)):
            raise UsageError(
                f"the caption margin of the untrained model's pictures is {captions.base[1]:.4f}, which {len(margins)} "
                "pictures do not tell from 0, so captions cannot be held; set algorithm.captions=free"
            )
    except UsageError as error:
        _go_without(config, error, warn)
        return None
    return captions


def _go_without(config: AlgorithmConfig, error: UsageError, warn: Say) -> bool:
    """Hold the gap alone, with a warning, unless captions were asked for by name."""
    if config.captions == "hold":
        raise error
    warn(f"target: held, and captions are not: {error}")
    return False


def _means(rows: Tensor) -> tuple[float, ...]:
    return tuple(column.contiguous().mean().item() for column in rows.unbind(1))
