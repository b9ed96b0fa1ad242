"""What a checkpoint holds of a run's weights: the trained ones, their averages, and the optimizer's state."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srpo_cli.config.schema import TrainConfig
from srpo_cli.models.flux import Flux
from srpo_cli.recipes.resume import check_layout
from srpo_cli.runtime.average import WeightAverage
from srpo_cli.runtime.checkpoints import EMA, OPTIMIZER, TRANSFORMER, Checkpoint, save_masters
from srpo_cli.runtime.trained import Trained


@dataclass(frozen=True)
class Weights:
    """The weights of a run, and where they lie in its checkpoints."""

    config: TrainConfig
    model: Flux
    trained: Trained
    average: WeightAverage | None

    def write(self, folder: Path | None) -> None:
        """Into a checkpoint's folder; a rank without one only gives its part."""
        if self.config.train.mode == "full":
            self._write_masters(folder)
        elif folder:  # every rank has the whole LoRA
            self.model.save_weights(folder / TRANSFORMER)
            if self.average:
                with self.average.applied():
                    self.model.save_weights(folder / EMA)
        state = self.trained.optimizer_state(keep=folder is not None)
        if folder:
            torch.save(state, folder / OPTIMIZER)

    def _write_masters(self, folder: Path | None) -> None:
        save_masters(folder and folder / TRANSFORMER, self.model.transformer, self.trained.masters())
        if self.average:
            averages = zip(self.trained.named, self.average.averages, strict=True)
            whole = ((name, self.trained.whole(average)) for name, average in averages)
            save_masters(folder and folder / EMA, self.model.transformer, whole)

    def restore(self, checkpoint: Checkpoint, state: dict[str, Any]) -> None:
        """Optimizer and averages, after the model itself was loaded from the checkpoint.

        UsageError where the optimizer was kept in another form, as the checkpoint's ``state`` tells.
        """
        check_layout(checkpoint, state, self.trained.layout)
        checkpoint.load_optimizer(self.trained.load_optimizer_state)
        if self.average:
            checkpoint.load_weights(EMA, self._load_average)

    def _load_average(self, tensors: dict[str, Tensor]) -> None:
        found = _by_name(tensors, self.trained.named)
        self.average.load_state_dict({"averages": self.trained.parts(found)})

    def put_back(self, checkpoint: Checkpoint) -> None:
        """Those of an earlier checkpoint, averaged ones where there are any, in the place of the model's own.

        To show them, at the end of a run: masters and averages stay what they are.
        """
        checkpoint.load_weights(EMA if self.average else TRANSFORMER, self._put_back)

    @torch.no_grad()
    def _put_back(self, tensors: dict[str, Tensor]) -> None:
        parameters = self.model.named_trainable_parameters()
        for parameter, value in zip(parameters.values(), _by_name(tensors, parameters), strict=True):
            parameter.copy_(value)


def _by_name(tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    """The tensors of a file of weights in the order of the model's ``names``, which for a LoRA hold an adapter's."""
    return [tensors[re.sub(r"(\.lora_[AB])\.\w+\.", r"\1.", name)] for name in names]
