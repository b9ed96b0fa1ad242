"""HPSv2, the human preference score: a ViT-H CLIP fine-tuned on preferences (Wu et al., arXiv:2306.09341).

Its own package and benchmark pad the longer side (``pad``; resized without antialias by the torchvision of its time),
SRPO's training crops the centre (``crop``), open_clip's default does that in Pillow (``crop-pil``). A picture whose
longer side already is the tower's is padded like any other; the package leaves it as it is, which no ViT takes.
"""

from __future__ import annotations

from pathlib import Path

import open_clip
import torch

from srpo_cli.rewards.clip import ClipReward, build_clip
from srpo_cli.rewards.preprocess import Preprocess
from srpo_cli.rewards.weights import Announce, find_weights


def load_hps(
    name: str = "hpsv2.1",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    announce: Announce | None = None,
    *,
    architecture: str = "ViT-H-14",
) -> ClipReward:
    """HPSv2.0 or HPSv2.1 as the raw cosine, about 0.15 to 0.35; comparable within one prompt and one version only.

    The benchmark's tables are a hundred times that.

    Args:
        name: its name in the registry, which says which version.
        weights: ``HPS_v2.1_compressed.pt`` or ``HPS_v2_compressed.pt``; the copy in the local Hugging Face cache if
            not given.
        device, dtype: where and in what it runs.
        announce: told about a download before it starts; None: nothing is downloaded.
        architecture: what open_clip calls the model that the file is of.

    Raises MissingError with the command that fetches the file.
    """
    found = find_weights(name, weights, announce)
    config = open_clip.get_model_config(architecture)
    (file,) = found.files.values()
    return ClipReward(
        build_clip(config, file, device, dtype),
        open_clip.get_tokenizer(architecture),
        preprocess=Preprocess(config["vision_cfg"]["image_size"], "pad"),
        modes=("pad", "pad-antialias", "crop-pil", "crop"),
        name=name,
        weights=found.record,
    )
