"""What a name on the command line is: a base model, a run, a checkpoint, tuned weights or a LoRA. Loads nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from srpo_cli.config.load import load_train_config
from srpo_cli.errors import MissingError, UsageError
from srpo_cli.registry import MODELS
from srpo_cli.runtime.folder import CONFIG


@dataclass(frozen=True)
class Source:
    """A model to sample from: its base and what is loaded in place of, or on top of, the base's transformer."""

    base: str
    weights: Path | None = None

    @classmethod
    def find(cls, name: str, base: Callable[[], str]) -> Source:
        """Read a name as a run folder, one of its checkpoints, tuned weights or a LoRA, or a base model.

        ``base`` is asked what tuned weights or a LoRA belong to, and for nothing else.
        """
        path = Path(name)
        if _is_checkpoint(path.resolve().parent) and path.resolve().name == "transformer":
            path = path.resolve().parent
        if (path / CONFIG).is_file():
            from srpo_cli.runtime.checkpoints import find_checkpoint  # imports torch

            return cls(_base_of(path), find_checkpoint(path).transformer)
        if _is_checkpoint(path):
            return cls(_base_of(path.resolve().parent.parent), path / "transformer")
        if (path / "model_index.json").is_file():
            return cls(name)
        if path.is_file() or (path.is_dir() and any(path.glob("*.safetensors"))):
            return cls(base(), path)
        if path.is_dir():
            raise UsageError(
                f"{name} is no run, checkpoint, pipeline, transformer or LoRA: name one of these, or a model"
            )
        if path.suffix == ".safetensors" or (len(path.parts) > 1 and path.parent.is_dir()):
            raise UsageError(f"{name} does not exist: name a run, checkpoint, weights or LoRA that does, or a model")
        MODELS.find(name)  # refuses an unknown name with the nearest known one
        return cls(name)


def check_base(name: str) -> None:
    """UsageError unless ``name`` can be a base: a model by name, of the Hub, or a pipeline's folder."""
    path = Path(name)
    if path.exists() and not (path / "model_index.json").is_file():
        raise UsageError(f"--base {name} is no base model: name a model, or the folder of a pipeline")
    Source.find(name, lambda: name)


def _is_checkpoint(path: Path) -> bool:
    return (path / "transformer").is_dir() and (path / "state.json").is_file()


def _base_of(run: Path) -> str:
    if not (run / CONFIG).is_file():
        raise MissingError(f"{run} has no {CONFIG}, so the base of its checkpoint is unknown: name the run folder")
    return load_train_config(run / CONFIG).config.model.name
