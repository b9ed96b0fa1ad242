"""Pictures of any size on their way to a tower, against what open_clip, transformers, torchvision and HPSv2 do."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, normalize, pil_to_tensor, resize
from transformers import CLIPImageProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from srpo_cli.rewards.preprocess import Mode, Preprocess

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
HALF = (0.5, 0.5, 0.5)
MODES = ["crop", "crop-pil", "pad", "pad-antialias", "squash", "squash-pil"]


@pytest.mark.parametrize("size", [(32, 32), (64, 64), (64, 96), (101, 70), (24, 40), (35, 32), (32, 37), (5, 300)])
def test_the_crop_is_torchvisions(size: tuple[int, int]) -> None:
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = resize(images, 32, InterpolationMode.BICUBIC, antialias=True)
    torch.testing.assert_close(Preprocess(32)(images), normalize(center_crop(expected, [32, 32]), MEAN, STD))


@pytest.mark.parametrize("mode", ["crop", "squash"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_by_pillow_is_open_clips_to_the_bit(
    mode: str, interpolation: str, photos: list[Image.Image], pictures: list[Tensor]
) -> None:
    theirs = open_clip.image_transform(
        32,
        is_train=False,
        mean=HALF,
        std=HALF,
        resize_mode={"crop": "shortest"}.get(mode, mode),
        interpolation=interpolation,
    )
    ours = Preprocess(32, f"{mode}-pil", HALF, HALF, interpolation)(pictures)
    assert torch.equal(ours, torch.stack([theirs(photo) for photo in photos]))


def test_by_pillow_with_a_floored_centre_is_transformers(photos: list[Image.Image], pictures: list[Tensor]) -> None:
    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = torch.as_tensor(processor(photos, return_tensors="pt").pixel_values)
    torch.testing.assert_close(Preprocess(32, "crop-pil", centre="floor")(pictures), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(35, 32), (32, 47), (32, 33), (32, 32)])
def test_a_floored_centre_starts_where_transformers_does(size: tuple[int, int]) -> None:
    pixels = torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    theirs = processor(pixels, return_tensors="pt").pixel_values
    torch.testing.assert_close(Preprocess(32, "crop", centre="floor")(pixels[None] / 255), theirs, atol=1e-6, rtol=0)


def as_hpsv2_pads(image: Tensor, size: int, antialias: bool) -> Tensor:
    """ResizeMaxSize of the HPSv2 package and Normalize, for (3, H, W), padded also where nothing is resized.

    Zeros go around the pixels in [0, 1], so black, not the mean; the odd row or column goes below or to the right.
    """
    scale = size / float(max(image.shape[-2:]))
    if scale != 1.0:
        shape = [round(edge * scale) for edge in image.shape[-2:]]
        image = F.interpolate(image[None], shape, mode="bicubic", align_corners=False, antialias=antialias)[0]
    square = torch.zeros(3, size, size)
    top, left = ((size - edge) // 2 for edge in image.shape[-2:])
    square[:, top : top + image.shape[-2], left : left + image.shape[-1]] = image
    return (square - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


@pytest.mark.parametrize(("mode", "antialias"), [("pad", False), ("pad-antialias", True)])
def test_padding_is_hpsv2s(mode: Mode, antialias: bool, pictures: list[Tensor]) -> None:
    fitting = torch.rand(3, 32, 21, generator=torch.Generator().manual_seed(0))
    for image in [*pictures, fitting]:
        torch.testing.assert_close(Preprocess(32, mode)(image[None])[0], as_hpsv2_pads(image, 32, antialias))


def test_without_antialias_pixels_are_left_out_and_with_it_none_is() -> None:
    for mode, dead in (("pad", True), ("pad-antialias", False), ("crop", False), ("squash", False)):
        image = torch.rand(1, 3, 200, 200, requires_grad=True)
        Preprocess(32, mode)(image).square().sum().backward()
        assert (image.grad == 0).any().item() is dead, mode


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (300, 2), (33, 31), (32, 20)])
def test_any_shape_becomes_the_towers(mode: Mode, size: tuple[int, int]) -> None:
    square = Preprocess(32, mode)(torch.rand(2, 3, *size))
    assert square.shape == (2, 3, 32, 32) and square.isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_a_list_is_its_pictures_one_by_one(mode: Mode, pictures: list[Tensor]) -> None:
    preprocess = Preprocess(32, mode)
    together = preprocess(pictures)
    assert all(
        torch.equal(square, preprocess(image[None])[0]) for square, image in zip(together, pictures, strict=True)
    )
    torch.testing.assert_close(preprocess(torch.stack([pictures[0]] * 3)), together[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("mode", MODES)
def test_half_precision_pictures_are_resized_in_single(mode: Mode, pictures: list[Tensor]) -> None:
    halves = pictures[1][None].bfloat16()
    assert torch.equal(Preprocess(32, mode)(halves), Preprocess(32, mode)(halves.float()))
    assert Preprocess(32, mode)(halves.double()).dtype == torch.float64


def test_eight_bit_pictures_survive_the_way_through_pillow(photos: list[Image.Image], pictures: list[Tensor]) -> None:
    square = Preprocess(96, "crop-pil", (0.0,) * 3, (1.0,) * 3)(pictures[0][None])[0]
    assert torch.equal((square * 255).round().byte(), pil_to_tensor(photos[0]))
