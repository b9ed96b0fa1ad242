"""Counts of what a piece of training does: the same on every machine and in every run, so that tests can be exact."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count
from torch.utils.hooks import RemovableHandle

aten = torch.ops.aten

READ_BY_OPERATORS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select}
"""Operators whose result, or its shape, the host needs: ``item``, ``float``, ``bool``, a mask as an index."""

READ_BY_METHODS = {Tensor.tolist, Tensor.numpy, Tensor.cpu, Tensor.__array__}
"""Methods that hand a tensor to the host."""


@dataclass
class Counts:
    """What was counted.

    Attributes:
        no_grad_samples: samples through the transformer without a gradient.
        grad_calls, grad_samples: calls of the transformer with one, and their samples.
        backwards: backward passes that were started.
        decodes: pictures that the VAE decoded.
        image_encodes, text_encodes: calls of the reward's towers.
        syncs: times that the host read what depends on a weight. On an accelerator it waits there.
        operators: aten operators, forward and backward, by name.
        flops: multiply-adds counted as two, attention's backward pass as four products.
        saved_bytes: what autograd kept, every storage once, parameters not at all.
    """

    no_grad_samples: int = 0
    grad_calls: int = 0
    grad_samples: int = 0
    backwards: int = 0
    decodes: int = 0
    image_encodes: int = 0
    text_encodes: int = 0
    syncs: int = 0
    operators: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    saved_bytes: int = 0

    @property
    def operator_count(self) -> int:
        return sum(self.operators.values())


class Counting:
    """Counts while it is open; ``with Counting(transformer, vae, clip) as counts: step()``.

    What lies on an accelerator cannot be told from the host's on a CPU, so it is followed: parameters are on the
    device, and so is all that is computed from them.

    Args:
        transformer, vae, clip: the models of a step; what is not there is not counted.
        others: further modules whose weights would be on the device.
    """

    def __init__(
        self,
        transformer: nn.Module | None = None,
        vae: nn.Module | None = None,
        clip: nn.Module | None = None,
        others: Iterable[nn.Module] = (),
    ) -> None:
        self.counts = Counts()
        self._transformer, self._vae, self._clip = transformer, vae, clip
        self._modules = [module for module in (transformer, vae, clip, *others) if module is not None]
        self._opened = ExitStack()

    def __enter__(self) -> Counts:
        parameters = [parameter for module in self._modules for parameter in module.parameters()]
        saved = _Saved(self.counts, parameters)
        self._flops = FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)
        for handle in self._hooks():
            self._opened.callback(handle.remove)
        self._opened.enter_context(torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor))
        self._opened.enter_context(self._flops)
        followed = _Followed(self.counts, parameters)
        self._opened.enter_context(followed)
        self._opened.enter_context(_Methods(self.counts, followed))
        return self.counts

    def __exit__(self, *error: Any) -> None:
        self._opened.close()
        self.counts.flops = self._flops.get_total_flops()

    def _hooks(self) -> Iterable[RemovableHandle]:
        if self._transformer is not None:
            yield self._transformer.register_forward_pre_hook(self._transform, with_kwargs=True)
        if self._vae is not None:
            yield self._vae.decoder.register_forward_pre_hook(self._decode)
        if self._clip is not None:
            yield self._clip.visual.register_forward_pre_hook(self._see)
            text = self._clip.transformer if hasattr(self._clip, "transformer") else self._clip.text
            yield text.register_forward_pre_hook(self._read)

    def _transform(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        samples = len(kwargs["hidden_states"])
        if torch.is_grad_enabled():
            self.counts.grad_calls += 1
            self.counts.grad_samples += samples
        else:
            self.counts.no_grad_samples += samples

    def _decode(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.counts.decodes += len(args[0])

    def _see(self, *_: Any) -> None:
        self.counts.image_encodes += 1

    def _read(self, *_: Any) -> None:
        self.counts.text_encodes += 1


class _Saved:
    """What autograd keeps for its backward passes."""

    def __init__(self, counts: Counts, parameters: Iterable[Tensor]) -> None:
        self._counts = counts
        self._seen = _Storages(parameters)

    def pack(self, tensor: Tensor) -> Tensor:
        if tensor not in self._seen:
            self._seen.add(tensor)
            self._counts.saved_bytes += tensor.untyped_storage().nbytes()
        return tensor


class _Storages:
    """A set of tensors by what they lie in; an address is not given out again while it is in here."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._held: dict[int, StorageWeakRef] = {}
        for tensor in tensors:
            self.add(tensor)

    def add(self, tensor: Tensor) -> None:
        reference = StorageWeakRef(tensor.untyped_storage())
        self._held[reference.cdata] = reference

    def __contains__(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()).cdata in self._held


class _Followed(TorchDispatchMode):
    """Counts operators, and follows what lies on the device through them."""

    def __init__(self, counts: Counts, parameters: Iterable[Tensor]) -> None:
        super().__init__()
        self._counts = counts
        self.device = _Storages(parameters)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "aten":
            self._counts.operators[function.overloadpacket.__name__] += 1
        here = any(tensor in self.device for tensor in _tensors((args, kwargs)))
        self._counts.syncs += here and function.overloadpacket in READ_BY_OPERATORS
        result = function(*args, **kwargs)
        for tensor in _tensors(result) if here else ():
            self.device.add(tensor)
        return result


class _Methods(TorchFunctionMode):
    """Counts what never becomes an operator."""

    def __init__(self, counts: Counts, followed: _Followed) -> None:
        super().__init__()
        self._counts, self._followed = counts, followed

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in READ_BY_METHODS and args[0] in self._followed.device:
            self._counts.syncs += 1
        if function is Tensor.backward:
            self._counts.backwards += 1
        return function(*args, **kwargs or {})


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in what an operator takes or gives."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(_gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return 2 * sdpa_flop_count(query, key, value)


_CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""What torch's counter leaves out."""
