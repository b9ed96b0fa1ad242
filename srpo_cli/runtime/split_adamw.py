"""AdamW for bfloat16 parameters with an exact float32 master that costs two bytes more, not four.

At a learning rate of 5e-6 an update is far below half a bfloat16 step of the weight, so bfloat16 weights that are
updated themselves stand still, and with stochastic rounding they carry more noise than signal. The master is therefore
kept in full: its bfloat16 high half is the parameter that the model computes with, its low half lies beside it. Low
halves and moments may live in pinned host memory and pass through the device once a step, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from srpo_cli.runtime.blocks import SLOTS, Action, Piece, Shelf, aligned, cut, schedule
from srpo_cli.runtime.moments import MomentsForm, make_moments

_LOW = "low"


def split(master: Tensor, out: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
    """Split float32 numbers into bfloat16 high and int16 low halves, written to ``out`` if given.

    ``high`` is the nearest bfloat16, ties away from zero, and as bit patterns ``master == (high << 16) + low``.
    """
    high, low = out or tuple(torch.empty_like(master, dtype=dtype) for dtype in (torch.bfloat16, torch.int16))
    bits = master.view(torch.int32)
    low.copy_(bits)  # the lower 16 bits, negative from half a bfloat16 step on
    # torch rounds ties to even, and for a tie that went down low would be +32768. The last bit, set, makes it no tie.
    high.copy_((bits | 1).view(torch.float32))
    return high, low


def join(high: Tensor, low: Tensor) -> Tensor:
    """The float32 numbers that ``split`` made the halves from, to the bit."""
    master = high.float()
    master.view(torch.int32).add_(low)
    return master


@dataclass
class _Block:
    """Parameters of one group that are updated together; ``home`` keeps their state, flat, in ``size`` elements."""

    group: int
    pieces: list[Piece]
    size: int
    home: dict[str, Tensor]


class SplitAdamW(torch.optim.Optimizer):
    """torch's AdamW on the float32 masters of bfloat16 parameters.

    With float32 moments its updates are torch.optim.AdamW's on float32 weights, to the bit; on CUDA those of the fused
    form. A step waits for nothing on the device.

    Args:
        parameters: bfloat16 and contiguous, all on one device, or groups of them.
        lr, betas, eps, weight_decay: as for torch.optim.AdamW.
        masters: exact float32 values to start from, in the parameters' order and read one at a time; None: the
            parameters' own. The parameters are set to their high halves.
        moments: how the moments are kept; 8bit needs bitsandbytes (MissingError).
        gradients: what gradients are summed up in. float32: each backward pass adds to a buffer and frees
            ``parameter.grad``; bfloat16: ``parameter.grad`` itself.
        offload: keep low halves and moments in host memory, pinned where there is CUDA.
        block: elements that are updated, and moved to the device and back, at a time.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        masters: Iterable[Tensor] | None = None,
        moments: MomentsForm = "float32",
        gradients: torch.dtype = torch.float32,
        offload: bool = False,
        block: int = 2**26,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self._parameters: list[nn.Parameter] = [p for group in self.param_groups for p in group["params"]]
        self._device = self._parameters[0].device
        for parameter in self._parameters:
            if parameter.dtype != torch.bfloat16 or not parameter.is_contiguous() or parameter.device != self._device:
                raise ValueError(
                    f"a parameter is {parameter.dtype} on {parameter.device} with strides {parameter.stride()}: "
                    f"all should be contiguous bfloat16 on one device, here {self._device}"
                )
        self._on_cuda = self._device.type == "cuda"
        self._moments = make_moments(moments, self._device)
        self._layout = {_LOW: (torch.int16, 1), **self._moments.layout}
        self._decoded = moments != "float32"
        self._steps = [0] * len(self._parameters)
        self._updates = 0
        self._factor: Tensor | None = None
        self._offload = offload
        self._streams = {}
        if offload and self._on_cuda:
            self._streams = {action: torch.cuda.Stream(self._device) for action in ("fetch", "write")}
        self._blocks = self._make_blocks(aligned(block))
        self._places: dict[nn.Parameter, list[tuple[Piece, _Block]]] = {p: [] for p in self._parameters}
        for held in self._blocks:
            for piece in held.pieces:
                self._places[self._parameters[piece.parameter]].append((piece, held))
        self._start_from(self._parameters if masters is None else masters)
        self._in_float32 = gradients == torch.float32
        self._sums: dict[nn.Parameter, Tensor] = {}
        if self._in_float32:
            for parameter in self._parameters:
                parameter.register_post_accumulate_grad_hook(self._collect)

    def _make_blocks(self, block: int) -> list[_Block]:
        blocks, first = [], 0
        for number, group in enumerate(self.param_groups):
            for pieces in cut([parameter.numel() for parameter in group["params"]], block):
                pieces = [Piece(p.parameter + first, p.start, p.stop, p.offset) for p in pieces]
                size = aligned(pieces[-1].offset + pieces[-1].stop - pieces[-1].start)
                blocks.append(_Block(number, pieces, size, {}))
            first += len(group["params"])
        away = self._offload and self._device.type != "meta"  # on which memory is only counted
        home, total = torch.device("cpu") if away else self._device, sum(b.size for b in blocks)
        for name, (dtype, share) in self._layout.items():
            shelf = Shelf(dtype, total // share, home, pinned=self._offload and self._on_cuda)
            for b in blocks:
                b.home[name] = shelf.take(b.size // share)
        return blocks

    @torch.no_grad()
    def _start_from(self, masters: Iterable[Tensor]) -> None:
        for parameter, master in zip(self._parameters, masters, strict=True):
            if master.shape != parameter.shape:
                raise ValueError(f"a master is {tuple(master.shape)}, its parameter {tuple(parameter.shape)}")
            high, low = split(master.to(self._device, torch.float32).contiguous())
            parameter.copy_(high)
            for piece, values in self._stored(_LOW, parameter):
                values.copy_(piece.of(low))

    def _stored(self, name: str, parameter: nn.Parameter) -> list[tuple[Piece, Tensor]]:
        """A parameter's pieces, and what is kept of them under ``name``."""
        share = self._layout[name][1]
        return [(piece, piece.within(block.home[name], share)) for piece, block in self._places[parameter]]

    # --- gradients ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _collect(self, parameter: nn.Parameter) -> None:
        """Add a fresh gradient to its float32 sum."""
        if parameter in self._sums:
            self._sums[parameter].add_(parameter.grad)
        else:
            self._sums[parameter] = parameter.grad.float()
        parameter.grad = None

    def _gradient(self, parameter: nn.Parameter) -> Tensor | None:
        return self._sums.get(parameter) if self._in_float32 else parameter.grad

    def accumulated(self) -> list[Tensor]:
        """The gradients that the next step uses, to be averaged in place."""
        return [grad for parameter in self._parameters if (grad := self._gradient(parameter)) is not None]

    def scale_gradients(self, factor: Tensor) -> None:
        """Multiply the gradients by ``factor``, a float32 scalar on the device, when the next step has them in float32.

        In place bfloat16 ones would be rounded a second time.
        """
        self._factor = factor if self._factor is None else self._factor * factor

    def _scaled(self, gradient: Tensor) -> Tensor:
        if self._factor is None:
            return gradient.float()
        return gradient.to(torch.float32, copy=True).mul_(self._factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and their factor; not ``set_to_none``: keep their memory, zeroed."""
        super().zero_grad(set_to_none)
        self._factor = None
        if set_to_none:
            self._sums.clear()
        for total in self._sums.values():
            total.zero_()

    # --- the step -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients; returns what ``closure`` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = {i for i, parameter in enumerate(self._parameters) if self._gradient(parameter) is not None}
        blocks = [(i, b) for i, b in enumerate(self._blocks) if any(piece.parameter in given for piece in b.pieces)]
        if self._offload:
            self._stream(blocks, given)
        else:
            for number, block in blocks:
                self._update(number, block, block.home, given)
        for i in given:
            self._steps[i] += 1
        self._updates += 1
        self._factor = None
        return loss

    def _stream(self, blocks: list[tuple[int, _Block]], given: set[int]) -> None:
        """Update blocks whose state is on the host, by ``schedule``, copies beside the updates where there is CUDA."""
        slots = self._slots([block for _, block in blocks])
        now = torch.cuda.current_stream(self._device) if self._on_cuda else None
        for stream in self._streams.values():  # the slots are this stream's, and so was the last step's end
            stream.wait_stream(now)
        done: dict[Action, torch.cuda.Event] = {}
        for (action, i), before in schedule(len(blocks), len(slots)):
            number, block = blocks[i]
            here = {name: slots[i % len(slots)][name][: home.numel()] for name, home in block.home.items()}
            stream = self._streams.get(action, now)
            with torch.cuda.stream(stream) if stream else nullcontext():
                for event in before if stream else ():
                    stream.wait_event(done[event])
                match action:
                    case "fetch":
                        for name, home in block.home.items():
                            here[name].copy_(home, non_blocking=True)
                    case "update":
                        self._update(number, block, here, given)
                    case "write":
                        for name, home in block.home.items():
                            home.copy_(here[name], non_blocking=True)
                if stream:
                    done[action, i] = stream.record_event()
        for stream in self._streams.values():
            now.wait_stream(stream)

    def _slots(self, blocks: Sequence[_Block]) -> list[dict[str, Tensor]]:
        """Room on the device for the blocks that are there at a time; freed after the step."""
        return [
            {
                name: torch.empty(max(b.home[name].numel() for b in blocks), dtype=dtype, device=self._device)
                for name, (dtype, _) in self._layout.items()
            }
            for _ in range(min(SLOTS, len(blocks)))
        ]

    def _update(self, number: int, block: _Block, stored: dict[str, Tensor], given: set[int]) -> None:
        """One step of AdamW for the parameters of a block that have gradients, its state on the device."""
        pieces = [piece for piece in block.pieces if piece.parameter in given]
        parameters = [self._parameters[piece.parameter] for piece in pieces]
        halves = [
            (piece.of(parameter.detach()), piece.within(stored[_LOW]))
            for piece, parameter in zip(pieces, parameters, strict=True)
        ]
        masters = [join(*half) for half in halves]
        first, second = self._moments.load(stored)
        group = self.param_groups[block.group]
        counters = self._device if self._on_cuda else "cpu"  # where the fused form and the others want them
        adamw(
            masters,
            [self._scaled(piece.of(self._gradient(p))) for piece, p in zip(pieces, parameters, strict=True)],
            [piece.within(first) for piece in pieces],
            [piece.within(second) for piece in pieces],
            [],
            [torch.full((), float(self._steps[piece.parameter]), device=counters) for piece in pieces],
            fused=self._on_cuda or None,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        self._moments.store(stored, first, second, seed=self._updates * len(self._blocks) + number)
        for master, half in zip(masters, halves, strict=True):
            split(master, out=half)

    # --- state ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def master(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's float32 master, on its device."""
        low = torch.cat([values.to(self._device, non_blocking=True) for _, values in self._stored(_LOW, parameter)])
        return join(parameter.detach(), low.view_as(parameter))

    def state_dict(self) -> dict[str, Any]:
        """Steps, low halves and moments of every parameter, as they are kept and not copied.

        Loaded beside parameters with the same bits it goes on exactly; the bits are what ``split`` makes of masters.
        """
        self._settle()
        state = {i: {"step": torch.tensor(float(step))} for i, step in enumerate(self._steps)}
        for name, (_, share) in self._layout.items():
            for i, parameter in enumerate(self._parameters):
                first, *more = [values for _, values in self._stored(name, parameter)]
                values = torch.cat([first, *more]) if more else first
                state[i][name] = values.view_as(parameter) if share == 1 else values
        return {"state": state, "updates": self._updates, "param_groups": super().state_dict()["param_groups"]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a ``state_dict``; ValueError if it is of other parameters or another form of moments."""
        state = state_dict["state"]
        expected = self.state_dict()["state"]
        for i, mine in expected.items():
            wanted = {name: (values.dtype, tuple(values.shape)) for name, values in mine.items()}
            found = {name: (values.dtype, tuple(values.shape)) for name, values in state.get(i, {}).items()}
            if found != wanted:
                raise ValueError(f"the state of parameter {i} is {found}, here it should be {wanted}")
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self._updates = state_dict["updates"]
        self._steps = [int(state[i]["step"]) for i in expected]
        for name, (_, share) in self._layout.items():
            for i, parameter in enumerate(self._parameters):
                for piece, values in self._stored(name, parameter):
                    start = piece.start // share
                    values.copy_(state[i][name].reshape(-1)[start : start + values.numel()])

    def _settle(self) -> None:
        """Wait until the host has what the last step wrote."""
        if self._on_cuda:
            torch.cuda.synchronize(self._device)

    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes by place, ``device`` and ``host``, and part; ``buffers`` are held only while a step runs."""

        def size(tensors: Iterable[Tensor]) -> int:
            return sum(tensor.nbytes for tensor in tensors)

        low = size(block.home[_LOW] for block in self._blocks)
        kept = {"low": low, "moments": size(t for block in self._blocks for t in block.home.values()) - low}
        largest = max(self._blocks, key=lambda block: block.size)
        working = 8 + 8 * self._decoded  # the master and a copy of it or of the gradient; the moments in float32
        moving = min(SLOTS, len(self._blocks)) * size(largest.home.values()) if self._offload else 0
        device = {
            "weights": size(self._parameters),
            "gradients": size(self.accumulated()),
            "buffers": largest.size * working + moving,
        }
        return {"device": device, "host": kept} if self._offload else {"device": device | kept, "host": {}}
