"""GenEval's question as a judge: detections made by hand, colours by a CLIP that sees nothing but colour."""

import pytest
import torch
import torch.nn.functional as F

from srpo_cli.config.benchmark import Benchmark
from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.metrics.geneval import COLOURS, Found
from srpo_cli.recipes.geneval import NOTE, GenEvalJudge
from srpo_cli.recipes.judges import Picture, plan_judges
from srpo_cli.rewards.clip import ClipReward
from srpo_cli.rewards.detector import Segments
from srpo_cli.rewards.preprocess import Preprocess
from srpo_cli.runtime.benchmarks import Item

PAINTS = {
    "red": (220, 20, 20),
    "orange": (250, 140, 10),
    "yellow": (250, 240, 20),
    "green": (30, 170, 40),
    "blue": (20, 40, 220),
    "purple": (120, 20, 150),
    "pink": (250, 150, 190),
    "brown": (110, 60, 20),
    "black": (5, 5, 5),
    "white": (250, 250, 250),
}
GREY = 0x99 / 255


class ColourClip(torch.nn.Module):
    """Sees of a picture how the mean of its pixels differs from grey, and of a text its number in a list of paints."""

    def __init__(self):
        super().__init__()
        self.visual = torch.nn.Linear(1, 1)
        self.read = []

    def encode_image(self, pixels):
        return pixels.mean((2, 3)) - GREY

    def encode_text(self, ids):
        paints = torch.tensor([PAINTS[colour] for colour in COLOURS])[ids[:, 0]] / 255
        return paints - GREY


def tokenize(clip):
    def tokens(texts):
        clip.read += texts
        return torch.tensor([[next(i for i, c in enumerate(COLOURS) if f" {c}" in text)] for text in texts])

    return tokens


@pytest.fixture
def clip():
    tower = ColourClip()
    preprocess = Preprocess(16, "squash", (0.0,) * 3, (1.0,) * 3)
    return ClipReward(tower, tokenize(tower), preprocess=preprocess, modes=("squash",), weights="paints")


class HandMade:
    """Finds what it was told is in every picture, with the scores it was told."""

    labels = ("sofa", "cat", "mouse")
    weights = "by hand"

    def __init__(self, *found):
        self.found = found

    def __call__(self, pixels, threshold):
        kept = [(label, score, box) for label, score, box in self.found if score >= threshold]
        masks = torch.zeros(len(kept), *pixels.shape[:2], dtype=torch.bool)
        for mask, (_, _, (left, top, right, bottom)) in zip(masks, kept, strict=True):
            mask[top:bottom, left:right] = True
        return Segments([label for label, _, _ in kept], torch.tensor([score for _, score, _ in kept]), masks)


def picture(tag, prompt="a photo", pixels=None, **wanted):
    canvas = torch.full((40, 60, 3), 128, dtype=torch.uint8) if pixels is None else pixels
    return Picture(Item(0, tag, 0, prompt, {"tag": tag, **wanted}), canvas)


def says(judge, *pictures):
    return judge(pictures)["geneval"].tolist()


def test_a_picture_is_1_if_it_shows_what_is_asked_for_else_0(clip):
    judge = GenEvalJudge(HandMade(("sofa", 0.5, (0, 0, 9, 9))), clip)
    couch = picture("single_object", include=[{"class": "couch", "count": 1}])
    cat = picture("single_object", include=[{"class": "cat", "count": 1}])
    said = judge([couch, cat, couch])
    assert list(said) == list(judge.columns)
    assert said["geneval"].dtype == torch.float64
    assert said["geneval"].tolist() == [1, 0, 1]
    assert judge.mistakes(cat) == ["0 of 1 cat"]


def test_counting_takes_only_what_is_quite_sure(clip):
    cats = [("cat", 0.95, (i, 0, i + 1, 5)) for i in range(3)] + [("cat", 0.6, (20, 0, 30, 5))]
    judge = GenEvalJudge(HandMade(*cats), clip)
    three = {"include": [{"class": "cat", "count": 3}], "exclude": [{"class": "cat", "count": 4}]}
    assert says(judge, picture("counting", **three), picture("two_object", **three)) == [1, 0]


@pytest.mark.parametrize("surroundings", ["red", "blue"])
@pytest.mark.parametrize("colour", COLOURS)
def test_an_objects_colour_is_that_of_its_own_pixels(clip, colour, surroundings):
    pixels = torch.tensor(PAINTS[surroundings], dtype=torch.uint8).expand(40, 60, 3).clone()
    pixels[10:30, 20:30] = torch.tensor(PAINTS[colour], dtype=torch.uint8)
    mask = torch.zeros(40, 60, dtype=torch.bool)
    mask[10:30, 20:30] = True
    judge = GenEvalJudge(HandMade(("cat", 0.9, (20, 10, 30, 30))), clip)
    assert judge.colours(pixels, [Found((15, 5, 35, 35), mask)], "cat") == [colour]
    red = picture("colors", pixels=pixels, include=[{"class": "cat", "count": 1, "color": "red"}])
    assert says(judge, red) == [float(colour == "red")]


def test_colours_are_named_by_the_mean_over_three_texts(clip):
    judge = GenEvalJudge(HandMade(), clip)
    features = judge._colour_features("cat")
    assert {text for text in clip.clip.read if " pink" in text} == {
        "a photo of a pink cat",
        "a photo of a pink-colored cat",
        "a photo of a pink object",
    }
    paints = torch.tensor([PAINTS[colour] for colour in COLOURS]) / 255 - GREY
    torch.testing.assert_close(features, F.normalize(paints, dim=1))


def test_places_are_read_off_the_boxes(clip):
    judge = GenEvalJudge(HandMade(("cat", 0.9, (0, 10, 10, 20)), ("mouse", 0.9, (40, 10, 50, 20))), clip)

    def asks(relation):
        include = [{"class": "computer mouse", "count": 1}, {"class": "cat", "count": 1, "position": [relation, 0]}]
        return picture("position", include=include)

    relations = ("left of", "right of", "above", "below")
    assert says(judge, *map(asks, relations)) == [1, 0, 0, 0]


def test_a_class_that_can_never_be_found_is_an_error_not_a_zero(clip):
    judge = GenEvalJudge(HandMade(), clip)
    with pytest.raises(SrpoError, match="knows no 'unicorn'"):
        judge([picture("single_object", include=[{"class": "unicorn", "count": 1}])])


def test_it_says_that_it_is_not_geneval(clip):
    judge = GenEvalJudge(HandMade(), clip)
    assert "not GenEval" in NOTE
    assert judge.record["note"] == NOTE
    assert [measure.note for measure in judge.measures] == [NOTE]
    assert judge.record["weights"] == "by hand; paints"


def test_prompts_without_the_question_are_refused_before_anything_is_loaded():
    benchmark = Benchmark.model_validate(
        {
            "name": "test",
            "description": "a test",
            "prompts": {"layout": "world", "count": 1},
            "metrics": ["geneval"],
        }
    )
    (plan,) = plan_judges(benchmark)
    plan.check([picture("colors", include=[{"class": "cat", "count": 1}]).item])
    with pytest.raises(UsageError, match="'a dog' comes without"):
        plan.check([Item(0, "", 0, "a dog")])
