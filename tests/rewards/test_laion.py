"""LAION's aesthetic predictors: the released files' layout, on a small backbone, against their formula written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from srpo_cli.errors import MissingError, SrpoError
from srpo_cli.registry import REWARD_FILES, REWARDS
from srpo_cli.rewards.laion import load_laion

V1, V2 = "laion-aesthetic-v1", "laion-aesthetic-v2"
HEADS = {V1: "sa_0_4_vit_l_14_linear.pth", V2: "sac+logos+ava1-l14-linearMSE.pth"}
CLIP = "open_clip_model.safetensors"
WIDTHS = {V1: (768, 1), V2: (768, 1024, 128, 64, 16, 1)}
KEYS = {V1: ("",), V2: ("layers.0.", "layers.2.", "layers.4.", "layers.6.", "layers.7.")}


@pytest.fixture
def released(clip_config: dict[str, Any], register: Callable, roughen: Callable, tmp_path: Path) -> tuple[str, Path]:
    """A small backbone with ViT-L/14's 768 features and OpenAI's activation, and a folder with all three files."""
    clip_config |= {"embed_dim": 768, "quick_gelu": True}
    torch.manual_seed(1)
    clip = roughen(open_clip.CLIP(**clip_config))
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, tmp_path / CLIP)
    for name, file in HEADS.items():
        head = {}
        for key, inputs, outputs in zip(KEYS[name], WIDTHS[name], WIDTHS[name][1:], strict=False):
            head[f"{key}weight"] = torch.randn(outputs, inputs) * (1 if inputs == 768 else inputs**-0.5)
            head[f"{key}bias"] = torch.randn(outputs)
        torch.save(head, tmp_path / file)
    return register("ViT-small-LAION", clip_config), tmp_path


@pytest.mark.parametrize("name", [V1, V2])
def test_ratings_are_the_written_out_ones(
    name: str, released: tuple[str, Path], photos: list[Image.Image], pictures: list[Tensor], written_out: type
) -> None:
    architecture, folder = released
    reward = REWARDS.get(name)(name, folder, architecture=architecture)
    assert (reward.name, reward.unit, reward.reads_text) == (name, "1 to 10", False)
    transform = open_clip.image_transform(32, is_train=False)
    x = written_out(load_file(folder / CLIP), heads=(2, 2), quick=True).image(torch.stack([*map(transform, photos)]))
    head = torch.load(folder / HEADS[name], weights_only=True)
    for key in KEYS[name]:
        x = x @ head[f"{key}weight"].T + head[f"{key}bias"]
    assert x.std() > 0.01
    rating = reward(pictures, ["whatever"] * len(pictures))
    torch.testing.assert_close(rating, x.squeeze(1), atol=1e-5, rtol=0)
    assert all(torch.equal(column, rating) for column in reward.scores(pictures, ["a"] * 6, ["b"] * 6))


@pytest.mark.parametrize("name", [V1, V2])
def test_the_gradient_reaches_every_pixel_and_is_that_of_the_rating(
    name: str, released: tuple[str, Path], check_gradient: Callable
) -> None:
    architecture, folder = released
    check_gradient(load_laion(name, folder, architecture=architecture), "")


@pytest.mark.parametrize("name", [V1, V2])
def test_bf16_is_the_same_rating_but_for_its_digits(
    name: str, released: tuple[str, Path], pictures: list[Tensor]
) -> None:
    architecture, folder = released
    exact = load_laion(name, folder, architecture=architecture)
    short = load_laion(name, folder, dtype=torch.bfloat16, architecture=architecture)
    rounded = short(pictures, [""] * 6)
    assert short.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact(pictures, [""] * 6), atol=0.05, rtol=0)


def test_the_heads_file_stands_for_the_reward_and_the_rest_is_beside_it(released: tuple[str, Path]) -> None:
    architecture, folder = released
    reward = load_laion(V2, folder / HEADS[V2], architecture=architecture)
    assert HEADS[V2] in reward.weights and CLIP in reward.weights and reward.weights.count("sha256:") == 2
    assert not any("token_embedding" in key for key in reward.tower.state_dict())


def test_the_head_of_the_other_version_is_one_line(released: tuple[str, Path]) -> None:
    architecture, folder = released
    with pytest.raises(SrpoError, match=f"{HEADS[V1]} is not the head of {V2}") as failure:
        load_laion(V2, folder / HEADS[V1], architecture=architecture)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("name", [V1, V2])
def test_what_is_missing_comes_with_its_command(
    name: str, hub_cache: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    with pytest.raises(MissingError, match=r"curl -L .*github.com/.*/raw/main/"):
        load_laion(name)
    head, backbone = REWARD_FILES[name]
    head.place.parent.mkdir(parents=True)
    head.place.touch()
    with pytest.raises(MissingError, match=f"hf download {backbone.repo} {CLIP}"):
        load_laion(name)


@pytest.mark.parametrize("name", [V1, V2])
def test_the_real_weights_rate_a_photograph_above_noise(name: str, real: Callable) -> None:
    """No published picture with its rating is known: a good photograph is worth 4 to 8, noise less."""
    pages = {V1: "of LAION-AI/aesthetic-predictor", V2: "of christophschuhmann/improved-aesthetic-predictor"}
    files = {HEADS[name]: pages[name], CLIP: "of timm/vit_large_patch14_clip_224.openai", "photograph.jpg": "your own"}
    folder = real(name, **files)
    photograph = open_clip.transform.MaybeToTensor()(Image.open(folder / "photograph.jpg").convert("RGB"))
    noise = torch.rand(photograph.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        good, bad = load_laion(name, folder)([photograph, noise], [""] * 2).tolist()
    assert 4 < good < 8 and bad < good
