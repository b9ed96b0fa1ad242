"""PickScore: the released files' layout, on a small model, against the official AutoProcessor and AutoModel."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from srpo_cli.errors import MissingError, SrpoError
from srpo_cli.rewards.pickscore import load_pickscore

TEXTS = [
    "a red bicycle",
    "",
    "Caf\u00e9 &amp; \u201cquotes\u201d  and\nlines",
    "very " * 120 + "long",
    "\u4e2d\u6587 <|endoftext|> x",
    "it's 12:30",
]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    """CLIP's own vocabulary of 49,408 in transformers, from the merges in open_clip."""
    bpe = gzip.decompress((Path(open_clip.__file__).parent / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode()
    theirs = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {theirs.get(word, word): i for word, i in open_clip.tokenizer.SimpleTokenizer().encoder.items()}
    merges = [tuple(line.split()) for line in bpe.split("\n")[1 : 49152 - 256 - 2 + 1]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges)


@pytest.fixture(scope="module")
def folder(tokenizer: CLIPTokenizer, roughen: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small CLIPModel with everything that the two repositories hold, as transformers writes it."""
    place = tmp_path_factory.mktemp("pickscore")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "hidden_act": "gelu"}
    config = CLIPConfig(
        projection_dim=16,
        # The release's configuration dates from when 2 stood for "the largest id ends a text".
        text_config=tower | {"num_hidden_layers": 2, "projection_dim": 16, "eos_token_id": 2, "vocab_size": 49408},
        vision_config=tower | {"num_hidden_layers": 2, "projection_dim": 16, "image_size": 32, "patch_size": 8},
    )
    torch.manual_seed(0)
    model = roughen(CLIPModel(config))
    model.logit_scale.data.fill_(4.6052)
    model.save_pretrained(place)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessorPil(**size), tokenizer).save_pretrained(place)
    return place


@torch.no_grad()
def official(folder: Path, photos: list[Image.Image], texts: list[str]) -> Tensor:
    """The model card's way, for picture i and text i: exp(logit_scale) * cosine."""
    processor, model = AutoProcessor.from_pretrained(folder, backend="pil"), AutoModel.from_pretrained(folder).eval()
    pixels = torch.as_tensor(processor.image_processor(photos, return_tensors="pt").pixel_values)
    words = processor.tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    image = model.get_image_features(pixel_values=pixels).pooler_output
    text = model.get_text_features(**words).pooler_output
    return model.logit_scale.exp() * torch.cosine_similarity(image, text)


def test_scores_are_the_official_ones(folder: Path, photos: list[Image.Image], pictures: list[Tensor]) -> None:
    reward = load_pickscore(weights=folder)
    assert reward.unit == "100 x cosine" and reward.modes == ("crop-pil", "crop")
    expected = official(folder, photos, TEXTS)
    assert expected.std() > 1
    torch.testing.assert_close(reward(pictures, TEXTS) / reward.scale, expected / reward.scale, atol=1e-5, rtol=0)


def test_the_cosine_alone_has_a_name_of_its_own(folder: Path, pictures: list[Tensor]) -> None:
    scaled, cosine = load_pickscore(weights=folder), load_pickscore("pickscore:cosine", folder)
    assert (cosine.name, cosine.unit, cosine.scale) == ("pickscore:cosine", "cosine", 1.0)
    torch.testing.assert_close(scaled(pictures, TEXTS), scaled.scale * cosine(pictures, TEXTS))


def test_tokens_are_transformers_not_open_clips(folder: Path, tokenizer: CLIPTokenizer) -> None:
    ids = load_pickscore(weights=folder).tokenizer(TEXTS)
    theirs = tokenizer(TEXTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(ids, theirs)
    assert not torch.equal(ids.max(-1).indices, open_clip.tokenizer.SimpleTokenizer()(TEXTS).max(-1).indices)


def test_a_file_with_and_one_without_position_ids_are_the_same(
    folder: Path, tmp_path: Path, pictures: list[Tensor]
) -> None:
    state = load_file(folder / "model.safetensors")
    assert not any("position_ids" in name for name in state)
    for tower, count in (("text_model", 77), ("vision_model", 17)):
        state[f"{tower}.embeddings.position_ids"] = torch.arange(count)[None]
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    save_file(state, tmp_path / "old.safetensors")
    old, new = load_pickscore(weights=tmp_path / "old.safetensors"), load_pickscore(weights=folder)
    assert torch.equal(old(pictures, TEXTS), new(pictures, TEXTS))


def test_bf16_is_the_same_score_but_for_its_digits(folder: Path, pictures: list[Tensor]) -> None:
    exact = load_pickscore("pickscore:cosine", folder)
    short = load_pickscore("pickscore:cosine", folder, dtype=torch.bfloat16)
    rounded = short(pictures, TEXTS)
    assert short.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact(pictures, TEXTS), atol=0.02, rtol=0)


def test_the_gradient_reaches_every_pixel_and_is_that_of_the_score(folder: Path, check_gradient: Callable) -> None:
    check_gradient(load_pickscore("pickscore:cosine", folder), TEXTS[0])


def test_the_real_architecture_has_the_tensors_of_the_release() -> None:
    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    with torch.device("meta"):
        config = CLIPConfig(projection_dim=1024, text_config=text, vision_config=vision | {"patch_size": 14})
        state = CLIPModel(config).state_dict()
    assert len(state) == 910 and sum(tensor.numel() for tensor in state.values()) == 986_109_441


@pytest.mark.parametrize("damage", ["missing", "configuration", "tokenizer"])
def test_foreign_files_are_one_line(damage: str, folder: Path, tmp_path: Path) -> None:
    state = load_file(folder / "model.safetensors")
    for file in ("config.json", "tokenizer.json"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    if damage == "missing":
        state.pop("visual_projection.weight")
    elif damage == "configuration":
        (tmp_path / "config.json").write_text("[")
    else:
        (tmp_path / "tokenizer.json").write_text("{}")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(SrpoError, match=r"visual_projection|config\.json|tokenizer\.json") as failure:
        load_pickscore(weights=tmp_path)
    assert "\n" not in str(failure.value)


def test_without_the_files_the_commands_that_fetch_them_are_told(
    folder: Path, tmp_path: Path, hub_cache: Callable
) -> None:
    with pytest.raises(MissingError, match=r"3\.94 GB.*hf download yuvalkirstain/PickScore_v1 model\.safetensors"):
        load_pickscore()
    for file in ("config.json", "model.safetensors"):
        (tmp_path / file).write_bytes((folder / file).read_bytes())
    with pytest.raises(MissingError, match=r"hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K tokenizer\.json"):
        load_pickscore(weights=tmp_path)


def test_the_real_weights_score_as_the_official_way_does(
    real: Callable, photos: list[Image.Image], pictures: list[Tensor]
) -> None:
    """Through AutoProcessor and AutoModel on the same files, near 20 as the paper has it."""
    files = dict.fromkeys(["model.safetensors", "config.json"], "of yuvalkirstain/PickScore_v1")
    processor = ["tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"]
    place = real("pickscore", **files, **dict.fromkeys(processor, "of laion/CLIP-ViT-H-14-laion2B-s32B-b79K"))
    assert json.loads((place / "config.json").read_text())["projection_dim"] == 1024
    scores = load_pickscore(weights=place)(pictures, TEXTS)
    assert 5 < scores.mean() < 30
    torch.testing.assert_close(scores, official(place, photos, TEXTS), atol=1e-3, rtol=0)
