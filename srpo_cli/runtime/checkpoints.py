"""Checkpoints that an interrupted run goes on from, bit for bit on one device.

``checkpoints/step-000020/`` holds ``transformer/`` in diffusers' layout (safetensors, a LoRA where one is trained),
``optimizer.pt`` (tensors only, read with ``weights_only=True``) and ``state.json``. It is written under another name
and renamed when whole.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.runtime.folder import disk_errors

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and the step after which it was written."""

    path: Path
    step: int

    @classmethod
    def of(cls, folder: Path, step: int) -> Checkpoint:
        """The place of a step's checkpoint in a run's ``checkpoints`` folder."""
        return cls(folder / f"step-{step:06d}", step)

    @property
    def transformer(self) -> Path:
        """The tuned weights, a folder that diffusers reads."""
        return self.path / "transformer"

    def state(self) -> dict[str, Any]:
        """What the run noted beside the tensors; SrpoError if the file cannot be read."""
        try:
            state = json.loads((self.path / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise self._damaged("state.json") from error
        if not isinstance(state, dict) or state.get("step") != self.step:
            raise self._damaged("state.json")
        return state

    def check_transformer(self) -> None:
        """SrpoError if the weights are not all there; their header says how long they must be."""
        files = list(self.transformer.glob("*.safetensors"))
        try:
            if not files:
                raise FileNotFoundError(self.transformer)
            for file in files:
                with safe_open(file, "pt"):
                    pass
        except (OSError, SafetensorError) as error:
            raise self._damaged("transformer") from error

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the optimizer; SrpoError if the file is damaged or of another model."""
        try:
            optimizer.load_state_dict(torch.load(self.path / "optimizer.pt", weights_only=True, map_location="cpu"))
            for parameter, moments in optimizer.state.items():
                for moment in moments.values():
                    if moment.dim() and moment.shape != parameter.shape:  # load_state_dict only counts
                        raise ValueError(f"shape {tuple(moment.shape)}")
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise self._damaged("optimizer.pt") from error

    def _damaged(self, what: str) -> SrpoError:
        earlier = [c for c in list_checkpoints(self.path.parent) if c.step < self.step]
        then = f"goes on from {earlier[-1].path.name}" if earlier else "starts over"
        return SrpoError(
            f"checkpoint {self.path} is damaged or foreign ({what}): remove it, and the resumed run {then}"
        )


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The whole checkpoints of a run's ``checkpoints`` folder, oldest first."""
    found = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((Checkpoint(path, int(match[1])) for path, match in found if match), key=lambda c: c.step)


def save_checkpoint(
    folder: Path,
    step: int,
    save_weights: Callable[[Path], None],
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Checkpoint:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep``.

    ``save_weights`` writes the model's trained weights to a folder that it makes.
    """
    checkpoint = Checkpoint.of(folder, step)
    path = checkpoint.path
    with disk_errors(folder):
        for left in folder.glob(".step-*.tmp"):  # by a process that was killed while it wrote or removed
            shutil.rmtree(left)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.mkdir()
            save_weights(temporary / "transformer")
            torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
            (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
            for written in (*temporary.rglob("*"), temporary):
                _sync(written)
        except BaseException as error:
            free = shutil.disk_usage(folder).free
            shutil.rmtree(temporary, ignore_errors=True)
            if isinstance(error, RuntimeError | SafetensorError):  # so torch and safetensors report a full disk
                raise SrpoError(
                    f"cannot write {path} ({str(error).splitlines()[0]}) with {free / 2**20:.0f} MiB free: "
                    "free some space, then resume the run"
                ) from error
            raise
        if path.exists():
            _remove(path)
        temporary.replace(path)
        _sync(folder)
        for old in list_checkpoints(folder)[:-keep]:
            _remove(old.path)
    return checkpoint


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves none that looks whole."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.old.tmp")))


def find_checkpoint(path: Path) -> Checkpoint:
    """The newest checkpoint of a run folder, or the one that ``path`` itself is."""
    match = _NAME.fullmatch(path.resolve().name)
    if match and (path / "state.json").is_file():
        return Checkpoint(path, int(match[1]))
    checkpoints = list_checkpoints(path / "checkpoints")
    if not checkpoints:
        raise UsageError(f"{path} holds no checkpoint: name a run folder or one of its checkpoints/step-* folders")
    return checkpoints[-1]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
