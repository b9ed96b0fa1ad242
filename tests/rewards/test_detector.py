"""Mask2Former with random weights: read from a folder, asked, and not believed where its files do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessor, SwinConfig

from srpo_cli.errors import MissingError, SrpoError
from srpo_cli.metrics.geneval import COLOURS
from srpo_cli.recipes.geneval import GenEvalJudge
from srpo_cli.recipes.judges import Picture
from srpo_cli.rewards.detector import load_detector
from srpo_cli.rewards.miniature import load_miniature
from srpo_cli.runtime.benchmarks import Item

LABELS = ["sofa", "cat", "mouse"]


@pytest.fixture(scope="module")
def release(tmp_path_factory) -> Path:
    """A folder as transformers saves one; the processor makes small squares, as the release's does."""
    torch.manual_seed(0)
    swin = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4, image_size=64)
    swin.out_features = ["stage1", "stage2", "stage3", "stage4"]
    config = Mask2FormerConfig(
        backbone_config=swin,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=5,
        id2label=dict(enumerate(LABELS)),
    )
    folder = tmp_path_factory.mktemp("mask2former")
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"height": 384, "width": 384}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def detector(release):
    return load_detector(weights=release)


@pytest.fixture
def pixels():
    """A wide picture with structure, (60, 96, 3)."""
    noise = torch.rand(1, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(noise, (60, 96), mode="bicubic").clamp(0, 1)[0].movedim(0, -1) * 255).byte()


@pytest.fixture
def copy(release, tmp_path):
    """Makes a folder like the release's with one file changed."""

    def changed(name, change):
        shutil.copytree(release, tmp_path, dirs_exist_ok=True)
        (tmp_path / name).write_bytes(change((release / name).read_bytes()))
        return tmp_path

    return changed


def test_it_has_the_labels_of_its_configuration_and_names_its_files(detector):
    assert detector.labels == LABELS
    assert [part.split()[0] for part in detector.weights.split("; ")] == [
        "model.safetensors",
        "config.json",
        "preprocessor_config.json",
    ]


def test_what_it_finds_is_what_its_network_says_of_the_picture_at_800_px(release, detector, pixels):
    model = Mask2FormerForUniversalSegmentation.from_pretrained(release).eval()
    size = (800, 1280)  # 60 x 96, the shorter side to 800; both are multiples of 32
    resized = F.interpolate(pixels.movedim(-1, 0)[None].float(), size, mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    with torch.no_grad():
        out = model((resized.round().clamp(0, 255) / 255 - mean) / std)
    logits = F.interpolate(out.masks_queries_logits, (384, 384), mode="bilinear")[0]
    masks = logits > 0
    sure = (logits.sigmoid() * masks).flatten(1).sum(1) / masks.flatten(1).sum(1).clamp(min=1)
    scores = out.class_queries_logits[0].softmax(-1)[:, :-1] * sure[:, None]  # (queries, classes)

    found = detector(pixels, 0.0)
    assert len(found.labels) == len(found.scores) == len(found.masks) > 0
    assert found.masks.shape[1:] == (60, 96)
    assert found.masks.dtype == torch.bool
    for label, score, mask in zip(found.labels, found.scores, found.masks, strict=True):
        of_label = scores[:, LABELS.index(label)]
        query = (of_label - score).abs().argmin()
        assert of_label[query].item() == pytest.approx(score.item(), abs=1e-3)
        expected = F.interpolate(masks[query][None, None].float(), (60, 96), mode="nearest")[0, 0].bool()
        assert (mask == expected).float().mean() > 0.98


def test_only_what_reaches_the_threshold_is_found(detector, pixels):
    scores = detector(pixels, 0.0).scores
    middle = scores.median().item()
    assert sorted(detector(pixels, middle).scores.tolist()) == sorted(scores[scores >= middle].tolist())
    nothing = detector(pixels, 1.0)
    assert nothing.labels == []
    assert nothing.scores.shape == (0,)
    assert nothing.masks.shape == (0, 60, 96)


def test_masks_may_overlap(detector, pixels):
    masks = detector(pixels, 0.0).masks
    assert (masks.sum(0) > 1).any()


def test_it_answers_genevals_question(copy):
    """Certain that all it sees are cats, but for the shape of their masks."""

    def sees_cats(content):
        state = load(content)
        state["class_predictor.bias"][LABELS.index("cat")] = 20
        return save(state, metadata={"format": "pt"})

    judge = GenEvalJudge(load_detector(weights=copy("model.safetensors", sees_cats)), load_miniature())
    pixels = torch.zeros(64, 64, 3, dtype=torch.uint8)

    def asks(**wanted):
        include = [{"class": "cat", "count": 1, **wanted}]
        return Picture(Item(0, "colors", 0, "a photo", {"include": include}), pixels)

    asked = [asks(), asks(**{"class": "couch"}), *(asks(color=colour) for colour in COLOURS)]
    cat, couch, *coloured = judge(asked)["geneval"].tolist()
    assert (cat, couch, sum(coloured)) == (1, 0, 1)


def test_missing_files_are_told_with_the_command(tmp_path, hub_cache):
    with pytest.raises(MissingError, match="hf download facebook/mask2former-swin-small-coco-instance"):
        load_detector()
    with pytest.raises(MissingError, match="nothing at"):
        load_detector(weights=tmp_path / "nowhere")


def test_weights_that_a_file_lacks_are_not_made_up(copy):
    def without_one(content):
        state = load(content)
        del state["class_predictor.weight"]
        return save(state, metadata={"format": "pt"})

    with pytest.raises(SrpoError, match=r"does not fit .*class_predictor.weight"):
        load_detector(weights=copy("model.safetensors", without_one))


def test_weights_of_another_size_are_refused(copy):
    def wider(content):
        return json.dumps({**json.loads(content), "num_queries": 7}).encode()

    with pytest.raises(SrpoError, match=r"not Mask2Former|does not fit"):
        load_detector(weights=copy("config.json", wider))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_that_was_cut_off_is_told_in_one_line(copy, name):
    with pytest.raises(SrpoError, match="not Mask2Former") as error:
        load_detector(weights=copy(name, lambda content: content[:1000]))
    assert "\n" not in str(error.value)
