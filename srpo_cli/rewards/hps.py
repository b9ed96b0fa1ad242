"""HPSv2.1, the human preference score: a ViT-H CLIP fine-tuned on preferences (Wu et al., arXiv:2306.09341).

Pictures go through :func:`srpo_cli.rewards.clip.preprocess` (shorter side to 224 px, centre crop), as in
SRPO's training; the official benchmark pads the longer side instead, so scores of pictures that are not
square differ.
"""

from __future__ import annotations

from pathlib import Path

import torch
from huggingface_hub import try_to_load_from_cache

from srpo_cli.errors import MissingError
from srpo_cli.registry import HUB_FILES
from srpo_cli.rewards.clip import ClipReward, load_open_clip

_ARCHITECTURE = "ViT-H-14"


def load_hpsv2_1(
    name: str = "hpsv2.1",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> ClipReward:
    """HPSv2.1 as the raw cosine, about 0.15 to 0.35; comparable within one prompt only.

    Args:
        name: its name in the registry.
        weights: ``HPS_v2.1_compressed.pt``; the copy in the local Hugging Face cache if not given.
        device, dtype: where and in what it runs; the CPU always computes in float32.

    Raises MissingError with the command that fetches the file.
    """
    hub = HUB_FILES[name]
    weights = weights or try_to_load_from_cache(hub.repo, hub.files[0])
    if not isinstance(weights, str | Path) or not Path(weights).is_file():
        where = weights if isinstance(weights, str | Path) else "not in the Hugging Face cache"
        raise MissingError(f"HPSv2.1 needs {hub.files[0]} (1.97 GB), {where}; fetch it with: {hub.download}")
    reward = load_open_clip(_ARCHITECTURE, weights, device, dtype)
    reward.name = name
    return reward
