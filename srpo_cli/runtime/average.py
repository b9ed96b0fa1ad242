"""An exponential moving average of the trained weights, in float32 whatever the weights are kept in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from srpo_cli.runtime.blocks import Shelf


def _itself(parameter: Tensor) -> Tensor:
    return parameter


class WeightAverage:
    """``average = decay * average + (1 - decay) * weight`` after every update, begun at the weights as they are.

    Args:
        parameters: the trained weights, of any dtype; shards (DTensor) are averaged as shards.
        decay: share of the average that an update keeps, in [0, 1).
        master: a weight's float32 value, for weights that are only a rounding of it (``SplitAdamW.master``).
        device: where the averages are kept, None: with the weights. "cpu", for weights that are no shards: in few
            allocations on the host, pinned where the weights are on CUDA; they pass through the weights' device, so
            that no update waits for it. SrpoError where the host has no room for them.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        decay: float,
        master: Callable[[Tensor], Tensor] = _itself,
        device: torch.device | str | None = None,
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}: should be in [0, 1)")
        self.parameters = list(parameters)
        self._lerp, self._master = get_ema_multi_avg_fn(decay), master
        self._device = torch.device(device) if device is not None else None
        self.averages = self._room()
        """The averages, float32, in the parameters' order. On the host they are current after a synchronisation."""
        for average, parameter in zip(self.averages, self.parameters, strict=True):
            average.copy_(self._master(parameter).detach().float(), non_blocking=True)

    def _room(self) -> list[Tensor]:
        """Room for the averages."""
        values = [parameter.detach() for parameter in self.parameters]
        if self._device is None or self._device.type != "cpu":
            return [torch.empty_like(value, dtype=torch.float32, device=self._device) for value in values]
        pinned = any(value.is_cuda for value in values)
        shelf = Shelf(torch.float32, sum(value.numel() for value in values), self._device, pinned)
        return [shelf.take(value.numel()).view(value.shape) for value in values]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the average."""
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            here = average.to(parameter.device, non_blocking=True)  # itself, where it is kept there
            self._lerp([here], [self._master(parameter).detach().float()], None)
            if here is not average:
                average.copy_(here, non_blocking=True)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters hold the averages, in their own dtype; afterwards what they held before, to the bit.

        Nothing may train meanwhile: what they held stays on their device, in the room that gradients have in training.
        """
        held = [parameter.detach().clone() for parameter in self.parameters]
        try:
            self._write(self.averages)
            yield
        finally:
            self._write(held)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value, non_blocking=True)

    def state_dict(self) -> dict[str, Any]:
        """The averages, not copied."""
        if any(parameter.is_cuda for parameter in self.parameters):
            torch.cuda.synchronize()
        return {"averages": self.averages}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a ``state_dict``; ValueError if it is of other weights."""
        given = state_dict["averages"]
        shapes, mine = ([tuple(tensor.shape) for tensor in tensors] for tensors in (given, self.averages))
        if shapes != mine:
            raise ValueError(f"the averages have shapes {shapes}, here they should be {mine}")
        for average, value in zip(self.averages, given, strict=True):
            average.copy_(value)
