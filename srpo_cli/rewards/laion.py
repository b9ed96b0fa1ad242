"""LAION's aesthetic predictors, v1 and v2: how a picture looks, whatever its prompt; heads on CLIP ViT-L/14.

v1 is one linear map on the unit features, v2 ("improved", trained on SAC, Logos and AVA) five with nothing between
them. Both take OpenAI's weights, so its activation; their code preprocesses in Pillow (``crop-pil``).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

from srpo_cli.errors import SrpoError, one_line
from srpo_cli.rewards.clip import build_clip
from srpo_cli.rewards.head import linear_head
from srpo_cli.rewards.preprocess import Mode, Preprocess
from srpo_cli.rewards.vision import RatingReward
from srpo_cli.rewards.weights import Announce, find_weights, read_state

_HEADS: dict[str, Callable[[int], nn.Module]] = {
    "laion-aesthetic-v1": lambda width: nn.Linear(width, 1),
    "laion-aesthetic-v2": lambda width: linear_head(width, (0, 2, 4, 6, 7)),
}
_MODES: tuple[Mode, ...] = ("crop-pil", "crop")


class LaionReward(RatingReward):
    """A rating from CLIP's picture features; ``tower`` maps pixels to these, (B, D)."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.tower(pixels)


def load_laion(
    name: str = "laion-aesthetic-v2",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    announce: Announce | None = None,
    *,
    architecture: str = "ViT-L-14-quickgelu",
) -> LaionReward:
    """LAION aesthetic v1 or v2, about 1 to 10.

    Args:
        name: its name in the registry, which says which version.
        weights: a folder with the head, ``sa_0_4_vit_l_14_linear.pth`` or ``sac+logos+ava1-l14-linearMSE.pth``, and
            OpenAI's ViT-L/14, ``open_clip_model.safetensors``; or the head's file, with the other beside it or in the
            Hub cache.
        device, dtype: where and in what it runs; the head in float32 or wider.
        announce: told about a download before it starts; None: nothing is downloaded.
        architecture: what open_clip calls the backbone.

    Raises MissingError with the command that fetches what is not here; SrpoError for files of another layout.
    """
    found = find_weights(name, weights, announce)
    head_file, clip_file = found.files.values()
    config = open_clip.get_model_config(architecture)
    head = _HEADS[name](config["embed_dim"])
    try:
        head.load_state_dict({key.removeprefix("layers."): value for key, value in read_state(head_file).items()})
    except RuntimeError as error:
        raise SrpoError(f"{head_file} is not the head of {name}: {one_line(error)}") from error
    return LaionReward(
        build_clip(config, clip_file, device, dtype).visual,
        head.to(device, torch.promote_types(dtype, torch.float32)),
        preprocess=Preprocess(config["vision_cfg"]["image_size"], _MODES[0]),
        modes=_MODES,
        name=name,
        weights=found.record,
    )
