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
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.runtime.folder import disk_errors

TRANSFORMER, EMA, OPTIMIZER, ROLLOUTS = "transformer", "ema", "optimizer.pt", "rollouts.safetensors"
BEST = "best"
"""A run's relative link to the checkpoint that its guard found best; where links cannot be made, a text file of it."""
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

    def load_weights(self, kind: str, load: Callable[[dict[str, Tensor]], None]) -> None:
        """Give ``load`` all weights of ``TRANSFORMER`` or ``EMA`` by the transformer's names; SrpoError if they are
        damaged or not there."""
        try:
            tensors: dict[str, Tensor] = {}
            for file in sorted((self.path / kind).glob("*.safetensors")):
                tensors |= {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
            load(tensors)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise self._damaged(kind) from error

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
    protect: int | None = None,
) -> Checkpoint:
    """Write the checkpoint of ``step`` and remove all but the newest ``keep`` and that of step ``protect``.

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
            if old.step != protect:
                _remove(old.path)
    return checkpoint


def save_masters(folder: Path | None, model: ModelMixin, masters: Iterable[tuple[str, Tensor]]) -> None:
    """Write float32 weights to a new folder that diffusers reads.

    Args:
        folder: where; None: nothing is written, but every weight is asked for, as a rank has to that holds a part.
        model: whose weights they are, and whose configuration goes with them.
        masters: every weight by name.
    """
    if folder is None:
        for _ in masters:
            pass
        return
    model.save_config(folder)
    sizes = {name: parameter.numel() * torch.float32.itemsize for name, parameter in model.named_parameters()}
    save_shards(folder, sizes, masters, {"format": "pt"}, _FILE_BYTES)


def save_shards(
    folder: Path,
    sizes: dict[str, int],
    tensors: Iterable[tuple[str, Tensor]],
    headers: dict[str, str],
    limit: int | str,
) -> None:
    """Write a transformer's weights in the files that diffusers reads, each as soon as its last tensor has come.

    Args:
        folder: there already.
        sizes: bytes of every tensor by name.
        tensors: each once, in the order of ``sizes``; only what goes into one file is in host memory at a time.
        headers: metadata of every file.
        limit: bytes of a file, or as "10GB".
    """
    stem, suffix = SAFETENSORS_WEIGHTS_NAME.split(".")
    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern=f"{stem}{{suffix}}.{suffix}", max_shard_size=limit
    )
    begun: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors:
        file = split.tensor_to_filename[name]
        begun.setdefault(file, {})[name] = tensor.cpu().contiguous()
        if len(begun[file]) == len(split.filename_to_tensors[file]):
            save_file(begun.pop(file), folder / file, headers)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _remove(path: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves none that looks whole."""
    shutil.rmtree(path.rename(path.with_name(f".{path.name}.old.tmp")))


def link_best(run: Path, checkpoint: Checkpoint | None) -> None:
    """Point ``best`` of a run's folder to a checkpoint of it, or move it there, at once; None: remove it.

    It is a relative symbolic link. On a file system that has none it is a text file that holds the same path, which
    only a run's folder is looked up by: ``best`` itself cannot be named as a checkpoint there.
    """
    link, temporary = run / BEST, run / f".{BEST}.tmp"
    with disk_errors(run):
        if link.is_dir() and not link.is_symlink():  # the run was copied by what follows links
            shutil.rmtree(link)
        if checkpoint is None:
            link.unlink(missing_ok=True)
            return
        target = checkpoint.path.relative_to(run)
        temporary.unlink(missing_ok=True)  # of a process that was killed in here
        try:
            temporary.symlink_to(target, target_is_directory=True)
        except OSError:
            temporary.write_text(target.as_posix())
        temporary.replace(link)


def find_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint that ``path`` is, or that a run is known by: its best if there is one, else the newest."""
    return _checkpoint_at(path) or best_checkpoint(path) or newest_checkpoint(path)


def best_checkpoint(run: Path) -> Checkpoint | None:
    """The whole checkpoint that a run's ``best`` points to; None if it points to none, or there is none."""
    link = run / BEST
    return _checkpoint_at(run / link.read_text() if link.is_file() else link)


def newest_checkpoint(run: Path) -> Checkpoint:
    """The last checkpoint of a run, which it goes on from; UsageError if there is none."""
    checkpoints = list_checkpoints(run / "checkpoints")
    if not checkpoints:
        raise UsageError(f"{run} holds no checkpoint: name a run folder or one of its checkpoints/step-* folders")
    return checkpoints[-1]


def _checkpoint_at(path: Path) -> Checkpoint | None:
    """The whole checkpoint that a folder, or a link to one, is."""
    real = path.resolve()
    match = _NAME.fullmatch(real.name)
    if not match or not (real / "state.json").is_file():
        return None
    return Checkpoint(real if path.is_symlink() else path, int(match[1]))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
