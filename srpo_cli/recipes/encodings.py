"""What a run encodes once and keeps: the prompts that it consumes, and the latents of given pictures.

Text encoders are loaded before the model, asked for every prompt that is not in the cache yet, and gone before the
model comes: a T5 of 9.5 GB and a transformer need not fit beside each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from srpo_cli.config.schema import TrainConfig
from srpo_cli.models.flux import LatentSpace
from srpo_cli.models.flux_files import encoder_fingerprint, load_prompt_encoder
from srpo_cli.models.flux_text import PromptEncoder
from srpo_cli.recipes.pictures import PictureSource
from srpo_cli.rewards.weights import Announce
from srpo_cli.runtime.distributed import Ranks
from srpo_cli.runtime.fetch import fetch
from srpo_cli.runtime.tensor_cache import TensorCache, cache_root


def cache_folder(config: TrainConfig) -> Path | None:
    """Where encodings are kept between runs; None: nowhere, as for the miniature, whose encoders are smaller."""
    cache = config.prompts.cache
    if cache == "auto":
        return None if config.model.name == "miniature" else cache_root()
    return cache


class EncodedPrompts:
    """Encodings of prompts out of a cache on disk; the encoders are loaded for what is not there, and let go again.

    Args:
        config: names the model and the cache.
        folder: of the cache.
        device: where encoders run.
        announce: told about a download before it starts; None: nothing is downloaded.
    """

    def __init__(
        self, config: TrainConfig, folder: Path, device: torch.device, announce: Announce | None = None
    ) -> None:
        download = None if announce is None else partial(fetch, announce=announce)
        self._where = (config.model.name, getattr(torch, config.model.dtype), device, download)
        self._cache = TensorCache(folder / "prompts")
        self.fingerprint = encoder_fingerprint(*self._where)

    def encode_ahead(self, prompts: Iterable[str], ranks: Ranks, say: Callable[[str], None]) -> None:
        """Put what is missing of ``prompts`` into the cache; the processes of a machine share the work."""
        own = list(dict.fromkeys(prompts))[ranks.local_rank :: ranks.local_size]
        with ranks.together():
            missing = [prompt for prompt in own if self._cache.get(self._key(prompt)) is None]
            if missing:
                say(f"encoding {len(missing)} prompts into {self._cache.folder}")
                encoder = load_prompt_encoder(*self._where)
                for prompt in missing:
                    self._encode(encoder, prompt)

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """T5 states (L, D) and pooled CLIP (D') of one prompt, on the CPU."""
        found = self._cache.get(self._key(prompt))
        if found is None:  # somebody emptied the cache under way
            return self._encode(load_prompt_encoder(*self._where), prompt)
        return found["prompt_embeds"], found["pooled"]

    def _encode(self, encoder: PromptEncoder, prompt: str) -> tuple[Tensor, Tensor]:
        prompt_embeds, pooled = encoder.encode(prompt)
        self._cache.put(self._key(prompt), {"prompt_embeds": prompt_embeds, "pooled": pooled})
        return prompt_embeds, pooled

    def _key(self, prompt: str) -> str:
        return f"{self.fingerprint}\n{prompt}"


class EncodedPictures:
    """Latents of given pictures, each encoded once; alone, so that they do not depend on which others came with it.

    Args:
        pictures: by number.
        model: encodes them.
        size: height and width, px.
        folder: cache on disk; None: in memory only.
        fingerprint: which autoencoder this is.
    """

    def __init__(
        self,
        pictures: PictureSource,
        model: LatentSpace,
        size: tuple[int, int],
        folder: Path | None,
        fingerprint: str,
    ) -> None:
        self.pictures, self.model, self.size = pictures, model, size
        self._disk = TensorCache(folder / "latents") if folder else None
        self._memory: dict[str, Tensor] = {}
        self._prefix = f"{fingerprint} {size[0]}x{size[1]} "

    def batch(self, numbers: Sequence[int]) -> Tensor:
        """Packed latents (N, tokens, 4 * channels), on the model's device."""
        latents = torch.stack([self._latents(number) for number in numbers])
        return latents.to(self.model.device, non_blocking=True)

    def _latents(self, number: int) -> Tensor:
        content = self.pictures.key(number)
        if content is None:
            return self._encode(number)
        key = self._prefix + content
        if key not in self._memory:
            found = self._disk.get(key) if self._disk else None
            self._memory[key] = found["latents"] if found else self._encode(number)
            if self._disk and not found:
                self._disk.put(key, {"latents": self._memory[key]})
        return self._memory[key]

    def _encode(self, number: int) -> Tensor:
        return self.model.encode(self.pictures.picture(number, self.size)[None])[0].cpu()
