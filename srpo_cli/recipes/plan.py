"""Count what a configuration's models hold and do, on the meta device, and plan its memory from that.

No weight is loaded and nothing is computed: a transformer with one block of each kind, and one with a second of
either, are run with tensors that have a shape and no content, and what a further block adds is multiplied.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from srpo_cli.config.schema import TrainConfig
from srpo_cli.errors import MissingError, UsageError
from srpo_cli.registry import HUB_FILES, MINIATURE_REWARDS
from srpo_cli.runtime.plan import Counts, Machine, Plan, Work, choose, settle, this_machine
from srpo_cli.runtime.quiet import quiet_libraries

_LONGEST_PROMPT = 512  # T5 tokens

_FLUX_1_DEV: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "transformer": {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "axes_dims_rope": (16, 56, 56),
            "guidance_embeds": True,
        },
        "vae": {
            "block_out_channels": (128, 256, 512, 512),
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "layers_per_block": 2,
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
        "text_encoder": {  # CLIP ViT-L/14's text tower
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "projection_dim": 768,
            "vocab_size": 49408,
        },
        "text_encoder_2": {  # T5 v1.1 XXL
            "d_model": 4096,
            "d_ff": 10240,
            "d_kv": 64,
            "num_heads": 64,
            "num_layers": 24,
            "feed_forward_proj": "gated-gelu",
            "vocab_size": 32128,
        },
        "tokenizer_2": {"model_max_length": _LONGEST_PROMPT},
    }
)
"""FLUX.1-dev's published architecture, for machines without its files; Krea's variant shares it."""

_PUBLISHED = {"flux.1-dev": _FLUX_1_DEV, "flux.1-krea-dev": _FLUX_1_DEV}

_CONFIG_FILES = {"tokenizer_2": "tokenizer_config.json"}

_TOWERS = {
    "hpsv2.0": "ViT-H-14",
    "hpsv2.1": "ViT-H-14",
    "pickscore": "ViT-H-14",
    "pickscore:cosine": "ViT-H-14",
}
"""Architecture of a named reward's CLIP, by open_clip's name."""


def plan_run(config: TrainConfig, device: torch.device, ranks_size: int = 1, local_size: int = 1) -> Plan:
    """The plan of a run that is about to start in this process.

    Args:
        device: what it runs on; a CPU needs no counting.
        ranks_size, local_size: processes of the run, and of them those on this node.

    Raises MissingError with three settings that would fit where nothing does, unless ``memory.plan`` names a plan.
    """
    from srpo_cli.runtime.doctor import accelerators

    if ranks_size == 1 and config.memory.plan == "sharded":  # the only shard is all of it
        memory = config.memory.model_copy(update={"plan": "replicated"})
        config = config.model_copy(update={"memory": memory})
    devices = [] if device.type == "cpu" else accelerators()
    machine = this_machine(devices, local_size, max(1, ranks_size // local_size))
    plan = settle(config, machine, lambda: count(config), recount=count)
    check_fits(plan, config)
    return plan


def check_fits(plan: Plan, config: TrainConfig) -> None:
    """MissingError with settings that would fit, for a plan that does not and that nobody named."""
    if not plan.fits and config.memory.plan == "auto":
        ways = ", or ".join(map(str, plan.advice))
        raise MissingError(f"{plan.why}: try {ways}; --set memory.plan={plan.settings.plan} runs it all the same")


def plan_for(config: TrainConfig, machine: Machine, launch: str = "") -> Plan:
    """The plan of a configuration on any machine, counted and priced."""

    counted: dict[Any, Counts] = {}

    def recount(changed: TrainConfig) -> Counts:
        key = (changed.model, changed.train.mode, changed.lora.rank, changed.lora.targets)
        if key not in counted:
            counted[key] = count(changed, torch.float32 if machine.is_cpu else None)
        return counted[key]

    return choose(recount(config), config, machine, launch=launch, recount=recount)


def count(config: TrainConfig, dtype: torch.dtype | None = None) -> Counts:
    """Count a configuration's transformer, decoder, reward and text encoders.

    Args:
        config: its model must be known, a folder, or in the Hub's cache; of the files only the config.json are read.
        dtype: what is computed in; None: ``model.dtype``.

    Raises MissingError where the model's configuration is nowhere, UsageError for a size that it cannot make or LoRA
    targets that match nothing.
    """
    quiet_libraries()
    dtype, name = dtype or getattr(torch, config.model.dtype), config.model.name
    longest = part_config(name, "tokenizer_2").get("model_max_length") or _LONGEST_PROMPT
    grid, tokens = _grid(config), int(min(longest, _LONGEST_PROMPT))
    held, work = _count_transformer(config, dtype, grid, tokens)
    decoder_parameters, decoder = _count_decoder(name, dtype, grid)
    rewards = [_count_reward(name, dtype) for name in config.reward.parts]
    reward_parameters, reward_work, uncounted = zip(*rewards, strict=True)
    return Counts(
        **held,
        transformer=work,
        decoder=decoder,
        reward=_together(reward_work),
        decoder_parameters=decoder_parameters,
        reward_parameters=sum(reward_parameters),
        encoder_parameters=_count_encoders(name),
        prompt=_prompt_width(name, tokens) * dtype.itemsize,
        uncounted=", and ".join(filter(None, uncounted)),
    )


def part_config(name: str, part: str) -> Mapping[str, Any]:
    """The configuration of one part of a FLUX-layout model, by what ``model.name`` may be.

    It is read where the model is; a model that is not here is what was published of it. Raises MissingError for one
    that is neither.
    """
    if name == "miniature":
        from srpo_cli.miniature import WEIGHTS

        name = str(WEIGHTS / "pipeline")
    file = f"{part}/{_CONFIG_FILES.get(part, 'config.json')}"
    if Path(name).is_dir():
        path = Path(name) / file
        if not path.is_file():
            raise MissingError(f"no {file} in {name}: a FLUX pipeline has one, and the plan is counted from it")
        return _read(path)
    published = _FLUX_1_DEV if name.endswith(".safetensors") else _PUBLISHED.get(name)
    hub = HUB_FILES.get(name)
    repository = hub.repo if hub else name
    found = None
    if not name.endswith(".safetensors"):
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repository, file)
    if isinstance(found, str):
        return _read(Path(found))
    if published is None:
        raise MissingError(
            f"{name} cannot be planned: its {file} is not in the Hugging Face cache; fetch it with: "
            f'hf download {repository} --include "*.json"'
        )
    return published[part]


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MissingError(f"{path} cannot be read as a configuration: fetch it again") from error


def _grid(config: TrainConfig) -> tuple[int, int]:
    """Rows and columns of tokens, each of 2x2 latents."""
    height, width = config.model.size
    unit = 2 ** len(part_config(config.model.name, "vae")["block_out_channels"])
    if height % unit or width % unit:
        raise UsageError(
            f"model.size is {[height, width]}: {config.model.name} makes multiples of {unit} px on both sides"
        )
    return height // unit, width // unit


def _prompt_width(name: str, tokens: int) -> int:
    """Numbers in one encoded prompt: T5's states and CLIP's pooled one."""
    architecture = part_config(name, "transformer")
    return architecture["joint_attention_dim"] * tokens + architecture["pooled_projection_dim"]


# The parts


def _count_transformer(
    config: TrainConfig, dtype: torch.dtype, grid: tuple[int, int], tokens: int
) -> tuple[dict[str, int], Work]:
    """What the transformer and its LoRA hold, and its work."""
    from diffusers import FluxTransformer2DModel

    architecture = dict(part_config(config.model.name, "transformer"))

    def run(double: int, single: int) -> tuple[dict[str, int], Work]:
        with torch.device("meta"):
            model = FluxTransformer2DModel.from_config(architecture, num_layers=double, num_single_layers=single)
        held = _held(model.to(dtype))
        held["lora"] = _add_lora(model, config) if config.train.mode == "lora" else 0
        return held, _measure(model, _call(model, dtype, grid, tokens), list(_blocks(model)))

    (held, work), (more_double, double), (more_single, single) = run(1, 1), run(2, 1), run(1, 2)
    further = architecture["num_layers"] - 1, architecture["num_single_layers"] - 1

    def whole(one: float, with_double: float, with_single: float) -> float:
        return one + further[0] * (with_double - one) + further[1] * (with_single - one)

    summed = ("forward", "both", "recomputed", "saved", "stash")
    counted = {key: whole(*(getattr(each, key) for each in (work, double, single))) for key in summed}
    totals = {
        key: whole(value, more_double[key], more_single[key])
        for key, value in held.items()
        if key in ("parameters", "modulation", "linears", "lora")
    }
    return held | totals, replace(work, **counted)


def _count_decoder(name: str, dtype: torch.dtype, grid: tuple[int, int]) -> tuple[int, Work]:
    """Parameters of the VAE, and the work of decoding."""
    from diffusers import AutoencoderKL

    with torch.device("meta"):
        vae = AutoencoderKL.from_config(dict(part_config(name, "vae"))).to(dtype).requires_grad_(False)
    latents = _empty(1, vae.config.latent_channels, 2 * grid[0], 2 * grid[1], dtype=dtype).requires_grad_()
    units = [vae.decoder.mid_block, *vae.decoder.up_blocks]
    return _size(vae), _measure(vae, lambda: vae.decode(latents, return_dict=False)[0], units)


@cache
def _count_reward(name: str, dtype: torch.dtype) -> tuple[int, Work, str]:
    """Parameters and work of the reward's picture tower, and what could not be counted.

    Texts are read once for each word and prompt, before the first step; then their tower is on the host.
    """
    import open_clip

    architecture = _TOWERS.get(name)
    if name.startswith("clip:"):
        architecture = name.removeprefix("clip:").partition("/")[0]
    if name in MINIATURE_REWARDS:
        from srpo_cli.miniature import WEIGHTS

        settings = _read(WEIGHTS / "reward" / "reward.json")
    elif architecture:
        settings = open_clip.get_model_config(architecture)
    else:
        return 0, Work(), f"reward {name}, whose network is not a CLIP"
    if settings is None or "hf_model_name" in settings["text_cfg"] or "timm_model_name" in settings["vision_cfg"]:
        return 0, Work(), f"reward {name}, whose towers are another library's"
    with torch.device("meta"):
        clip = open_clip.CLIP(settings["embed_dim"], settings["vision_cfg"], settings["text_cfg"])
    tower = clip.to(dtype).requires_grad_(False).eval().visual
    side = settings["vision_cfg"]["image_size"]
    pixels = _empty(1, 3, side, side, dtype=dtype).requires_grad_()
    return _size(tower), _measure(tower, lambda: tower(pixels), []), ""


def _together(works: Sequence[Work]) -> Work:
    """What several parts do on the same picture, all of them kept for one backward pass."""
    summed = ("forward", "both", "recomputed", "saved", "stash")
    largest = ("block", "widest")
    totals = {key: sum(getattr(work, key) for work in works) for key in summed}
    return Work(**totals, **{key: max(getattr(work, key) for work in works) for key in largest})


@cache
def _count_encoders(name: str) -> int:
    """Parameters of CLIP's text tower and of T5's encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    with torch.device("meta"):
        clip = CLIPTextModel(CLIPTextConfig.from_dict(dict(part_config(name, "text_encoder"))))
        t5 = T5EncoderModel(T5Config.from_dict(dict(part_config(name, "text_encoder_2"))))
    return _size(clip) + _size(t5)


def _call(transformer: nn.Module, dtype: torch.dtype, grid: tuple[int, int], tokens: int) -> Callable[[], Tensor]:
    """One forward pass for one picture."""
    config, image_tokens = transformer.config, grid[0] * grid[1]
    inputs = {
        "hidden_states": _empty(1, image_tokens, config.in_channels, dtype=dtype),
        "encoder_hidden_states": _empty(1, tokens, config.joint_attention_dim, dtype=dtype),
        "pooled_projections": _empty(1, config.pooled_projection_dim, dtype=dtype),
        "timestep": _empty(1, dtype=dtype),
        "guidance": _empty(1) if config.guidance_embeds else None,
        "img_ids": _empty(image_tokens, 3),
        "txt_ids": _empty(tokens, 3),
    }
    return lambda: transformer(**inputs, return_dict=False)[0]


def _add_lora(transformer: nn.Module, config: TrainConfig) -> int:
    """Put the configured LoRA beside a frozen transformer; returns its parameters."""
    from srpo_cli.models.flux_lora import add_lora

    transformer.requires_grad_(False)
    with torch.device("meta"):
        add_lora(transformer, config.lora.rank, config.lora.alpha, config.lora.targets)
    return sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad)


def _blocks(transformer: nn.Module) -> Iterator[nn.Module]:
    yield from transformer.transformer_blocks
    yield from transformer.single_transformer_blocks


def _held(transformer: nn.Module) -> dict[str, int]:
    """A transformer's parameters, by what :class:`Counts` calls them."""
    from srpo_cli.models.quantised import is_modulation

    weights = {
        name: module.weight.numel()
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear) and "transformer_blocks." in name
    }
    modulation = sum(size for name, size in weights.items() if is_modulation(name))
    return {
        "parameters": _size(transformer),
        "modulation": modulation,
        "linears": sum(weights.values()) - modulation,
        "block": max(_size(block) for block in _blocks(transformer)),
        "matrix": max(weights.values()),
    }


# Measuring


def _measure(module: nn.Module, call: Callable[[], Tensor], units: Sequence[nn.Module]) -> Work:
    """Run a module on the meta device, forward and backward, and forward again with its ``units`` recomputed.

    Args:
        module: its parameters are not among what is kept.
        call: makes the output; what is to get a gradient requires one.
        units: the modules that gradient checkpointing recomputes, none where there is no such thing.
    """
    kept = _Kept(module)
    with _fused_attention(), FlopCounterMode(display=False) as flops, kept.watch(units, flops.get_total_flops):
        output = call()
        forward = flops.get_total_flops()
        torch.autograd.backward([output], [torch.empty_like(output)])
    both = flops.get_total_flops()
    if not units:
        return Work(forward, both, both, kept.bytes, kept.bytes, 0, kept.widest)
    stash = _Kept(module)
    module.enable_gradient_checkpointing()
    try:
        with _fused_attention(), stash.watch():
            call()
    finally:
        module.disable_gradient_checkpointing()
    again = sum(flops for _, flops in kept.units)
    return Work(forward, both, both + again, kept.bytes, stash.bytes, max(size for size, _ in kept.units), kept.widest)


class _Kept:
    """Bytes that autograd keeps for the backward pass: every storage once, parameters not at all."""

    def __init__(self, module: nn.Module) -> None:
        self._known = [parameter.untyped_storage() for parameter in module.parameters()]
        self._seen = {id(storage) for storage in self._known}
        self.bytes = self.widest = 0
        self.units: list[tuple[int, float]] = []
        """Bytes and FLOPs that each unit added."""

    @contextmanager
    def watch(self, units: Sequence[nn.Module] = (), flops: Callable[[], float] = float) -> Iterator[None]:
        """Count what is saved inside, in total and by unit."""
        started: list[tuple[int, float]] = []

        def enter(*_: Any) -> None:
            started.append((self.bytes, flops()))

        def leave(*_: Any) -> None:
            size, work = started.pop()
            self.units.append((self.bytes - size, flops() - work))

        hooks = [unit.register_forward_pre_hook(enter) for unit in units]
        hooks += [unit.register_forward_hook(leave) for unit in units]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in self._seen:
            self._seen.add(id(storage))
            self._known.append(storage)  # held, so that no other one gets its id
            self.bytes += storage.nbytes()
            self.widest = max(self.widest, storage.nbytes())
        return tensor


class _FusedAttention(torch.autograd.Function):
    """Attention as fused kernels keep it: inputs, output and one number per query, never the scores.

    On the meta device torch's own would be the one that keeps the scores, twice the bytes of everything else.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = F.scaled_dot_product_attention(query, key, value)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        scores = query.new_empty(*query.shape[:-1], key.shape[-2])
        # Four products, as many FLOPs as a backward pass has by convention; a kernel's own recomputation is its affair.
        of_scores = gradient @ value.transpose(-1, -2)
        return of_scores @ key, of_scores.transpose(-1, -2) @ query, scores.transpose(-1, -2) @ gradient


class _fused_attention(TorchFunctionMode):
    """Context in which :class:`_FusedAttention` takes the place of torch's attention."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            inputs = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])]
            return _FusedAttention.apply(*inputs[:3])
        return function(*args, **kwargs)


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
