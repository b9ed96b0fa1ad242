"""The CLIP reward: preprocessing, caching, gradients and checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, normalize, resize

from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.rewards.clip import ClipReward, build_clip, load_open_clip
from srpo_cli.rewards.preprocess import Preprocess

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
CPU = {"device": "cpu", "dtype": torch.float32}


def characters(texts: list[str]) -> Tensor:
    """One token per character, 12 of them, the end marked by the largest id."""
    rows = torch.zeros(len(texts), 12, dtype=torch.long)
    for row, text in zip(rows, texts, strict=True):
        ids = [ord(character) % 500 + 1 for character in text[:10]]
        row[: len(ids) + 1] = torch.tensor([*ids, 519])
    return rows


@pytest.fixture
def reward(tiny_clip: open_clip.CLIP) -> ClipReward:
    return ClipReward(tiny_clip, characters, preprocess=Preprocess(32))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (64, 96), (101, 70), (24, 40)])
def test_preprocessing_is_torchvisions(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = resize(images, 32, InterpolationMode.BICUBIC, antialias=True)
    expected = normalize(center_crop(expected, [32, 32]), MEAN, STD)
    torch.testing.assert_close(Preprocess(32)(images), expected)


def test_every_pixel_of_a_large_square_picture_has_a_gradient(reward: ClipReward) -> None:
    images = torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(0), requires_grad=True)
    reward.scores(images, ["a"])[0].sum().backward()
    assert (images.grad != 0).all()


def test_scores_are_cosines_of_each_picture_with_its_own_text(reward: ClipReward) -> None:
    images = torch.rand(3, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    prompts, others = ["a", "b", "c"], ["x", "x", "y"]
    first, second = reward.scores(images, prompts, others)
    table = reward.image_features(images) @ reward.text_features([*prompts, *others]).T
    torch.testing.assert_close(first, table[:, :3].diagonal())
    torch.testing.assert_close(second, table[:, 3:].diagonal())
    assert torch.equal(reward(images, prompts), first)


def test_a_callers_autocast_does_not_reach_the_reward(reward: ClipReward) -> None:
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = reward(image, ["a"])
    reward._text_cache.clear()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(image, ["a"]), expected)


def test_the_scale_multiplies_the_cosine(tiny_clip: open_clip.CLIP, reward: ClipReward) -> None:
    scaled = ClipReward(tiny_clip, characters, preprocess=Preprocess(32), scale=5.0)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(scaled(image, ["a"]), 5 * reward(image, ["a"]))


def test_each_distinct_text_is_encoded_once(reward: ClipReward) -> None:
    asked: list[str] = []
    reward.tokenizer = lambda texts: (asked.extend(texts), characters(texts))[1]
    reward.text_features(["a", "b", "a"])
    reward.text_features(["b", "a"])
    assert set(asked) == {"a", "b"} and len(asked) == 16  # one padded batch


def test_a_text_is_worth_the_same_to_the_bit_whatever_is_new_beside_it(tiny_clip: open_clip.CLIP) -> None:
    texts = [f"text {i}" for i in range(40)]
    together = ClipReward(tiny_clip, characters, preprocess=Preprocess(32)).text_features(texts)
    apart = ClipReward(tiny_clip, characters, preprocess=Preprocess(32))
    assert all(torch.equal(apart.text_features([text])[0], row) for text, row in zip(texts, together, strict=True))


def test_the_reward_is_frozen(reward: ClipReward) -> None:
    assert not reward.clip.training
    assert not any(parameter.requires_grad for parameter in reward.clip.parameters())
    assert not reward.text_features(["a"]).requires_grad


def test_a_checkpoint_gives_back_the_model_it_was_written_from(
    tiny_clip: open_clip.CLIP, clip_config: dict[str, Any], clip_file: Path
) -> None:
    loaded = build_clip(clip_config, clip_file, **CPU)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for ours, theirs in (
        (loaded.encode_image(image), tiny_clip.encode_image(image)),
        (loaded.encode_text(characters(["abc"])), tiny_clip.encode_text(characters(["abc"]))),
    ):
        assert torch.cosine_similarity(ours, theirs).item() > 0.9999


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_or_foreign_checkpoint_is_one_line(clip_config: dict[str, Any], clip_file: Path, damage: str) -> None:
    if damage == "cut":
        clip_file.write_bytes(clip_file.read_bytes()[:1000])
    else:
        clip_config["vision_cfg"]["width"] = 64
    with pytest.raises(SrpoError, match=r"reward\.safetensors") as failure:
        build_clip(clip_config, clip_file, **CPU)
    assert "\n" not in str(failure.value)


def test_a_pickle_that_would_run_code_is_not_read(clip_config: dict[str, Any], tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"state_dict": Payload()}, tmp_path / "reward.pt")
    with pytest.raises(SrpoError, match="Cannot read reward weights"):
        build_clip(clip_config, tmp_path / "reward.pt", **CPU)
    assert not (tmp_path / "ran").exists()


def test_a_plain_clip_needs_weights_and_a_known_architecture(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"--weights clip:ViT-B-32=FILE"):
        load_open_clip("clip:ViT-B-32")
    with pytest.raises(MissingError, match=r"nowhere\.pt not found"):
        load_open_clip("clip:ViT-B-32", tmp_path / "nowhere.pt")
    with pytest.raises(UsageError, match="'ViT-Z-1'"):
        load_open_clip("clip:ViT-Z-1")


@pytest.mark.parametrize("architecture", ["roberta-ViT-B-32", "convnext_base", "ViT-L-14-CLIPA"])
def test_an_architecture_with_parts_of_other_libraries_is_refused(architecture: str, clip_file: Path) -> None:
    with pytest.raises(UsageError, match=r"\((text_cfg\.hf|vision_cfg\.timm)_\w+\).* like ViT-B-32") as failure:
        load_open_clip(f"clip:{architecture}", clip_file)
    assert "\n" not in str(failure.value)
