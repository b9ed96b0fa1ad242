"""A reward that trains well passes the check, and every fault put into one is named."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from srpo_cli.errors import UsageError
from srpo_cli.miniature.world import draw_prompts, draw_scenes_of, render
from srpo_cli.recipes.check import check_reward
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.clip import ClipReward
from srpo_cli.rewards.miniature import load_miniature
from srpo_cli.rewards.preprocess import Mode, Preprocess

PROMPTS = draw_prompts(4, 0, "validation")
HPS_MODES: tuple[Mode, ...] = ("pad", "pad-antialias", "crop-pil", "crop")


@pytest.fixture(scope="module")
def pictures() -> list[Tensor]:
    return list(render(draw_scenes_of(PROMPTS, 0, seed=0)))


@pytest.fixture(scope="module")
def wide(pictures: list[Tensor]) -> list[Tensor]:
    """The pictures at five times the tower's height, and wider than high."""
    return [F.interpolate(picture[None], (280, 350), mode="bicubic")[0].clamp(0, 1) for picture in pictures]


@pytest.fixture(scope="module")
def miniature() -> ClipReward:
    return load_miniature()


@pytest.fixture(scope="module")
def behind(miniature: ClipReward) -> Callable[..., ClipReward]:
    """The miniature's weights behind other preprocessings."""
    size, mean, std = (getattr(miniature.preprocess, name) for name in ("size", "mean", "std"))

    def make(*modes: Mode) -> ClipReward:
        preprocess = Preprocess(size, modes[0], mean, std)
        return ClipReward(miniature.clip, miniature.tokenizer, preprocess=preprocess, modes=modes)

    return make


class Faulty(Reward):
    """A good reward whose training path sees changed pictures or gives changed scores."""

    name = "faulty"
    modes = ("crop-pil", "crop")

    def __init__(self, inner: ClipReward, before: Callable = lambda x: x, after: Callable = lambda x: x) -> None:
        self.inner, self.before, self.after = inner, before, after
        self.preprocess = inner.preprocess

    def __call__(self, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
        if self.preprocess.mode == "crop-pil":
            return self.inner(images, prompts)
        return torch.cat(
            [
                self.after(self.inner(self.before(image[None]), [prompt]))
                for image, prompt in zip(images, prompts, strict=True)
            ]
        )


def test_the_miniatures_reward_passes(miniature: ClipReward, pictures: list[Tensor]) -> None:
    check = check_reward(miniature, pictures, PROMPTS)
    assert (check.verdict, check.notes) == ("ok", ())
    assert (check.difference_max, check.dead_pixels, check.outside_crop) == (0, 0, 0)
    assert check.gradient_norm > 0
    assert max(check.error_along, check.error_random) < 0.01
    assert check.row()["verdict"] == "ok" and check.row()["dtype"] == "float32"


def test_modes_that_differ_on_purpose_pass_and_what_the_crop_leaves_out_is_said(
    behind: Callable[..., ClipReward], wide: list[Tensor]
) -> None:
    check = check_reward(behind(*HPS_MODES), wide, PROMPTS)
    assert (check.verdict, check.reference, check.training) == ("ok", "pad", "crop")
    assert check.difference_max > 0.01  # a black border is not a crop
    assert check.difference_squares < 1e-6
    assert check.dead_pixels == 0
    assert check.outside_crop == pytest.approx(1 - 280 / 350, abs=0.04)
    assert any("centre crop leaves" in note for note in check.notes)


def test_paths_that_rank_pictures_otherwise_are_noted(behind: Callable[..., ClipReward], wide: list[Tensor]) -> None:
    check = check_reward(behind(*HPS_MODES), wide, PROMPTS)
    assert check.rank_correlation < 0.9
    assert any("ranks these pictures otherwise" in note for note in check.notes)


@pytest.mark.parametrize("enlarged", [False, True])
def test_a_resize_without_antialias_is_named_whatever_the_pictures_size(
    behind: Callable[..., ClipReward], pictures: list[Tensor], wide: list[Tensor], enlarged: bool
) -> None:
    check = check_reward(behind("pad"), wide if enlarged else pictures, PROMPTS)
    assert "without antialias" in check.verdict
    assert (check.dead_pixels > 0.3) == enlarged
    assert check.dead_enlarged == pytest.approx(1 - (4 / 6) ** 2, abs=0.01)


def half(images: Tensor) -> Tensor:
    width = images.shape[-1] // 2
    return torch.cat([images[..., :width].detach(), images[..., width:]], -1)


def with_another_mean(images: Tensor) -> Tensor:
    return images + 2 / 255


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ({"before": lambda x: x.clamp(0, 1)}, "a clamp"),
        ({"before": Tensor.detach}, "the score is detached"),
        ({"after": Tensor.detach}, "the score is detached"),
        ({"after": lambda r: 0 * r}, "gradient of zero"),
        ({"before": half}, "50.0% of the pixels have no gradient"),
        ({"after": lambda r: 0.5 * r + 0.5 * r.detach()}, "off by 50.0% from finite differences along the gradient"),
        ({"before": lambda x: 0.7 * x + 0.3 * x.detach()}, "a wrong gradient: off by 30.0%"),
        ({"before": lambda x: x.flip(1)}, "channel order"),
        ({"before": with_another_mean}, "channel order, mean, std"),
        ({"before": lambda x: 2 * x - 1}, "channel order, mean, std and range"),
        ({"after": lambda r: r / 0}, "not finite: 0 of 4 by reference, 4 of 4 in training"),
    ],
)
def test_a_fault_in_the_training_path_is_named(
    behind: Callable[..., ClipReward], pictures: list[Tensor], fault: dict[str, Callable], named: str
) -> None:
    check = check_reward(Faulty(behind("crop"), **fault), pictures, PROMPTS)
    assert named in check.verdict


def test_the_wrapper_of_these_tests_is_no_fault_itself(
    behind: Callable[..., ClipReward], pictures: list[Tensor]
) -> None:
    assert check_reward(Faulty(behind("crop")), pictures, PROMPTS).verdict == "ok"


class Centred(Reward):
    """The miniature's reward, five times as large and with almost nothing left of one picture's score."""

    name = "centred"

    def __init__(self, inner: ClipReward, centre: float) -> None:
        self.inner, self.centre = inner, centre

    def __call__(self, images: Tensor | list[Tensor], prompts: list[str]) -> Tensor:
        return 5 * (self.inner(images, prompts) - self.centre) + 5e-4


def test_a_good_reward_whose_score_is_near_zero_passes(miniature: ClipReward, pictures: list[Tensor]) -> None:
    for picture, prompt in zip(pictures, PROMPTS, strict=True):
        centred = Centred(miniature, miniature([picture], [prompt]).item())
        assert check_reward(centred, [picture], [prompt]).verdict == "ok"


def test_a_reward_without_gradient_is_said_to_score_only(
    behind: Callable[..., ClipReward], pictures: list[Tensor]
) -> None:
    check = check_reward(behind("crop-pil"), pictures, PROMPTS)
    assert check.verdict == "not differentiable: it can score, it cannot train"
    assert check.score_training == check.score_reference


def test_a_reward_that_raises_is_a_row(miniature: ClipReward, pictures: list[Tensor]) -> None:
    def fall(_: Tensor) -> Tensor:
        raise RuntimeError("mat1 and mat2 shapes\ncannot be multiplied")

    check = check_reward(Faulty(miniature, before=fall), pictures, PROMPTS)
    assert check.verdict == "fails with RuntimeError: mat1 and mat2 shapes cannot be multiplied"


def test_half_precision_is_said_to_be_unmeasured(pictures: list[Tensor]) -> None:
    check = check_reward(load_miniature(dtype=torch.bfloat16), pictures, PROMPTS)
    assert (check.verdict, check.dtype, check.error_along) == ("ok", "bfloat16", None)
    assert any("float32" in note for note in check.notes)


def test_no_pictures_are_refused(miniature: ClipReward) -> None:
    with pytest.raises(UsageError, match="needs pictures"):
        check_reward(miniature, [], [])
