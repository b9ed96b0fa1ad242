"""What every reward is: pictures and prompts in, one number per picture out, higher is better."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from srpo_cli.errors import UsageError
from srpo_cli.rewards.preprocess import Images, Mode, Preprocess


class Reward(ABC):
    """A frozen judge of pictures. A plug-in subclasses this and implements :meth:`__call__`; the rest has defaults.

    Attributes:
        name: what the user, messages and logs call it.
        unit: what one number of it is, for instance "cosine".
        reads_text: whether the prompt matters; a reward that does not read it ignores it.
        differentiable: whether its pixels have a gradient; only then can it train Direct-Align.
        thread_safe: whether two threads may call it at once.
        weights: which weights these are, as recorded with every score: repository and revision, or sha256.
        preprocess: how pictures come to the size that its tower takes; None where the reward takes them as they are.
        modes: the preprocessings that it can be asked for. The first is the reference, the one that the published
            numbers used; the last is the one for training, on tensors and antialiased.
    """

    name: str = "reward"
    unit: str = ""
    reads_text: bool = True
    differentiable: bool = True
    thread_safe: bool = False
    weights: str = ""
    preprocess: Preprocess | None = None
    modes: tuple[Mode, ...] = ()

    @abstractmethod
    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        """Reward of picture i for prompt i.

        Args:
            images: (B, 3, H, W) in [0, 1], or B pictures (3, H, W), each of its own size.
            prompts: B texts.

        Returns (B,) float32; differentiable in ``images`` where ``differentiable`` says so.
        """

    def scores(self, images: Images, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Rewards of the same pictures for several lists of B texts, one (B,) per list.

        A reward that can share work between the lists, most often the vision tower's, overrides this.
        """
        return tuple(self(images, column) for column in texts)

    def prepare(self, texts: Sequence[str]) -> None:  # noqa: B027 - most rewards have nothing to prepare
        """Told which texts it will be asked for; a reward that can read them once for all overrides this."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights behind it, none where they live elsewhere."""
        for module in vars(self).values():
            if isinstance(module, nn.Module):
                yield from module.parameters()

    @property
    def tells_prompts(self) -> bool:
        """Whether a picture may get different rewards for different prompts."""
        return self.reads_text

    @property
    def device(self) -> torch.device:
        """Where its weights are; the CPU for a reward without any."""
        return next((parameter.device for parameter in self.parameters()), torch.device("cpu"))

    def via(self, mode: str | None) -> Self:
        """The same reward, weights shared, behind another of its ``modes``; None leaves it as it is.

        "reference" and "training" stand for the first and the last of them.
        """
        if mode is None or (not self.modes and mode in ("reference", "training")):
            return self
        chosen = {"reference": self.modes[:1], "training": self.modes[-1:]}.get(mode, (mode,))
        if not self.modes or chosen[0] not in self.modes:
            known = ", ".join(self.modes) or "it takes pictures as they are"
            raise UsageError(f"{self.name} has no preprocessing {mode!r}: choose one of its own ({known})")
        twin = copy.copy(self)
        twin.preprocess = replace(self.preprocess, mode=chosen[0])
        return twin
