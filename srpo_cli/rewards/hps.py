"""HPSv2.1, the human preference score: a ViT-H CLIP fine-tuned on preferences (Wu et al., arXiv:2306.09341).

Its own package and benchmark pad the longer side (``pad``; resized without antialias by the torchvision of its time),
SRPO's training crops the centre (``crop``), open_clip's default does that in Pillow (``crop-pil``).
"""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch

from srpo_cli.rewards.clip import ClipReward, build_clip
from srpo_cli.rewards.preprocess import Preprocess
from srpo_cli.rewards.weights import Announce, find_weights

_ARCHITECTURE = "ViT-H-14"


def load_hps(
    name: str = "hpsv2.1",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    announce: Announce | None = None,
) -> ClipReward:
    """HPSv2.1 as the raw cosine, about 0.15 to 0.35; comparable within one prompt and one version only.

    Args:
        name: its name in the registry.
        weights: ``HPS_v2.1_compressed.pt``; the copy in the local Hugging Face cache if not given.
        device, dtype: where and in what it runs.
        announce: told about a download before it starts; None: nothing is downloaded.

    Raises MissingError with the command that fetches the file.
    """
    found = find_weights(name, weights, announce)
    config = open_clip.get_model_config(_ARCHITECTURE)
    (file,) = found.files.values()
    return ClipReward(
        build_clip(config, file, device, dtype),
        open_clip.get_tokenizer(_ARCHITECTURE),
        preprocess=Preprocess(config["vision_cfg"]["image_size"], "pad"),
        modes=("pad", "pad-antialias", "crop-pil", "crop"),
        name=name,
        weights=found.record,
    )
