"""Linear layers in 8 or 4 bits: a frozen base under a LoRA, and float8 arithmetic for rollouts.

float8 and int8 weights have one scale for each output row. They are read back to the layer's dtype for each product,
again in the backward pass: autograd keeps the small form, where a library's would keep the large one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srpo_cli.errors import MissingError, UsageError, one_line

FLOAT8 = torch.float8_e4m3fn
_STORED = {"float8": (FLOAT8, 448.0), "int8": (torch.int8, 127.0)}  # and the largest value of each
_FLOAT8_UNITS = (8, 9)  # CUDA capability from which on tensor cores multiply float8


class WeightOnlyLinear(nn.Linear):
    """A frozen linear layer whose weight is kept in float8 or int8; differentiable in its input."""

    def __init__(self, linear: nn.Linear, kind: str) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False, device="meta", dtype=linear.weight.dtype)
        stored, scale = quantise_rows(linear.weight.detach(), kind)
        self.weight = nn.Parameter(stored, requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return _WeightOnlyProduct.apply(x, self.weight, self.scale, self.bias)

    def dequantised(self) -> Tensor:
        """The weight that it computes with, (out, in), in the dtype that it came in."""
        return self.weight.to(self.scale.dtype) * self.scale


class _WeightOnlyProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        return F.linear(x, weight.to(scale.dtype) * scale, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        weight, scale = ctx.saved_tensors
        return grad @ (weight.to(scale.dtype) * scale).to(grad.dtype), None, None, None


def quantise_rows(values: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``values`` (..., N) in float8 or int8, and the scales (..., 1) that undo it, in the dtype of ``values``."""
    dtype, largest = _STORED[kind]
    peak = values.abs().amax(dim=-1, keepdim=True).float().clamp(min=torch.finfo(values.dtype).tiny * largest)
    scale = (peak / largest).to(values.dtype)  # as it is kept: its rounding is then part of what is divided by
    scaled = (values.float() / scale.float()).clamp(-largest, largest)
    return (scaled.round() if dtype == torch.int8 else scaled).to(dtype), scale


def quantise_linears(module: nn.Module, base: str) -> None:
    """Keep the weights of all linear layers below ``module`` in "float8", "int8" or "nf4", in place, on its device.

    Raises MissingError where nf4's library is not installed, UsageError where the device cannot hold the format.
    """
    make = _nf4 if base == "nf4" else WeightOnlyLinear
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear:
                try:
                    setattr(parent, name, make(child, base))
                except (RuntimeError, TypeError, NotImplementedError) as error:
                    device = child.weight.device.type
                    raise UsageError(
                        f"lora.base {base} does not work on {device} ({one_line(error)}): take another, or model"
                    ) from error


def is_quantised(linear: nn.Module) -> bool:
    """Whether a linear layer's weight is kept in 8 or 4 bits."""
    return isinstance(linear, WeightOnlyLinear) or linear.weight.dtype == torch.uint8


def _nf4(linear: nn.Linear, _base: str) -> nn.Linear:
    """A linear layer in 4 bits through bitsandbytes, which quantises where the weight is."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise MissingError("lora.base nf4 needs bitsandbytes: pip install bitsandbytes") from error
    weight, device = linear.weight.detach(), linear.weight.device
    layer = Linear4bit(
        linear.in_features, linear.out_features, False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=layer)
    layer.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)
    return layer.to(device)


class Float8Linear(nn.Module):
    """The product of a linear layer in float8, weights and inputs scaled row by row; without gradient."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.dequantised() if isinstance(linear, WeightOnlyLinear) else linear.weight.detach()
        stored, scale = quantise_rows(weight.float(), "float8")
        self.register_buffer("weight", stored)
        self.register_buffer("scale", scale.t())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        rows, row_scale = quantise_rows(x.reshape(-1, x.shape[-1]).float(), "float8")
        if x.device.type == "cuda":
            by_row = F.ScalingType.RowWise
            product = F.scaled_mm(rows, self.weight.t(), row_scale, by_row, self.scale, by_row)
        else:
            product = (rows.float() @ self.weight.float().t()) * row_scale * self.scale
        product = product.to(x.dtype).reshape(*x.shape[:-1], -1)
        return product if self.bias is None else product + self.bias.to(x.dtype)


@contextmanager
def float8_linears(blocks: nn.Module, device: torch.device) -> Iterator[None]:
    """Let the linear layers of ``blocks``, but for modulation and LoRA, compute in float8 while this is open.

    Weights are quantised as they are on entering and take a byte each beside their own. CPUs imitate the arithmetic.

    Raises what :func:`check_float8_rollouts` does.
    """
    four_bits = any(isinstance(layer, nn.Linear) and layer.weight.dtype == torch.uint8 for layer in blocks.modules())
    check_float8_rollouts(device, "nf4" if four_bits else "model")
    swapped = []
    try:
        for path, parent in list(blocks.named_modules()):
            for name, child in list(parent.named_children()):
                if type(child) not in (nn.Linear, WeightOnlyLinear) or is_modulation(f"{path}.{name}"):
                    continue
                setattr(parent, name, Float8Linear(child))
                swapped.append((parent, name, child))
        yield
    finally:
        for parent, name, child in swapped:
            setattr(parent, name, child)


def is_modulation(name: str) -> bool:
    """Whether the name of a block's linear layer is that of its modulation (``norm*.linear``)."""
    return name.removesuffix(".base_layer").endswith(".linear") and ".norm" in f".{name}"


def check_float8_rollouts(device: torch.device, base: str = "model") -> None:
    """Raise UsageError on an accelerator that cannot multiply float8, and over a 4-bit ``base``; reads no weights."""
    if base == "nf4":
        raise UsageError("rollout.dtype float8 does not go with lora.base nf4: take model")
    if device.type == "cpu":
        return
    if device.type == "cuda" and torch.version.cuda and torch.cuda.get_device_capability(device) >= _FLOAT8_UNITS:
        return
    found = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    raise UsageError(f"rollout.dtype float8: {found} cannot multiply float8, set rollout.dtype to model")
