"""The miniature's rewards: a small CLIP of its rendered world with the bias that HPS is known for, and one without.

The first is what presets train on. The second, "miniature:clip", is held out, a second opinion on the result: a CLIP of
the same layout that was trained on captions alone, from weights and batches of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from open_clip.tokenizer import SimpleTokenizer

from srpo_cli.errors import MissingError
from srpo_cli.registry import MINIATURE_REWARDS
from srpo_cli.rewards.clip import ClipReward, build_clip
from srpo_cli.rewards.preprocess import Preprocess
from srpo_cli.rewards.weights import Announce, sha256


def load_miniature(
    name: str = "miniature",
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    announce: Announce | None = None,
) -> ClipReward:
    """A reward of the miniature as the raw cosine.

    Args:
        name: its name in the registry, which says which weights of the folder are its own; any other, as that of a
            plug-in made of it, stands for "miniature".
        weights: a folder with ``reward.json``, ``reward.safetensors`` or ``clip.safetensors``, and the BPE file that
            the first names; the one in the package if not given.
        device, dtype: where and in what it runs.
        announce: of no use here, nothing is downloaded.

    Raises MissingError if the folder is incomplete.
    """
    from srpo_cli.miniature import WEIGHTS

    folder = Path(weights) if weights else WEIGHTS / "reward"
    file = folder / MINIATURE_REWARDS.get(name, MINIATURE_REWARDS["miniature"])
    for part in (folder / "reward.json", file):
        if not part.is_file():
            raise MissingError(f"The reward {name} is not in {folder} (no {part.name}); reinstall srpo-cli.")
    config = json.loads((folder / "reward.json").read_text())
    mean, std, bpe = config.pop("mean"), config.pop("std"), config.pop("bpe")
    return ClipReward(
        build_clip(config, file, device, dtype),
        SimpleTokenizer(str(folder / bpe), context_length=config["text_cfg"]["context_length"]),
        preprocess=Preprocess(config["vision_cfg"]["image_size"], "crop", tuple(mean), tuple(std)),
        name=name,
        weights=f"{file.name} sha256:{sha256(file)}",
    )
