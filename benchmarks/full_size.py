"""Models of FLUX.1-dev's and HPSv2's size with random weights: in memory, and as files that the product loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from benchmarks.scenes import QUIET, SMALL_LAYOUT, randomise
from srpo_cli.config.load import load_train_config
from srpo_cli.config.schema import TrainConfig
from srpo_cli.miniature import WEIGHTS
from srpo_cli.models.flux import Conditioning, Flux
from srpo_cli.recipes.plan import part_config


@dataclass(frozen=True)
class Scale:
    """How large everything is.

    Attributes:
        sizes: height and width in px of the usual picture and of the large one.
        tokens: of a prompt.
        clip: the reward's architecture in open_clip.
        layout: keys of the transformer's configuration; the rest are FLUX.1's.
        matmul: side of the square product that tells the device's ceiling.
        steps: of a rollout.
    """

    sizes: tuple[tuple[int, int], tuple[int, int]] = ((720, 720), (1024, 1024))
    tokens: int = 512
    clip: str = "ViT-H-14"
    layout: tuple[tuple[str, object], ...] = (("guidance_embeds", True),)
    matmul: int = 8192
    steps: int = 25


FULL = Scale()
TINY = Scale(((64, 64), (96, 96)), 32, "ViT-S-32-alt", tuple(SMALL_LAYOUT.items()), 256, 2)
"""Small enough to show on a CPU in a test that nothing breaks."""


def make_transformer(scale: Scale, device: torch.device, dtype: torch.dtype) -> FluxTransformer2DModel:
    """Made where it is to be, in its dtype: on the host it would take minutes."""
    return _made(lambda: FluxTransformer2DModel(**dict(scale.layout)), device, dtype).train()


def make_vae(scale: Scale, device: torch.device, dtype: torch.dtype) -> AutoencoderKL:
    """FLUX.1's decoder, or the miniature's shape of one."""
    name = "flux.1-dev" if scale is FULL else "miniature"
    return _made(lambda: AutoencoderKL.from_config(dict(part_config(name, "vae"))), device, dtype).eval()


def make_clip(scale: Scale, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Both towers of the reward."""
    settings = open_clip.get_model_config(scale.clip)
    parts = (settings["embed_dim"], settings["vision_cfg"], settings["text_cfg"])
    return _made(lambda: open_clip.CLIP(*parts, quick_gelu=settings.get("quick_gelu", False)), device, dtype).eval()


def make_flux(scale: Scale, device: torch.device, dtype: torch.dtype) -> Flux:
    """A model without text encoders."""
    transformer, vae = make_transformer(scale, device, dtype), make_vae(scale, device, dtype)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return Flux(transformer, vae, scheduler, latent_dtype=torch.float32)


def random_texts(flux: Flux, scale: Scale, batch: int) -> Conditioning:
    """Encodings of ``batch`` prompts that nobody wrote."""
    config = flux.transformer.config
    like = {"device": flux.device, "dtype": flux.dtype}
    embeds = torch.randn(batch, scale.tokens, config.joint_attention_dim, **like)
    pooled = torch.randn(batch, config.pooled_projection_dim, **like)
    return Conditioning(embeds, pooled, torch.zeros(scale.tokens, 3, **like))


def random_latents(flux: Flux, size: tuple[int, int], batch: int) -> Tensor:
    """Packed noise for ``batch`` pictures."""
    return flux.noise(batch, size, torch.Generator().manual_seed(0))


def write_pipeline(folder: Path, scale: Scale, device: torch.device) -> Path:
    """A pipeline and a reward that the product can load from ``folder``.

    Text encoders are of full width and one layer; a run reads them once for its cache and lets them go.
    """
    pipeline = folder / "pipeline"
    pipeline.mkdir(parents=True)
    for part in ("tokenizer", "tokenizer_2"):
        shutil.copytree(WEIGHTS / "pipeline" / part, pipeline / part)
    settings = pipeline / "tokenizer_2" / "tokenizer_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "model_max_length": scale.tokens}))
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    transformer = make_transformer(scale, device, torch.bfloat16)
    width, pooled = transformer.config.joint_attention_dim, transformer.config.pooled_projection_dim
    transformer.save_pretrained(pipeline / "transformer")
    del transformer
    make_vae(scale, device, torch.bfloat16).save_pretrained(pipeline / "vae")
    FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True).save_pretrained(pipeline / "scheduler")
    clip, t5 = (dict(part_config("miniature", part)) for part in ("text_encoder", "text_encoder_2"))
    clip |= {"hidden_size": pooled, "projection_dim": pooled, "num_hidden_layers": 1}
    t5 |= {"d_model": width, "num_layers": 1}
    encoders = {"text_encoder": CLIPTextModel(CLIPTextConfig.from_dict(clip))}
    encoders["text_encoder_2"] = T5EncoderModel(T5Config.from_dict(t5))
    for part, encoder in encoders.items():
        randomise(encoder)
        encoder.save_pretrained(pipeline / part)
    reward = make_clip(scale, device, torch.bfloat16)
    save_file(
        {name: tensor.contiguous() for name, tensor in reward.state_dict().items()}, folder / "reward.safetensors"
    )
    (folder / "prompts.txt").write_text("".join(f"a {a} {b}\n" for a in ("red", "green", "blue") for b in "xyz"))
    return folder


def run_config(folder: Path, scale: Scale, *overrides: str) -> TrainConfig:
    """The preset ``realism`` on what :func:`write_pipeline` wrote."""
    wanted = [
        f"model.name={folder / 'pipeline'}",
        f"model.size={list(scale.sizes[0])}",
        f"reward.name=clip:{scale.clip}",
        f"reward.weights={folder / 'reward.safetensors'}",
        f"prompts.source={folder / 'prompts.txt'}",
        f"prompts.cache={folder / 'cache'}",
        f"rollout.steps={scale.steps}",
        *QUIET,
    ]
    return load_train_config("realism", overrides=[*wanted, *overrides]).config


def _made(make: Callable[[], Any], device: torch.device, dtype: torch.dtype) -> Any:
    """A module with random weights in ``dtype``; buffers are what they should be."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            module = make()
    finally:
        torch.set_default_dtype(before)
    randomise(module)
    return module
