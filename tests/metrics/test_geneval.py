"""GenEval's rules on detections made by hand."""

import pytest
import torch

from srpo_cli.errors import UsageError
from srpo_cli.metrics.geneval import (
    COLOURS,
    MOST_OBJECTS,
    Found,
    check_metadata,
    cut_out,
    mistakes,
    relations,
    sort_objects,
)


def box_mask(left, top, right, bottom, size=40):
    mask = torch.zeros(size, size, dtype=torch.bool)
    mask[top:bottom, left:right] = True
    return mask


def found(left, top, right, bottom):
    return Found((left, top, right, bottom), box_mask(left, top, right, bottom))


def no_colours(_objects, _name):
    raise AssertionError("nobody asked for a colour")


ONE_DOG = {"include": [{"class": "dog", "count": 1}]}
THREE_DOGS = {"include": [{"class": "dog", "count": 3}], "exclude": [{"class": "dog", "count": 4}]}
DOG = found(0, 0, 10, 10)


# What is kept of the detections


def test_detections_are_kept_by_class_surest_first_with_boxes_around_their_masks():
    masks = torch.stack([box_mask(1, 2, 5, 9), box_mask(10, 11, 20, 30), box_mask(0, 0, 3, 3)])
    objects = sort_objects(["dog", "cat", "dog"], torch.tensor([0.5, 0.4, 0.8]), masks, 0.3)
    assert {name: [one.box for one in some] for name, some in objects.items()} == {
        "dog": [(0, 0, 3, 3), (1, 2, 5, 9)],
        "cat": [(10, 11, 20, 30)],
    }
    assert torch.equal(objects["cat"][0].mask, masks[1])


def test_only_what_is_surer_than_the_threshold_is_kept():
    masks = torch.stack([DOG.mask] * 3)
    scores = torch.tensor([0.5, 0.5001, 0.4999])
    assert len(sort_objects(["dog"] * 3, scores, masks, 0.5)["dog"]) == 1
    assert sort_objects(["dog"] * 3, scores, masks, 0.9) == {}


def test_at_most_sixteen_of_a_class_are_kept_the_surest():
    masks = torch.stack([box_mask(i, 0, i + 1, 1) for i in range(20)])
    kept = sort_objects(["dog"] * 19 + ["cat"], torch.linspace(0.4, 0.9, 20), masks, 0.3)
    assert len(kept["dog"]) == MOST_OBJECTS == 16
    assert [one.box[0] for one in kept["dog"]] == list(range(18, 2, -1))
    assert len(kept["cat"]) == 1


def test_no_detection_is_no_object():
    assert sort_objects([], torch.zeros(0), torch.zeros(0, 40, 40, dtype=torch.bool), 0.3) == {}


@pytest.mark.parametrize(
    ("label", "name"), [("sofa", "couch"), ("tvmonitor", "tv"), ("mouse", "computer mouse"), ("zebra", "zebra")]
)
def test_a_detectors_word_for_a_class_becomes_genevals(label, name):
    assert list(sort_objects([label], torch.tensor([0.9]), DOG.mask[None], 0.3)) == [name]


# Numbers


def test_an_object_that_is_there_is_enough_and_more_do_not_hurt():
    assert mistakes(ONE_DOG, {"dog": [DOG]}, no_colours) == []
    assert mistakes(ONE_DOG, {"dog": [DOG] * 5, "cat": [DOG]}, no_colours) == []
    assert mistakes(ONE_DOG, {"cat": [DOG]}, no_colours) == ["0 of 1 dog"]


@pytest.mark.parametrize(("count", "wrong"), [(2, 1), (3, 0), (4, 1), (7, 1)])
def test_a_number_is_met_exactly(count, wrong):
    assert len(mistakes(THREE_DOGS, {"dog": [DOG] * count}, no_colours)) == wrong


def test_all_requirements_have_to_be_met():
    wanted = {"include": [{"class": "dog", "count": 1}, {"class": "cat", "count": 1}]}
    assert mistakes(wanted, {"dog": [DOG], "cat": [DOG]}, no_colours) == []
    assert mistakes(wanted, {"dog": [DOG]}, no_colours) == ["0 of 1 cat"]
    assert len(mistakes(wanted, {}, no_colours)) == 2


# Colours


def test_a_colour_is_asked_of_the_surest_objects_only():
    sure, unsure = found(0, 0, 5, 5), found(20, 20, 30, 30)
    wanted = {"include": [{"class": "dog", "count": 1, "color": "red"}]}
    seen = []

    def colours_of(objects, name):
        seen.append((list(objects), name))
        return ["red" if one is sure else "blue" for one in objects]

    assert mistakes(wanted, {"dog": [sure, unsure]}, colours_of) == []
    assert mistakes(wanted, {"dog": [unsure, sure]}, colours_of) == ["dog is blue, not red"]
    assert seen == [([sure], "dog"), ([unsure], "dog")]


def test_as_many_objects_as_asked_for_must_have_the_colour():
    wanted = {"include": [{"class": "dog", "count": 2, "color": "red"}]}
    assert mistakes(wanted, {"dog": [DOG, DOG]}, lambda objects, _: ["red", "red"]) == []
    assert mistakes(wanted, {"dog": [DOG, DOG]}, lambda objects, _: ["red", "pink"]) == ["dog is red, pink, not red"]


def test_two_objects_have_a_colour_each():
    wanted = {"include": [{"class": "dog", "count": 1, "color": "red"}, {"class": "cat", "count": 1, "color": "blue"}]}
    both = {"dog": [DOG], "cat": [DOG]}
    assert mistakes(wanted, both, lambda _, name: [{"dog": "red", "cat": "blue"}[name]]) == []
    assert len(mistakes(wanted, both, lambda _, name: [{"dog": "blue", "cat": "red"}[name]])) == 2


def test_an_object_is_cut_out_and_grey_hides_what_is_around_it():
    pixels = torch.arange(6 * 5 * 3, dtype=torch.uint8).view(6, 5, 3)
    mask = torch.zeros(6, 5, dtype=torch.bool)
    mask[2, 1] = mask[3, 2] = True
    crop = cut_out(pixels, Found((1.0, 2.0, 3.0, 4.0), mask))
    assert crop.shape == (2, 2, 3)
    assert torch.equal(crop[0, 0], pixels[2, 1])
    assert torch.equal(crop[1, 1], pixels[3, 2])
    assert (crop[0, 1] == 0x99).all() and (crop[1, 0] == 0x99).all()


# Places


@pytest.mark.parametrize(
    ("box", "names"),
    [
        ((0, 40, 10, 50), {"left of"}),
        ((80, 40, 90, 50), {"right of"}),
        ((40, 0, 50, 10), {"above"}),
        ((40, 80, 50, 90), {"below"}),
        ((0, 0, 10, 10), {"left of", "above"}),
        ((80, 80, 90, 90), {"right of", "below"}),
        ((40, 40, 50, 50), set()),
        ((0, 30, 10, 40), {"left of"}),  # 14 degrees off the horizontal
    ],
)
def test_how_a_box_lies_to_another(box, names):
    assert relations(box, (40, 40, 50, 50)) == names


def test_centres_may_differ_by_a_tenth_of_both_extents():  # 0.1 x (10 + 10) = 2 px
    assert relations((2, 0, 12, 10), (0, 0, 10, 10)) == set()
    assert relations((2.5, 0, 12.5, 10), (0, 0, 10, 10)) == set()  # 0.5 of 2.5 px is a fifth of the way
    assert relations((5, 0, 15, 10), (0, 0, 10, 10)) == {"right of"}  # 3 of 5 px


def test_a_relation_turns_round_with_its_boxes():
    generator = torch.Generator().manual_seed(0)
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    named = 0
    for _ in range(200):
        corners = torch.rand(2, 2, 2, generator=generator).sort(1).values * 50
        one, other = corners.flatten(1).tolist()
        assert relations(other, one) == {opposite[name] for name in relations(one, other)}
        named += len(relations(one, other))
    assert named > 100


def test_a_place_is_relative_to_an_earlier_requirement():
    wanted = {
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["left of", 0]}],
    }
    left, right = found(0, 15, 10, 25), found(25, 15, 35, 25)
    assert mistakes(wanted, {"dog": [left], "cat": [right]}, no_colours) == []
    assert mistakes(wanted, {"dog": [right], "cat": [left]}, no_colours) == ["dog is not left of its target"]
    assert mistakes(wanted, {"dog": [left]}, no_colours) == ["0 of 1 cat", "nothing that dog could be left of"]
    assert mistakes(wanted, {"dog": [left, right], "cat": [right, left]}, no_colours) == []  # the surest of each


# What a prompt has to come with


@pytest.mark.parametrize(
    "wanted",
    [
        {},
        {"include": []},
        {"include": [{"class": "dog"}]},
        {"include": ["dog"]},
        {"include": [{"class": "dog", "count": 1, "color": "mauve"}]},
        {"include": [{"class": "dog", "count": 1, "position": ["left of", 0]}]},  # of itself
        {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["near", 0]}]},
        {"include": [{"class": "dog", "count": 1}], "exclude": [{"class": "dog"}]},
    ],
)
def test_a_prompt_without_a_question_is_refused_in_one_line(wanted):
    with pytest.raises(UsageError, match="a photo of a dog") as error:
        check_metadata(wanted, "a photo of a dog")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "wanted",
    [
        THREE_DOGS,
        {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": COLOURS[-1]}], "prompt": "a white dog"},
        {"include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1, "position": ["below", 0]}]},
    ],
)
def test_genevals_own_questions_are_taken(wanted):
    check_metadata(wanted, "a photo of a dog")
