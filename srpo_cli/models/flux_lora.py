"""LoRA on a FLUX transformer through peft: made to be trained, loaded, folded into the weights, saved.

The weights of a LoRA are float32, whatever the base is kept in, and compute in the dtype of what they are given.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from srpo_cli.errors import SrpoError, UsageError, one_line
from srpo_cli.models.quantised import is_modulation, is_quantised

_FACTOR = re.compile(r"transformer\.(.+)\.lora_([AB])\.weight")


class MasterLinear(nn.Linear):
    """A linear layer of float32 weights that multiplies in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


@dataclass(frozen=True)
class LowRank:
    """What a LoRA adds to a weight (out, in): ``scale`` * ``up`` (out, rank) @ ``down`` (rank, in)."""

    up: Tensor
    down: Tensor
    scale: float

    def delta(self) -> Tensor:
        """The sum's second term, (out, in) float32."""
        return self.scale * (self.up.float() @ self.down.float())


def linear_layers(transformer: FluxTransformer2DModel) -> list[str]:
    """The names of all linear layers."""
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]


def add_lora(
    transformer: FluxTransformer2DModel,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> None:
    """Put a LoRA that changes nothing yet beside linear layers, and freeze everything else.

    Args:
        rank, alpha: its scale is ``alpha / rank``; None: 1.
        targets: ends of the layers' names; None: the linear layers of the blocks, but for their modulation.
        generator: a CPU generator that ``down`` is drawn from, uniform as peft draws it; ``up`` is 0.

    Raises UsageError for a target that is the end of no linear layer's name.
    """
    config = LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=_targets(linear_layers(transformer), targets),
        init_lora_weights=False,
    )
    transformer.add_adapter(config)
    _keep_in_float32(transformer)
    for _, layer in sorted(_lora_layers(transformer)):
        for down, up in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
            bound = 1 / math.sqrt(down.in_features)
            with torch.no_grad():
                down.weight.copy_(torch.empty(down.weight.shape).uniform_(-bound, bound, generator=generator))
                up.weight.zero_()


def _targets(names: Sequence[str], targets: Sequence[str] | None) -> list[str]:
    if targets is None:
        return [name for name in names if "transformer_blocks." in name and not is_modulation(name)]
    chosen: dict[str, None] = {}
    for target in targets:
        matching = [name for name in names if name == target or name.endswith(f".{target}")]
        if not matching:
            ends = dict.fromkeys(re.sub(r".*transformer_blocks\.\d+\.", "", name) for name in names)
            raise UsageError.unknown("LoRA target", target, ends)
        chosen |= dict.fromkeys(matching)
    return list(chosen)


def load_lora(transformer: FluxTransformer2DModel, file: Path) -> None:
    """Load a LoRA on top of ``transformer``: diffusers' and PEFT's layout, or kohya's or XLabs', which diffusers reads.

    Its values come as they are in the file, whatever the base is kept in.

    Raises SrpoError that names the first tensor that is for another model.
    """
    try:
        state, alphas, metadata = FluxLoraLoaderMixin.lora_state_dict(
            str(file.parent),
            weight_name=file.name,
            use_safetensors=True,
            local_files_only=True,
            return_alphas=True,
            return_lora_metadata=True,
        )
    except (OSError, ValueError, LookupError, AssertionError, RuntimeError, SafetensorError) as error:
        raise SrpoError(f"Cannot load LoRA {file}: {one_line(error)}") from error
    _check(transformer, state, file)
    try:
        transformer.load_lora_adapter(state, network_alphas=alphas or None, metadata=metadata)
    except (ValueError, KeyError, RuntimeError) as error:
        raise SrpoError(f"Cannot load LoRA {file}: {one_line(error)}") from error
    _keep_in_float32(transformer)
    # peft made the LoRA in the dtype of the weights beside it, in float8 even, and rounded the file to that.
    *_, name = transformer.peft_config
    plain = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    set_peft_model_state_dict(transformer, plain, adapter_name=name)


def _check(transformer: FluxTransformer2DModel, state: dict[str, Tensor], file: Path) -> None:
    layers = {name: transformer.get_submodule(name) for name in linear_layers(transformer)}
    foreign = next((name for name in state if _target(name) not in layers), None)
    if foreign or not state:
        raise SrpoError(f"{file} is not a LoRA of this transformer: it has no layer for {foreign or 'an empty file'}.")
    for name, tensor in state.items():
        match = _FACTOR.fullmatch(name)
        layer, axis = layers[match[1]], 1 if match[2] == "A" else 0
        wanted = layer.in_features if axis else layer.out_features
        if tensor.ndim != 2 or tensor.shape[axis] != wanted:
            shape = list(tensor.shape)
            here = ["rank", wanted] if axis else [wanted, "rank"]
            raise SrpoError(f"{file} is a LoRA of another model: {name} is {shape} there and {here} here.")


def _target(name: str) -> str | None:
    """The module that a LoRA tensor belongs to, None if it is not a LoRA tensor of the transformer."""
    match = _FACTOR.fullmatch(name)
    return match[1] if match else None


def scale_lora(transformer: FluxTransformer2DModel, scale: float) -> None:
    """Let the LoRA add ``scale`` times what was trained, W = W_0 + scale * dW, as DRaFT does (arXiv:2309.17400).

    At 0 it adds nothing, at 1 what was trained, whatever was set before. Drawing and folding in follow it;
    :func:`save_lora` writes what was trained.
    """
    transformer.set_adapters(list(transformer.peft_config), scale)


def fuse_lora(transformer: FluxTransformer2DModel) -> dict[str, LowRank]:
    """Fold the LoRA into the weights, rounded once to their dtype, and make every weight trainable.

    Returns what was added by parameter, for masters that are wider than the weights. UsageError over a quantised base.
    """
    added = {}
    for name, layer in _lora_layers(transformer):
        base = layer.get_base_layer()
        if is_quantised(base):
            raise UsageError("a LoRA cannot be folded into quantised weights: set lora.base to model")
        for adapter, down in layer.lora_A.items():
            up, scale = layer.lora_B[adapter].weight.detach(), layer.scaling[adapter]
            change = LowRank(up, down.weight.detach(), scale)
            base.weight.data = (base.weight.data.float() + change.delta()).to(base.weight.dtype)
            added[f"{name}.weight"] = change
    transformer.unload_lora()
    transformer.requires_grad_(True)
    return added


def save_lora(transformer: FluxTransformer2DModel, folder: Path) -> None:
    """Write the LoRA in diffusers' layout, ``pytorch_lora_weights.safetensors`` with alpha and rank in its header."""
    ((name, config),) = transformer.peft_config.items()
    FluxLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer, adapter_name=name),
        transformer_lora_adapter_metadata=config.to_dict(),
    )


def has_lora(transformer: FluxTransformer2DModel) -> bool:
    """Whether a LoRA is on the transformer."""
    return bool(getattr(transformer, "peft_config", None))


def _lora_layers(transformer: nn.Module) -> list[tuple[str, LoraLayer]]:
    return [(name, module) for name, module in transformer.named_modules() if isinstance(module, LoraLayer)]


def _keep_in_float32(transformer: nn.Module) -> None:
    """Let the LoRA's weights be float32 and yet cost no wide copy of the activations, as peft would make."""
    for _, layer in _lora_layers(transformer):
        layer.cast_input_dtype_enabled = False
        for factors in (layer.lora_A, layer.lora_B):
            for adapter, factor in factors.items():
                master = MasterLinear(factor.in_features, factor.out_features, bias=False, device="meta")
                master.weight = nn.Parameter(factor.weight.detach().float())
                factors[adapter] = master
