"""Weights in 8 bits: how near they are, that autograd keeps the small form, and whose gradients come out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from srpo_cli.errors import UsageError
from srpo_cli.models.quantised import (
    Float8Linear,
    WeightOnlyLinear,
    check_float8_rollouts,
    is_modulation,
    quantise_rows,
)


@pytest.mark.parametrize(("kind", "step"), [("float8", 2**-4), ("int8", 0.5 / 127)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_come_back_within_half_a_step(kind: str, step: float, dtype: torch.dtype) -> None:
    values = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    values[3] = 0
    stored, scale = quantise_rows(values, kind)
    back, peak = stored.float() * scale.float(), values.float().abs().amax(-1, keepdim=True)
    bound = step * values.float().abs() + peak * 2**-16 if kind == "float8" else step * peak
    assert ((back - values.float()).abs() <= 1.01 * bound + 1e-12).all()
    assert stored.element_size() == 1 and scale.dtype == dtype


@pytest.mark.parametrize("kind", ["float8", "int8"])
def test_a_layer_is_a_product_with_its_own_weight_and_saves_nothing_larger(kind: str) -> None:
    torch.manual_seed(0)
    layer = WeightOnlyLinear(nn.Linear(24, 16), kind)
    x = torch.randn(3, 5, 24, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = layer(x)
    assert max(tensor.untyped_storage().nbytes() for tensor in saved) == 24 * 16
    plain = nn.functional.linear(x, layer.dequantised(), layer.bias)
    assert torch.equal(out, plain)
    weights = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weights).sum(), x)
    (expected,) = torch.autograd.grad((plain * weights).sum(), x)
    torch.testing.assert_close(grad, expected)
    assert list(layer.state_dict()) == ["weight", "bias", "scale"]


def test_float8_arithmetic_is_within_its_rounding() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(256, 32)
    x = torch.randn(2, 7, 256)
    with torch.no_grad():
        error = (Float8Linear(linear)(x) - linear(x)).norm() / linear(x).norm()
    assert 0 < error < 0.05


@pytest.mark.parametrize("base", ["model", "float8", "int8"])
def test_a_cpu_may_draw_in_float8_over_8_bits_and_more(base: str) -> None:
    check_float8_rollouts(torch.device("cpu"), base)


@pytest.mark.parametrize(
    ("device", "base", "message"),
    [("mps", "model", "mps cannot multiply float8"), ("cpu", "nf4", r"float8 does not go with lora\.base nf4")],
)
def test_that_float8_rollouts_cannot_work_is_known_before_there_is_a_model(
    device: str, base: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as failure:
        check_float8_rollouts(torch.device(device), base)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("name", "modulates"),
    [
        ("transformer_blocks.0.norm1.linear", True),
        ("transformer_blocks.0.norm1_context.linear.base_layer", True),
        ("single_transformer_blocks.3.norm.linear", True),
        ("transformer_blocks.0.attn.to_q", False),
        ("single_transformer_blocks.3.proj_mlp", False),
    ],
)
def test_modulation_is_known_by_its_name(name: str, modulates: bool) -> None:
    assert is_modulation(name) == modulates
