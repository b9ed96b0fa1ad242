"""An exponential moving average of the trained weights, in float32 whatever the weights are kept in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn


def _itself(parameter: Tensor) -> Tensor:
    return parameter


class WeightAverage:
    """``average = decay * average + (1 - decay) * weight`` after every update, begun at the weights as they are.

    Args:
        parameters: the trained weights, of any dtype; shards (DTensor) are averaged as shards.
        decay: share of the average that an update keeps, in [0, 1).
        master: a weight's float32 value, for weights that are only a rounding of it (``SplitAdamW.master``).
        device: where the averages are kept, None: with the weights. On the host they are pinned where there is CUDA,
            and pass through the weights' device, so that no update waits for it.
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
        self.averages = [self._keep(self._master(parameter).detach().float()) for parameter in self.parameters]
        """The averages, float32, in the parameters' order. On the host they are current after a synchronisation."""

    def _keep(self, value: Tensor) -> Tensor:
        """A copy of a tensor where averages are kept."""
        device = self._device or value.device
        if device.type == "cpu" and value.device.type == "cuda":
            return torch.empty_like(value, device=device, pin_memory=True).copy_(value, non_blocking=True)
        return value.to(device, copy=True)

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

        Nothing may train meanwhile.
        """
        held = [self._keep(parameter.detach()) for parameter in self.parameters]
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
