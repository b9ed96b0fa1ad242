"""The FLUX family through diffusers: FLUX.1-dev, the miniature of its layout, fine-tuned copies of either.

Latents travel packed, as the transformer takes them: (B, tokens, 4 * channels), one token per 2x2 latents.
Sigma becomes the model's clock in :meth:`Flux.velocity` only; :meth:`Flux.sample` draws what ``FluxPipeline``
draws.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from srpo_cli.core.sampling import euler_sample
from srpo_cli.core.schedule import shifted_sigmas, truncate_to_clock
from srpo_cli.errors import MissingError, SrpoError, UsageError, one_line
from srpo_cli.registry import HUB_FILES

Size = tuple[int, int]  # height, width in px

_CLOCK = 1000  # the transformer multiplies the time it is given by this
_LONGEST_PROMPT = 512  # T5 tokens; FLUX was trained with no more
_PROMPTS_KEPT = 512  # encoded prompts in memory, 4 MiB each for FLUX.1-dev
_LORA_FILE = "pytorch_lora_weights.safetensors"
_FROZEN: dict[str, Any] = {
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
}
_HELPERS: dict[str, Any] = {
    "scheduler": FlowMatchEulerDiscreteScheduler,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": T5TokenizerFast,
}


@dataclass(frozen=True)
class Conditioning:
    """Encoded prompts: T5 states (B, L, D), pooled CLIP (B, D') and text position ids, (L, 3) zeros."""

    prompt_embeds: Tensor
    pooled: Tensor
    text_ids: Tensor

    def select(self, index: slice | Sequence[int] | Tensor) -> Conditioning:
        """The prompts at ``index``, in its order."""
        return Conditioning(self.prompt_embeds[index], self.pooled[index], self.text_ids)

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
        """What noise is made in."""
        return self.vae.dtype

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
        return _pack(randn_tensor(shape, generator=generator, device=self.device, dtype=self.dtype))

    def decode(self, packed_latents: Tensor, size: Size) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1] of clean packed latents; float32 or wider, differentiable."""
        latents = _unpack(packed_latents, *self._grid(size)) / self._vae_scale + self._vae_shift
        pixels = self.vae.decode(latents.to(self.vae.device, self.vae.dtype), return_dict=False)[0]
        pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
        return (pixels / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Packed latents of pictures (B, 3, H, W) in [0, 1]: the mean of the VAE's posterior, no sampling."""
        self._grid(images.shape[-2:])
        pixels = (2 * images - 1).to(self.vae.device, self.vae.dtype)
        latents = self.vae.encode(pixels).latent_dist.mode()
        return _pack((latents - self._vae_shift) * self._vae_scale)


class Flux(LatentSpace):
    """A FLUX-layout model made of diffusers and transformers parts; only its transformer is ever trained.

    Args:
        transformer, vae, scheduler: the parts of a ``FluxPipeline``. VAE and text encoders are frozen here.
        text_encoder, text_encoder_2, tokenizer, tokenizer_2: CLIP and T5; not needed if prompts come encoded.
        max_sequence_length: T5 tokens per prompt; longer prompts are cut.
        name: what messages and logs call this model.
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
        *,
        max_sequence_length: int = _LONGEST_PROMPT,
        name: str = "flux",
    ) -> None:
        super().__init__(vae, name)
        for frozen in (text_encoder, text_encoder_2):
            if frozen is not None:
                frozen.requires_grad_(False).eval()
        self.transformer = transformer
        self.scheduler = scheduler
        self.text_encoder, self.text_encoder_2 = text_encoder, text_encoder_2
        self.tokenizer, self.tokenizer_2 = tokenizer, tokenizer_2
        self.max_sequence_length = max_sequence_length
        self._encode_prompt = lru_cache(maxsize=_PROMPTS_KEPT)(self._encode_prompt)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The transformer's parameters, or those of its LoRA where one is loaded."""
        return [parameter for parameter in self.transformer.parameters() if parameter.requires_grad]

    def save_weights(self, folder: Path) -> None:
        """Write what is trained, in the layout that :func:`load_flux` takes as ``weights``."""
        adapters = getattr(self.transformer, "peft_config", None)
        if not adapters:
            self.transformer.save_pretrained(folder)
            return
        (name,) = adapters
        FluxLoraLoaderMixin.save_lora_weights(
            folder,
            transformer_lora_layers=get_peft_model_state_dict(self.transformer, adapter_name=name),
            transformer_lora_adapter_metadata=adapters[name].to_dict(),
        )

    def encode_prompts(self, prompts: Sequence[str]) -> Conditioning:
        """Encode N prompts, each distinct one once, to the model's device and dtype."""
        # One at a time: to the last bit, an encoding must not depend on which prompts were cached already.
        embeds, pooled = zip(*(self._encode_prompt(prompt) for prompt in prompts), strict=True)
        text_ids = torch.zeros(embeds[0].shape[0], 3)
        return Conditioning(torch.stack(embeds), torch.stack(pooled), text_ids).to(self.device, self.dtype)

    @torch.no_grad()
    def _encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        """T5 states (L, D) and pooled CLIP (D') of one prompt, on the CPU."""
        clip = _read(self.text_encoder, self.tokenizer, prompt, self.tokenizer.model_max_length)
        t5 = _read(self.text_encoder_2, self.tokenizer_2, prompt, self.max_sequence_length)
        return t5.last_hidden_state[0].cpu(), clip.pooler_output[0].cpu()

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

        Returns packed velocity, shaped like ``packed_latents``.
        """
        batch, device = packed_latents.shape[0], self.device
        distilled = self.transformer.config.guidance_embeds
        return self.transformer(
            hidden_states=packed_latents.to(device, self.dtype),
            # Rounded to the dtype as a tick, not as a fraction, as diffusers does: bfloat16 tells them apart.
            timestep=(sigma * _CLOCK).to(device, self.dtype).expand(batch) / _CLOCK,
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
    ) -> Tensor:
        """Draw pictures with the Euler sampler.

        Args:
            conditioning, noise: B prompts and packed noise, (B, tokens, 4 * channels).
            size, steps, shift: as for :meth:`sigmas`.
            guidance: as for :meth:`velocity`.
            truncate_time: tell the model the time rounded down to its integer clock, as SRPO's reference
                rollout does; the latents move by the exact sigmas all the same.

        Returns packed clean latents, shaped like ``noise``.
        """

        def velocity(latents: Tensor, sigma: Tensor) -> Tensor:
            told = truncate_to_clock(sigma, _CLOCK) if truncate_time else sigma
            return self.velocity(latents, told, conditioning, guidance, size)

        return euler_sample(velocity, noise.to(self.device, self.dtype), self.sigmas(steps, size, shift))


def _read(encoder: Any, tokenizer: Any, prompt: str, length: int) -> Any:
    """A text encoder's output for one prompt, padded or cut to ``length`` tokens."""
    fixed = {"padding": "max_length", "max_length": length, "truncation": True}
    ids = tokenizer([prompt], return_tensors="pt", **fixed).input_ids.to(encoder.device)
    with torch.autocast(encoder.device.type, enabled=False):  # what is cached must not depend on the caller
        return encoder(ids)


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
    weights: str | Path | None = None,
    frozen_dtype: torch.dtype | None = None,
) -> Flux:
    """Load a FLUX-layout pipeline from local files; nothing is downloaded and only safetensors are read.

    Args:
        name: "flux.1-dev", "miniature", a folder in diffusers' pipeline layout, or a repository of the
            Hugging Face Hub that is in the local cache.
        dtype, device: what and where it runs; the CPU always computes in float32.
        weights: a tuned transformer (folder of ``save_pretrained``) in place of the pipeline's own, or a LoRA
            on top of it (``pytorch_lora_weights.safetensors`` or the folder around it).
        frozen_dtype: what VAE and text encoders run in, where a float32 transformer would not leave them room.

    Raises MissingError with the command that fetches what is not here, SrpoError for files that do not fit.
    """
    if torch.device(device).type == "cpu":
        dtype = frozen_dtype = torch.float32
    folder, lora = _pipeline_folder(name), _lora_file(weights)
    transformer = folder / "transformer" if weights is None or lora else Path(weights)

    parts = {part: _load_helper(cls, folder / part) for part, cls in _HELPERS.items()}
    parts["transformer"] = _load_model(FluxTransformer2DModel, transformer, dtype)
    for part, cls in _FROZEN.items():
        parts[part] = _load_model(cls, folder / part, frozen_dtype or dtype)
    _check_fit(parts, transformer)
    if lora:
        _add_lora(parts["transformer"], lora)
    for part in ("transformer", *_FROZEN):
        parts[part].to(device)
    longest = min(parts["tokenizer_2"].model_max_length, _LONGEST_PROMPT)
    return Flux(**parts, max_sequence_length=longest, name=name)


def load_latent_space(
    name: str, dtype: torch.dtype = torch.bfloat16, device: str | torch.device = "cpu"
) -> LatentSpace:
    """Load only the autoencoder of what :func:`load_flux` takes as ``name``, or of any folder with a ``vae`` in it.

    Raises what :func:`load_flux` raises.
    """
    folder = _pipeline_folder(name, "vae")
    vae = _load_model(AutoencoderKL, folder / "vae", torch.float32 if torch.device(device).type == "cpu" else dtype)
    return LatentSpace(vae.to(device), name)


def _pipeline_folder(name: str, part: str = "") -> Path:
    """The local folder of a pipeline by its name; of the Hub's files only those of ``part`` must be there."""
    if name == "miniature":
        from srpo_cli.miniature import WEIGHTS

        if not (WEIGHTS / "pipeline").is_dir():
            raise MissingError(f"The miniature's weights are not in {WEIGHTS / 'pipeline'}; reinstall srpo-cli.")
        return WEIGHTS / "pipeline"
    if Path(name).is_dir():
        return Path(name)
    hub = HUB_FILES.get(name)
    repo = hub.repo if hub else name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo):
        raise UsageError(f"Model {name!r} is neither a known name, nor a folder, nor a Hugging Face repository.")
    command = hub.download if hub else f"hf download {repo}"
    if part:
        command = f'hf download {repo} --include "{part}/*"'
    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise MissingError(f"{name} is not in the Hugging Face cache; fetch it with: {command}") from error
    needed = hub.files if hub else (f"{part}/config.json" if part else "model_index.json",)
    for file in (file for file in needed if file.startswith(part)):
        if not (folder / file).is_file():
            raise MissingError(f"{name} is incomplete in the Hugging Face cache ({file}); continue with: {command}")
    return folder


def _lora_file(weights: str | Path | None) -> Path | None:
    """The LoRA file that ``weights`` is or holds; None for a whole transformer."""
    if weights is None:
        return None
    path = Path(weights)
    if not path.exists():
        raise MissingError(f"Weights {path} not found.")
    if path.is_dir():
        return path / _LORA_FILE if (path / _LORA_FILE).is_file() else None
    if path.suffix != ".safetensors":
        raise UsageError(f"Weights {path}: only safetensors are read, as a LoRA file or a transformer's folder.")
    return path


def _load_helper(cls: Any, folder: Path) -> Any:
    """A scheduler or tokenizer, which hold no tensors."""
    if not folder.is_dir():
        raise MissingError(f"No {folder.name} in {folder.parent}; a FLUX pipeline has one.")
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SrpoError(f"Cannot load {folder}: {one_line(error)}") from error


def _load_model(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A model from a ``save_pretrained`` folder; every one of its tensors must be there and fit."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise MissingError(f"No {cls.__name__} in {folder}: config.json and *.safetensors are needed.")
    try:
        model, info = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise SrpoError(f"Cannot load {folder}: {one_line(error)}") from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise SrpoError(f"{folder} does not hold a {cls.__name__}: {len(wrong)} tensors missing or misshapen.")
    return model


def _check_fit(parts: dict[str, Any], source: Path) -> None:
    """Refuse a transformer that was made for other text encoders or another VAE."""
    config = parts["transformer"].config
    for what, wanted, given in (
        ("VAE channels", config.in_channels // 4, parts["vae"].config.latent_channels),
        ("T5 width", config.joint_attention_dim, parts["text_encoder_2"].config.d_model),
        ("CLIP width", config.pooled_projection_dim, parts["text_encoder"].config.hidden_size),
    ):
        if wanted != given:
            raise SrpoError(f"The transformer in {source} is for another pipeline: {what} {wanted}, here {given}.")


def _add_lora(transformer: FluxTransformer2DModel, file: Path) -> None:
    """Load a LoRA in diffusers' layout (``transformer.<module>.lora_A.weight``) on top of ``transformer``."""
    modules = dict(transformer.named_modules())
    try:
        with safe_open(file, "pt") as tensors:
            names = list(tensors.keys())
        foreign = [name for name in names if _lora_module(name) not in modules]
        if foreign or not names:
            raise SrpoError(
                f"{file} is not a LoRA of this transformer in diffusers' layout: {(foreign or ['empty'])[0]}."
            )
        transformer.load_lora_adapter(file.parent, weight_name=file.name, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise SrpoError(f"Cannot load LoRA {file}: {one_line(error)}") from error


def _lora_module(name: str) -> str | None:
    """The module that a LoRA tensor belongs to, None if it is not a LoRA tensor of the transformer."""
    match = re.fullmatch(r"transformer\.(.+)\.lora_[AB]\.weight", name)
    return match[1] if match else None
