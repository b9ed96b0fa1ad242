"""The target that the base model's pictures set: gap, captions, and what to do where these cannot be held."""

import math

import pytest
import torch

from srpo_cli.config.schema import AlgorithmConfig
from srpo_cli.errors import UsageError
from srpo_cli.recipes.figures import OtherPrompts
from srpo_cli.recipes.target import holds_captions, make_target, warn_of_target
from srpo_cli.rewards.base import Reward

OTHERS = OtherPrompts(["a dog", "a cat"])


class Aesthetic(Reward):
    """A reward that reads no text."""

    reads_text = False

    def __call__(self, images, prompts):
        return images.mean((1, 2, 3))


class Matching(Aesthetic):
    reads_text = True


@pytest.fixture
def told():
    return []


def pictures(gap, margin, spread=0.1, count=64):
    """Gap and margin of so many pictures, with exactly these means."""
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0))
    noise = (noise - noise.mean()) / noise.std()
    return torch.stack([gap + 0 * noise, margin + spread * noise], 1)


def make(told, base, asked, **config):
    return make_target(
        AlgorithmConfig(**{"target": "auto", "at_target": "hold", **config}), base, asked, 4, told.append, told.append
    )


def test_gap_and_margin_are_the_means_of_what_is_drawn(told):
    target = make(told, pictures(-0.1, 0.6), pictures(0.2, 0.5))
    assert target.value == pytest.approx(-0.1 + 1.35 * 0.3)
    assert (*target.captions.base, *target.captions.asked) == pytest.approx((-0.1, 0.6, 0.2, 0.5))
    assert target.captions.error == pytest.approx(0.1 / math.sqrt(4), rel=1e-4)
    assert [line.split(",")[0] for line in told] == [
        "target: semantic gap -0.100 now",
        "target: caption margin 0.600 now",
    ]


def test_a_given_gap_takes_what_is_expected_of_captions_from_the_asked_pictures_too(told):
    target = make(told, pictures(-0.1, 0.6), pictures(0.2, 0.5), target=0.4)
    assert (target.value, target.captions.expected(0.4)) == (0.4, pytest.approx(0.5))
    assert told[0] == "target: semantic gap -0.100 now, train to +0.400 and hold it there"


def test_a_given_gap_below_the_base_models_is_refused_for_what_it_is(told):
    with pytest.raises(UsageError, match=r"algorithm\.target is -0\.5, and the untrained model's gap is -0\.1000"):
        make(told, pictures(-0.1, 0.6), pictures(0.2, 0.5), target=-0.5)


def test_a_policy_method_holds_the_gap_alone_and_says_so(told):
    config = AlgorithmConfig(name="dance-grpo", target="auto", at_target="hold")
    assert not holds_captions(config, Matching(), OTHERS, told.append)
    assert "captions are not: dance-grpo follows no gradient" in told[0]


@pytest.mark.parametrize(
    ("config", "lines"),
    [({"name": "refl"}, 1), ({"name": "refl", "relative": True}, 0), ({"name": "refl", "target": None}, 0), ({}, 0)],
)
def test_a_plain_reward_is_told_that_it_need_not_come_near_a_gap(told, config, lines):
    warn_of_target(AlgorithmConfig(**{"target": "auto", **config}), told.append)
    assert ["raises the plain reward" in line for line in told] == [True] * lines


def test_without_margins_the_gap_alone_is_held(told):
    target = make(told, pictures(-0.1, 0.6)[:, :1], pictures(0.2, 0.5)[:, :1])
    assert target.captions is None and target.value == pytest.approx(0.305)


@pytest.mark.parametrize("margin", [0.03, 0.0, -0.2])
def test_a_margin_that_is_not_clear_of_chance_cannot_be_held(told, margin):
    """64 pictures with a spread of 0.1: three standard errors are 0.0375."""
    base, asked = pictures(-0.1, margin), pictures(0.2, 0.5)
    assert make(told, base, asked).captions is None
    assert told[0].startswith("target: the gap is held and captions are not: the caption margin")
    with pytest.raises(
        UsageError, match=r"algorithm\.captions is hold, and the caption margin.*: set algorithm\.captions=free"
    ):
        make(told, base, asked, captions="hold")
    assert make(told, pictures(-0.1, 0.04), asked).captions


@pytest.mark.parametrize(
    ("reward", "others", "why"),
    [(Aesthetic(), OTHERS, "tells no prompt from another"), (Matching(), OtherPrompts(["a dog"] * 2), "one prompt")],
)
def test_captions_need_a_reward_that_tells_prompts_apart_and_two_of_them(told, reward, others, why):
    config = AlgorithmConfig(target="auto", at_target="hold")
    assert holds_captions(config, Matching(), OTHERS, told.append) and not told
    assert not holds_captions(config, reward, others, told.append)
    assert why in told[0]
    with pytest.raises(UsageError, match=why):
        holds_captions(config.model_copy(update={"captions": "hold"}), reward, others, told.append)
    assert not holds_captions(config.model_copy(update={"captions": "free"}), reward, others, told.append)
    assert len(told) == 1
