"""The design of a study: who sees which prompts, in which order, on which side. Pure functions of a seed."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from random import Random

APART = 10
"""Tasks from one picture of a prompt to the next at least, where a study has enough of them."""

_TRIES = 100  # at most, to find room for a repeat


@dataclass(frozen=True)
class Place:
    """One task of a rater.

    Attributes:
        prompt: index of the prompt.
        variant: which of the prompt's pictures, or pairs of pictures.
        repeat: the rater has had it before and is to be compared with himself.
    """

    prompt: int
    variant: int
    repeat: bool = False


def assign(groups: Sequence[str], raters: int, k: int, seed: int) -> list[tuple[int, ...]]:
    """The ``k`` raters of every prompt, chosen at random among those who have the fewest.

    Args:
        groups: of each prompt.
        raters: how many there are, at least ``k``.

    No rater has more than one prompt more than any other, over all prompts; within a group the difference is two at
    most.
    """
    random = Random(f"{seed}:assignment")
    loads = [0] * raters
    chosen: dict[int, tuple[int, ...]] = {}
    for prompt in sorted(random.sample(range(len(groups)), len(groups)), key=lambda prompt: groups[prompt]):
        by_load = sorted(range(raters), key=lambda rater: (loads[rater], random.random()))
        chosen[prompt] = tuple(sorted(by_load[:k]))
        for rater in chosen[prompt]:
            loads[rater] += 1
    return [chosen[prompt] for prompt in range(len(groups))]


def order(prompts: Sequence[int], variants: Sequence[int], repeats: float, seed: int, rater: int) -> list[Place]:
    """The order of one rater's tasks.

    The variants of a prompt come in rounds, at most one of each prompt in a round, so that they are apart; which
    variant comes first is balanced over the prompts. ``repeats``, a share of all of them, come once more: where
    possible a third of all tasks later, and no nearer to the prompt's others than these are to each other.

    Args:
        prompts: indices of the rater's prompts.
        variants: how many variants each of these has.
    """
    random = Random(f"{seed}:order:{rater}")
    distance = least_distance(variants, repeats)
    places: list[Place] = []
    last: dict[int, int] = {}
    for waiting in _rounds(prompts, variants, random):
        random.shuffle(waiting)
        while waiting:
            here = len(places)
            far = (i for i, place in enumerate(waiting) if here - last.get(place.prompt, -distance) >= distance)
            chosen = next(far, None)
            if chosen is None:
                chosen = min(range(len(waiting)), key=lambda i: last[waiting[i].prompt])
            places.append(waiting.pop(chosen))
            last[places[-1].prompt] = here
    return _with_repeats(places, round(repeats * len(places)), distance, random)


def least_distance(variants: Sequence[int], repeats: float) -> int:
    """How far the tasks of a prompt are to be apart at least, half a round where that is less than :data:`APART`.

    It is kept where all prompts have equally many variants; 0 without any.
    """
    tasks = sum(variants)
    if not tasks:
        return 0
    half_a_round = (tasks + round(repeats * tasks)) // (2 * max(variants))
    return min(max(1, half_a_round), APART, len(variants))


def sides(pairs: Sequence[Iterable[int]], seed: int, rater: int) -> list[list[bool]]:
    """Which pairs a rater sees with the sides swapped: half of each kind, drawn by a coin.

    Args:
        pairs: for each of the rater's prompts the kinds of its pairs.

    Returns a flag for each pair of each prompt. Where a kind has an odd number, one rater has one more swapped, the
    next rater one less.
    """
    random, coin = Random(f"{seed}:sides:{rater}"), Random(f"{seed}:coin")
    places: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for prompt, kinds in enumerate(pairs):
        for number, kind in enumerate(kinds):
            places[kind].append((prompt, number))
    swapped: set[tuple[int, int]] = set()
    first = coin.randrange(2)
    for kind in sorted(places):
        more = (first + kind + rater) % 2
        swapped.update(random.sample(places[kind], (len(places[kind]) + more) // 2))
    return [[(prompt, number) in swapped for number, _ in enumerate(kinds)] for prompt, kinds in enumerate(pairs)]


def deal(count: int, loads: Sequence[int], seed: int) -> list[int]:
    """To whom each of ``count`` things goes, so that ``loads``, what everyone has already, become equal."""
    random, loads = Random(f"{seed}:deal:{sum(loads)}"), list(loads)
    dealt = []
    for _ in range(count):
        dealt.append(min(range(len(loads)), key=lambda hand: (loads[hand], random.random())))
        loads[dealt[-1]] += 1
    return dealt


def _rounds(prompts: Sequence[int], variants: Sequence[int], random: Random) -> list[list[Place]]:
    """Each prompt's variants dealt evenly over the rounds, from a first one that is balanced over the prompts."""
    rounds: list[list[Place]] = [[] for _ in range(max(variants, default=0))]
    by_count: dict[int, list[int]] = defaultdict(list)
    for prompt, count in zip(prompts, variants, strict=True):
        by_count[count].append(prompt)
    for count, alike in sorted(by_count.items()):
        first = random.random()
        for number, prompt in enumerate(random.sample(alike, len(alike))):
            for turn in range(count):
                place = (turn + (number + first) / len(alike)) * len(rounds) / count
                rounds[int(place)].append(Place(prompt, (number + turn) % count))
    return rounds


def _with_repeats(places: list[Place], count: int, distance: int, random: Random) -> list[Place]:
    """The tasks with ``count`` of them put in once more."""
    far = max(len(places) // 3, distance)
    candidates = deque(random.sample(places, len(places)))
    for _ in range(count):
        for _ in range(len(candidates)):
            chosen = candidates.popleft()
            spot = _spot(places, chosen, far, distance, random)
            if spot is not None:
                break
            candidates.append(chosen)
        else:
            spot = len(places)
            chosen = min(candidates, key=lambda place: max(_indices(places, place.prompt)))
            candidates.remove(chosen)
        places.insert(spot, replace(chosen, repeat=True))
    return places


def _spot(places: Sequence[Place], place: Place, far: int, distance: int, random: Random) -> int | None:
    """Where ``place`` may come again, ``far`` behind itself and ``distance`` away from the prompt's other tasks."""
    others = _indices(places, place.prompt)
    itself = next(i for i in others if places[i] == place)
    behind = range(itself + far, len(places) + 1)
    for spot in random.sample(behind, min(len(behind), _TRIES)):
        if all(spot - other >= distance if other < spot else other + 1 - spot >= distance for other in others):
            return spot
    return None


def _indices(places: Sequence[Place], prompt: int) -> list[int]:
    return [i for i, place in enumerate(places) if place.prompt == prompt]
