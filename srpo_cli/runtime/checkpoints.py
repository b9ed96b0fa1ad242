"""Checkpoints that an interrupted run goes on from, bit for bit on one device.

``checkpoints/step-000020/`` holds ``transformer/`` in diffusers' layout (safetensors), ``optimizer.pt`` (tensors
only, read with ``weights_only=True``) and ``state.json``. It is written under another name and renamed when whole.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.runtime.folder import disk_errors

_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder and the step after which it was written."""

    path: Path
    step: int

    @property
    def transformer(self) -> Path:
        """The tuned weights, a folder that diffusers reads."""
        return self.path / "transformer"

    def state(self) -> dict[str, Any]:
        """What the run noted beside the tensors; SrpoError if the file cannot be read."""
        try:
            return json.loads((self.path / "state.json").read_text())
        except (OSError, ValueError) as error:
            raise SrpoError(f"checkpoint {self.path} is damaged (state.json): resume from an earlier one") from error

    def load_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Restore the optimizer; SrpoError if the file is damaged or of another model."""
        file = self.path / "optimizer.pt"
        try:
            optimizer.load_state_dict(torch.load(file, weights_only=True, map_location="cpu"))
        except (OSError, RuntimeError, ValueError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise SrpoError(f"checkpoint {self.path} is damaged (optimizer.pt): resume from an earlier one") from error


def list_checkpoints(folder: Path) -> list[Checkpoint]:
    """The whole checkpoints of a run's ``checkpoints`` folder, oldest first."""
    found = [(path, _NAME.fullmatch(path.name)) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted((Checkpoint(path, int(match[1])) for path, match in found if match), key=lambda c: c.step)


def save_checkpoint(
    folder: Path,
    step: int,
    transformer: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Checkpoint:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep``."""
    path = folder / f"step-{step:06d}"
    temporary = folder / f".{path.name}.tmp"
    with disk_errors(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            transformer.save_pretrained(temporary / "transformer")
            torch.save(optimizer.state_dict(), temporary / "optimizer.pt")
        except RuntimeError as error:  # torch and safetensors report a full disk this way
            shutil.rmtree(temporary, ignore_errors=True)
            raise SrpoError(f"cannot write {path} ({str(error).splitlines()[0]}): is the disk full?") from error
        (temporary / "state.json").write_text(json.dumps({"step": step, **state}, indent=2) + "\n")
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        shutil.rmtree(path, ignore_errors=True)
        temporary.replace(path)
        _sync(folder)
        for old in list_checkpoints(folder)[:-keep]:
            shutil.rmtree(old.path)
    return Checkpoint(path, step)


def find_checkpoint(path: Path) -> Checkpoint:
    """The newest checkpoint of a run folder, or the one that ``path`` itself is."""
    if match := _NAME.fullmatch(path.resolve().name):
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
