"""Several processes that train one model together, as torchrun starts them; one process needs none of this.

Each rank takes its share of a step's prompts, gradients are averaged, and rank 0 alone writes, measures and talks.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from srpo_cli.errors import LostRankError, SrpoError, UsageError, one_line
from srpo_cli.runtime.folder import environment
from srpo_cli.runtime.launch import LAUNCHED

T = TypeVar("T")

_CPU = torch.device("cpu")
_BUCKET = 2**26  # elements that travel together: 256 MB in float32
_PATIENCE = timedelta(hours=12)  # while rank 0 measures, the others wait; if it dies, torchrun ends them


class _SilentExit(SystemExit):
    """How a rank leaves for an error that rank 0 tells."""


class _LonelyError(SrpoError):
    """Another rank has ended: nobody is left to agree with."""

    agreed = True


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

    @property
    def local_size(self) -> int:
        """Processes of the run on this machine."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    @property
    def local_rank(self) -> int:
        """Which of the processes on this machine this one is."""
        return int(os.environ.get("LOCAL_RANK", self.rank)) if self.size > 1 else 0

    def share(self, count: int) -> range:
        """Which of ``count`` things this rank does: the same number as the others, or one more."""
        return range(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def average(self, tensors: Sequence[Tensor], values: Tensor) -> Tensor:
        """Replace ``tensors`` by their means over the ranks, in few exchanges; returns the means of ``values`` (N,)."""
        if self.size == 1:
            return values
        means = values.clone()
        for bucket in _buckets([means, *tensors]):
            flat = self._sum(torch.cat([tensor.flatten() for tensor in bucket])) / self.size
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, mean in zip(bucket, parts, strict=True):
                tensor.copy_(mean.view_as(tensor))
        return means

    def largest(self, number: int) -> int:
        """The largest of the ranks' numbers."""
        return max(self.gather(number))

    def from_rank_0(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        if self.size == 1:
            return value
        box = [value]
        with self._company():
            dist.broadcast_object_list(box, src=0, device=self.device)
        return box[0]

    def check_packages(self, packages: Mapping[str, str | None]) -> None:
        """Refuse ranks that compute with other versions than rank 0, in one line that it tells."""
        versions = self.gather(packages)
        for rank, theirs in enumerate(versions):
            for name, version in versions[0].items():
                if theirs.get(name) != version:
                    what = f"rank {rank} has {name} {theirs.get(name)}, rank 0 has {version}"
                    raise self.common(UsageError(f"{what}: install the same versions everywhere"))

    def wait(self) -> None:
        """Go on when all ranks have come here."""
        self.gather(None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """Work in which any rank may meet a user's mistake: if one does, all end, and rank 0 says why."""
        error = None
        try:
            yield
        except SrpoError as caught:
            if caught.agreed:  # in work of the same kind within this one
                raise
            error = caught
        errors = self.gather(error and (str(error), error.exit_code))
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
        error.agreed = True
        return error if self.leads else _SilentExit(error.exit_code)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, on every rank, in their order."""
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
            if LAUNCHED in os.environ:
                raise LostRankError("another process of this run has ended") from error
            lost = _LonelyError("another process of this run has ended; what it said is above")
            raise lost if self.leads else SystemExit(lost.exit_code) from error


ALONE = Ranks()
"""The one process that there is."""


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one dtype in groups of at most ``_BUCKET`` elements, or of one."""
    bucket: list[Tensor] = []
    elements = 0
    for tensor in tensors:
        if bucket and (elements + tensor.numel() > _BUCKET or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket, elements = [], 0
        bucket.append(tensor)
        elements += tensor.numel()
    if bucket:
        yield bucket


@contextmanager
def join_ranks(device: torch.device, exchange: str | None = None) -> Iterator[Ranks]:
    """The ranks that torchrun's environment speaks of, or the one process that there is.

    Args:
        device: what this process computes on; among several accelerators its own becomes the current one.
        exchange: where what ranks tell each other is; None: on ``device``. The CPU leaves accelerators alone.

    Raises UsageError where ranks are fewer than said, have no accelerator, or have other packages than rank 0.
    """
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
    exchange = torch.device(exchange or device)
    with _ended_by_signals():
        try:
            dist.init_process_group(dist.get_default_backend_for_device(exchange), timeout=_PATIENCE)
        except dist.DistError as error:
            place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            raise SrpoError(
                f"rank {os.environ['RANK']} cannot reach the others at {place} ({one_line(error)})"
            ) from error
    ranks = Ranks(dist.get_rank(), size, exchange)
    try:
        ranks.check_packages(environment()["packages"])
        yield ranks
    except (SrpoError, _SilentExit) as error:
        # Where all ranks leave together, one that kept its connections would now and then be aborted by them at its
        # exit. Not where one leaves alone, or has lost another: who is left may be past answering.
        if isinstance(error, _SilentExit) or (error.agreed and not isinstance(error, _LonelyError)):
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """While ranks wait for each other there is nothing to finish, and a handler in Python would not be called."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
