"""How a process holds the weights that are trained: whole, in two halves, or its shard of them.

The loop asks the same of each: collect gradients, average them over the ranks, clip, step, and hand out the float32
masters for a checkpoint. What is computed is the same; where it lies and what travels is not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from srpo_cli.runtime.distributed import Ranks
from srpo_cli.runtime.split_adamw import SplitAdamW

_CLIP_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Trained:
    """Whole weights in every process, with torch's own AdamW. Collective methods are called by all ranks in one order.

    Args:
        parameters: what is trained, by its name in the model.
        optimizer: over exactly these, in this order.
    """

    layout = "adamw"
    """Checkpoints of one layout can be gone on with by any plan of that layout."""
    collective = False
    """Whether passes and checkpoints are collective: all ranks then take part in each, or none does."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.named = dict(parameters)
        self.optimizer = optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.named.values())

    def gradients(self) -> list[Tensor]:
        """What the next step goes by."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def accumulate(self, last: bool) -> None:
        """Told before each backward pass of an update, whether it is the last one."""

    def average(self, ranks: Ranks, values: Tensor) -> Tensor:
        """Average the gradients over the ranks, in place, and ``values`` (N,), which come back."""
        return ranks.average(self.gradients(), values)

    def clip(self, limit: float | None) -> Tensor:
        """Scale the gradients to a global norm of at most ``limit``; returns the norm before that, a scalar."""
        norm = get_total_norm(self.gradients())
        if limit is not None:
            clip_grads_with_norm_(self.parameters, limit, norm)
        return norm

    def step(self, lr: float) -> None:
        """One update at the rate ``lr``; the gradients are gone afterwards."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def gather(self) -> None:
        """Make all weights ready for passes that not every rank takes part in."""

    def release(self) -> None:
        """Undo :meth:`gather`; needed after weights were changed behind its back."""

    def master(self, parameter: nn.Parameter) -> Tensor:
        """The parameter as it is updated, this rank's part of it; float32 but for a bfloat16 master."""
        return parameter.detach()

    def masters(self) -> Iterator[tuple[str, Tensor]]:
        """Every trained weight whole and by name, one at a time."""
        for name, parameter in self.named.items():
            yield name, self.whole(self.master(parameter))

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor that is held as the parameters are, whole."""
        return tensor

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Undo :meth:`whole` for one tensor of each parameter."""
        return list(tensors)

    def optimizer_state(self, keep: bool = True) -> dict[str, Any]:
        """The optimizer's ``state_dict``, its tensors whole; a rank that only gives its part does not ``keep`` them."""
        return self.optimizer.state_dict() if keep else {}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`optimizer_state`; ValueError if it is of another model."""
        self.optimizer.load_state_dict(state)
        for parameter, moments in self.optimizer.state.items():
            for moment in moments.values():
                if moment.dim() and moment.shape != parameter.shape:  # load_state_dict only counts
                    raise ValueError(f"shape {tuple(moment.shape)}")

    def remember(self) -> Any:
        """What :meth:`recall` needs; None where it would have to be copied off the device at every step."""
        if any(parameter.device.type != "cpu" for parameter in self.parameters):
            return None
        weights = [parameter.detach().clone() for parameter in self.parameters]
        return weights, copy.deepcopy(self.optimizer.state_dict())

    @torch.no_grad()
    def recall(self, remembered: Any) -> None:
        """Put weights and optimizer back to what they were."""
        weights, state = remembered
        self.optimizer.load_state_dict(state)
        for parameter, before in zip(self.parameters, weights, strict=True):
            parameter.copy_(before)


class Halves(Trained):
    """bfloat16 weights whose float32 masters are split beside them, on the device or the host."""

    layout = "halves"
    optimizer: SplitAdamW

    def gradients(self) -> list[Tensor]:
        return self.optimizer.accumulated()

    def clip(self, limit: float | None) -> Tensor:
        # In float32 whatever the gradients are: of bfloat16 ones torch's norm is bfloat16, off by up to 0.4 %.
        norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in self.gradients()]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        if limit is not None:
            self.optimizer.scale_gradients((limit / (norm + _CLIP_EPS)).clamp(max=1.0))
        return norm

    def master(self, parameter: nn.Parameter) -> Tensor:
        return self.optimizer.master(parameter)

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state)

    def remember(self) -> None:
        return None


class Shards(Trained):
    """This rank's shard of float32 weights (FSDP2), gathered once for all rollouts and passes of an update.

    Args:
        root: the module that :func:`shard` was applied to.
        parameters, optimizer: as for :class:`Trained`, of sharded parameters.
    """

    collective = True

    def __init__(
        self, root: nn.Module, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        super().__init__(parameters, optimizer)
        self.root = root

    def accumulate(self, last: bool) -> None:
        # Gradients are scattered in every pass: whole float32 ones, kept for the last, would be 48 GB of FLUX.1-dev.
        self.root.set_requires_all_reduce(last)

    def average(self, ranks: Ranks, values: Tensor) -> Tensor:
        return ranks.average([], values)  # the gradients were averaged while they were scattered

    def clip(self, limit: float | None) -> Tensor:
        return super().clip(limit).full_tensor()

    def step(self, lr: float) -> None:
        self.release()  # what is gathered next is to be the updated weights
        super().step(lr)

    def gather(self) -> None:
        for module in self._units():
            module.unshard()

    def release(self) -> None:
        for module in self._units():
            module.reshard()

    def _units(self) -> list[FSDPModule]:
        return [module for module in self.root.modules() if isinstance(module, FSDPModule)]

    def whole(self, tensor: DTensor) -> Tensor:
        return tensor.full_tensor()

    def parts(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [_like(tensor, parameter) for tensor, parameter in zip(tensors, self.parameters, strict=True)]

    def optimizer_state(self, keep: bool = True) -> dict[str, Any]:
        def whole(value: Any) -> Any:
            if isinstance(value, DTensor):
                value = value.full_tensor()
                return value.cpu() if keep else None  # 95 GB of FLUX.1-dev: one rank's host must do
            return value

        state = self.optimizer.state_dict()
        moments = {index: {key: whole(value) for key, value in own.items()} for index, own in state["state"].items()}
        return {**state, "state": moments}

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        parameters = self.parameters
        shards = {
            index: {key: _like(value, parameters[index]) for key, value in own.items()}
            for index, own in state["state"].items()
        }
        super().load_optimizer_state({**state, "state": shards})

    def remember(self) -> None:
        return None


def _like(value: Tensor, parameter: DTensor) -> Tensor:
    """A whole tensor cut as ``parameter`` is; scalars stay whole."""
    if not value.dim():
        return value
    if value.shape != parameter.shape:
        raise ValueError(f"shape {tuple(value.shape)}")
    value = value.to(parameter.device)
    return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def shard(
    root: nn.Module,
    blocks: Sequence[nn.Module],
    mesh: DeviceMesh,
    dtype: torch.dtype | None,
    weights: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Spread a model over ``mesh``, a unit for each block and one for what is left.

    Weights travel in ``dtype`` (None: as they are), gradients are reduced in float32. What a forward gathered stays
    until the update, also for the calls of one graph that are gone back through last: one gather of each unit an
    optimizer step, and one reduce-scatter a pass, however many calls it makes.

    Args:
        root: on the meta device; afterwards each rank has its shards on ``device``, float32.
        blocks: parts of ``root``.
        weights: whole weights by name. Every rank reads all of them, one at a time, and keeps its part: nothing of the
            size of the model is ever in one place.
    """
    # Inputs come in the dtype that they are to have; cast here, rotary tables would be rounded, too.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*blocks, root):
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
        module.set_reshard_after_backward(False)
    root.to_empty(device=device)
    for name, parameter in root.named_parameters():
        parameter.copy_(_like(weights[name].float(), parameter))


def make_mesh(ranks: Ranks, share: int) -> DeviceMesh:
    """``share`` ranks hold one copy between them; more ranks than that hold further copies (HSDP)."""
    kind = ranks.device.type
    if share == ranks.size:
        return init_device_mesh(kind, (ranks.size,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (ranks.size // share, share), mesh_dim_names=("replicate", "shard"))
