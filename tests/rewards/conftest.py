"""A CLIP small enough to make in a test, its checkpoint on disk, and what every CLIP-based reward is checked with."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from srpo_cli.rewards.base import Reward

CONFIG: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 520, "width": 32, "heads": 2, "layers": 2},
}

Register = Callable[..., str]


@pytest.fixture(scope="session")
def roughen() -> Callable[[torch.nn.Module], torch.nn.Module]:
    """Moves every weight of a fresh model in place, so that no bias is 0 and no norm's weight 1; fp16-representable."""

    def move(model: torch.nn.Module) -> torch.nn.Module:
        seeds = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=seeds)
                parameter.copy_((parameter + 0.1 * noise * (0.1 + parameter.abs().mean())).half().float())
        return model.eval()

    return move


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


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Register:
    """Makes an architecture, and its tags, known to open_clip for the length of a test."""
    for table in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
        monkeypatch.setattr(open_clip.factory, table, getattr(open_clip.factory, table).copy())

    def known(name: str, config: dict[str, Any], **tags: dict[str, Any]) -> str:
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(tmp_path / f"{name}.json")
        monkeypatch.setitem(open_clip.pretrained._PRETRAINED, name, tags)
        return name

    return known


@pytest.fixture
def hub_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Path]:
    """An empty Hub cache of the test's own; gives the folder of a repository's one revision, "1234"."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))

    def folder(repo: str) -> Path:
        repository = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
        for part in ("refs", "snapshots/1234"):
            (repository / part).mkdir(parents=True, exist_ok=True)
        (repository / "refs" / "main").write_text("1234")
        return repository / "snapshots" / "1234"

    return folder


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Smooth 8-bit pictures: square, wide, tall, smaller than any tower, and odd by three at every size tried."""
    seeds = np.random.default_rng(0)
    sizes = [(96, 96), (150, 61), (41, 90), (9, 7), (35, 32), (227, 224)]
    return [
        Image.fromarray(seeds.integers(0, 256, (w // 6 + 2, h // 6 + 2, 3), dtype=np.uint8)).resize(
            (w, h), Image.Resampling.BICUBIC
        )
        for w, h in sizes
    ]


@pytest.fixture(scope="session")
def pictures(photos: list[Image.Image]) -> list[Tensor]:
    """The same as tensors (3, H, W) in [0, 1]."""
    return [torch.from_numpy(np.array(photo)).permute(2, 0, 1) / 255 for photo in photos]


@pytest.fixture
def check_gradient() -> Callable[[Reward, str], None]:
    """Checks that every pixel of a picture has a gradient, and that it is that of the score, in float64."""

    def check(reward: Reward, text: str) -> None:
        for part in vars(reward).values():
            if isinstance(part, torch.nn.Module):
                part.double()
        reward = reward.via("training")
        seeds = torch.Generator().manual_seed(0)
        image = torch.rand(1, 3, 80, 80, generator=seeds, dtype=torch.float64, requires_grad=True)
        (score,) = reward.scores(image, [text])
        assert score.dtype == torch.float64
        (gradient,) = torch.autograd.grad(score.sum(), image)
        assert (gradient != 0).all()
        for direction in (gradient / gradient.norm(), torch.randn(image.shape, generator=seeds, dtype=torch.float64)):
            with torch.no_grad():
                up, down = (reward.scores(image + step * direction, [text])[0].sum() for step in (1e-5, -1e-5))
            torch.testing.assert_close((up - down) / 2e-5, (gradient * direction).sum(), rtol=1e-5, atol=1e-9)

    return check


@pytest.fixture
def real() -> Callable[..., Path]:
    """The folder of SRPO_REAL_WEIGHTS; skips, and says what to put there, where one of the files is not."""

    def folder(reward: str, **files: str) -> Path:
        place = os.environ.get("SRPO_REAL_WEIGHTS", "")
        absent = [f"{file} ({origin})" for file, origin in files.items() if not (place and Path(place, file).is_file())]
        if absent:
            pytest.skip(
                f"NOT CHECKED AGAINST THE REAL {reward.upper()}: put {', '.join(absent)} in a folder and set "
                "SRPO_REAL_WEIGHTS to it"
            )
        return Path(place)

    return folder


class WrittenOutClip:
    """A CLIP with ViT towers in plain tensor operations, from a checkpoint's tensors (Radford et al. 2021).

    Args:
        state: the tensors under open_clip's names.
        heads: of the picture's and the text's attention.
        quick: x * sigmoid(1.702 x) in place of the exact GELU.
    """

    def __init__(self, state: dict[str, Tensor], heads: tuple[int, int], quick: bool = False) -> None:
        self.state = {name: tensor.float() for name, tensor in state.items()}
        self.heads = heads
        self.quick = quick

    def image(self, pixels: Tensor) -> Tensor:
        """Unit features (B, D) of normalised pixels (B, 3, S, S)."""
        kernel = self.state["visual.conv1.weight"]
        side = kernel.shape[-1]
        patches = pixels.unfold(2, side, side).unfold(3, side, side)  # (B, 3, rows, columns, side, side)
        x = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2) @ kernel.flatten(1).T
        first = self.state["visual.class_embedding"].expand(len(x), 1, -1)
        x = torch.cat([first, x], 1) + self.state["visual.positional_embedding"]
        x = self._blocks(self._norm(x, "visual.ln_pre"), "visual.transformer", self.heads[0], mask=None)
        x = self._norm(x[:, 0], "visual.ln_post") @ self.state["visual.proj"]
        return x / x.norm(dim=-1, keepdim=True)

    def text(self, ids: Tensor) -> Tensor:
        """Unit features (N, D) of token ids (N, L); the largest id is the end."""
        x = self.state["token_embedding.weight"][ids] + self.state["positional_embedding"]
        mask = torch.ones(ids.shape[1], ids.shape[1]).tril() == 0
        x = self._norm(self._blocks(x, "transformer", self.heads[1], mask), "ln_final")
        x = x[torch.arange(len(ids)), ids.argmax(-1)] @ self.state["text_projection"]
        return x / x.norm(dim=-1, keepdim=True)

    def _blocks(self, x: Tensor, tower: str, heads: int, mask: Tensor | None) -> Tensor:
        norms = [name for name in self.state if name.startswith(f"{tower}.resblocks.") and name.endswith("ln_1.weight")]
        for block in (f"{tower}.resblocks.{i}" for i in range(len(norms))):
            x = x + self._attend(self._norm(x, f"{block}.ln_1"), f"{block}.attn", heads, mask)
            hidden = self._linear(self._norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")
            steep = hidden * torch.sigmoid(1.702 * hidden)
            exact = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
            x = x + self._linear(steep if self.quick else exact, f"{block}.mlp.c_proj")
        return x

    def _attend(self, x: Tensor, name: str, heads: int, mask: Tensor | None) -> Tensor:
        joint = x @ self.state[f"{name}.in_proj_weight"].T + self.state[f"{name}.in_proj_bias"]
        query, key, value = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in joint.chunk(3, -1))
        weight = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        if mask is not None:
            weight = weight.masked_fill(mask, -torch.inf)
        return self._linear((weight.softmax(-1) @ value).transpose(1, 2).flatten(2), f"{name}.out_proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]


@pytest.fixture
def written_out() -> type[WrittenOutClip]:
    return WrittenOutClip
