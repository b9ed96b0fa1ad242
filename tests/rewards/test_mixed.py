"""A mix of rewards is the weighted sum of its parts, in value, gradient and gap, and each part stays itself."""

from pathlib import Path

import pytest
import torch

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.config.schema import RewardConfig
from srpo_cli.errors import MissingError, UsageError
from srpo_cli.recipes.parts import check_pair, load_training_reward
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.clip import ClipReward
from srpo_cli.rewards.miniature import load_miniature
from srpo_cli.rewards.mixed import MixedReward, formula
from srpo_cli.rewards.noised import NoisedPair
from srpo_cli.rewards.plugins import reward
from srpo_cli.trust import trust

PLUGINS = Path(__file__).parent / "plugins"
CPU = torch.device("cpu")
WORDS = ControlWords(["realistic photo"], ["cg render"])
PROMPTS = ["a red cube", "a blue cone", "a green sphere"]
WEIGHTS = [(1, 0.5), (0.3, -2), (0, 1), (-1, 0)]


@reward(unit="pixels", reads_text=False, differentiable=True)
def brightness(images, prompts):
    return images.mean((1, 2, 3))


@reward(unit="classes", reads_text=True, differentiable=False)
def verdict(images, prompts):
    return images.mean((1, 2, 3)).round()


@pytest.fixture(autouse=True)
def a_user_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("srpo_cli.trust._this_process", set())


@pytest.fixture(scope="module")
def miniature():
    return load_miniature()


@pytest.fixture
def other():
    """A second CLIP, of another size and kind of text."""
    return load(name=str(trusted("untrained_clip.py")))


@pytest.fixture
def images():
    return torch.rand(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))


def trusted(name):
    """The path of a plug-in that the user has agreed to."""
    trust(PLUGINS / name)
    return PLUGINS / name


def load(**values):
    return load_training_reward(RewardConfig(**values), WORDS, CPU)


def columns():
    """The plain prompts, and those with either word."""
    return [PROMPTS, *(WORDS.texts(word, PROMPTS) for word in WORDS.all)]


# The sum


@pytest.mark.parametrize(("first", "second"), WEIGHTS)
def test_scores_are_the_weighted_sum_for_every_list_of_texts(first, second, miniature, other, images):
    mixed = MixedReward([(first, miniature), (second, other)])
    for number, texts in enumerate(columns()):
        expected = first * miniature(images, texts) + second * other(images, texts)
        torch.testing.assert_close(mixed.scores(images, *columns())[number], expected)
        torch.testing.assert_close(mixed(images, texts), expected)


@pytest.mark.parametrize(("first", "second"), WEIGHTS)
def test_the_gradient_is_the_weighted_sum_of_the_parts_gradients(first, second, images):
    def gradient(judge, leaf):
        r_plain, r_positive, r_negative = judge.scores(leaf, *columns())
        return torch.autograd.grad((0.3 * r_plain + r_positive - r_negative).sum(), leaf)[0]

    config, other = RewardConfig(name="miniature"), RewardConfig(name=str(trusted("untrained_clip.py")))
    one, two = (load_training_reward(each, WORDS, CPU, torch.float64) for each in (config, other))
    leaf = images.double().requires_grad_()
    found = gradient(MixedReward([(first, one), (second, two)]), leaf)
    expected = first * gradient(one, leaf) + second * gradient(two, leaf)
    assert expected.abs().max() > 1e-6
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


def test_a_part_of_weight_0_changes_no_bit(miniature, other, images):
    mixed = MixedReward([(1, miniature), (0, other)])
    for mine, its in zip(mixed.scores(images, *columns()), miniature.scores(images, *columns()), strict=True):
        assert torch.equal(mine, its)


def test_a_part_that_reads_no_text_moves_the_reward_and_cancels_out_of_the_gap(miniature, images):
    mixed = MixedReward([(1, miniature), (3, brightness)])
    leaf = images.clone().requires_grad_()
    plain, *terms = mixed.scores(leaf, *columns())
    torch.testing.assert_close(plain, miniature(images, PROMPTS) + 3 * images.mean((1, 2, 3)))
    _, *alone = miniature.scores(leaf, *columns())
    torch.testing.assert_close(WORDS.gap(terms), WORDS.gap(alone), rtol=0, atol=1e-6)
    gradients = [torch.autograd.grad(WORDS.gap(each).sum(), leaf)[0] for each in (terms, alone)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-8)


def test_every_part_is_asked_once_for_all_texts(images):
    class Counting(Reward):
        asked = 0

        def __call__(self, images, prompts):
            return torch.zeros(len(images))

        def scores(self, images, *texts):
            self.asked += 1
            return super().scores(images, *texts)

    parts = [(1, Counting()), (2, Counting())]
    assert len(MixedReward(parts).scores(images, *columns())) == 3
    assert [part.asked for _, part in parts] == [1, 1]


# What a mix says of itself


def test_parts_keep_what_is_their_own(miniature, other, images):
    mixed = MixedReward([(1, other), (-0.5, miniature)])
    assert mixed.name == f"{other.name} - 0.5 miniature"
    assert mixed.weights == f"{other.weights}; {miniature.weights}"
    assert len(list(mixed.parameters())) == len(list(other.parameters())) + len(list(miniature.parameters()))
    texts = ["a text that nothing has read"] * 3
    mixed.prepare(texts)
    assert texts[0] in miniature._text_cache
    through = mixed.via("training")
    assert [part.preprocess.mode for _, part in through.parts] == ["crop", "crop"]
    assert [part.preprocess.size for _, part in through.parts] == [32, miniature.preprocess.size]
    torch.testing.assert_close(through(images, PROMPTS), mixed(images, PROMPTS))
    with pytest.raises(UsageError, match="has no preprocessing 'squash'"):
        mixed.via("squash")


def test_another_preprocessing_reaches_the_parts(miniature):
    how = {"preprocess": miniature.preprocess, "modes": ("squash", "crop")}
    squashed = ClipReward(miniature.clip, miniature.tokenizer, **how)
    wide = torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(1))
    mixed = MixedReward([(1, squashed), (1, miniature)])
    expected = squashed.via("squash")(wide, PROMPTS) + miniature(wide, PROMPTS)
    torch.testing.assert_close(mixed.via("reference")(wide, PROMPTS), expected)
    torch.testing.assert_close(mixed.via("training")(wide, PROMPTS), 2 * miniature(wide, PROMPTS))
    assert not torch.allclose(expected, 2 * miniature(wide, PROMPTS))


def test_text_is_read_if_any_part_reads_it_and_there_is_a_gradient_if_all_have_one(miniature):
    def facts(*rewards):
        mixed = MixedReward((1, one) for one in rewards)
        return mixed.reads_text, mixed.differentiable, mixed.thread_safe

    assert facts(miniature, brightness) == (True, True, False)
    assert facts(brightness, brightness) == (False, True, False)
    assert facts(miniature, verdict) == (True, False, False)
    assert facts(miniature, miniature) == (True, True, True)


def test_a_mix_is_where_its_first_weights_are(miniature):
    elsewhere = load_miniature(device="meta")
    assert MixedReward([(1, brightness), (1, elsewhere), (1, miniature)]).device.type == "meta"
    assert MixedReward([(1, brightness)]).device.type == "cpu"


@pytest.mark.parametrize(
    ("parts", "text"),
    [
        ([(1, "a")], "a"),
        ([(-1, "a")], "-a"),
        ([(2, "a"), (1, "b")], "2 a + b"),
        ([(1, "a"), (-0.5, "b"), (-1, "c")], "a - 0.5 b - c"),
        ([(-0.25, "a"), (0, "b")], "-0.25 a + 0 b"),
    ],
)
def test_a_mix_is_named_as_people_write_a_sum(parts, text):
    assert formula(parts) == text


# From a configuration


def test_a_configuration_names_the_parts_their_weights_and_their_preprocessing(images):
    name = str(trusted("untrained_clip.py"))
    mixed = load(name="miniature", weight=2, others={name: {"weight": -0.5, "preprocess": "crop"}})
    assert mixed.name == f"2 miniature - 0.5 {name}"
    expected = 2 * load(name="miniature")(images, PROMPTS) - 0.5 * load(name=name)(images, PROMPTS)
    torch.testing.assert_close(mixed(images, PROMPTS), expected)
    with pytest.raises(UsageError, match="has no preprocessing 'pad'"):
        load(name="miniature", others={name: {"preprocess": "pad"}})


def test_a_reward_of_weight_1_alone_is_no_mix_and_of_another_weight_one_of_a_single_part(images):
    assert not isinstance(load(name="miniature"), MixedReward)
    against = load(name="miniature", weight=-1)
    torch.testing.assert_close(against(images, PROMPTS), -load(name="miniature")(images, PROMPTS))


def test_each_part_takes_weights_of_its_own(tmp_path):
    name = str(trusted("untrained_clip.py"))
    with pytest.raises(MissingError, match=f"reward miniature is not in {tmp_path}"):
        load(name=name, others={"miniature": {"weights": tmp_path}})


def test_a_part_that_is_unknown_or_has_no_gradient_is_refused_by_name(tmp_path):
    with pytest.raises(UsageError, match=r"Unknown reward 'pickscor'\. Did you mean 'pickscore'"):
        load(name="miniature", others={"pickscor": 1})
    judge = tmp_path / "judge.py"
    judge.write_text(
        "from srpo_cli.rewards.plugins import reward\n"
        "@reward(unit='', reads_text=True, differentiable=False)\ndef load(images, prompts): ...\n"
    )
    trust(judge)
    with pytest.raises(UsageError, match=r"judge\.py has no gradient"):
        load(name="miniature", others={str(judge): 1})
    config = RewardConfig(name="miniature", others={str(judge): 1})
    assert not load_training_reward(config, WORDS, CPU, gradient=False).differentiable


# Rewards that read no text


@pytest.mark.parametrize(
    ("values", "advice"),
    [
        ({"name": "aesthetic-v2.5"}, "aesthetic-v2.5 reads no text"),
        ({"name": "aesthetic-v2.5", "others": {"laion-aesthetic-v2": 1}}, "laion-aesthetic-v2 read no text"),
    ],
)
def test_what_words_cannot_move_is_refused_before_it_is_looked_for_with_what_works_instead(values, advice):
    with pytest.raises(UsageError, match=advice) as refusal:
        check_pair(RewardConfig(**values))
    assert "--set reward.pair=picture" in str(refusal.value)
    assert "--set algorithm.name=direct-align and algorithm.relative=false" in str(refusal.value)
    with pytest.raises(UsageError, match=advice):  # and not for its weights, which are not here
        load(**values)
    check_pair(RewardConfig(**values), relative=False)
    check_pair(RewardConfig(**values, pair="picture"))


@pytest.mark.parametrize("relative", [True, False])
def test_a_picture_pair_is_refused_where_words_make_every_pair(relative):
    with pytest.raises(UsageError, match=r"reward\.pair is picture, and miniature and pickscore read text"):
        check_pair(RewardConfig(name="miniature", others={"pickscore": 1}, pair="picture"), relative)
    check_pair(RewardConfig(name="miniature", others={"aesthetic-v2.5": 1}, pair="picture"), relative)
    check_pair(RewardConfig(name="miniature", others={"aesthetic-v2.5": 1}), relative)


def test_a_plugin_that_reads_no_text_trains_the_plain_reward_or_the_picture_pair(images):
    name = str(trusted("brightness.py"))
    with pytest.raises(UsageError, match=r"brightness\.py reads no text"):
        load(name=name)
    plain = load_training_reward(RewardConfig(name=name), WORDS, CPU, relative=False)
    torch.testing.assert_close(plain(images, PROMPTS), images.mean((1, 2, 3)))
    paired = load(name=name, pair="picture", pair_noise=0.25)
    assert isinstance(paired, NoisedPair)
    assert paired.noise == 0.25


def test_in_a_mix_with_a_picture_pair_words_move_what_reads_them_and_noise_the_rest(miniature, images):
    name = str(trusted("brightness.py"))
    alone = load(name=name, pair="picture")
    mixed = load(name="miniature", others={name: 3}, pair="picture")
    positive, negative = (WORDS.texts(word, PROMPTS) for word in WORDS.all)
    gap, its, noised = (
        WORDS.gap(judge.scores(images, positive, negative)) for judge in (mixed, miniature.via("training"), alone)
    )
    assert noised.abs().min() > 0
    torch.testing.assert_close(gap, its + 3 * noised, rtol=1e-4, atol=1e-6)
