"""The miniature's reward folder: configuration, weights and tokenizer from the files alone."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from srpo_cli.errors import MissingError
from srpo_cli.rewards.miniature import load_miniature

MEAN, STD = [0.5, 0.5, 0.5], [0.25, 0.25, 0.25]


@pytest.fixture
def folder(clip_config: dict[str, Any], clip_file: Path) -> Path:
    """Six merges make 'red' one token; vocabulary 512 bytes + 6 + 2, as ``clip_config`` has it."""
    merges = ["r e", "re d</w>", "a b", "c d", "e f", "g h"]
    (clip_file.parent / "bpe.txt.gz").write_bytes(gzip.compress("\n".join(["#version", *merges]).encode()))
    config = clip_config | {"mean": MEAN, "std": STD, "bpe": "bpe.txt.gz"}
    (clip_file.parent / "reward.json").write_text(json.dumps(config))
    return clip_file.parent


def test_a_folder_is_a_reward(folder: Path, tiny_clip: open_clip.CLIP) -> None:
    reward = load_miniature(weights=folder)

    assert (reward.scale, list(reward.preprocess.mean), list(reward.preprocess.std)) == (1.0, MEAN, STD)
    ids = reward.tokenizer(["red"])
    assert ids.shape == (1, 12) and ids[0, :3].tolist() == [518, 513, 519]
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = (
        tiny_clip.encode_image((image - 0.5) / 0.25, normalize=True) @ tiny_clip.encode_text(ids, normalize=True).T
    )
    torch.testing.assert_close(reward(image, ["red"]), expected[0], atol=2e-3, rtol=0)


def test_an_incomplete_installation_is_named(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"reward\.json"):
        load_miniature(weights=tmp_path)
