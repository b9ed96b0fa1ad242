"""ImageReward: the released file's layout at small size, its scores written out in plain torch, and its gradients."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from srpo_cli.errors import MissingError, SrpoError
from srpo_cli.registry import REWARDS
from srpo_cli.rewards.imagereward import TEXT, VISION, ImageReward, build_blip, load_imagereward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS += ["a", "red", "green", "bicycle", "in", "the", "rain", "at", "night", ",", "photo", "##graph"]

SMALL_VISION = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_eps": 1e-6,
}
SMALL_TEXT = {
    "vocab_size": len(WORDS) + 2,
    "max_position_embeddings": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "layer_norm_eps": 1e-12,
}
SMALL = {"vision": SMALL_VISION, "text": SMALL_TEXT}

SHORT = "a red bicycle in the rain"
FILLED = " ".join(["green", "night"] * 16 + ["rain"])  # 33 words: 35 tokens, nothing padded, nothing cut
LONG = f"{FILLED} , red photograph"
PROMPTS = ["", SHORT, "a Photograph, at Night", FILLED, LONG]

REAL = os.environ.get("SRPO_REAL_WEIGHTS")


def layout(vision: Mapping[str, Any], text: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in ImageReward.pt."""
    wide, broad = vision["hidden_size"], text["hidden_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, width: int) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    tower = "blip.visual_encoder."
    shapes[f"{tower}cls_token"] = (1, 1, wide)
    shapes[f"{tower}pos_embed"] = (1, patches + 1, wide)
    shapes[f"{tower}patch_embed.proj.weight"] = (wide, 3, vision["patch_size"], vision["patch_size"])
    shapes[f"{tower}patch_embed.proj.bias"] = (wide,)
    for index in range(vision["num_hidden_layers"]):
        block = f"{tower}blocks.{index}."
        norm(f"{block}norm1", wide)
        linear(f"{block}attn.qkv", wide, 3 * wide)
        linear(f"{block}attn.proj", wide, wide)
        norm(f"{block}norm2", wide)
        linear(f"{block}mlp.fc1", wide, vision["intermediate_size"])
        linear(f"{block}mlp.fc2", vision["intermediate_size"], wide)
    norm(f"{tower}norm", wide)

    embeddings = "blip.text_encoder.embeddings."
    shapes[f"{embeddings}position_ids"] = (1, text["max_position_embeddings"])
    shapes[f"{embeddings}word_embeddings.weight"] = (text["vocab_size"], broad)
    shapes[f"{embeddings}position_embeddings.weight"] = (text["max_position_embeddings"], broad)
    norm(f"{embeddings}LayerNorm", broad)
    for index in range(text["num_hidden_layers"]):
        layer = f"blip.text_encoder.encoder.layer.{index}."
        for attention, width in (("attention", broad), ("crossattention", wide)):
            linear(f"{layer}{attention}.self.query", broad, broad)
            linear(f"{layer}{attention}.self.key", width, broad)
            linear(f"{layer}{attention}.self.value", width, broad)
            linear(f"{layer}{attention}.output.dense", broad, broad)
            norm(f"{layer}{attention}.output.LayerNorm", broad)
        linear(f"{layer}intermediate.dense", broad, text["intermediate_size"])
        linear(f"{layer}output.dense", text["intermediate_size"], broad)
        norm(f"{layer}output.LayerNorm", broad)
    linear("blip.vision_proj", wide, 256)
    linear("blip.text_proj", broad, 256)
    for place, inputs, outputs in ((0, broad, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (7, 16, 1)):
        linear(f"mlp.layers.{place}", inputs, outputs)
    return shapes


def random_state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors that keep the size of what passes through them, so that every part has a say in the score."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        if name.endswith("position_ids"):
            state[name] = torch.arange(shape[1])[None]
        elif len(shape) == 1:
            around = 1 if "norm" in name.lower() and name.endswith("weight") else 0
            state[name] = around + 0.1 * torch.randn(shape, generator=generator)
        else:
            state[name] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    return random_state(layout(**SMALL))


@pytest.fixture
def folder(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """The released files."""
    torch.save(state, tmp_path / "ImageReward.pt")
    (tmp_path / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    return tmp_path


@pytest.fixture
def reward(folder: Path) -> ImageReward:
    return load_imagereward(weights=folder, **SMALL)


@pytest.fixture
def exact(folder: Path) -> ImageReward:
    return load_imagereward(weights=folder, dtype=torch.float64, **SMALL)


def pictures(count: int, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks of colour under noise, in 8 bits, so that Pillow and tensors see the same pictures."""
    generator = torch.Generator().manual_seed(sum(size))
    blocks, noise = (torch.randint(0, 256, (count, 3, *edges), generator=generator) for edges in ((4, 4), size))
    return (F.interpolate(blocks.to(dtype), size) + noise).div(2).floor() / 255


def written_out(
    state: Mapping[str, Tensor],
    pixels: Tensor,
    tokens: list[int],
    vision: Mapping[str, Any] = SMALL_VISION,
    text: Mapping[str, Any] = SMALL_TEXT,
) -> float:
    """The score of one normalised picture (3, H, W) for the tokens of one prompt, none of them padding."""

    def w(name: str) -> Tensor:
        return state[name].to(pixels.dtype)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w(f"{name}.weight"), w(f"{name}.bias"))

    def norm(x: Tensor, name: str, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w(f"{name}.weight"), w(f"{name}.bias"), eps)

    def attend(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key, value))
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return (weights @ value).transpose(0, 1).flatten(1)

    tower, heads = "blip.visual_encoder", vision["num_attention_heads"]
    kernel, bias = (w(f"{tower}.patch_embed.proj.{kind}") for kind in ("weight", "bias"))
    patches = F.conv2d(pixels[None], kernel, bias, stride=vision["patch_size"])
    x = torch.cat([w(f"{tower}.cls_token")[0], patches[0].flatten(1).T]) + w(f"{tower}.pos_embed")[0]
    for index in range(vision["num_hidden_layers"]):
        block = f"{tower}.blocks.{index}"
        query, key, value = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(attend(query, key, value, heads), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{tower}.norm", 1e-6)

    encoder, heads = "blip.text_encoder", text["num_attention_heads"]
    words, places = (w(f"{encoder}.embeddings.{kind}_embeddings.weight") for kind in ("word", "position"))
    y = norm(words[tokens] + places[: len(tokens)], f"{encoder}.embeddings.LayerNorm", 1e-12)
    for index in range(text["num_hidden_layers"]):
        layer = f"{encoder}.encoder.layer.{index}"
        for attention in ("attention", "crossattention"):
            name, other = f"{layer}.{attention}", y if attention == "attention" else seen
            query, key, value = (
                linear(x, f"{name}.self.{kind}") for kind, x in (("query", y), ("key", other), ("value", other))
            )
            mixed = linear(attend(query, key, value, heads), f"{name}.output.dense")
            y = norm(mixed + y, f"{name}.output.LayerNorm", 1e-12)
        inner = linear(F.gelu(linear(y, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        y = norm(inner + y, f"{layer}.output.LayerNorm", 1e-12)
    score = y[0]
    for place in (0, 2, 4, 6, 7):
        score = linear(score, f"mlp.layers.{place}")
    return ((score - 0.16717362830052426) / 1.0333394966054072).item()


def word_tokens(prompt: str) -> list[int]:
    """[CLS], at most 33 words, [SEP]; "photograph" is in two pieces, the comma stands alone."""
    text = prompt.lower().replace("photograph", "photo ##graph").replace(",", " , ")
    ids = [WORDS.index(word) for word in text.split()]
    return [WORDS.index("[CLS]"), *ids[:33], WORDS.index("[SEP]")]


def through_pillow(picture: Tensor, size: int) -> Tensor:
    """The steps of the original package."""
    steps = Compose(
        [
            Resize(size, InterpolationMode.BICUBIC),
            CenterCrop(size),
            ToTensor(),
            Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )
    return steps(Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).numpy()))


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (48, 96), (101, 70), (20, 28)])
def test_the_score_is_the_written_out_formulas(
    reward: ImageReward, state: dict[str, Tensor], size: tuple[int, int]
) -> None:
    images = pictures(len(PROMPTS), *size)
    expected = [
        written_out(state, through_pillow(image, 32).double(), word_tokens(prompt))
        for image, prompt in zip(images, PROMPTS, strict=True)
    ]
    scores = reward(images, PROMPTS)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_training_path_is_the_formula_behind_an_antialiased_resize(
    reward: ImageReward, state: dict[str, Tensor]
) -> None:
    images = pictures(len(PROMPTS), 96, 64)
    resized = Compose(
        [
            Resize(32, InterpolationMode.BICUBIC, antialias=True),
            CenterCrop(32),
            Normalize(open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD),
        ]
    )(images)
    expected = [
        written_out(state, pixels.double(), word_tokens(prompt))
        for pixels, prompt in zip(resized, PROMPTS, strict=True)
    ]
    assert reward.via("training")(images, PROMPTS).tolist() == pytest.approx(expected, abs=1e-5)


def test_pictures_and_prompts_move_the_score_by_far_more_than_the_tolerance(reward: ImageReward) -> None:
    images = pictures(4, 64, 64)
    for scores in (reward(images[:1].expand(4, -1, -1, -1), PROMPTS[:4]), reward(images, [SHORT] * 4)):
        assert torch.pdist(scores[:, None]).min() > 1e-3


def test_what_comes_after_35_tokens_does_not_matter(reward: ImageReward) -> None:
    image = pictures(1, 32, 32)
    assert torch.equal(reward(image, [FILLED]), reward(image, [LONG]))
    assert not torch.equal(reward(image, [FILLED]), reward(image, [FILLED.replace("rain", "red")]))


@pytest.mark.parametrize("mode", ["crop-pil", "crop"])
def test_pictures_of_several_sizes_score_as_they_do_alone(reward: ImageReward, mode: str) -> None:
    reward = reward.via(mode)
    images = [pictures(1, *size)[0] for size in ((32, 32), (96, 40), (33, 71))]
    together = reward(images, PROMPTS[:3])
    alone = [reward(image[None], [prompt]).item() for image, prompt in zip(images, PROMPTS[:3], strict=True)]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)


def test_several_lists_of_texts_share_one_vision_pass(reward: ImageReward) -> None:
    images, passes = pictures(2, 40, 40), []
    reward.blip.visual_encoder.register_forward_hook(lambda *_: passes.append(1))
    first, second = reward.scores(images, [SHORT, ""], [LONG, SHORT])
    assert len(passes) == 1
    torch.testing.assert_close(first, reward(images, [SHORT, ""]))
    torch.testing.assert_close(second, reward(images, [LONG, SHORT]))


def test_each_distinct_text_is_tokenized_once(reward: ImageReward) -> None:
    asked: list[str] = []
    tokenizer = reward.tokenizer
    reward.tokenizer = lambda texts, **options: (asked.extend(texts), tokenizer(texts, **options))[1]
    reward.tokens([SHORT, LONG, SHORT])
    ids, mask = reward.tokens([LONG, SHORT])
    assert asked == [SHORT, LONG]
    assert ids.shape == mask.shape == (2, 35)
    assert ids[1, : mask[1].sum()].tolist() == word_tokens(SHORT)


def test_blips_own_two_tokens_follow_berts(reward: ImageReward) -> None:
    ids, _ = reward.tokens(["[DEC] a [ENC]"])
    assert ids[0, :5].tolist() == [2, len(WORDS), WORDS.index("a"), len(WORDS) + 1, 3]


def test_every_pixel_of_a_large_square_picture_has_a_gradient(reward: ImageReward) -> None:
    images = pictures(1, 96, 96).requires_grad_()
    reward.via("training")(images, [SHORT]).sum().backward()
    assert (images.grad != 0).all()


@pytest.mark.parametrize("prompt", [SHORT, LONG])
def test_the_gradient_is_that_of_finite_differences(exact: ImageReward, prompt: str) -> None:
    training = exact.via("training")
    images = pictures(1, 48, 64, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(training.scores(images, [prompt])[0].sum(), images)
    step = 1e-5 * torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        above, below = (training.scores(images + sign * step, [prompt])[0].item() for sign in (1, -1))
    assert (gradient * step).sum().item() == pytest.approx((above - below) / 2, rel=1e-6)


def test_bfloat16_scores_are_float32_numbers_near_the_exact_ones(folder: Path, reward: ImageReward) -> None:
    half = load_imagereward(weights=folder, dtype=torch.bfloat16, **SMALL)
    assert (half.dtype, half.blip.mlp[0].weight.dtype) == (torch.bfloat16, torch.float32)
    images = pictures(4, 40, 40).requires_grad_()
    scores = half.via("training")(images, PROMPTS[:4])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reward.via("training")(images, PROMPTS[:4]), atol=0.05, rtol=0)
    scores.sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()


def test_a_callers_autocast_does_not_reach_the_reward(reward: ImageReward) -> None:
    image = pictures(1, 32, 32)
    expected = reward(image, [SHORT])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(image, [SHORT]), expected)


def test_it_is_frozen_and_says_what_it_is(reward: ImageReward) -> None:
    assert not reward.blip.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert (reward.name, reward.preprocess.mode, reward.via("training").preprocess.mode) == (
        "imagereward",
        "crop-pil",
        "crop",
    )
    assert reward.weights.startswith("ImageReward.pt sha256:") and "; vocab.txt sha256:" in reward.weights
    assert "standardised" in reward.unit
    assert REWARDS.get("imagereward") is load_imagereward


def test_the_whole_release_fits_the_whole_architecture() -> None:
    shapes = layout(VISION, TEXT)
    assert len(shapes) == 625
    assert sum(math.prod(shape) for shape in shapes.values()) == 446_666_465  # 1.787 GB
    blip = build_blip({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    assert sum(parameter.numel() for parameter in blip.parameters()) == 446_206_689


def test_a_file_without_the_unused_tensors_is_read_as_well(
    folder: Path, state: dict[str, Tensor], reward: ImageReward
) -> None:
    unused = ("blip.vision_proj", "blip.text_proj", "blip.text_encoder.embeddings.position_ids")
    torch.save({name: x for name, x in state.items() if not name.startswith(unused)}, folder / "ImageReward.pt")
    image = pictures(1, 32, 32)
    assert torch.equal(load_imagereward(weights=folder, **SMALL)(image, [SHORT]), reward(image, [SHORT]))


@pytest.mark.parametrize("damage", ["cut", "missing", "extra", "shape", "nested", "words"])
def test_a_damaged_or_foreign_file_is_one_line(folder: Path, state: dict[str, Tensor], damage: str) -> None:
    file, changed = folder / "ImageReward.pt", dict(state)
    if damage == "missing":
        del changed["blip.text_encoder.encoder.layer.1.crossattention.self.key.bias"]
    elif damage == "extra":
        changed["blip.visual_encoder.blocks.2.norm1.weight"] = torch.ones(32)
    elif damage == "shape":
        changed["mlp.layers.7.weight"] = torch.ones(1, 8)
    torch.save({"model": changed} if damage == "nested" else changed, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "words":
        (file := folder / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(SrpoError, match=file.name) as failure:
        load_imagereward(weights=folder, **SMALL)
    assert "\n" not in str(failure.value)


def test_a_vocabulary_that_is_no_text_is_one_line(folder: Path) -> None:
    (folder / "vocab.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SrpoError, match=r"vocab\.txt is not a vocabulary"):
        load_imagereward(weights=folder, **SMALL)


def test_without_a_file_the_command_that_fetches_it_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srpo_cli.rewards.weights.try_to_load_from_cache", lambda repo, file: None)
    with pytest.raises(MissingError, match=r"1\.79 GB.*hf download THUDM/ImageReward ImageReward\.pt"):
        load_imagereward()
    (folder / "vocab.txt").unlink()
    with pytest.raises(MissingError, match=r"hf download google-bert/bert-base-uncased vocab\.txt"):
        load_imagereward(weights=folder)


@pytest.mark.slow
def test_at_full_size_the_score_is_the_written_out_formulas(tmp_path: Path) -> None:
    file, words = tmp_path / "ImageReward.pt", [*WORDS, *(f"word{i}" for i in range(30522 - len(WORDS)))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.save(random_state(layout(VISION, TEXT)), file)  # 1.8 GB
    reward = load_imagereward(weights=file)
    image = pictures(1, 300, 400)
    scores = reward(image.expand(2, -1, -1, -1), [SHORT, LONG])
    state, pixels = torch.load(file, mmap=True, weights_only=True), through_pillow(image[0], 224)
    with torch.no_grad():
        expected = [written_out(state, pixels, word_tokens(prompt), VISION, TEXT) for prompt in (SHORT, LONG)]
    file.unlink()
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3


def test_the_published_scores_of_the_real_weights() -> None:
    names = ("ImageReward.pt", "vocab.txt", "1.webp", "2.webp", "3.webp", "4.webp")
    absent = [name for name in names if not REAL or not (Path(REAL) / name).is_file()]
    if absent:
        pytest.skip(
            f"NOT CHECKED AGAINST THE REAL IMAGEREWARD: put {', '.join(absent)} (ImageReward.pt of THUDM/ImageReward, "
            "vocab.txt of google-bert/bert-base-uncased, assets/images/*.webp of the project's repository) in a folder "
            "and set SRPO_REAL_WEIGHTS to it"
        )
    reward = load_imagereward(weights=Path(REAL) / "ImageReward.pt")
    images = [
        torch.from_numpy(np.asarray(Image.open(Path(REAL) / f"{i}.webp").convert("RGB"))).permute(2, 0, 1) / 255
        for i in range(1, 5)
    ]
    prompt = "a painting of an ocean with clouds and birds, day time, low depth field effect"
    # README of THUDM/ImageReward
    assert reward(images, [prompt] * 4).tolist() == pytest.approx([0.5812, 0.2745, -1.4132, -2.0296], abs=0.01)
