"""What a run that was stopped is gone on with, and what keeps it from being the same run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from srpo_cli.config.schema import TrainConfig
from srpo_cli.errors import UsageError
from srpo_cli.runtime.checkpoints import Checkpoint, list_checkpoints, newest_checkpoint
from srpo_cli.runtime.distributed import Ranks
from srpo_cli.runtime.folder import RunFolder, config_digest, environment

_EXACT = ("srpo-cli", "torch", "torchvision", "diffusers", "transformers", "open_clip_torch")


@dataclass(frozen=True)
class Resumed:
    """Where a run stands: its newest checkpoint, None before the first; the rollouts of a step over all processes."""

    checkpoint: Checkpoint | None
    batch: int


def resume_from(folder: RunFolder, config: TrainConfig, ranks: Ranks) -> Resumed:
    """What to go on from.

    Another number of processes shares out the same rollouts: equal to rounding, not to the bit. Refuses what could not
    be exact otherwise: other library versions, another kind of device, or a configuration that is not the
    checkpoint's.
    """
    before, now = folder.environment(), environment()["packages"]
    for name in _EXACT:
        if (version := before["packages"].get(name)) != now[name]:
            raise UsageError(
                f"{folder.path} was begun with {name} {version}, here is {now[name]}: going on would not be exact; "
                f"install {name}=={version} or start a new run"
            )
    if (device := before.get("device")) != ranks.device.type:
        raise UsageError(
            f"{folder.path} was begun on {device}, here is {ranks.device.type}: going on would not be exact; "
            "go on there or start a new run"
        )
    batch = before.get("batch", before.get("processes", 1) * config.train.batch_size)
    if batch < ranks.size:
        raise UsageError(
            f"a step of {folder.path} has {batch} rollout(s), here are {ranks.size} processes: start {batch} at most"
        )
    if not list_checkpoints(folder.checkpoints):
        return Resumed(None, batch)
    checkpoint = newest_checkpoint(folder.path)
    if checkpoint.state().get("config") != digest(config):
        raise UsageError(f"{checkpoint.path} belongs to another configuration than {folder.path}'s: start a new run")
    if config.train.steps < checkpoint.step:
        raise UsageError(
            f"{folder.path} has done {checkpoint.step} steps already: --steps {config.train.steps} is fewer; give more"
        )
    checkpoint.check_transformer()
    return Resumed(checkpoint, batch)


def check_layout(checkpoint: Checkpoint, state: dict[str, Any], layout: str) -> None:
    """UsageError where the optimizer was kept in another form than the plan of now keeps it in."""
    if (before := state.get("layout", layout)) != layout:
        plans = {"adamw": "replicated or sharded", "halves": "resident or streamed"}
        raise UsageError(
            f"{checkpoint.path} was written under plan {plans[before]}, and what fits here is {plans[layout]}: go on "
            "on a machine like the first, or start a new run with --set model.weights="
            f"{checkpoint.transformer}"
        )


FREE = {
    "description": True,
    "train": {"steps"},
    "memory": {"plan", "micro_batch", "shard"},
    "prompts": {"cache"},
    "evaluation": True,
    "samples": True,
    "checkpoint": True,
}
"""What no step depends on: how long a run is, what it writes and where it keeps it."""


def digest(config: TrainConfig) -> str:
    """Digest of all that a step depends on."""
    return config_digest(config.model_dump_json(exclude=FREE))
