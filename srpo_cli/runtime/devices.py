"""Which device a run uses, and how its arithmetic is set up there."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch is slow to import, and has_accelerator often does without it
    import torch

_SYSTEM, _DEVICES = Path("/sys/bus"), Path("/dev")
_PCI_CLASSES = ("0x03", "0x12")  # display controllers and processing accelerators
_DEVICE_FILES = ("nvidia*", "nvhost*", "nvmap", "kfd", "dri", "dxg", "accel")  # what is not on PCI, or in a sandbox


def best_device() -> torch.device:
    """The accelerator of this process, or the CPU."""
    import torch

    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


def has_accelerator() -> bool:
    """Whether anything but the CPU is here; torch is only asked where the machine may have one."""
    return _may_have_accelerator() and best_device().type != "cpu"


def _may_have_accelerator() -> bool:
    """False only where Linux says for certain that there is none."""
    if sys.platform != "linux" or not _SYSTEM.is_dir():
        return True
    try:
        on_pci = [path.read_text() for path in _SYSTEM.glob("pci/devices/*/class")]
    except OSError:
        return True
    return any(kind.startswith(_PCI_CLASSES) for kind in on_pci) or any(
        any(_DEVICES.glob(pattern)) for pattern in _DEVICE_FILES
    )


def arithmetic(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[object]:
    """Compute in ``dtype`` on an accelerator while the weights stay in float32; the CPU computes in float32."""
    import torch

    if device.type == "cpu" or dtype is torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype)
