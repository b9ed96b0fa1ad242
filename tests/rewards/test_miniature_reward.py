"""The miniature's rewards: a folder's configuration, weights and tokenizer, and what the two in the package like."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from srpo_cli.config.load import load_train_config, preset_names, read_preset
from srpo_cli.errors import MissingError
from srpo_cli.miniature.build.reward import GLOSS
from srpo_cli.miniature.world import CG, PHOTO, STYLES, draw_prompts, draw_scenes_of, render
from srpo_cli.rewards.miniature import load_miniature

UNSTYLED = STYLES.index("")
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


@pytest.mark.parametrize(
    ("name", "file"), [("miniature", "reward.safetensors"), ("miniature:clip", "clip.safetensors")]
)
def test_the_name_says_which_weights_of_the_folder(folder: Path, name: str, file: str) -> None:
    (folder / "reward.safetensors").rename(folder / file)

    assert load_miniature(name, folder).weights.startswith(f"{file} sha256:")
    (folder / file).unlink()
    with pytest.raises(MissingError, match=rf"^The reward {name} is not in .* \(no {file}\); reinstall"):
        load_miniature(name, folder)


# The reward that is held out

COUNT = 64


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return draw_prompts(COUNT, 11, "validation")


@pytest.fixture(scope="module")
def pictures(prompts: list[str]) -> dict[int, torch.Tensor]:
    """The renderer's pictures of the same prompts, without a style and in two."""
    return {style: render(draw_scenes_of(prompts, style, seed=3)) for style in (UNSTYLED, PHOTO, CG)}


@torch.no_grad()
def test_the_held_out_reward_tells_photographs_from_renders(prompts, pictures) -> None:
    reward = load_miniature("miniature:clip")
    words = [[f"{STYLES[style]}. {prompt}" for prompt in prompts] for style in (PHOTO, CG)]
    photo, cg = (torch.sub(*reward.scores(pictures[style], *words)) for style in (PHOTO, CG))

    assert (photo[:, None] > cg).float().mean() > 0.99
    assert photo.mean() > 0.2 and cg.mean() < -0.2


@torch.no_grad()
def test_the_held_out_reward_does_not_share_the_taste_for_gloss(prompts, pictures) -> None:
    images = pictures[UNSTYLED]
    glossy = GLOSS.apply(images, torch.Generator().manual_seed(0))
    trained_on, held_out = (load_miniature(name) for name in ("miniature", "miniature:clip"))

    liked = [(reward(glossy, prompts) > reward(images, prompts)).float().mean() for reward in (trained_on, held_out)]
    assert liked[0] > 0.7 and liked[1] < 0.3, liked
    assert trained_on.weights != held_out.weights
    assert (trained_on(images, prompts) - held_out(images, prompts)).abs().mean() > 0.05


@pytest.mark.parametrize("name", preset_names())
def test_no_preset_optimises_the_held_out_reward(name: str) -> None:
    preset = read_preset(name)
    layers = preset.variants or {None: preset.base}
    forms = [
        load_train_config(name, variant=key, miniature=layer.miniature is not None) for key, layer in layers.items()
    ]
    trained_on = {part for form in forms for part in form.config.reward.parts}
    assert "miniature" in trained_on and "miniature:clip" not in trained_on
