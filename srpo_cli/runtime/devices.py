"""Which device a run uses, and how its arithmetic is set up there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def best_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def has_accelerator() -> bool:
    """Whether anything but the CPU is here."""
    return best_device().type != "cpu"


def arithmetic(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Compute in ``dtype`` on an accelerator while the weights stay in float32; the CPU computes in float32."""
    if device.type == "cpu" or dtype is torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)
