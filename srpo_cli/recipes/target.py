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


def warn_of_target(config: AlgorithmConfig, warn: Say) -> None:
    """Say so where what is trained need not lead to the target."""
    if config.target is not None and not config.compares_words:
        warn(
            f"target: {config.name} raises the plain reward, which need not lead to a gap between words: set "
            "algorithm.relative=true, or algorithm.target=null and count steps"
        )


def holds_captions(config: AlgorithmConfig, reward: Reward, others: OtherPrompts, warn: Say) -> bool:
    """Whether pictures are to be held to their prompts, and can be.

    UsageError where they cannot, and the user asked for it by name; a line where the target is held without.
    """
    if config.captions == "free" or (config.captions == "auto" and config.at_target == "stop"):
        return False
    if not config.holds_captions:
        why = f"{config.name} follows no gradient that could bring pictures back"
    elif not reward.tells_prompts:
        why = f"the reward {reward.name} tells no prompt from another"
    elif not len(others):
        why = "there is one prompt to train on"
    else:
        return True
    return _go_without(config, why, warn)


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
    if config.target == "auto":
        wanted = _means(asked)[0]
        target = Target.from_positive_mode(gap, wanted, config.target_reach, captions)
        known = f"{gap:+.3f} now, {wanted:+.3f} when asked for the positive word, so train"
    elif config.target > gap:
        target = Target(gap, config.target, captions)
        known = f"{gap:+.3f} now, train"
    else:
        raise UsageError(
            f"algorithm.target is {config.target:g}, and the untrained model's gap is {gap:.4f}: give a gap above "
            "that, or auto"
        )
    hold = " and hold it there" if config.at_target == "hold" else ""
    say(f"target: semantic gap {known} to {target.value:+.3f}{hold}")
    if captions:
        now, then = captions.base[1], captions.asked[1]
        say(
            f"target: caption margin {now:.3f} now, {then:.3f} when asked for the positive word; held between the two "
            "on the way from the one gap to the other"
        )
    return target


def _captions(config: AlgorithmConfig, base: Tensor, asked: Tensor, rollouts: int, warn: Say) -> CaptionMargin | None:
    known, count = _means(base), len(base)
    deviation = base[:, 1].std().item()
    if known[1] > _CLEAR * deviation / math.sqrt(count):
        return CaptionMargin(known, _means(asked), deviation / math.sqrt(rollouts))
    margin = f"the caption margin of the untrained model's pictures is {known[1]:.4f}"
    _go_without(config, f"{margin}, which {count} pictures do not tell from 0", warn)
    return None


def _go_without(config: AlgorithmConfig, why: str, warn: Say) -> bool:
    """Hold the gap alone, with a warning, unless captions were asked for by name."""
    if config.captions == "hold":
        raise UsageError(f"algorithm.captions is hold, and {why}: set algorithm.captions=free")
    warn(f"target: the gap is held and captions are not: {why}")
    return False


def _means(rows: Tensor) -> tuple[float, ...]:
    return tuple(column.contiguous().mean().item() for column in rows.unbind(1))
