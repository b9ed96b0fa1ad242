"""The FLUX family through diffusers: FLUX.1-dev, the miniature of its layout, fine-tuned copies of either.

Latents travel packed, as the transformer takes them: (B, tokens, 4 * channels), one token per 2x2 latents.
Sigma becomes the model's clock in :meth:`Flux.velocity` and :meth:`Flux.sample` only; the latter draws what
``FluxPipeline`` draws.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from srpo_cli.core.sampling import euler_sample
from srpo_cli.core.schedule import shifted_sigmas, truncate_to_clock
from srpo_cli.errors import MissingError, SrpoError, UsageError, one_line
from srpo_cli.models.flux_files import (
    PARTS,
    TEXT_PARTS,
    Download,
    load_helper,
    load_model,
    load_text_parts,
    load_transformer,
    make_transformer,
    pipeline_folder,
    tuned_weights,
)
from srpo_cli.models.flux_lora import LowRank, add_lora, fuse_lora, has_lora, load_lora, save_lora, scale_lora
from srpo_cli.models.flux_text import LONGEST_PROMPT, EncodeOne, PromptEncoder
from srpo_cli.models.quantised import float8_linears

Size = tuple[int, int]  # height, width in px
Sampler = Callable[[Callable[[Tensor, Tensor], Tensor], Tensor, Tensor], Tensor]

_CLOCK = 1000  # the transformer multiplies the time it is given by this
_COMPILATIONS = 64  # of a block; torch's 8 are fewer than the batches of a run, and one more would end it
_PROMPTS_KEPT = 512  # encoded prompts in memory, 4 MiB each for FLUX.1-dev
_FAST_ATTENTION = ("_flash_3", "_native_cudnn")  # in this order, where they work; "native" has the rest in it
_CUDNN_FROM = (9, 0)  # CUDA capability: before Hopper the flash attention inside "native" is as fast


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: T5 states (B, L, D), pooled CLIP (B, D') and text position ids, (L, 3) zeros."""

    prompt_embeds: Tensor
    pooled: Tensor
    text_ids: Tensor

    def select(self, index: slice | Sequence[int] | Tensor) -> Conditioning:
        """The prompts at ``index``, in its order."""
        return Conditioning(self.prompt_embeds[index], self.pooled[index], self.text_ids)

    def repeat(self, count: int) -> Conditioning:
        """All prompts ``count`` times over, one whole batch after the other."""
        return Conditioning(self.prompt_embeds.repeat(count, 1, 1), self.pooled.repeat(count, 1), self.text_ids)

    def to(self, *args: Any, **kwargs: Any) -> Conditioning:
        """All three tensors through ``Tensor.to``."""
        return Conditioning(*(tensor.to(*args, **kwargs) for tensor in vars(self).values()))


class LatentSpace:
    """The autoencoder of a FLUX-layout model with its packing: pictures to latents and back, no transformer.

    Args:
        vae: frozen here. Any ``AutoencoderKL`` will do; its scale and shift are its own configuration's.
        name: what messages call this model.
    """

    def __init__(self, vae: AutoencoderKL, name: str = "vae") -> None:
        self.vae = vae.requires_grad_(False).eval()
        self.name = name
        self.granularity = 2 ** len(vae.config.block_out_channels)
        """Height and width must be multiples of this many px: the VAE's factor times the 2x2 packing."""
        self._vae_scale = vae.config.scaling_factor
        self._vae_shift = vae.config.shift_factor or 0.0

    @property
    def device(self) -> torch.device:
        """Where noise is made for and latents are expected."""
        return self.vae.device

    @property
    def dtype(self) -> torch.dtype:
        """What the model computes in."""
        return self.vae.dtype

    @property
    def latent_dtype(self) -> torch.dtype:
        """What noise is made in and latents are kept in."""
        return self.dtype

    def _grid(self, size: Size) -> Size:
        """Rows and columns of tokens; UsageError for a size that the model cannot make."""
        height, width = size
        unit = self.granularity
        if min(size) < unit or height % unit or width % unit:
            raise UsageError(f"{self.name} cannot make {height}x{width} px: both sides must be multiples of {unit}.")
        return height // unit, width // unit

    def nearest_size(self, size: Size, pixels: int | None = None) -> Size:
        """The size nearest to ``size`` that the model can make, its area brought down to about ``pixels`` at most."""
        scale = min(1.0, math.sqrt(pixels / (size[0] * size[1]))) if pixels else 1.0
        return tuple(max(1, round(edge * scale / self.granularity)) * self.granularity for edge in size)

    def noise(self, count: int, size: Size, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """Packed noise for ``count`` pictures, what ``FluxPipeline`` draws from ``generator``, to the bit.

        A list holds one generator per picture. A CPU generator gives the same noise on every device.
        """
        rows, columns = self._grid(size)
        shape = (count, self.vae.config.latent_channels, 2 * rows, 2 * columns)
        drawn_on = (generator[0] if isinstance(generator, list) else generator).device if generator else self.device
        noise = randn_tensor(shape, generator=generator, device=drawn_on, dtype=self.latent_dtype)
        return _pack(noise.to(self.device, non_blocking=True))

    def decode(self, packed_latents: Tensor, size: Size) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of clean packed latents; float32 or wider, differentiable."""
        latents = _unpack(packed_latents, *self._grid(size)) / self._vae_scale + self._vae_shift
        with self._own_arithmetic():
            pixels = self.vae.decode(latents.to(self.vae.device, self.vae.dtype), return_dict=False)[0]
        pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        return (pixels / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Packed latents of pictures (B, 3, H, W) in [0, 1]: the mean of the VAE's posterior, no sampling."""
        self._grid(images.shape[-2:])
        pixels = (2 * images - 1).to(self.vae.device, self.vae.dtype)
        with self._own_arithmetic():
            latents = self.vae.encode(pixels).latent_dist.mode()
        return _pack(((latents - self._vae_shift) * self._vae_scale).to(self.latent_dtype))

    def _own_arithmetic(self) -> AbstractContextManager[None]:
        """Keep a caller's autocast out of the autoencoder: it would put normalisations into float32."""
        return torch.autocast(self.vae.device.type, enabled=False)


class Flux(LatentSpace):
    """A FLUX-layout model made of diffusers and transformers parts; only its transformer is ever trained.

    Args:
        transformer, vae, scheduler: the parts of a ``FluxPipeline``. VAE and text encoders are frozen here.
        text_encoder, text_encoder_2, tokenizer, tokenizer_2: CLIP and T5; not needed if prompts come encoded.
        max_sequence_length: T5 tokens that every prompt is padded or cut to.
        name: what messages call this model.
        latent_dtype: what noise and the sampler's state are kept in; None: the transformer's dtype, as in
            ``FluxPipeline``.
    """

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        vae: AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: CLIPTextModel | None = None,
        text_encoder_2: T5EncoderModel | None = None,
        tokenizer: CLIPTokenizer | None = None,
        tokenizer_2: T5TokenizerFast | None = None,
        max_sequence_length: int = LONGEST_PROMPT,
        name: str = "flux",
        latent_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(vae, name)
        self.transformer = transformer
        self.scheduler = scheduler
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.encode_one: EncodeOne | None = None
        """Where encoded prompts come from."""
        self.compute_dtype: torch.dtype | None = None
        """What the transformer computes in where that is not its weights' own, as in shards that travel rounded."""
        self._latent_dtype = latent_dtype
        if text_encoder is not None and text_encoder_2 is not None:
            encoder = PromptEncoder(text_encoder, text_encoder_2, tokenizer, tokenizer_2, max_sequence_length)
            self.encode_one = lru_cache(maxsize=_PROMPTS_KEPT)(encoder.encode)

    @property
    def device(self) -> torch.device:
        return self.transformer.x_embedder.weight.device  # diffusers' own ``device`` walks through every module

    @property
    def dtype(self) -> torch.dtype:
        # Blocks may be quantised, and a LoRA is float32.
        return self.compute_dtype or self.transformer.x_embedder.weight.dtype

    @property
    def latent_dtype(self) -> torch.dtype:
        return self._latent_dtype or self.dtype

    def named_trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The transformer's parameters by name, or those of its LoRA where there is one."""
        return {name: value for name, value in self.transformer.named_parameters() if value.requires_grad}

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The same without their names."""
        return list(self.named_trainable_parameters().values())

    def save_weights(self, folder: Path) -> None:
        """Write what is trained, in the layout that :func:`load_flux` takes as ``weights``."""
        if self.has_lora:
            save_lora(self.transformer, folder)
        else:
            self.transformer.save_pretrained(folder)

    # --- LoRA -----------------------------------------------------------------------------------------

    @property
    def has_lora(self) -> bool:
        """Whether there is a LoRA, loaded or added, that is not folded in."""
        return has_lora(self.transformer)

    def add_lora(
        self, rank: int, alpha: float | None = None, targets: Sequence[str] | None = None, seed: int = 0
    ) -> None:
        """Train a LoRA from here on, and nothing else; see :func:`srpo_cli.models.flux_lora.add_lora`."""
        add_lora(self.transformer, rank, alpha, targets, torch.Generator().manual_seed(seed))

    def scale_lora(self, scale: float) -> None:
        """Draw with the LoRA ``scale`` times as strong; see :func:`srpo_cli.models.flux_lora.scale_lora`."""
        scale_lora(self.transformer, scale)

    def untrained_velocity(
        self, packed_latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float, size: Size
    ) -> Tensor:
        """:meth:`velocity` of the model beneath its LoRA."""
        self.transformer.disable_adapters()
        try:
            return self.velocity(packed_latents, sigma, conditioning, guidance, size)
        finally:
            self.transformer.enable_adapters()

    def fuse_lora(self) -> dict[str, LowRank]:
        """Fold a LoRA into the weights and train all of them; see :func:`srpo_cli.models.flux_lora.fuse_lora`."""
        return fuse_lora(self.transformer)

    # --- memory and speed -----------------------------------------------------------------------------

    def checkpoint_blocks(self, transformer: bool, vae: bool) -> None:
        """Recompute each block in its backward pass, or keep its activations; without gradient neither happens."""
        for part, wanted in ((self.transformer, transformer), (self.vae, vae)):
            if wanted:
                part.enable_gradient_checkpointing()
            else:
                part.disable_gradient_checkpointing()

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the transformer's repeated blocks whole, each kind on its first call.

        A kind is compiled again for other batch sizes, with and without gradient or float8, up to some 60 times.
        """
        options: dict[str, Any] = {"fullgraph": True, "backend": backend}
        if "recompile_limit" in signature(torch.compile).parameters:
            options["recompile_limit"] = _COMPILATIONS  # holds in the threads of a backward pass, too
        else:
            torch.compiler.config.recompile_limit = max(torch.compiler.config.recompile_limit, _COMPILATIONS)
        self.transformer.compile_repeated_blocks(**options)

    def use_attention(self, name: str = "auto") -> str:
        """Choose the attention backend by diffusers' name and return it.

        "auto" takes the fastest one that is installed and works here, forward and backward. Raises UsageError for a
        name that is none or does not work here, MissingError for a package that is not installed.
        """
        if name != "auto":
            self._set_attention(name)
            return name
        for candidate in _FAST_ATTENTION if self._may_be_faster() else ():
            with suppress(SrpoError):
                self._set_attention(candidate)
                return candidate
        self._set_attention("native")
        return "native"

    def _may_be_faster(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) >= _CUDNN_FROM

    def _set_attention(self, name: str) -> None:
        try:
            with attention_backend("native"):  # diffusers would make it that of every other model, too
                self.transformer.set_attention_backend(name)
                self._try_attention(name)
        except ValueError as error:
            known = [backend.value for backend in AttentionBackendName]
            raise UsageError.unknown("attention backend", name, ["auto", *known]) from error
        except (RuntimeError, ImportError) as error:
            raise MissingError(f"attention {name} is not installed here ({one_line(error)}): or set auto") from error

    def _try_attention(self, name: str) -> None:
        """One pass forward and backward over a few tokens, as the transformer would make it."""
        heads = (1, 128, 1, self.transformer.config.attention_head_dim)
        try:
            q, k, v = (torch.zeros(heads, dtype=self.dtype, device=self.device, requires_grad=True) for _ in range(3))
            with torch.enable_grad():
                dispatch_attention_fn(q, k, v, backend=AttentionBackendName(name)).sum().backward()
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            self.transformer.set_attention_backend("native")
            where = f"{self.dtype} on {self.device.type}".removeprefix("torch.")
            raise UsageError(f"attention {name} does not work in {where} ({one_line(error)}): set auto") from error

    def float8_rollouts(self) -> AbstractContextManager[None]:
        """Compute the blocks' linear layers in float8 while this is open; for sampling only, it has no gradient.

        See :func:`srpo_cli.models.quantised.float8_linears`. Weights that are sharded must be gathered before.
        """
        blocks = [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]
        return float8_linears(nn.ModuleList(blocks), self.device)

    # --- prompts --------------------------------------------------------------------------------------

    def release_text_encoders(self, encode_one: EncodeOne | None = None) -> None:
        """Let the text encoders go; from here on encoded prompts come from ``encode_one``."""
        self.text_encoder = self.text_encoder_2 = None
        self.encode_one = lru_cache(maxsize=_PROMPTS_KEPT)(encode_one) if encode_one else None

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode N prompts, each distinct one once, to the model's device and dtype."""
        if self.encode_one is None:
            raise RuntimeError(f"{self.name} has no text encoders: it was loaded without them")
        # One at a time: to the last bit, an encoding must not depend on which prompts were cached already.
        embeds, pooled = zip(*(self.encode_one(prompt) for prompt in prompts), strict=True)
        text_ids = torch.zeros(embeds[0].shape[0], 3)
        return Conditioning(torch.stack(embeds), torch.stack(pooled), text_ids).to(
            self.device, self.dtype, non_blocking=True
        )

    # --- the flow -------------------------------------------------------------------------------------

    def sigmas(self, steps: int, size: Size, shift: float | None = None) -> Tensor:
        """Sampling sigmas (steps + 1,) from about 1 down to 0, float32 on the CPU.

        ``shift`` None follows the model's own scheduler, whose shift may grow with the picture, as
        ``FluxPipeline`` does; a number fixes it.
        """
        if shift is not None:
            return shifted_sigmas(steps, shift)
        rows, columns = self._grid(size)
        config = self.scheduler.config
        mu = calculate_shift(
            rows * columns,
            config.get("base_image_seq_len", 256),
            config.get("max_image_seq_len", 4096),
            config.get("base_shift", 0.5),
            config.get("max_shift", 1.15),
        )
        uniform = None if config.get("use_flow_sigmas") else np.linspace(1.0, 1 / steps, steps)
        self.scheduler.set_timesteps(steps, device="cpu", sigmas=uniform, mu=mu)
        return self.scheduler.sigmas

    def velocity(
        self, packed_latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance: float, size: Size
    ) -> Tensor:
        """Predict ``eps - x_0``; differentiable in the transformer's parameters.

        Args:
            packed_latents: (B, tokens, 4 * channels) at ``sigma``.
            sigma: scalar or (B,), in [0, 1].
            conditioning: B prompts.
            guidance: distilled guidance scale; ignored by models that were not trained with one.
            size: height and width of the picture, px.

        Returns packed velocity, shaped like ``packed_latents``, in the model's dtype.
        """
        return self._velocity(packed_latents, self._ticks(sigma), conditioning, guidance, size)

    def _ticks(self, sigma: Tensor) -> Tensor:
        """Sigmas as the transformer's clock; rounded to the dtype as ticks, as diffusers does, not as fractions."""
        return (sigma * _CLOCK).to(self.device, self.dtype, non_blocking=True)

    def _velocity(
        self, packed_latents: Tensor, ticks: Tensor, conditioning: Conditioning, guidance: float, size: Size
    ) -> Tensor:
        batch, device = packed_latents.shape[0], self.device
        distilled = self.transformer.config.guidance_embeds
        return self.transformer(
            hidden_states=packed_latents.to(device, self.dtype),
            timestep=ticks.expand(batch) / _CLOCK,
            guidance=torch.full((batch,), guidance, device=device) if distilled else None,
            pooled_projections=conditioning.pooled,
            encoder_hidden_states=conditioning.prompt_embeds,
            txt_ids=conditioning.text_ids,
            img_ids=_image_ids(*self._grid(size), device),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def sample(
        self,
        conditioning: Conditioning,
        noise: Tensor,
        size: Size,
        steps: int,
        guidance: float,
        shift: float | None = None,
        truncate_time: bool = False,
        sampler: Sampler = euler_sample,
    ) -> Tensor:
        """Draw pictures with the Euler sampler.

        Args:
            conditioning, noise: B prompts and packed noise, (B, tokens, 4 * channels).
            size, steps, shift: as for :meth:`sigmas`.
            guidance: as for :meth:`velocity`.
            truncate_time: tell the model the time rounded down to its integer clock, as SRPO's reference
                rollout does; the latents move by the exact sigmas all the same.
            sampler: ``euler_path`` to keep the latents of every step.

        Returns packed clean latents, shaped like ``noise``, or what else ``sampler`` makes of it.
        """
        sigmas = self.sigmas(steps, size, shift)
        # On the device before the first step, all at once: a copy in each would make the host wait for the device.
        ticks = iter(self._ticks(truncate_to_clock(sigmas, _CLOCK) if truncate_time else sigmas))

        def velocity(latents: Tensor, _sigma: Tensor) -> Tensor:
            return self._velocity(latents, next(ticks), conditioning, guidance, size).to(self.latent_dtype)

        return sampler(velocity, noise.to(self.device, self.latent_dtype), sigmas.to(self.device, non_blocking=True))


def _pack(latents: Tensor) -> Tensor:
    """(B, C, 2h, 2w) latents to (B, h * w, 4C) tokens."""
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def _unpack(packed_latents: Tensor, rows: int, columns: int) -> Tensor:
    """Undo :func:`_pack`."""
    batch, _, channels = packed_latents.shape
    patches = packed_latents.reshape(batch, rows, columns, channels // 4, 2, 2)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // 4, 2 * rows, 2 * columns)


@lru_cache(maxsize=8)
def _image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Position (0, row, column) of every token, (rows * columns, 3) float32."""
    grid = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    return nn.functional.pad(grid, (1, 0)).float().to(device)


def load_flux(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    weights: str | Path | Sequence[str | Path] | None = None,
    frozen_dtype: torch.dtype | None = None,
    *,
    text_encoders: bool = True,
    base: str = "model",
    latent_dtype: torch.dtype | None = None,
    download: Download | None = None,
    literal: bool = False,
    empty: bool = False,
) -> Flux:
    """Load a FLUX-layout pipeline from local files, of which only safetensors are read.

    Args:
        name: "flux.1-dev", "flux.1-krea-dev", "miniature", a folder in diffusers' pipeline layout, a repository of
            the Hugging Face Hub, or the single file of a transformer, whose other parts are FLUX.1-dev's.
        dtype, device: what and where it runs; the CPU computes in float32.
        weights: a tuned transformer (folder of ``save_pretrained``, or one file in diffusers' or Black Forest Labs'
            layout) in place of the pipeline's own, a LoRA on top of it (a file, or the folder around it), or both.
            A LoRA is what is trained from then on.
        frozen_dtype: what VAE and text encoders run in, where a float32 transformer would not leave them room.
        text_encoders: False leaves them unread; prompts then come from :meth:`Flux.release_text_encoders`.
        base: "float8", "int8" or "nf4" keeps the blocks' linear layers, modulation included, weight-only quantised
            and the transformer frozen, for a LoRA; "model": everything in ``dtype``.
        latent_dtype: see :class:`Flux`.
        download: fetches what is not here; None: nothing is downloaded.
        literal: take both dtypes at their word on the CPU, too.
        empty: leave the transformer's weights unread, on the meta device; see
            :func:`srpo_cli.models.flux_files.read_weights`. Not with a LoRA.

    Raises MissingError with the command that fetches what is not here, SrpoError for files that do not fit.
    """
    if torch.device(device).type == "cpu" and not literal:
        dtype = frozen_dtype = torch.float32
    tuned = tuned_weights(name, weights)
    wanted = [part for part in PARTS if text_encoders or part not in TEXT_PARTS]
    if tuned.transformer:
        wanted.remove("transformer")  # its configuration is enough, and comes with every part of it
    folder = pipeline_folder(name, wanted, download)
    source = tuned.transformer or folder / "transformer"

    parts = {"scheduler": load_helper(FlowMatchEulerDiscreteScheduler, folder / "scheduler")}
    if empty and tuned.lora:
        raise UsageError(f"{tuned.lora} cannot be folded into weights that are not read whole: merge it first")
    parts["transformer"] = (
        make_transformer(source, folder).to(dtype) if empty else load_transformer(source, folder, dtype, device, base)
    )
    parts["vae"] = load_model(AutoencoderKL, folder / "vae", frozen_dtype or dtype).to(device)
    if text_encoders:
        parts |= load_text_parts(folder, frozen_dtype or dtype, device)
    _check_fit(parts, source)
    if base != "model":
        parts["transformer"].requires_grad_(False)
    if tuned.lora:
        load_lora(parts["transformer"], tuned.lora)
    return Flux(**parts, name=name, latent_dtype=latent_dtype)


def load_latent_space(
    name: str, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> LatentSpace:
    """Load only the autoencoder of what :func:`load_flux` takes as ``name``, or of any folder with a ``vae`` in it.

    Raises what :func:`load_flux` raises.
    """
    folder = pipeline_folder(name, ("vae",))
    vae = load_model(AutoencoderKL, folder / "vae", torch.float32 if torch.device(device).type == "cpu" else dtype)
    return LatentSpace(vae.to(device), name)


def _check_fit(parts: dict[str, Any], source: Path) -> None:
    """Refuse a transformer that was made for other text encoders or another VAE."""
    config = parts["transformer"].config
    pairs = [("VAE channels", config.in_channels // 4, parts["vae"].config.latent_channels)]
    if "text_encoder" in parts:
        pairs.append(("T5 width", config.joint_attention_dim, parts["text_encoder_2"].config.d_model))
        pairs.append(("CLIP width", config.pooled_projection_dim, parts["text_encoder"].config.hidden_size))
    for what, wanted, given in pairs:
        if wanted != given:
            raise SrpoError(f"The transformer in {source} is for another pipeline: {what} {wanted}, here {given}.")
