"""Aesthetic Predictor v2.5: how a picture looks, whatever its prompt; a small head on SigLIP's picture features.

Its authors squash every picture to a square, in Pillow (``squash-pil``); from 5.5 on they call it great. The tower's
27 patches of 14 px leave 6 of the square's 384 px over: the lowest and rightmost 1.6 % of a picture are not seen,
and but for what resizing mixes into the rest have no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from srpo_cli.errors import SrpoError, one_line
from srpo_cli.rewards.head import linear_head
from srpo_cli.rewards.preprocess import Mode, Preprocess
from srpo_cli.rewards.vision import RatingReward
from srpo_cli.rewards.weights import Announce, find_weights, read_state

VISION: Mapping[str, Any] = MappingProxyType(
    {
        "image_size": 384,
        "patch_size": 14,
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
    }
)
"""The vision tower of siglip-so400m-patch14-384."""

_HEAD_PLACES = (0, 2, 4, 6, 8)
_HALF = (0.5, 0.5, 0.5)
_MODES: tuple[Mode, ...] = ("squash-pil", "squash")


class AestheticReward(RatingReward):
    """A rating from what SigLIP's vision tower pools.

    Args:
        tower: SigLIP's vision tower.
        head, name, weights: as for every :class:`RatingReward`.
    """

    def __init__(
        self, tower: SiglipVisionModel, head: nn.Module, *, name: str = "aesthetic-v2.5", weights: str = ""
    ) -> None:
        preprocess = Preprocess(tower.config.image_size, _MODES[0], _HALF, _HALF)
        super().__init__(tower, head, preprocess=preprocess, modes=_MODES, name=name, weights=weights)

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels).pooler_output


def load_aesthetic(
    name: str = "aesthetic-v2.5",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    announce: Announce | None = None,
    *,
    vision: Mapping[str, Any] = VISION,
) -> AestheticReward:
    """Aesthetic Predictor v2.5.

    Args:
        name: its name in the registry.
        weights: SigLIP's ``model.safetensors``, with ``aesthetic_predictor_v2_5.pth`` beside it or in the cache; the
            caches if not given. Of SigLIP only the vision tower is read.
        device, dtype: where and in what it runs; the head in float32 or wider.
        announce: told about a download before it starts; None: nothing is downloaded.
        vision: sizes of the vision tower; the release's if not given.

    Raises MissingError with the command that fetches a file that is not here, SrpoError for one that does not fit.
    """
    found = find_weights(name, weights, announce)
    siglip, predictor = found.files.values()
    try:
        tower = build_tower(read_state(siglip), vision)
    except RuntimeError as error:
        raise SrpoError(f"{siglip} is not siglip-so400m-patch14-384: {one_line(error)}") from error
    try:
        head = build_head(read_state(predictor), vision["hidden_size"])
    except RuntimeError as error:
        raise SrpoError(f"{predictor} is not the head of Aesthetic Predictor v2.5: {one_line(error)}") from error
    return AestheticReward(
        tower.to(device, dtype),
        head.to(device, torch.promote_types(dtype, torch.float32)),
        name=name,
        weights=found.record,
    )


def build_tower(state: Mapping[str, Tensor], vision: Mapping[str, Any] = VISION) -> SiglipVisionModel:
    """The vision tower out of a whole SigLIP's tensors.

    Raises RuntimeError for a tensor too many, too few, or of another shape in it.
    """
    with init_empty_weights():
        tower = SiglipVisionModel(SiglipVisionConfig(**vision))
    prefix = "vision_model."
    names = [name for name in state if name.startswith(prefix)]
    tower.load_state_dict({name.removeprefix(prefix): state[name] for name in names}, assign=True)
    return tower


def build_head(state: Mapping[str, Tensor], width: int = VISION["hidden_size"]) -> nn.Module:
    """The released head, for features of ``width``; RuntimeError as for :func:`build_tower`."""
    head = nn.ModuleDict({"scoring_head": linear_head(width, _HEAD_PLACES)})
    head.load_state_dict(state)
    return head["scoring_head"]
