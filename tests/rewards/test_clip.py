"""The CLIP reward: caching, gradients, checkpoints, and every kind of architecture and tag against open_clip itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as WordTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerFast, RobertaConfig

from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.rewards.clip import ClipReward, build_clip, load_open_clip
from srpo_cli.rewards.preprocess import Preprocess
from srpo_cli.rewards.weights import sha256

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
HALF = (0.5, 0.5, 0.5)
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


OPENAI_WAY = {"mean": MEAN, "std": STD, "interpolation": "bicubic", "resize_mode": "shortest"}
SIGLIP_WAY = {"mean": HALF, "std": HALF, "interpolation": "bicubic", "resize_mode": "squash"}
CLIPA_WAY = SIGLIP_WAY | {"interpolation": "bilinear"}
WORDS = {"vocab_size": 49408, "context_length": 16}
TEXTS = ["a red bicycle", "", "two cats", "it\u2019s", "night " * 30, "a"]
FAMILIES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # over CONFIG, and what the tag says
    "plain": ({"text_cfg": WORDS}, OPENAI_WAY),
    "quickgelu-by-tag": ({"text_cfg": WORDS}, OPENAI_WAY | {"quick_gelu": True}),
    "resnet": (
        {"text_cfg": WORDS, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}},
        OPENAI_WAY,
    ),
    "siglip": (
        {
            "vision_cfg": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "avg", "timm_proj": "linear"},
            "text_cfg": {
                "no_causal_mask": True,
                "pool_type": "last",
                "proj_bias": True,
                "hf_tokenizer_name": "org/words",
            },
            "init_logit_bias": -10,
            "custom_text": True,
        },
        SIGLIP_WAY,
    ),
    "rotary": (
        {
            "vision_cfg": {"image_size": 224, "timm_model_name": "eva02_tiny_patch14_224"},
            "text_cfg": WORDS,
            "custom_text": True,
        },
        CLIPA_WAY,
    ),
    "hybrid": (
        {"vision_cfg": {"image_size": 224, "timm_model_name": "vit_tiny_r_s16_p8_224"}, "text_cfg": WORDS},
        OPENAI_WAY,
    ),
    "coca": (
        {
            "vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 4, "output_tokens": True},
            "text_cfg": WORDS | {"embed_cls": True, "output_tokens": True},
            "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
            "custom_text": True,
        },
        OPENAI_WAY,
    ),
    "roberta": (
        {"text_cfg": {"hf_model_name": "org/roberta", "hf_tokenizer_name": "org/words", "context_length": 12}},
        OPENAI_WAY,
    ),
}


@pytest.fixture
def libraries(hub_cache: Callable[[str], Path]) -> dict[str, Path]:
    """A Hub cache with a text tower's configuration and a tokenizer, by repository."""
    folders = {repo: hub_cache(repo) for repo in ("org/roberta", "org/words")}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    RobertaConfig(vocab_size=520, max_position_embeddings=40, **sizes).save_pretrained(folders["org/roberta"])
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "red", "bicycle", "two", "cats", "night"]
    rules = WordTokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    rules.pre_tokenizer = WhitespaceSplit()
    rules.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>", "sep_token": "</s>", "cls_token": "<s>"}
    PreTrainedTokenizerFast(tokenizer_object=rules, **special).save_pretrained(folders["org/words"])
    return folders


@pytest.fixture
def family(
    request: pytest.FixtureRequest, clip_config: dict[str, Any], libraries: dict[str, Path], register: Callable
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """An architecture with a tag "real", its configuration with local folders for repositories, and the tag."""
    changes, tag = FAMILIES[request.param]
    config = clip_config | changes
    for part in ("vision_cfg", "text_cfg"):
        config[part] = clip_config[part] | changes.get(part, {})
    name = register(f"tiny-{request.param}", config, real=tag | {"hf_hub": "org/weights/"})
    local = config | {"text_cfg": dict(config["text_cfg"])}
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if key in local["text_cfg"]:
            local["text_cfg"][key] = str(libraries[local["text_cfg"][key]])
    register("as-open-clip-does", local | {"quick_gelu": tag.get("quick_gelu", False)})
    return name, local, tag


@pytest.mark.parametrize("family", FAMILIES, indirect=True)
def test_scores_are_open_clips(
    family: tuple, roughen: Callable, tmp_path: Path, photos: list[Image.Image], pictures: list[Tensor]
) -> None:
    name, _, tag = family
    torch.manual_seed(0)
    ways = {f"image_{key}": tag[key] for key in OPENAI_WAY}
    theirs, _, transform = open_clip.create_model_and_transforms("as-open-clip-does", pretrained_text=False, **ways)
    roughen(theirs)
    file = tmp_path / "weights.safetensors"
    save_file({key: tensor.clone() for key, tensor in theirs.state_dict().items()}, file)
    with torch.no_grad():
        image = theirs.encode_image(torch.stack([transform(photo) for photo in photos]), normalize=True)
        text = theirs.encode_text(open_clip.get_tokenizer("as-open-clip-does")(TEXTS), normalize=True)

    reward = load_open_clip(f"clip:{name}/real", file)

    squash = tag["resize_mode"] == "squash"
    assert reward.modes == (("squash-pil", "squash") if squash else ("crop-pil", "crop"))
    assert reward.unit == "cosine" and f"sha256:{sha256(file)}" in reward.weights
    expected = (image * text).sum(-1)
    assert expected.std() > 1e-3
    torch.testing.assert_close(reward(pictures, TEXTS), expected, atol=1e-5, rtol=0)
    short = load_open_clip(f"clip:{name}/real", file, dtype=torch.bfloat16)(pictures, TEXTS)
    assert short.dtype == torch.float32
    torch.testing.assert_close(short, expected, atol=0.05, rtol=0)


@pytest.mark.parametrize("family", ["quickgelu-by-tag", "siglip"], indirect=True)
def test_the_gradient_reaches_every_pixel_and_is_that_of_the_score(
    family: tuple, tmp_path: Path, check_gradient: Callable
) -> None:
    torch.manual_seed(0)
    name = family[0]
    model = open_clip.create_model("as-open-clip-does", pretrained_text=False)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    check_gradient(load_open_clip(f"clip:{name}/real", tmp_path / "weights.safetensors"), "a red bicycle")


def test_every_tag_of_open_clip_has_a_repository_and_a_way_to_preprocess() -> None:
    tags = open_clip.list_pretrained()
    assert len(tags) > 190
    for architecture, tag in tags:
        trained = open_clip.get_pretrained_cfg(architecture, tag)
        assert trained["hf_hub"].count("/") == 2 and trained["resize_mode"] in ("shortest", "squash")
        assert trained["interpolation"] in ("bicubic", "bilinear") and len(trained["mean"]) == len(trained["std"]) == 3


def test_without_a_tag_the_preprocessing_is_what_all_tags_share(
    clip_config: dict[str, Any], register: Callable, clip_file: Path
) -> None:
    one = {"hf_hub": "org/weights/"} | CLIPA_WAY
    for name, tags, mode, mean in (
        ("of-one-mind", {"a": one, "b": one}, "squash-pil", HALF),
        ("of-two", {"a": one, "b": {"hf_hub": "org/weights/"} | OPENAI_WAY}, "crop-pil", MEAN),
        ("of-none", {}, "crop-pil", MEAN),
    ):
        preprocess = load_open_clip(f"clip:{register(name, clip_config, **tags)}", clip_file).preprocess
        assert (preprocess.mode, preprocess.mean) == (mode, mean), name


def test_a_tag_is_found_in_the_hub_cache_safetensors_first(
    clip_config: dict[str, Any], register: Callable, clip_file: Path, hub_cache: Callable
) -> None:
    name = register("tiny", clip_config, real={"hf_hub": "org/weights/"} | OPENAI_WAY)
    folder = hub_cache("org/weights")
    torch.save(load_file(clip_file), folder / "open_clip_pytorch_model.bin")
    assert load_open_clip(f"clip:{name}/real").weights == "org/weights@1234"
    (folder / "open_clip_model.safetensors").write_bytes(b"cut")
    with pytest.raises(SrpoError, match=r"Cannot read.*open_clip_model\.safetensors"):
        load_open_clip(f"clip:{name}/real")


def test_a_missing_tag_comes_with_its_size_and_command(
    clip_config: dict[str, Any], register: Callable, hub_cache: Callable
) -> None:
    name = register("tiny", clip_config, real={"hf_hub": "org/weights/"} | OPENAI_WAY)
    with pytest.raises(
        MissingError,
        match=r"clip:tiny/real needs open_clip_model\.safetensors \(0\.00 GB in float32\).*"
        r"hf download org/weights open_clip_model\.safetensors \(or open_clip_pytorch_model\.bin, where",
    ):
        load_open_clip(f"clip:{name}/real")


def test_a_download_is_announced_and_the_older_file_is_asked_for_second(
    clip_config: dict[str, Any],
    register: Callable,
    clip_file: Path,
    hub_cache: Callable,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = register("tiny", clip_config, real={"hf_hub": "org/weights/"} | OPENAI_WAY)
    asked: list[str] = []

    def download(repo: str, file: str) -> str:
        asked.append(file)
        if file.endswith(".safetensors"):
            raise FileNotFoundError(file)
        torch.save(load_file(clip_file), hub_cache(repo) / file)
        return str(hub_cache(repo) / file)

    monkeypatch.setattr("srpo_cli.rewards.weights.hf_hub_download", download)
    said: list[str] = []
    assert load_open_clip(f"clip:{name}/real", announce=said.append).weights == "org/weights@1234"
    assert asked == ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    assert len(said) == 2 and said[1].startswith("downloading open_clip_pytorch_model.bin (0.00 GB in float32)")


@pytest.mark.parametrize("family", ["siglip", "roberta"], indirect=True)
def test_another_librarys_part_is_never_fetched_unannounced(
    family: tuple, clip_file: Path, hub_cache: Callable
) -> None:
    repo = "org/roberta" if "hf_model_name" in family[1]["text_cfg"] else "org/words"
    for file in hub_cache(repo).iterdir():
        file.unlink()
    with pytest.raises(MissingError, match=rf"needs .* of {repo}.* hf download {repo} --include '\*\.json'") as failure:
        load_open_clip(f"clip:{family[0]}/real", clip_file)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("family", ["siglip"], indirect=True)
def test_a_tokenizer_beside_the_weights_is_the_first_choice(
    family: tuple, libraries: dict[str, Path], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = open_clip.create_model("as-open-clip-does", pretrained_text=False)
    libraries["org/words"].rename(tmp_path / "given")
    save_file(model.state_dict(), tmp_path / "given" / "open_clip_model.safetensors")
    for given in (tmp_path / "given", tmp_path / "given" / "open_clip_model.safetensors"):
        reward = load_open_clip(f"clip:{family[0]}/real", given)
        assert f"tokenizer.json sha256:{sha256(tmp_path / 'given' / 'tokenizer.json')}" in reward.weights
        assert reward.tokenizer(["two cats"])[0, :3].tolist() == [7, 8, 2]


def test_a_checkpoint_of_a_parallel_training_is_read(
    clip_config: dict[str, Any], tiny_clip: open_clip.CLIP, tmp_path: Path
) -> None:
    state = {f"module.{name}": tensor for name, tensor in tiny_clip.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state | {"module.logit_scale": torch.ones(1)}}, tmp_path / "epoch_3.pt")
    loaded = build_clip(clip_config, tmp_path / "epoch_3.pt", **CPU)
    assert loaded.logit_scale.shape == () and torch.equal(loaded.visual.proj, tiny_clip.visual.proj)


def test_a_clip_needs_weights_a_known_architecture_and_a_known_tag(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"--weights clip:ViT-B-32=FILE, or name .* clip:ViT-B-32/openai"):
        load_open_clip("clip:ViT-B-32")
    with pytest.raises(MissingError, match=r"nowhere\.pt"):
        load_open_clip("clip:ViT-B-32", tmp_path / "nowhere.pt")
    with pytest.raises(UsageError, match=r"'ViT-Z-14'.*ViT-[HLg]-14"):
        load_open_clip("clip:ViT-Z-14")
    with pytest.raises(
        UsageError, match=r"Unknown tag of clip:ViT-B-32 'opnai'. Did you mean 'openai'.*laion2b_s34b_b79k"
    ):
        load_open_clip("clip:ViT-B-32/opnai")
    with pytest.raises(
        MissingError, match=r"openai needs .* \(0\.61 GB in float32\).*timm/vit_base_patch32_clip_224\.openai"
    ):
        load_open_clip("clip:ViT-B-32/openai", tmp_path)


def test_prepared_texts_are_never_encoded_again():
    clip = open_clip.create_model("ViT-B-32", pretrained=None)
    reward = ClipReward(clip, open_clip.get_tokenizer("ViT-B-32"), preprocess=Preprocess(224))
    reward.prepare(["a cat", "a dog"])
    prepared = reward.text_features(["a cat", "a dog"])
    for name, child in clip.named_children():
        if name != "visual":
            child.to("meta")  # where nothing can be computed
    assert torch.equal(reward.text_features(["a dog", "a cat"]), prepared[[1, 0]])
    assert reward.device == torch.device("cpu")
    with pytest.raises(NotImplementedError, match="meta"):
        reward.text_features(["a bird"])
