"""HPSv2: the released files' layout, on a model of another size, against HPSv2's own way written out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from srpo_cli.errors import MissingError, SrpoError, UsageError
from srpo_cli.registry import REWARD_FILES, REWARDS
from srpo_cli.rewards.hps import load_hps
from srpo_cli.rewards.weights import sha256

TEXTS = ["Realistic photo. a red bicycle", "a red bicycle", "Caf\u00e9 &amp; \u201cquotes\u201d"]
BOTH = (torch.float32, torch.bfloat16)
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


@pytest.fixture
def released(clip_config: dict[str, Any], register: Callable, roughen: Callable, tmp_path: Path) -> tuple[str, Path]:
    """A small architecture with HPS's vocabulary, and its file as the release has it."""
    clip_config["vision_cfg"] |= {"layers": 3, "width": 48, "head_width": 16}
    clip_config["text_cfg"] |= {"context_length": 77, "vocab_size": 49408}
    torch.manual_seed(1)
    state = roughen(open_clip.CLIP(**clip_config)).half().state_dict()
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    return register("ViT-small-HPS", clip_config), tmp_path / "HPS_v2.1_compressed.pt"


def as_the_benchmark_resizes(image: Tensor, size: int, antialias: bool) -> Tensor:
    """The longer side to the tower's, black around, then mean and deviation."""
    scale = size / max(image.shape[-2:])
    shape = [round(edge * scale) for edge in image.shape[-2:]]
    image = F.interpolate(image[None], shape, mode="bicubic", align_corners=False, antialias=antialias)
    down, across = (size - edge for edge in shape)
    image = F.pad(image, [across // 2, across - across // 2, down // 2, down - down // 2])
    return (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize("version", ["hpsv2.0", "hpsv2.1"])
@pytest.mark.parametrize(("mode", "antialias"), [("reference", False), ("pad-antialias", True)])
def test_scores_are_the_written_out_cosines(
    version: str,
    mode: str,
    antialias: bool,
    released: tuple[str, Path],
    pictures: list[Tensor],
    written_out: type,
) -> None:
    architecture, file = released
    reward = load_hps(version, file, architecture=architecture)
    assert (reward.name, reward.scale, reward.unit, reward.dtype) == (version, 1.0, "cosine", torch.float32)
    assert reward.weights.endswith(f"sha256:{sha256(file)}")
    plain = written_out(torch.load(file, weights_only=True)["state_dict"], heads=(3, 2))
    squares = torch.cat([as_the_benchmark_resizes(image, 32, antialias) for image in pictures])
    words = plain.text(open_clip.tokenizer.SimpleTokenizer()(TEXTS * 2))
    expected = (plain.image(squares) * words).sum(-1)
    assert expected.std() > 0.01
    torch.testing.assert_close(reward.via(mode)(pictures, TEXTS * 2), expected, atol=1e-5, rtol=0)


def test_bf16_is_the_same_score_but_for_its_digits(released: tuple[str, Path], pictures: list[Tensor]) -> None:
    architecture, file = released
    exact, short = (load_hps(weights=file, dtype=dtype, architecture=architecture) for dtype in BOTH)
    rounded = short(pictures, TEXTS * 2)
    assert short.dtype == torch.bfloat16 and rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact(pictures, TEXTS * 2), atol=0.02, rtol=0)


def test_the_gradient_reaches_every_pixel_and_is_that_of_the_score(
    released: tuple[str, Path], check_gradient: Callable
) -> None:
    architecture, file = released
    check_gradient(load_hps(weights=file, architecture=architecture), TEXTS[0])


def test_each_way_in_circulation_can_be_asked_for(released: tuple[str, Path]) -> None:
    architecture, file = released
    reward = load_hps(weights=file, architecture=architecture)
    assert reward.preprocess.mode == reward.via("reference").preprocess.mode == "pad"
    assert reward.via("training").preprocess.mode == "crop"
    assert reward.via("crop-pil").preprocess.mode == "crop-pil"
    with pytest.raises(UsageError, match=r"'squash'.*pad, pad-antialias, crop-pil, crop"):
        reward.via("squash")


def test_a_file_of_another_architecture_is_one_line(released: tuple[str, Path]) -> None:
    architecture, file = released
    state = torch.load(file, weights_only=True)["state_dict"]
    for key in ("visual.proj", "logit_scale"):
        torch.save({"state_dict": {name: value for name, value in state.items() if name != key}}, file)
        with pytest.raises(SrpoError, match=f"not a checkpoint of this CLIP architecture.*{key}"):
            load_hps(weights=file, architecture=architecture)


def test_the_real_architecture_has_the_tensors_of_the_release() -> None:
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-H-14"))
    assert len(model.state_dict()) == 686
    assert sum(tensor.numel() for tensor in model.state_dict().values()) == 986_109_441


@pytest.mark.parametrize(
    ("version", "file"), [("hpsv2.0", "HPS_v2_compressed.pt"), ("hpsv2.1", "HPS_v2.1_compressed.pt")]
)
def test_without_the_file_the_command_that_fetches_it_is_told(
    version: str, file: str, tmp_path: Path, hub_cache: Callable
) -> None:
    assert REWARDS.get(version) is load_hps and REWARD_FILES[version][0].files == (file,)
    with pytest.raises(MissingError, match=rf"1\.97 GB.*hf download xswu/HPSv2 {file}") as failure:
        load_hps(version)
    assert failure.value.exit_code == 4
    with pytest.raises(MissingError, match=r"nowhere\.pt"):
        load_hps(version, tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("version", "file", "prompt", "value"),
    [  # issues 27 and 30 of tgxs002/HPSv2
        ("hpsv2.0", "HPS_v2_compressed.pt", "A cat with two horns on its head", 0.2876),
        ("hpsv2.1", "HPS_v2.1_compressed.pt", "cat with horn", 0.288),
    ],
)
def test_the_real_weights_score_the_demo_picture_as_others_report(
    version: str, file: str, prompt: str, value: float, real: Callable
) -> None:
    """Their torchvision, so their antialias, is not reported: one of both must give the value, in 16-bit autocast."""
    folder = real(version, **{file: "of xswu/HPSv2", "demo_image.jpg": "assets/ of tgxs002/HPSv2"})
    reward = load_hps(version, folder / file)
    image = pil_to_tensor(Image.open(folder / "demo_image.jpg").convert("RGB"))[None] / 255
    with torch.no_grad():
        scores = [reward.via(mode)(image, [prompt]).item() for mode in ("pad", "pad-antialias")]
    assert min(abs(score - value) for score in scores) < 1e-3, scores
