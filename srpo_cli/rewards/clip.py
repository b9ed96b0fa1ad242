"""Rewards that compare a picture with a text in a CLIP space: plain CLIP, and what other rewards build on."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from srpo_cli.errors import MissingError, SrpoError, UsageError, one_line

Tokenizer = Callable[[list[str]], Tensor]

# Texts go through the tower in batches of exactly this size, the last one padded: to the last bit, a text's
# features must not depend on which others were new beside it, or a resumed run would drift from the first.
_TEXT_BATCH = 16


def preprocess(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Bring pictures to a CLIP tower, differentiably: resize the shorter side, crop the centre, normalise.

    Args:
        images: (B, 3, H, W) in [0, 1], any size and shape.
        size: side of the square that the tower takes, px.
        mean, std: per channel, in [0, 1] units.

    Returns (B, 3, size, size). Bicubic with antialias, so that every pixel of a large picture has a gradient.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    height, width = int(size * height / short), int(size * width / short)
    images = F.interpolate(images, (height, width), mode="bicubic", align_corners=False, antialias=True)
    top, left = round((height - size) / 2), round((width - size) / 2)
    images = images[..., top : top + size, left : left + size]
    return (images - images.new_tensor(mean).view(3, 1, 1)) / images.new_tensor(std).view(3, 1, 1)


class ClipReward:
    """``scale * cos(picture, text)`` in the space of a frozen open_clip model; higher is better.

    Args:
        clip: any open_clip model with ``encode_image`` and ``encode_text``. Frozen here.
        tokenizer: maps N texts to token ids, (N, context length).
        image_size: side of the vision tower's input, px.
        mean, std: its normalisation.
        scale: 1 for the raw cosine, as HPSv2 reports it.
        name: what messages and logs call this reward.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Tokenizer,
        *,
        image_size: int,
        mean: Sequence[float] = open_clip.OPENAI_DATASET_MEAN,
        std: Sequence[float] = open_clip.OPENAI_DATASET_STD,
        scale: float = 1.0,
        name: str = "clip",
    ) -> None:
        self.clip = clip.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.image_size = image_size
        self.mean, self.std = tuple(mean), tuple(std)
        self.scale = scale
        self.name = name
        self._text_cache: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        return next(self.clip.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.clip.parameters()).dtype

    def image_features(self, images: Tensor) -> Tensor:
        """Unit features (B, D) of pictures (B, 3, H, W) in [0, 1]; float32 or wider, differentiable."""
        pixels = preprocess(images, self.image_size, self.mean, self.std).to(self.device, self.dtype)
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

    def scores(self, images: Tensor, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Rewards of the same pictures for several lists of texts, at the price of one vision pass.

        Args:
            images: (B, 3, H, W) in [0, 1].
            texts: lists of B texts; text i of each list belongs to picture i.

        Returns one (B,) per list, differentiable in ``images``.
        """
        features = self.image_features(images)
        return tuple(self.scale * (features * self.text_features(column)).sum(-1) for column in texts)

    def score(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Reward of picture i for prompt i, (B,) float32."""
        return self.scores(images, prompts)[0].float()


def _unit(features: Tensor) -> Tensor:
    """Unit vectors in float32 or wider: the difference of two cosines has no digits left in bfloat16."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def load_open_clip(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
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
        raise MissingError(f"{name} has no weights; set reward.weights to an open_clip checkpoint of {architecture}.")
    return ClipReward(
        build_clip(config, Path(weights), device, dtype),
        open_clip.get_tokenizer(architecture),
        image_size=config["vision_cfg"]["image_size"],
        name=name,
    )


def build_clip(config: dict[str, Any], weights: Path, device: str | torch.device, dtype: torch.dtype) -> open_clip.CLIP:
    """An ``open_clip.CLIP(**config)`` that holds exactly the tensors of ``weights``, cast to ``dtype``.

    Built on the meta device: initialising a ViT-H at random takes longer than reading it.
    """
    state = _read_state(weights)
    with torch.device("meta"):
        clip = open_clip.CLIP(**config)
    try:
        clip.load_state_dict(state, assign=True)
    except RuntimeError as error:
        raise SrpoError(f"{weights} is not a checkpoint of this CLIP architecture: {one_line(error)}") from error
    # The causal mask is a non-persistent buffer, so no checkpoint holds it.
    clip.attn_mask = torch.full(clip.attn_mask.shape, float("-inf")).triu_(1)
    return clip.to(device, torch.float32 if torch.device(device).type == "cpu" else dtype)


def _read_state(weights: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint; pickles are read with ``weights_only``, so that no code in them runs."""
    if not weights.is_file():
        raise MissingError(f"Reward weights {weights} not found.")
    try:
        if weights.suffix == ".safetensors":
            return load_file(weights)
        state = torch.load(weights, map_location="cpu", weights_only=True)
        return state.get("state_dict", state)
    except (
        SafetensorError,
        pickle.UnpicklingError,
        RuntimeError,
        OSError,
        EOFError,
        AttributeError,
    ) as error:
        raise SrpoError(f"Cannot read reward weights {weights}: {one_line(error)}") from error
