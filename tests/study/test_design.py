"""The design of a study, over many sizes: who sees what, how often, how far apart, on which side."""

from collections import Counter
from itertools import combinations, pairwise

import pytest

from srpo_cli.study.design import APART, Place, assign, deal, least_distance, order, sides

SIZES = [  # raters, of each prompt, prompts
    (10, 5, 500),
    (10, 5, 7),
    (3, 2, 11),
    (2, 2, 20),
    (7, 3, 1),
    (5, 1, 23),
]
ORDERS = [  # prompts, variants of each, repeats
    (250, 2, 0.05),
    (20, 2, 0.05),
    (20, 3, 0.1),
    (15, 6, 0.0),
    (40, 1, 0.2),
    (6, 2, 0.25),
]


def indices(places: list[Place], prompt: int) -> list[int]:
    return [i for i, place in enumerate(places) if place.prompt == prompt]


@pytest.mark.parametrize(("raters", "k", "prompts"), SIZES)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_prompt_has_k_raters_and_loads_differ_by_one_at_most(raters, k, prompts, seed):
    groups = [["anime", "photo", "paintings"][i % 3] for i in range(prompts)]
    raters_of = assign(groups, raters, k, seed)
    assert len(raters_of) == prompts
    assert all(len(set(chosen)) == k and set(chosen) <= set(range(raters)) for chosen in raters_of)
    loads = [sum(rater in chosen for chosen in raters_of) for rater in range(raters)]
    assert max(loads) - min(loads) <= 1
    for group in set(groups):
        of_group = [chosen for chosen, its in zip(raters_of, groups, strict=True) if its == group]
        loads = [sum(rater in chosen for chosen in of_group) for rater in range(raters)]
        assert max(loads) - min(loads) <= 2


def test_raters_are_no_fixed_panels():
    # dealt out in turn, raters 0 to 4 and 5 to 9 would never see the same prompt
    together = Counter(pair for chosen in assign([""] * 500, 10, 5, 0) for pair in combinations(chosen, 2))
    assert len(together) == 45 and min(together.values()) > 70  # of 500 * 10 / 45 = 111 on average


@pytest.mark.parametrize(("prompts", "variants", "repeats"), ORDERS)
@pytest.mark.parametrize("rater", range(4))
def test_everything_is_shown_once_and_the_pictures_of_a_prompt_are_far_apart(prompts, variants, repeats, rater):
    names = list(range(100, 100 + prompts))
    places = order(names, [variants] * prompts, repeats, 3, rater)
    first = [place for place in places if not place.repeat]
    assert sorted(first, key=lambda place: (place.prompt, place.variant)) == [
        Place(prompt, variant) for prompt in names for variant in range(variants)
    ]
    distance = least_distance([variants] * prompts, repeats)
    assert distance == min(len(places) // (2 * variants), APART, prompts)
    gaps = [b - a for prompt in names for a, b in pairwise(indices(places, prompt))]
    assert not gaps or min(gaps) >= distance


@pytest.mark.parametrize(("prompts", "variants", "repeats"), ORDERS)
def test_repeats_are_so_many_all_different_and_far_from_the_first_time(prompts, variants, repeats):
    places = order(range(prompts), [variants] * prompts, repeats, 3, 0)
    total = prompts * variants
    again = [i for i, place in enumerate(places) if place.repeat]
    assert len(again) == round(repeats * total)
    assert len({(places[i].prompt, places[i].variant) for i in again}) == len(again)
    for i in again:
        assert i - places.index(Place(places[i].prompt, places[i].variant)) >= total // 3


def test_all_of_a_rater_s_tasks_can_come_twice():
    places = order(range(12), [2] * 12, 1.0, 0, 0)
    assert Counter((place.prompt, place.variant) for place in places) == {
        (prompt, variant): 2 for prompt in range(12) for variant in range(2)
    }


@pytest.mark.parametrize("variants", [2, 3, 5])
def test_no_arm_comes_first_more_often_than_another(variants):
    places = order(range(60), [variants] * 60, 0.0, 0, 1)
    for turn in range(variants):
        of_round = places[60 * turn : 60 * (turn + 1)]
        assert set(Counter(place.variant for place in of_round).values()) == {60 // variants}
        assert len({place.prompt for place in of_round}) == 60


@pytest.mark.parametrize("repeats", [0.0, 0.1])
@pytest.mark.parametrize("variants", [[1, 2, 4, 2], [2] * 57 + [6] * 3, [1, 2, 3] * 20, [1] * 70 + [10]])
def test_prompts_may_have_unequally_many_pictures(variants, repeats):
    places = order(range(len(variants)), variants, repeats, 0, 0)
    once = Counter(place.prompt for place in places if not place.repeat)
    assert [once[prompt] for prompt in range(len(variants))] == variants
    gaps = [b - a for prompt in once for a, b in pairwise(indices(places, prompt))]
    assert min(gaps) >= least_distance(variants, repeats) == min(len(places) // (2 * max(variants)), APART)


@pytest.mark.parametrize(("prompts", "variants"), [(1, 1), (1, 4), (2, 3)])
def test_small_studies_keep_what_distance_there_is(prompts, variants):
    places = order(range(prompts), [variants] * prompts, 0.0, 0, 0)
    gaps = [b - a for prompt in range(prompts) for a, b in pairwise(indices(places, prompt))]
    assert len(places) == prompts * variants
    assert not gaps or min(gaps) >= least_distance([variants] * prompts, 0.0) >= 1


def test_nothing_to_show_is_an_empty_order():
    assert order([], [], 0.05, 0, 0) == []


def test_an_assignment_is_a_function_of_its_seed():
    five, again, six = (assign([""] * 30, 6, 3, seed) for seed in (5, 5, 6))
    assert five == again != six


def test_an_order_is_a_function_of_seed_and_rater():
    def draw(seed: int, rater: int) -> list[Place]:
        return order(range(20), [2] * 20, 0.05, seed, rater)

    assert draw(5, 0) == draw(5, 0)
    assert draw(5, 0) != draw(6, 0) and draw(5, 0) != draw(5, 1)


@pytest.mark.parametrize("prompts", [20, 21])
def test_half_of_each_kind_of_pair_is_swapped_and_raters_take_turns_with_the_odd_one(prompts):
    kinds = [[0, 1, 2]] * prompts
    swapped = [sides(kinds, 4, rater) for rater in range(10)]
    counts = [[sum(flags[kind] for flags in of_rater) for kind in range(3)] for of_rater in swapped]
    assert {count for of_rater in counts for count in of_rater} <= {prompts // 2, -(-prompts // 2)}
    assert [2 * sum(of_rater[kind] for of_rater in counts) for kind in range(3)] == [10 * prompts] * 3
    assert sides(kinds, 4, 0) == swapped[0] != swapped[1]


@pytest.mark.parametrize(("count", "loads"), [(10, [0, 0, 0]), (4, [0, 3, 1]), (0, [1, 2]), (7, [5])])
def test_what_is_dealt_makes_loads_equal(count, loads):
    dealt = deal(count, loads, 0)
    after = [load + dealt.count(hand) for hand, load in enumerate(loads)]
    assert len(dealt) == count and max(after) - min(after) <= 1
