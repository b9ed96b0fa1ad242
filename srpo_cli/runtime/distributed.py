"""Several processes that train one model together, as torchrun starts them; one process needs none of this.

Each rank takes its share of a step's prompts, gradients are averaged, and rank 0 alone writes, measures and talks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from srpo_cli.errors import SrpoError, UsageError

T = TypeVar("T")

_CPU = torch.device("cpu")
_PATIENCE = timedelta(hours=12)  # while rank 0 measures, the others wait; if it dies, torchrun ends them


@dataclass(frozen=True)
class Ranks:
    """The processes of a run, and which of them this one is. Collective methods are called by all in one order."""

    rank: int = 0
    size: int = 1
    device: torch.device = _CPU

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes, measures and talks."""
        return self.rank == 0

    def turn(self, step: int) -> int:
        """A number that no other step and no other rank has; in one process the step itself."""
        return step * self.size + self.rank

    def mean(self, *values: float) -> list[float]:
        """Each value's mean over the ranks."""
        if self.size == 1:
            return list(values)
        return (self._sum(torch.tensor(values, dtype=torch.float64)) / self.size).tolist()

    def average_gradients(self, parameters: Sequence[nn.Parameter], loss: float) -> float:
        """Replace all gradients by their means over the ranks, in one exchange; returns the mean of ``loss``."""
        if self.size == 1:
            return loss
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), gradients[0].new_tensor([loss])])
        *means, mean_loss = (self._sum(flat) / self.size).split([*(g.numel() for g in gradients), 1])
        for gradient, mean in zip(gradients, means, strict=True):
            gradient.copy_(mean.view_as(gradient))
        return mean_loss.item()

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return max(self._gather(number))

    def from_rank_0(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self._company():
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        self._gather(None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work in which any rank may meet a user's mistake: if one does, all end, and rank 0 says why."""
        error = None
        try:
            yield
        except SrpoError as caught:
            error = caught
        errors = self._gather(error and (str(error), error.exit_code))
        first = next((rank for rank, found in enumerate(errors) if found), None)
        if first is None:
            return
        if error is None:
            message, exit_code = errors[first]
            error = SrpoError(f"rank {first}: {message}")
            error.exit_code = exit_code
        raise self.common(error)

    def common(self, error: SrpoError) -> BaseException:
        """What to raise for an error that all ranks meet alike: rank 0 tells it, the others leave silently."""
        return error if self.leads else SystemExit(error.exit_code)

    def _gather(self, value: T) -> list[T]:
        if self.size == 1:
            return [value]
        values = [value] * self.size
        with self._company():
            dist.all_gather_object(values, value)
        return values

    def _sum(self, values: Tensor) -> Tensor:
        values = values.to(self.device)
        with self._company():
            dist.all_reduce(values)
        return values

    @contextmanager
    def _company(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # torch.distributed's errors are of this kind
            raise self.common(SrpoError("another process of this run has ended; what it said is above")) from error


@contextmanager
def join_ranks(device: torch.device) -> Iterator[Ranks]:
    """The ranks that torchrun's environment speaks of, or the one process that there is."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks(device=device)
        return
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UsageError(f"WORLD_SIZE is {size} and {name} is not set: start with torchrun, or unset WORLD_SIZE")
    if device.type != "cpu":
        local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.accelerator.device_count()
        if local >= count:
            raise UsageError(f"local rank {local} has no device, {count} are here: start at most {count} processes")
        torch.accelerator.set_device_index(local)
    dist.init_process_group(dist.get_default_backend_for_device(device), timeout=_PATIENCE)
    yield Ranks(dist.get_rank(), size, device)
    dist.destroy_process_group()  # not after an error: the other ranks may be past answering
