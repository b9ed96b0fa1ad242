"""A CLIP small enough to make in a test, and its checkpoint on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 520, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def clip_config() -> dict[str, Any]:
    return {key: value if key == "embed_dim" else dict(value) for key, value in CONFIG.items()}


@pytest.fixture(scope="session")
def tiny_clip() -> open_clip.CLIP:
    torch.manual_seed(0)
    return open_clip.CLIP(**CONFIG).eval()


@pytest.fixture
def clip_file(tiny_clip: open_clip.CLIP, tmp_path: Path) -> Path:
    """The weights as safetensors in half precision, as a released reward is."""
    file = tmp_path / "reward.safetensors"
    save_file({name: tensor.half().contiguous() for name, tensor in tiny_clip.state_dict().items()}, file)
    return file
