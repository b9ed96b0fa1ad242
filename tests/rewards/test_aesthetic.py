"""Aesthetic Predictor v2.5: the released files' layouts at small size, its ratings written out in plain torch, and its
gradients."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import pil_to_tensor, resize
from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

from srpo_cli.errors import MissingError, SrpoError
from srpo_cli.registry import REWARD_FILES, REWARDS
from srpo_cli.rewards.aesthetic import VISION, AestheticReward, build_head, build_tower, load_aesthetic
from srpo_cli.rewards.weights import sha256

SMALL = {  # 30 px are four patches and 2 px over, as 384 px are 27 and 6 over
    "image_size": 30,
    "patch_size": 7,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SEEN = 28
HEAD = "aesthetic_predictor_v2_5.pth"
REAL = os.environ.get("SRPO_REAL_WEIGHTS")


def tower_layout(vision: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of SigLIP's vision tower in model.safetensors."""
    width, inner = vision["hidden_size"], vision["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str) -> None:
        shapes.update({f"{name}.weight": (width,), f"{name}.bias": (width,)})

    def mlp(name: str) -> None:
        linear(f"{name}.fc1", width, inner)
        linear(f"{name}.fc2", inner, width)

    tower = "vision_model."
    shapes[f"{tower}embeddings.patch_embedding.weight"] = (width, 3, vision["patch_size"], vision["patch_size"])
    shapes[f"{tower}embeddings.patch_embedding.bias"] = (width,)
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    shapes[f"{tower}embeddings.position_embedding.weight"] = (patches, width)
    for index in range(vision["num_hidden_layers"]):
        layer = f"{tower}encoder.layers.{index}."
        norm(f"{layer}layer_norm1")
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            linear(f"{layer}self_attn.{part}", width, width)
        norm(f"{layer}layer_norm2")
        mlp(f"{layer}mlp")
    norm(f"{tower}post_layernorm")
    shapes[f"{tower}head.probe"] = (1, 1, width)
    shapes[f"{tower}head.attention.in_proj_weight"] = (3 * width, width)
    shapes[f"{tower}head.attention.in_proj_bias"] = (3 * width,)
    linear(f"{tower}head.attention.out_proj", width, width)
    norm(f"{tower}head.layernorm")
    mlp(f"{tower}head.mlp")
    return shapes


def head_layout(width: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of aesthetic_predictor_v2_5.pth."""
    sizes = ((0, width, 1024), (2, 1024, 128), (4, 128, 64), (6, 64, 16), (8, 16, 1))
    weights = {f"scoring_head.{place}.weight": (outputs, inputs) for place, inputs, outputs in sizes}
    return weights | {f"scoring_head.{place}.bias": (outputs,) for place, _, outputs in sizes}


def random_state(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Tensors that keep the size of what passes through them, so that every part has a say in the rating."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        around = 1 if "norm" in name and name.endswith("weight") else 0
        size = 0.1 if len(shape) == 1 else 1 / math.sqrt(math.prod(shape[1:]))
        state[name] = (around + size * torch.randn(shape, generator=generator)).to(dtype)
    return state


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """The tensors of both files, the head's in bfloat16 as they are released."""
    return random_state(tower_layout(SMALL)) | random_state(head_layout(SMALL["hidden_size"]), torch.bfloat16)


@pytest.fixture
def folder(state: dict[str, Tensor], tmp_path: Path) -> Path:
    """The released files; SigLIP's holds a text tower as well."""
    rest = {"logit_scale": torch.zeros(1), "text_model.head.bias": torch.zeros(8)}
    save_file({name: x for name, x in state.items() if "scoring" not in name} | rest, tmp_path / "model.safetensors")
    torch.save({name: x for name, x in state.items() if "scoring" in name}, tmp_path / HEAD)
    return tmp_path


@pytest.fixture
def reward(folder: Path) -> AestheticReward:
    return load_aesthetic(weights=folder, vision=SMALL)


def pictures(count: int, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Blocks of colour under noise, in 8 bits, so that Pillow and tensors see the same pictures."""
    generator = torch.Generator().manual_seed(sum(size))
    blocks, noise = (torch.randint(0, 256, (count, 3, *edges), generator=generator) for edges in ((4, 4), size))
    return (F.interpolate(blocks.to(dtype), size) + noise).div(2).floor() / 255


def written_out(state: Mapping[str, Tensor], pixels: Tensor) -> float:
    """The rating of one normalised picture (3, H, W)."""
    w = {name.removeprefix("vision_model."): tensor.double() for name, tensor in state.items()}
    heads = SMALL["num_attention_heads"]

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    def mlp(x: Tensor, name: str) -> Tensor:
        inner = linear(x, f"{name}.fc1")
        # GELU's tanh form
        inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
        return linear(inner, f"{name}.fc2")

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (query, key, value))
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(-1)
        return (weights @ value).transpose(0, 1).flatten(1)

    kernel, bias = (w[f"embeddings.patch_embedding.{kind}"] for kind in ("weight", "bias"))
    patches = F.conv2d(pixels.double()[None], kernel, bias, stride=SMALL["patch_size"])
    x = patches[0].flatten(1).T + w["embeddings.position_embedding.weight"]
    for index in range(SMALL["num_hidden_layers"]):
        layer = f"encoder.layers.{index}"
        y = norm(x, f"{layer}.layer_norm1")
        parts = (linear(y, f"{layer}.self_attn.{part}_proj") for part in "qkv")
        x = x + linear(attend(*parts), f"{layer}.self_attn.out_proj")
        x = x + mlp(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp")
    x = norm(x, "post_layernorm")

    kernels, biases = w["head.attention.in_proj_weight"].chunk(3), w["head.attention.in_proj_bias"].chunk(3)
    sources = (w["head.probe"][0], x, x)
    parts = (F.linear(*part) for part in zip(sources, kernels, biases, strict=True))
    pooled = linear(attend(*parts), "head.attention.out_proj")[0]
    pooled = pooled + mlp(norm(pooled, "head.layernorm"), "head.mlp")

    rating = pooled / pooled.square().sum().sqrt()
    for place in (0, 2, 4, 6, 8):
        rating = linear(rating, f"scoring_head.{place}")
    return rating.item()


@pytest.mark.parametrize("size", [(30, 30), (64, 64), (48, 96), (101, 70), (20, 28)])
def test_the_rating_is_the_written_out_formulas_behind_siglips_own_preprocessing(
    reward: AestheticReward, state: dict[str, Tensor], size: tuple[int, int]
) -> None:
    images = pictures(3, *size)
    processor = SiglipImageProcessorPil(
        size={"height": 30, "width": 30}, resample=3, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    originals = [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in images]
    inputs = processor(originals, return_tensors="pt").pixel_values
    ratings = reward(images, [""] * 3)
    assert ratings.dtype == torch.float32
    assert ratings.tolist() == pytest.approx([written_out(state, pixels) for pixels in inputs], abs=1e-5)


@pytest.mark.parametrize("size", [(64, 64), (48, 96), (20, 28)])
def test_the_training_path_is_the_formula_behind_an_antialiased_resize(
    reward: AestheticReward, state: dict[str, Tensor], size: tuple[int, int]
) -> None:
    images = pictures(3, *size)
    squares = resize(images, [30, 30], InterpolationMode.BICUBIC, antialias=True)
    expected = [written_out(state, pixels) for pixels in 2 * squares - 1]
    assert reward.via("training")(images, [""] * 3).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_features_are_those_of_the_whole_siglip(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.manual_seed(0)
    text = {key: SMALL[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")}
    siglip = SiglipModel(SiglipConfig(text_config=text | {"vocab_size": 20}, vision_config=dict(SMALL))).eval()
    siglip.save_pretrained(tmp_path)
    torch.save({name: x for name, x in state.items() if "scoring" in name}, tmp_path / HEAD)
    reward = load_aesthetic(weights=tmp_path, vision=SMALL)
    pixels = 2 * pictures(2, 30, 30) - 1
    torch.testing.assert_close(
        reward.tower(pixels).pooler_output, siglip.get_image_features(pixel_values=pixels).pooler_output
    )


def test_pictures_move_the_rating_by_far_more_than_the_tolerance(reward: AestheticReward) -> None:
    assert torch.pdist(reward(pictures(4, 64, 64), [""] * 4)[:, None]).min() > 1e-3


@pytest.mark.parametrize("mode", ["squash-pil", "squash"])
def test_pictures_of_several_sizes_are_rated_as_they_are_alone(reward: AestheticReward, mode: str) -> None:
    reward = reward.via(mode)
    images = [pictures(1, *size)[0] for size in ((30, 30), (96, 40), (33, 71))]
    alone = [reward(image[None], [""]).item() for image in images]
    assert reward(images, [""] * 3).tolist() == pytest.approx(alone, abs=1e-5)


def test_texts_do_not_matter_and_cost_no_second_pass(reward: AestheticReward) -> None:
    images, passes = pictures(2, 40, 40), []
    reward.tower.register_forward_hook(lambda *_: passes.append(1))
    first, second = reward.scores(images, ["a", "b"], ["c", ""])
    assert len(passes) == 1
    assert torch.equal(first, second) and torch.equal(first, reward(images, ["d", "e"]))
    assert not reward.reads_text


def test_every_pixel_that_the_towers_patches_see_has_a_gradient(reward: AestheticReward) -> None:
    images = pictures(1, 90, 90).requires_grad_()
    reward.via("training")(images, [""]).sum().backward()
    has_gradient = (images.grad != 0)[0].all(0)
    assert has_gradient[: 3 * SEEN, : 3 * SEEN].all()
    assert not has_gradient[-1].any() and not has_gradient[:, -1].any()  # past the last patch, and resizing's reach


def test_the_gradient_is_that_of_finite_differences(folder: Path) -> None:
    training = load_aesthetic(weights=folder, dtype=torch.float64, vision=SMALL).via("training")
    images = pictures(1, 48, 64, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(training.ratings(images).sum(), images)
    step = 1e-5 * torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        above, below = (training.ratings(images + sign * step).item() for sign in (1, -1))
    assert (gradient * step).sum().item() == pytest.approx((above - below) / 2, rel=1e-6)


def test_bfloat16_ratings_are_float32_numbers_near_the_exact_ones(folder: Path, reward: AestheticReward) -> None:
    half = load_aesthetic(weights=folder, dtype=torch.bfloat16, vision=SMALL)
    assert (half.dtype, half.head[0].weight.dtype) == (torch.bfloat16, torch.float32)
    images = pictures(4, 40, 40).requires_grad_()
    ratings = half.via("training")(images, [""] * 4)
    assert ratings.dtype == torch.float32
    torch.testing.assert_close(ratings, reward.via("training")(images, [""] * 4), atol=0.05, rtol=0)
    ratings.sum().backward()
    assert images.grad.isfinite().all() and images.grad.any()


def test_a_callers_autocast_does_not_reach_the_reward(reward: AestheticReward) -> None:
    image = pictures(1, 30, 30)
    expected = reward(image, [""])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reward(image, [""]), expected)


def test_it_is_frozen_and_says_what_it_is(reward: AestheticReward) -> None:
    assert not reward.tower.training and not reward.head.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert [reward.preprocess.mode, reward.via("training").preprocess.mode] == ["squash-pil", "squash"]
    assert reward.weights.startswith("model.safetensors sha256:") and f"; {HEAD} sha256:" in reward.weights
    assert (reward.name, reward.unit) == ("aesthetic-v2.5", "1 to 10")
    assert REWARDS.get("aesthetic-v2.5") is load_aesthetic


def test_the_whole_release_fits_the_whole_architecture() -> None:
    shapes = tower_layout(VISION)
    assert len(shapes) == 448
    assert sum(math.prod(shape) for shape in shapes.values()) == 428_225_600
    build_tower({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    shapes = head_layout(VISION["hidden_size"])
    assert len(shapes) == 10
    build_head({name: torch.empty(shape, dtype=torch.bfloat16) for name, shape in shapes.items()})


@pytest.mark.parametrize("damage", ["cut", "missing", "extra", "shape", "cut head", "missing head", "other head"])
def test_a_damaged_or_foreign_file_is_one_line(folder: Path, state: dict[str, Tensor], damage: str) -> None:
    tower = {name: x for name, x in state.items() if "scoring" not in name}
    head = {name: x for name, x in state.items() if "scoring" in name}
    if damage == "missing":
        del tower["vision_model.head.probe"]
    elif damage == "extra":
        tower["vision_model.encoder.layers.2.layer_norm1.weight"] = torch.ones(32)
    elif damage == "shape":
        tower["vision_model.post_layernorm.weight"] = torch.ones(16)
    elif damage == "missing head":
        del head["scoring_head.8.bias"]
    elif damage == "other head":
        head = {name.replace("scoring_head", "layers"): x for name, x in head.items()}
    save_file(tower, folder / "model.safetensors")
    torch.save(head, folder / HEAD)
    file = folder / (HEAD if "head" in damage else "model.safetensors")
    if damage.startswith("cut"):
        file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SrpoError, match=file.name) as failure:
        load_aesthetic(weights=folder, vision=SMALL)
    assert "\n" not in str(failure.value)


def test_without_a_file_the_command_that_fetches_it_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("srpo_cli.rewards.weights.try_to_load_from_cache", lambda repo, file: None)
    monkeypatch.setenv("TORCH_HOME", str(folder / "hub"))
    with pytest.raises(MissingError, match=r"3\.51 GB.*hf download google/siglip-so400m-patch14-384 model\.safeten"):
        load_aesthetic()
    (folder / HEAD).unlink()
    with pytest.raises(MissingError, match=r"2\.6 MB.*curl -L .*/models/aesthetic_predictor_v2_5\.pth"):
        load_aesthetic(weights=folder)


def real(*names: str) -> list[Path]:
    """Files under SRPO_REAL_WEIGHTS; skips, and says what to put there, where they are not."""
    absent = [name for name in names if not REAL or not (Path(REAL) / name).is_file()]
    if absent:
        pytest.skip(
            f"NOT CHECKED AGAINST THE REAL AESTHETIC PREDICTOR V2.5: put {', '.join(absent)} (siglip.safetensors is "
            "model.safetensors of google/siglip-so400m-patch14-384; the rest is under models/ and assets/samples/ of "
            "discus0434/aesthetic-predictor-v2-5) in a folder and set SRPO_REAL_WEIGHTS to it"
        )
    return [Path(REAL) / name for name in names]


def test_the_released_head_is_the_one_that_the_registry_names() -> None:
    (head,) = real(HEAD)
    assert sha256(head) == REWARD_FILES["aesthetic-v2.5"][1].sha256
    build_head(torch.load(head, weights_only=True))


def test_the_real_weights_rate_the_authors_samples_above_noise() -> None:
    weights, _, *samples = real("siglip.safetensors", HEAD, *(f"sample{i}.jpg" for i in range(1, 5)))
    reward = load_aesthetic(weights=weights)
    images = [pil_to_tensor(Image.open(sample).convert("RGB")) / 255 for sample in samples]
    *ratings, noise = reward([*images, pictures(1, 384, 384)[0]], [""] * 5).tolist()
    assert all(1 <= rating <= 10 for rating in ratings)
    assert noise < min(ratings)
