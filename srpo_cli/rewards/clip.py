"""Rewards that compare a picture with a text in a CLIP space: plain CLIP, and what other rewards build on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from srpo_cli.errors import MissingError, SrpoError, UsageError, one_line
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.preprocess import Images, Mode, Preprocess
from srpo_cli.rewards.weights import Announce, read_state, sha256

Tokenizer = Callable[[list[str]], Tensor]

# Texts go through the tower in batches of exactly this size, the last one padded: to the last bit, a text's
# features must not depend on which others were new beside it, or a resumed run would drift from the first.
_TEXT_BATCH = 16


class ClipReward(Reward):
    """``scale * cos(picture, text)`` in the space of a frozen CLIP; higher is better.

    Args:
        clip: any model with ``encode_image`` and ``encode_text``. Frozen here.
        tokenizer: maps N texts to token ids, (N, context length).
        preprocess: how pictures come to its vision tower.
        modes: the preprocessings that may be asked for, reference first, the one for training last.
        scale: 1 for the raw cosine, as HPSv2 reports it.
        unit, name, weights: as for every :class:`Reward`.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Tokenizer,
        *,
        preprocess: Preprocess,
        modes: tuple[Mode, ...] = ("crop",),
        scale: float = 1.0,
        unit: str = "cosine",
        name: str = "clip",
        weights: str = "",
    ) -> None:
        self.clip = clip.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.preprocess = preprocess
        self.modes = modes
        self.scale = scale
        self.unit, self.name, self.weights = unit, name, weights
        self._text_cache: dict[str, Tensor] = {}

    @property
    def dtype(self) -> torch.dtype:
        return next(self.clip.parameters()).dtype

    def image_features(self, images: Images) -> Tensor:
        """Unit features (B, D) of pictures in [0, 1]; float32 or wider, differentiable."""
        pixels = self.preprocess(images).to(self.device, self.dtype)
        with self._own_precision():
            return _unit(self.clip.encode_image(pixels))

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit features (N, D) of texts, computed once per distinct text."""
        new = [text for text in dict.fromkeys(texts) if text not in self._text_cache]
        for start in range(0, len(new), _TEXT_BATCH):
            batch = new[start : start + _TEXT_BATCH]
            padded = batch + batch[-1:] * (_TEXT_BATCH - len(batch))
            with self._own_precision():
                features = _unit(self.clip.encode_text(self.tokenizer(padded).to(self.device)))
            self._text_cache.update(zip(batch, features, strict=False))
        return torch.stack([self._text_cache[text] for text in texts])

    def _own_precision(self) -> torch.autocast:
        """Keeps a caller's autocast out: differences of cosines need the digits, the text cache needs one value."""
        return torch.autocast(self.device.type, enabled=False)

    def scores(self, images: Images, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Rewards of the same pictures for several lists of B texts, at the price of one vision pass.

        Returns one (B,) per list, float32 or wider, differentiable in ``images``.
        """
        features = self.image_features(images)
        return tuple(self.scale * (features * self.text_features(column)).sum(-1) for column in texts)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0].float()


def _unit(features: Tensor) -> Tensor:
    """Unit vectors in float32 or wider: the difference of two cosines has no digits left in bfloat16."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def load_open_clip(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    announce: Announce | None = None,
) -> ClipReward:
    """A plain CLIP reward, the raw cosine.

    Args:
        name: "clip:" and an open_clip architecture, e.g. "clip:ViT-B-32".
        weights: an open_clip checkpoint (.safetensors, .pt or .bin) of that architecture.
        device, dtype: where and in what it runs; the CPU always computes in float32.

    Raises UsageError for an architecture that is unknown or has parts of other libraries, which would be downloaded;
    MissingError without weights, SrpoError if they do not fit.
    """
    architecture = name.removeprefix("clip:")
    config = open_clip.get_model_config(architecture) if architecture in open_clip.list_models() else None
    if config is None or not config.keys() <= {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}:
        raise UsageError(f"{name}: {architecture!r} is not a plain CLIP architecture of open_clip, like ViT-B-32.")
    foreign = [f"text_cfg.{key}" for key in config["text_cfg"] if key.startswith("hf_")]
    foreign += [f"vision_cfg.{key}" for key in config["vision_cfg"] if key.startswith("timm_")]
    if foreign:
        raise UsageError(
            f"{name}: {architecture!r} takes a part from another library ({foreign[0]}), which would be downloaded; "
            "only architectures whose vision tower, text tower and tokenizer are open_clip's own work, like ViT-B-32."
        )
    if weights is None:
        raise MissingError(f"{name} has no weights; give an open_clip checkpoint as --weights {name}=FILE.")
    path = Path(weights)
    return ClipReward(
        build_clip(config, path, device, dtype),
        open_clip.get_tokenizer(architecture),
        preprocess=Preprocess(config["vision_cfg"]["image_size"], "crop-pil"),
        modes=("crop-pil", "crop"),
        name=name,
        weights=f"{path.name} sha256:{sha256(path)}",
    )


def build_clip(config: dict[str, Any], weights: Path, device: str | torch.device, dtype: torch.dtype) -> open_clip.CLIP:
    """An ``open_clip.CLIP(**config)`` that holds exactly the tensors of ``weights``, cast to ``dtype``.

    Built on the meta device: initialising a ViT-H at random takes longer than reading it.
    """
    state = read_state(weights)
    with torch.device("meta"):
        clip = open_clip.CLIP(**config)
    try:
        clip.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise SrpoError(f"{weights} is not a checkpoint of this CLIP architecture: {one_line(error)}") from error
    # The causal mask is a non-persistent buffer, so no checkpoint holds it.
    clip.attn_mask = torch.full(clip.attn_mask.shape, float("-inf")).triu_(1)
    return clip.to(device, dtype)
