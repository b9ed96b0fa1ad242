"""Blocks of parameters whose optimizer state is kept flat, and the order in which they pass through a device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from srpo_cli.errors import SrpoError, one_line
from srpo_cli.runtime.moments import ALIGN

SLOTS = 3
"""Blocks on the device at a time: one arrives, one is updated, one leaves."""
_SHELF = 2**30  # bytes


def aligned(count: int) -> int:
    """The next multiple of ALIGN."""
    return math.ceil(count / ALIGN) * ALIGN


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of a parameter, and where in its block they begin."""

    parameter: int
    start: int
    stop: int
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """These elements of a tensor like the parameter, flat."""
        return tensor.reshape(-1)[self.start : self.stop]

    def within(self, stored: Tensor, share: int = 1) -> Tensor:
        """These elements of a flat tensor of the block with one entry for ``share`` elements."""
        first = self.offset // share
        return stored[first : first + math.ceil((self.stop - self.start) / share)]


def cut(sizes: Sequence[int], block: int) -> list[list[Piece]]:
    """Cut parameters of the given numbers of elements into blocks of at most ``block``, a multiple of ALIGN.

    A parameter lies in one block, but for those larger than a block. Pieces begin at multiples of ALIGN.
    """
    blocks: list[list[Piece]] = [[]]
    offset = 0
    for parameter, size in enumerate(sizes):
        for start in range(0, size, block):
            stop = min(start + block, size)
            if blocks[-1] and offset + stop - start > block:
                blocks.append([])
                offset = 0
            blocks[-1].append(Piece(parameter, start, stop, offset))
            offset += aligned(stop - start)
    return [pieces for pieces in blocks if pieces]


Action = tuple[str, int]


def schedule(blocks: int, slots: int = SLOTS) -> Iterator[tuple[Action, tuple[Action, ...]]]:
    """What is done with which block, in the order in which it is issued, and what each action waits for.

    While a block is updated the next one is fetched and the one before is written back. Block i uses slot
    i % ``slots`` of the device's buffers, so its fetch waits until the slot's last block is written.
    """
    for block in range(-1, blocks):
        if (ahead := block + 1) < blocks:
            yield ("fetch", ahead), ((("write", ahead - slots),) if ahead >= slots else ())
        if block >= 0:
            yield ("update", block), (("fetch", block),)
            yield ("write", block), (("update", block),)


class Shelf:
    """Zeroed tensors of one dtype, ``total`` elements of them, cut from few allocations.

    torch rounds a pinned allocation up to a power of two, which would waste a third of many middling ones. Of one
    dtype, because torch.save refuses memory that is seen as two. SrpoError where there is no pinned memory to be had.
    """

    def __init__(self, dtype: torch.dtype, total: int, device: torch.device, pinned: bool) -> None:
        self.dtype, self.total, self.left, self.device, self.pinned = dtype, total, total, device, pinned
        self.rests: list[Tensor] = []

    def take(self, size: int) -> Tensor:
        """The next ``size`` elements, from the first allocation that has room for them."""
        at = next((i for i, rest in enumerate(self.rests) if rest.numel() >= size), len(self.rests))
        if at == len(self.rests):
            self.rests.append(self._allocate(max(min(_SHELF // self.dtype.itemsize, self.left), size)))
        taken, self.rests[at] = self.rests[at][:size], self.rests[at][size:]
        self.left -= size
        return taken

    def _allocate(self, size: int) -> Tensor:
        try:
            return torch.zeros(size, dtype=self.dtype, device=self.device, pin_memory=self.pinned)
        except RuntimeError as error:
            if not self.pinned:
                raise
            wanted = max(self.total, size) * self.dtype.itemsize / 2**30
            raise SrpoError(
                f"a process got no {wanted:.1f} GiB of pinned host memory ({one_line(error)}): set memory.adam=8bit, "
                "or memory.plan=resident or sharded, or start fewer processes on this machine"
            ) from error
