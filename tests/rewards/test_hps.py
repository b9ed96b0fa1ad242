"""HPSv2.1: the released file's layout, on a tower of another size, and what is said where the file is
missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from srpo_cli.errors import MissingError
from srpo_cli.rewards.hps import load_hps


def test_the_checkpoint_layout_of_the_release_is_read(
    tiny_clip: open_clip.CLIP, clip_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip_config["text_cfg"] |= {"context_length": 77, "vocab_size": 49408}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: clip_config)
    model = open_clip.CLIP(**clip_config)
    file = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": model.half().state_dict()}, file)

    reward = load_hps(weights=file)

    assert (reward.name, reward.scale, reward.dtype) == ("hpsv2.1", 1.0, torch.float32)
    assert reward(torch.rand(1, 3, 40, 40), ["Real. a red bicycle"]).abs() <= 1


def test_the_real_architecture_has_the_tensors_of_the_release() -> None:
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    assert len(model.state_dict()) == 686
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 986_109_441


def test_without_the_file_the_command_that_fetches_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srpo_cli.rewards.weights.try_to_load_from_cache", lambda repo, file: None)
    with pytest.raises(MissingError, match=r"1\.97 GB.*hf download xswu/HPSv2 HPS_v2\.1_compressed\.pt") as failure:
        load_hps()
    assert failure.value.exit_code == 4
    with pytest.raises(MissingError, match=r"nowhere\.pt"):
        load_hps(weights=tmp_path / "nowhere.pt")
