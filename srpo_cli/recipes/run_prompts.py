"""Which prompts a training run is about: what it trains on, measures by, and asks of the untrained model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.config.schema import TrainConfig
from srpo_cli.recipes.guard import CALIBRATION, PANEL_PROMPTS
from srpo_cli.recipes.parts import Prompts
from srpo_cli.recipes.pictures import PictureSource


class RunPrompts:
    """All of a run's prompts are known ahead, so that they can be encoded before the model is loaded.

    Args:
        config: of the run.
        prompts: to train on, and to measure by.
        pictures: given ones that stand for rollouts, with captions of their own; None where the model draws them.
        batch: rollouts of a step, over all processes.
        watched: untrained pictures that the guard is calibrated by; 0 without a guard.
    """

    def __init__(
        self, config: TrainConfig, prompts: Prompts, pictures: PictureSource | None, batch: int, watched: int
    ) -> None:
        self.config, self.pictures, self.batch, self.watched = config, pictures, batch, watched
        self.train, self.held_out, self.in_order = prompts.train, prompts.held_out, prompts.in_order
        self._prompts = prompts
        with_target = config.algorithm.target is not None
        self.calibration = prompts.batch(range(CALIBRATION if with_target else watched))
        """What the untrained model draws, to set target and guard by."""
        self.panel = prompts.held_out[:PANEL_PROMPTS] if watched else []
        """Held-out prompts that the guard looks at again and again."""

    def of(self, numbers: Sequence[int]) -> list[str]:
        """The prompts of the rollouts with these numbers: captions where given pictures stand for them.

        Rollouts of a group have one prompt.
        """
        if self.pictures:
            return [self.pictures.caption(number) for number in numbers]
        return self._prompts.batch([number // self.config.algorithm.group for number in numbers])

    @property
    def trained_on(self) -> Iterator[str]:
        """The prompt of every rollout in order."""
        for number in range(self.config.train.steps * self.batch):
            yield from self.of([number])

    @cached_property
    def judged(self) -> list[str]:
        """Every prompt whose pictures the reward is asked about in training, once."""
        return list(dict.fromkeys([*self.trained_on, *self.calibration, *self.panel]))

    @property
    def asks(self) -> bool:
        """Whether the untrained model is asked for the positive word."""
        return self.config.algorithm.target_asks or self.watched > 0

    @property
    def encoded(self) -> Iterator[str]:
        """Every prompt that the model is asked for, some of them several times."""
        yield from self.trained_on
        yield from self.held_out
        yield from self.calibration
        if self.asks:
            words = ControlWords(**self.config.control_words.model_dump())
            yield from words.asked(self.calibration)
            yield from words.asked(self.panel)
