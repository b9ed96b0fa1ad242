"""What a name on the command line is: a base model, a run, a checkpoint, tuned weights or a LoRA. Loads nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from srpo_cli.config.load import load_train_config
from srpo_cli.errors import MissingError, UsageError
from srpo_cli.registry import MODELS
from srpo_cli.runtime.folder import CONFIG

_WEIGHTS = ("transformer", "ema")  # folders of a checkpoint


@dataclass(frozen=True)
class Source:
    """A model to sample from: its base and what is loaded in place of, or on top of, the base's transformer.

    ``beneath`` is a tuned transformer that ``weights``, a LoRA, was trained on.
    """

    base: str
    weights: Path | None = None
    beneath: Path | None = None

    @property
    def tuned(self) -> tuple[Path, ...]:
        """All that is put into the base, in order: what ``load_flux`` takes as ``weights``."""
        return tuple(path for path in (self.beneath, self.weights) if path is not None)

    @classmethod
    def find(cls, name: str, base: Callable[[], str]) -> Source:
        """Read a name as a run folder, one of its checkpoints, tuned weights or a LoRA, or a base model.

        Of a run its best checkpoint is taken, the newest where no best one is known; of a checkpoint the averaged
        weights, where there are any. Weights are named by their checkpoint's own folder, since a running training
        moves the link ``best``. ``base`` is asked what tuned weights or a LoRA belong to, and for nothing else.
        """
        path = Path(name)
        if _is_checkpoint(path.resolve().parent) and path.name in _WEIGHTS:
            return cls._of_run(path.resolve().parent.parent.parent, path.resolve())
        if (path / CONFIG).is_file():
            from srpo_cli.runtime.checkpoints import find_checkpoint  # imports torch

            return cls._of_run(path, _weights_in(find_checkpoint(path).path))
        if _is_checkpoint(path):
            return cls._of_run(path.resolve().parent.parent, _weights_in(path.resolve() if path.is_symlink() else path))
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

    @classmethod
    def _of_run(cls, run: Path, weights: Path) -> Source:
        if not (run / CONFIG).is_file():
            raise MissingError(f"{run} has no {CONFIG}, so the base of its checkpoint is unknown: name the run folder")
        config = load_train_config(run / CONFIG).config
        start = config.model.weights
        trained_on = start if config.train.mode == "lora" and start and not _is_lora(start) else None
        return cls(config.model.name, weights, trained_on)


def is_model(path: Path) -> bool:
    """Whether a folder is one that can be drawn from: a run, a checkpoint, a pipeline, or weights."""
    return (
        (path / CONFIG).is_file()
        or _is_checkpoint(path)
        or (path / "model_index.json").is_file()
        or any(path.glob("*.safetensors"))
    )


def check_base(name: str) -> None:
    """UsageError unless ``name`` can be a base: a model by name or of the Hub, a pipeline's folder, a transformer."""
    path = Path(name)
    is_transformer = path.is_file() and path.suffix == ".safetensors"
    if path.exists() and not is_transformer and not (path / "model_index.json").is_file():
        raise UsageError(f"--base {name} is no base model: name a model, or the folder of a pipeline")
    Source.find(name, lambda: name)


def _is_checkpoint(path: Path) -> bool:
    return (path / "transformer").is_dir() and (path / "state.json").is_file()


def _weights_in(checkpoint: Path) -> Path:
    """The weights that a checkpoint is for: their average, where one was kept."""
    return next(path for path in (checkpoint / "ema", checkpoint / "transformer") if path.is_dir())


def _is_lora(path: Path) -> bool:
    """Whether a file or folder of weights is a LoRA; unreadable ones are left for whoever loads them."""
    from safetensors import SafetensorError, safe_open

    if path.is_dir():
        return (path / "pytorch_lora_weights.safetensors").is_file()
    try:
        with safe_open(path, "np") as tensors:
            return any("lora" in name for name in list(tensors.keys()))
    except (OSError, SafetensorError):
        return False
