"""The picture's own pair: its reward under every text but a negative word's, its noised copy's under these."""

import pytest
import torch

from srpo_cli.algorithms.base import ControlWords
from srpo_cli.rewards.base import Reward
from srpo_cli.rewards.noised import NoisedPair
from srpo_cli.rewards.preprocess import Preprocess

WORDS = ControlWords(["Photo", "Real"], ["Render", "Flat"])
PROMPTS = ["a red cube", "a blue cone", "a green sphere"]
NOISE = 0.05


class Seen(Reward):
    """The mean of a power of all pixels, which keeps the pictures that it was shown."""

    reads_text = False
    modes = ("squash", "crop")

    def __init__(self, power=3):
        self.power, self.shown, self.preprocess = power, [], Preprocess(8, "squash")

    def __call__(self, images, prompts):
        self.shown.append(images)
        return torch.stack([(image**self.power).mean() for image in images])


def pair(reward, words=WORDS, noise=NOISE):
    return NoisedPair(reward, words.positive, words.negative, words.template, noise=noise)


def texts(word, prompts=PROMPTS):
    return WORDS.texts(word, prompts)


@pytest.fixture
def images():
    return torch.rand(3, 3, 24, 32, generator=torch.Generator().manual_seed(0))


def noise_of(prompts, size=(24, 32), **how):
    """The noise (N, 3, H, W) that is put on grey pictures with these prompts."""
    seen = Seen()
    grey = torch.full((len(prompts), 3, *size), 0.5, dtype=torch.float64)
    pair(seen, **how).scores(grey, WORDS.texts("Render", prompts))
    return seen.shown[0] - 0.5


def test_only_a_negative_word_gets_the_noised_copy(images):
    seen = Seen()
    columns = [PROMPTS, texts("Photo"), texts("Render"), texts("Real"), texts("Flat")]
    plain, photo, render, real, flat = pair(seen).scores(images, *columns)
    clean, copies = seen.shown  # one look at each
    assert clean is images
    assert torch.equal(plain, photo) and torch.equal(plain, real) and torch.equal(render, flat)
    torch.testing.assert_close(plain, Seen()(images, PROMPTS))
    torch.testing.assert_close(render, Seen()(copies, PROMPTS))
    assert (copies != images).all()


def test_each_text_of_a_list_is_read_for_itself(images):
    seen = Seen()
    pair(seen).scores(images, ["Photo. x", "Render. x", "x"])
    (shown,) = seen.shown
    assert [bool((one != image).any()) for one, image in zip(shown, images, strict=True)] == [False, True, False]


def test_the_noise_is_normal_of_the_asked_deviation_and_leaves_the_range():
    noise = noise_of(PROMPTS, (96, 96), noise=0.3)  # 27648 numbers a picture
    torch.testing.assert_close(noise.std((1, 2, 3)), torch.full((3,), 0.3, dtype=torch.float64), rtol=0.02, atol=0)
    assert noise.mean((1, 2, 3)).abs().max() < 4 * 0.3 / 27648**0.5
    assert (noise.abs() > 0.5).any()  # of grey pictures: below 0 or above 1
    assert ((noise.abs() < 0.3).double().mean() - 0.6827).abs() < 0.01


def test_the_noise_is_the_prompts_own_whatever_batch_word_process_and_step_it_is_in():
    torch.manual_seed(1)
    together = noise_of(PROMPTS)
    torch.manual_seed(2)
    for number, prompt in enumerate(PROMPTS):
        assert torch.equal(noise_of([prompt])[0], together[number])
    assert torch.equal(noise_of(PROMPTS[::-1]), together.flip(0))
    correlations = torch.corrcoef(together.flatten(1))
    assert (correlations - torch.eye(3)).abs().max() < 0.1  # 2304 numbers each: four standard errors are 0.083
    first = [-0.8491, -0.9778, 0.0992]  # what torch draws for the sha256 of "a red cube"
    assert (together[0].flatten()[:3] / NOISE).tolist() == pytest.approx(first, abs=1e-3)


@pytest.mark.parametrize(
    ("template", "positive", "negative"),
    [
        ("{word} {prompt}", "Photo real", "Photo"),  # one begins like the other
        ("{word} {prompt}", "Photo", "Photo real"),
        ("{prompt}, {word}", "real photo", "photo"),
        ("{prompt}, {word}", "photo", "flat photo"),
        ("<{prompt}> as {word}!", "photo", "render"),
        ("{{{word}}} {prompt}", "photo", "{x}"),
    ],
)
def test_a_text_is_read_as_it_was_made(template, positive, negative, images):
    words = ControlWords([positive], [negative], template)
    for prompt in ("a cube", f"{negative} of a cube", f"a cube, {negative}", ""):
        seen = Seen()
        prompts = [prompt] * 3
        pair(seen, words).scores(images, words.texts(positive, prompts), words.texts(negative, prompts))
        clean, copies = seen.shown
        assert torch.equal(clean, images)
        assert torch.equal((copies - images).round(decimals=5), noise_on(images, prompts).round(decimals=5))


def noise_on(images, prompts):
    """What :data:`WORDS` would put on pictures with these prompts."""
    seen = Seen()
    pair(seen).scores(images, texts("Render", prompts))
    return seen.shown[0] - images


def test_the_gradient_is_that_of_the_clean_picture_minus_that_of_the_copy(images):
    leaf = images.double().requires_grad_()
    r_positive, r_negative = pair(Seen()).scores(leaf, texts("Photo"), texts("Render"))
    (found,) = torch.autograd.grad((r_positive - r_negative).sum(), leaf)
    x, noise = images.double(), noise_on(images.double(), PROMPTS)
    expected = 3 * (x**2 - (x + noise) ** 2) / x[0].numel()  # of the mean of x**3
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_a_linear_reward_has_a_gap_and_no_gradient_of_it(images):
    leaf = images.double().requires_grad_()
    r_positive, r_negative = pair(Seen(power=1)).scores(leaf, texts("Photo"), texts("Render"))
    gap = r_positive - r_negative
    torch.testing.assert_close(gap, -noise_on(images.double(), PROMPTS).mean((1, 2, 3)))
    (gradient,) = torch.autograd.grad(gap.sum(), leaf)
    assert gradient.abs().max() < 1e-15


def test_pictures_of_their_own_sizes(images):
    seen = Seen()
    listed = [images[0], images[1, :, :8], images[2, :, :, :5]]
    render, photo = pair(seen).scores(listed, texts("Render"), texts("Photo"))
    assert [copy.shape for copy in seen.shown[0]] == [image.shape for image in listed]
    torch.testing.assert_close(seen.shown[0][0], images[0] + noise_on(images, PROMPTS)[0])
    assert (render != photo).all()


def test_it_says_of_itself_what_its_reward_says_and_that_text_matters():
    inner = Seen()
    inner.name, inner.unit, inner.weights = "seen", "cubes", "none"
    inner.layer = torch.nn.Linear(1, 1, device="meta")
    paired = pair(inner)
    assert (paired.name, paired.unit, paired.weights) == ("seen", "cubes", "none")
    assert paired.reads_text and paired.differentiable
    assert list(paired.parameters()) == list(inner.parameters())
    assert paired.device.type == "meta"
    through = paired.via("training")
    assert through.preprocess.mode == through.reward.preprocess.mode == "crop"
    assert through.noise == paired.noise
    white, flat = torch.ones(2, 3, 8, 8), texts("Flat", ["a", "b"])
    torch.testing.assert_close(through(white, flat), paired(white, flat))


def test_a_prompt_gets_the_plain_reward(images):
    torch.testing.assert_close(pair(Seen())(images, PROMPTS), Seen()(images, PROMPTS))
