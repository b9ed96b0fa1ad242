"""Where a run's model and the state of its training are put, by the memory plan that was settled on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from srpo_cli.config.schema import OptimizerConfig, TrainConfig
from srpo_cli.errors import UsageError
from srpo_cli.models.flux import Flux
from srpo_cli.models.flux_files import load_masters, read_weights, tuned_weights
from srpo_cli.registry import MODELS
from srpo_cli.runtime.devices import arithmetic
from srpo_cli.runtime.distributed import Ranks
from srpo_cli.runtime.fetch import fetch
from srpo_cli.runtime.plan import Settings
from srpo_cli.runtime.seeding import derive
from srpo_cli.runtime.split_adamw import SplitAdamW
from srpo_cli.runtime.trained import Halves, Shards, Trained, make_mesh, shard

_SPLIT = ("resident", "streamed")
_MANTISSA = 8  # bits of a bfloat16's, the hidden one included


@dataclass(frozen=True)
class Loaded:
    """A model to train. ``masters`` are the exact float32 weights by name, read when asked for; None: the weights."""

    model: Flux
    masters: Mapping[str, Tensor] | None = None


def load_model(
    config: TrainConfig,
    plan: Settings,
    ranks: Ranks,
    tuned: Path | None = None,
    *,
    text_encoders: bool = True,
    announce: Callable[[str], None] | None = None,
) -> Loaded:
    """The model to train, with the LoRA that is trained where mode lora asks for one.

    Args:
        config: names the model, the mode and the precision.
        plan: says in what the trained weights are kept; in plan sharded they are not read before they are spread.
        ranks: whose device the model is on.
        tuned: what a checkpoint holds: weights in place of the configured ones, or a LoRA over them.
        text_encoders: False leaves them unread; the model is then given encoded prompts.
        announce: told about a download before it starts; None: nothing is downloaded.
    """
    wanted, lora = getattr(torch, config.model.dtype), config.train.mode == "lora"
    in_bfloat16 = plan.plan in _SPLIT or config.memory.master == "bfloat16"
    sharded = plan.plan == "sharded" and not lora
    kept = wanted if lora else torch.bfloat16 if in_bfloat16 else torch.float32
    name, weights = config.model.name, _weights(config, tuned)
    model: Flux = MODELS.get(name)(
        name,
        kept,
        ranks.device,
        weights,
        frozen_dtype=torch.float32 if ranks.device.type == "cpu" else wanted,
        text_encoders=text_encoders,
        base=config.lora.base if lora else "model",
        latent_dtype=torch.float32,
        literal=in_bfloat16 and not lora,
        empty=sharded,
        download=None if announce is None else partial(fetch, announce=announce),
    )
    if lora:
        if not model.has_lora:
            options = config.lora
            model.add_lora(options.rank, options.alpha, options.targets, seed=derive(config.train.seed, "lora"))
        return Loaded(model)
    added = model.fuse_lora() if model.has_lora else None
    parameters = dict(model.transformer.named_parameters())
    if sharded:
        return Loaded(model, read_weights(name, weights, parameters))
    return Loaded(model, load_masters(name, weights, parameters, added) if plan.plan in _SPLIT else None)


def _weights(config: TrainConfig, tuned: Path | None) -> list[Path]:
    """What is put into the named model: a checkpoint's LoRA lies over the weights that the run was begun with."""
    begun = config.model.weights
    if tuned is None:
        return [begun] if begun else []
    beneath = tuned_weights(config.model.name, begun).transformer if begun and config.train.mode == "lora" else None
    return [beneath, tuned] if beneath else [tuned]


def prepare_model(model: Flux, config: TrainConfig, plan: Settings, device: torch.device) -> None:
    """Recompute and compile as configured; after a LoRA was added, and before weights are spread."""
    model.checkpoint_blocks(transformer=plan.transformer_checkpointing, vae=plan.vae_checkpointing)
    able = device.type == "cuda" and find_spec("triton") is not None
    if config.model.compile is True or (config.model.compile == "auto" and able):
        model.compile_blocks()


def hold(loaded: Loaded, config: TrainConfig, plan: Settings, ranks: Ranks) -> Trained:
    """What is trained of a model and its optimizer, held as the plan says."""
    transformer, options = loaded.model.transformer, config.optimizer
    if plan.plan == "sharded" and config.train.mode == "full":
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        dtype = None if ranks.device.type == "cpu" else getattr(torch, config.model.dtype)
        shard(transformer, blocks, make_mesh(ranks, plan.shard), dtype, loaded.masters, ranks.device)
        loaded.model.compute_dtype = dtype
        parameters = loaded.model.named_trainable_parameters()
        return Shards(transformer, parameters, _adamw(parameters, options))
    parameters = loaded.model.named_trainable_parameters()
    if config.train.mode == "full" and plan.plan in _SPLIT:
        masters = loaded.masters and (loaded.masters[name] for name in parameters)
        return Halves(parameters, _split_adamw(parameters, options, plan, masters))
    if config.memory.master == "bfloat16":
        _refuse_to_freeze(parameters, options.lr)
    return Trained(parameters, _adamw(parameters, options))


def arithmetic_of(config: TrainConfig, plan: Settings, device: torch.device) -> AbstractContextManager[object]:
    """How passes of the model compute: autocast over whole float32 weights, else in the weights' own dtype."""
    if plan.plan != "replicated" or config.train.mode == "lora" or config.memory.master == "bfloat16":
        return nullcontext()
    return arithmetic(device, getattr(torch, config.model.dtype))


def _adamw(parameters: dict[str, nn.Parameter], options: OptimizerConfig) -> torch.optim.AdamW:
    betas, fused = tuple(options.betas), all(parameter.is_cuda for parameter in parameters.values())
    return torch.optim.AdamW(
        parameters.values(), options.lr, betas, options.eps, options.weight_decay, fused=fused or None
    )


def _split_adamw(
    parameters: dict[str, nn.Parameter], options: OptimizerConfig, plan: Settings, masters: Iterable[Tensor] | None
) -> SplitAdamW:
    return SplitAdamW(
        list(parameters.values()),
        options.lr,
        tuple(options.betas),
        options.eps,
        options.weight_decay,
        masters=masters,
        moments=plan.adam,
        gradients=getattr(torch, plan.gradients),
        offload=plan.plan == "streamed",
    )


def _refuse_to_freeze(parameters: dict[str, nn.Parameter], lr: float) -> None:
    """UsageError where most updates would be lost: an Adam step is about ``lr``, less than half a bfloat16 step."""
    frozen = sum(_frozen_share(parameter.detach(), lr) * parameter.numel() for parameter in parameters.values())
    share = frozen / sum(parameter.numel() for parameter in parameters.values())
    if share > 0.5:
        raise UsageError(
            f"memory.master bfloat16 cannot hold updates of optimizer.lr {lr:g}: they are below half a step of "
            f"{share:.0%} of the weights, which would never move; use memory.master=float32 or a higher rate"
        )


def _frozen_share(weight: Tensor, lr: float) -> float:
    sample = weight.flatten()[:: max(1, weight.numel() // 4096)].float().abs()
    step = torch.exp2(torch.floor(torch.log2(sample.clamp(min=1e-30))) + 1 - _MANTISSA)
    return (lr < step / 2).float().mean().item()
