"""Checkpoints that an interrupted run goes on from, bit for bit on one device.

``checkpoints/step-000020/`` holds ``transformer/`` in diffusers' layout (safetensors; the float32 masters, or the LoRA
that is trained), ``ema/`` in the same layout where weights are averaged, ``optimizer.pt`` (tensors only, read with
``weights_only=True``), ``rollouts.safetensors`` where rollouts are replayed, and ``state.json``. It is written under
another name and renamed when whole. Nothing in it depends on how many processes wrote it.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.runtime.folder import disk_errors

TRANSFORMER, EMA, OPTIMIZER, ROLLOUTS = "transformer", "ema", "optimizer.pt", "rollouts.safetensors"
_FILE_BYTES = 10 * 10**9
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

    def load_optimizer(self, load: Callable[[dict[str, Any]], None]) -> None:
        """Give ``load`` the optimizer's state; SrpoError if the file is damaged or of another model."""
        try:
            load(torch.load(self.path / OPTIMIZER, weights_only=True, map_location="cpu", mmap=True))
        except (OSError, RuntimeError, ValueError, TypeError, KeyError, EOFError, pickle.UnpicklingError) as error:
            raise self._damaged(OPTIMIZER) from error

    def load_average(self, load: Callable[[dict[str, Tensor]], None]) -> None:
        """Give ``load`` the averaged weights by the transformer's names; SrpoError if they are damaged or not there."""
        try:
            tensors: dict[str, Tensor] = {}
            for file in sorted((self.path / EMA).glob("*.safetensors")):
                tensors |= {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
            load(tensors)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise self._damaged(EMA) from error

    def rollouts(self, device: torch.device) -> dict[str, Tensor]:
        """The rollouts that are replayed; SrpoError if the file cannot be read."""
        try:
            return load_file(self.path / ROLLOUTS, device=str(device))
        except (OSError, SafetensorError) as error:
            raise self._damaged(ROLLOUTS) from error

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
    write: Callable[[Path], None],
    state: dict[str, Any],
    keep: int,
) -> Checkpoint:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep``.

    ``write`` puts the tensors into the folder that it is given.
    """
    checkpoint = Checkpoint.of(folder, step)
    path = checkpoint.path
    with disk_errors(folder):
        for left in folder.glob(".step-*.tmp"):  # by a process that was killed while it wrote or removed
            shutil.rmtree(left)
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            temporary.mkdir()
            write(temporary)
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


def save_masters(folder: Path | None, model: ModelMixin, masters: Iterable[tuple[str, Tensor]]) -> None:
    """Write weights to a new folder that diffusers reads, a file of about 10 GB at a time.

    Args:
        folder: where; None: nothing is written, but every weight is asked for, as a rank has to that holds a part.
        model: whose configuration goes with them.
        masters: every weight by name; only what goes into one file is in host memory at a time.
    """
    written: list[tuple[Path, list[str]]] = []
    part: dict[str, Tensor] = {}
    if folder:
        model.save_config(folder)

    def close() -> None:
        path = folder / f"part-{len(written)}.safetensors"
        save_file(part, path, {"format": "pt"})
        written.append((path, list(part)))
        part.clear()

    size = total = 0
    for name, master in masters:
        if not folder:
            continue
        bytes_here = master.numel() * master.element_size()
        if part and size + bytes_here > _FILE_BYTES:
            close()
            size = 0
        part[name] = master.cpu().contiguous()
        size, total = size + bytes_here, total + bytes_here
    if folder:
        close()
        _name_parts(folder, written, total)


def _name_parts(folder: Path, written: list[tuple[Path, list[str]]], total: int) -> None:
    """Give the files of one set of weights the names that diffusers looks for."""
    if len(written) == 1:
        written[0][0].replace(folder / SAFETENSORS_WEIGHTS_NAME)
        return
    stem, suffix = SAFETENSORS_WEIGHTS_NAME.split(".")
    places = {}
    for number, (path, names) in enumerate(written, 1):
        name = f"{stem}-{number:05d}-of-{len(written):05d}.{suffix}"
        path.replace(folder / name)
        places |= dict.fromkeys(names, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


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
