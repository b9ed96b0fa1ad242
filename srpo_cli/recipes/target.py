"""Set the target of a run by what the untrained model draws, with and without the positive word."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from srpo_cli.config.schema import AlgorithmConfig
from srpo_cli.core.target import CaptionMargin, Target
from srpo_cli.errors import UsageError
from srpo_cli.recipes.figures import CAPTION_MARGIN, GAP


def make_target(
    config: AlgorithmConfig,
    names: Sequence[str],
    base: Tensor,
    asked: Tensor,
    say: Callable[[str], None],
    warn: Callable[[str], None],
) -> Target:
    """The target that ``config.target`` gives, or that is measured.

    Args:
        config: of the method.
        names: of the figures, see :attr:`srpo_cli.recipes.figures.Figures.names`, and of the gap.
        base: figures of pictures that the untrained model draws, (N, len(names)).
        asked: likewise when it is asked for the positive word; of no use where the target is given.
        say, warn: where lines for the user go.

    Raises UsageError where the gap cannot be reached, or captions not be held.
    """
    measured = config.target == "auto"
    gap = _mean(base, names, GAP)
    captions = _captions(config, names, base, asked if measured else base, warn)
    if not measured:
        return Target(gap, config.target, captions)
    wanted = _mean(asked, names, GAP)
    target = Target.from_positive_mode(gap, wanted, config.target_reach, captions)
    say(
        f"target: semantic gap {gap:+.3f} now, {wanted:+.3f} when asked for the positive word, "
        f"so train to {target.value:+.3f}"
    )
    if captions:
        say(
            f"target: caption margin {captions.base:.3f} now, {captions.asked:.3f} when asked for the positive word, "
            "so hold it on the way"
        )
    return target


def _captions(
    config: AlgorithmConfig, names: Sequence[str], base: Tensor, asked: Tensor, warn: Callable[[str], None]
) -> CaptionMargin | None:
    """What holds pictures to their prompts; None where nothing does."""
    if not config.holds_captions:
        return None
    try:
        if CAPTION_MARGIN not in names:
            raise UsageError(
                "the reward reads no text, or there is one prompt alone, so pictures cannot be held to their prompts; "
                "set algorithm.captions=free"
            )
        return CaptionMargin(*(_mean(rows, names, CAPTION_MARGIN) for rows in (base, asked)))
    except UsageError as error:
        if config.captions == "hold":
            raise
        warn(f"target: held, and captions are not: {error}")
        return None


def _mean(rows: Tensor, names: Sequence[str], name: str) -> float:
    return rows[:, names.index(name)].contiguous().mean().item()
