"""How AdamW's two moments are kept between steps: in float32, in bfloat16, or in 8 bits.

A form stores the moments of many parameters in flat tensors, each parameter from an element number that ALIGN divides,
and hands them out as float32. Whatever is rounded, is rounded so that no update grows by it.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from srpo_cli.errors import MissingError

MomentsForm = Literal["float32", "bfloat16", "8bit"]
ALIGN = 256
"""Elements that share a scale in 8 bits, as in bitsandbytes' own optimizers."""

_FIRST, _SECOND = "exp_avg", "exp_avg_sq"  # torch.optim's names


class Moments(Protocol):
    """One way to keep moments; ``layout`` says each stored tensor's dtype and how many elements share an entry."""

    layout: dict[str, tuple[torch.dtype, int]]

    def load(self, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The first and second moments, float32 and flat, to be updated in place."""

    def store(self, stored: dict[str, Tensor], first: Tensor, second: Tensor, seed: int) -> None:
        """Keep the updated moments, which may be overwritten; the same ``seed`` rounds the same way."""


class _Float32:
    layout: ClassVar = {_FIRST: (torch.float32, 1), _SECOND: (torch.float32, 1)}

    def load(self, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return stored[_FIRST], stored[_SECOND]

    def store(self, stored: dict[str, Tensor], first: Tensor, second: Tensor, seed: int) -> None:
        pass  # they were updated where they are kept


class _Bfloat16:
    """The second moment moves by a thousandth a step, less than bfloat16 resolves, so it is rounded at random."""

    layout: ClassVar = {_FIRST: (torch.bfloat16, 1), _SECOND: (torch.bfloat16, 1)}

    def load(self, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return stored[_FIRST].float(), stored[_SECOND].float()

    def store(self, stored: dict[str, Tensor], first: Tensor, second: Tensor, seed: int) -> None:
        stored[_FIRST].copy_(first)
        draw = torch.Generator(second.device).manual_seed(seed)
        noise = torch.empty(second.shape, dtype=torch.int16, device=second.device)
        # Up to half a bfloat16 step either way, before rounding to nearest; not the half itself, which would move
        # what bfloat16 holds already. Below 4.6e-41 noise can pass zero, and a negative pattern is no number.
        noise.random_(-(2**15) + 1, 2**15, generator=draw)
        second.view(torch.int32).add_(noise).clamp_(min=0)
        stored[_SECOND].copy_(second)


class _EightBit:
    """Dynamic 8-bit codes with a scale per ALIGN elements, through bitsandbytes; the second moment as its root.

    The root has half the decades of the moment itself. A root that would still be rounded to 0 gets the smallest code,
    because the first moment is divided by it. Codes are counted from that of zero, so that zeroed memory holds zeros
    and what no parameter fills sets no scale. Small decreases of a root are rounded away, so that updates come out a
    little short: measured on two small models by 0.1 and 0.4 % over 50 steps, by 1 and 2 % over 200.
    """

    layout: ClassVar = {
        _FIRST: (torch.uint8, 1),
        f"{_FIRST}_absmax": (torch.float32, ALIGN),
        _SECOND: (torch.uint8, 1),
        f"{_SECOND}_absmax": (torch.float32, ALIGN),
    }

    def __init__(self, device: torch.device) -> None:
        try:
            from bitsandbytes import functional
        except ImportError as error:
            raise MissingError(
                "moments in 8bit need bitsandbytes, which is not installed: pip install bitsandbytes, "
                "or set memory.adam to bfloat16"
            ) from error
        self.functional = functional
        self.codes, self.zeros = {}, {}
        for name, signed in ((_FIRST, True), (_SECOND, False)):
            values = functional.create_dynamic_map(signed=signed)
            self.codes[name], self.zeros[name] = values.to(device), int(values.abs().argmin())
        self.values = {name: codes.roll(-self.zeros[name]) for name, codes in self.codes.items()}

    def load(self, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        first, root = (
            self.functional.dequantize_blockwise(
                stored[name], absmax=stored[f"{name}_absmax"], code=values, blocksize=ALIGN
            )
            for name, values in self.values.items()
        )
        return first, root.square_()

    def store(self, stored: dict[str, Tensor], first: Tensor, second: Tensor, seed: int) -> None:
        for name, values in ((_FIRST, first), (_SECOND, second.sqrt_())):
            codes, scales = self.quantise(values, self.codes[name])
            torch.sub(codes, self.zeros[name], out=stored[name])
            stored[f"{name}_absmax"].copy_(scales)
        stored[_SECOND].clamp_(min=1)

    def quantise(self, values: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
        """For each value the number of the nearest code, and the blocks' largest magnitudes."""
        if values.is_cuda:
            numbers, state = self.functional.quantize_blockwise(values, code=codes, blocksize=ALIGN)
            return numbers, state.absmax
        # On the CPU bitsandbytes (0.50) looks codes up in a table too coarse for them: 0 comes back as 2e-5 of the
        # largest, and weights without a gradient begin to drift.
        blocks = values.view(-1, ALIGN)
        scales = blocks.abs().amax(1)
        middles = (codes[1:] + codes[:-1]) / 2
        return torch.bucketize((blocks / scales[:, None]).view(-1), middles).to(torch.uint8), scales


def make_moments(form: MomentsForm, device: torch.device) -> Moments:
    """The named form, for tensors on ``device``; MissingError if 8bit lacks its library."""
    match form:
        case "float32":
            return _Float32()
        case "bfloat16":
            return _Bfloat16()
        case "8bit":
            return _EightBit(device)
