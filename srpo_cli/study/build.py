"""Make a study: a folder with blind pictures, everyone's tasks in order, a link for everyone, and the key."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import Any

from PIL import Image

from srpo_cli import __version__
from srpo_cli.errors import UsageError
from srpo_cli.runtime.pictures import open_picture
from srpo_cli.study.arms import Item
from srpo_cli.study.design import Place, assign, deal, order, sides
from srpo_cli.study.rubric import Facts, Mode, load_rubric
from srpo_cli.study.store import ANSWERS, FACTS, KEY, LINKS, PICTURES, Store, Task, create
from srpo_cli.study.training import TrainingItem

Shown = tuple[str, str | None]
"""Ids of a picture, or of a left and a right one."""

_PNG_LEVEL = 4  # of zlib: half the time of its default, and files that are a few per cent larger


@dataclass(frozen=True)
class Options:
    """What is asked, and of how many.

    Attributes:
        name: the study's own; raters do not see it.
        k: raters of each prompt.
        repeats: share of a rater's tasks that come once more, in [0, 1].
    """

    name: str
    mode: Mode = "grades"
    raters: int = 10
    experts: int = 3
    k: int = 5
    repeats: float = 0.05
    seed: int = 0


@dataclass(frozen=True)
class _Prompt:
    """A prompt with what is shown of it: pictures, or pairs of them, each with its group and its arms' number."""

    id: str
    prompt: str
    shown: Sequence[Shown]
    groups: Sequence[str]
    kinds: Sequence[int]


def new_study(
    study: Path,
    items: Sequence[Item],
    options: Options,
    training: Sequence[TrainingItem] = (),
    tell: Callable[[str], None] = lambda _: None,
) -> Facts:
    """Make the folder of a study, all of it or nothing.

    The order of tasks is a function of the seed; ids and links are secret and differ each time. UsageError where the
    folder is taken, where options and arms do not fit together, and where the arms' pictures of a prompt differ in
    size, by which they could be told apart.
    """
    _check(items, options)
    if study.exists() and (not study.is_dir() or any(study.iterdir())):
        raise UsageError(f"{study} exists: name a new folder for the study")
    making = study.with_name(f".{study.name}.tmp")
    try:
        shutil.rmtree(making, ignore_errors=True)
        (making / PICTURES).mkdir(parents=True)
        (making / KEY).parent.mkdir(mode=0o700)
    except OSError as error:
        raise UsageError(f"cannot write to {study.parent} ({error.strerror}): name another folder") from error
    try:
        facts = _fill(making, items, options, training, tell)
        making.replace(study)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    return facts


def resolve(study: Path) -> int:
    """Give the experts what raters disagree about, every picture to one of them, and return how many are new.

    UsageError for a study of pairs, and for one without experts.
    """
    store = Store(study)
    if store.facts.mode != "grades":
        raise UsageError(f"{study} compares pairs: there are no grades to resolve")
    if not store.facts.experts:
        raise UsageError(f"{study} has no experts: make a study with --experts 3")
    with store.transaction():  # so that what was read is still so when the tasks are added
        positions, disputes = store.loads("expert"), store.disputes()
        experts, hands = list(positions), deal(len(disputes), list(positions.values()), store.facts.seed)
        for dispute, hand in zip(disputes, hands, strict=True):
            expert = experts[hand]
            store.add(Task(_new_id(), expert, positions[expert], "resolution", other=None, **asdict(dispute)))
            positions[expert] += 1
    return len(disputes)


def _check(items: Sequence[Item], options: Options) -> None:
    arms = len(items[0].files)
    if options.mode == "pairs" and arms < 2:
        raise UsageError(f"pairs need two arms or more, here is {arms}: give another --arm, or --mode grades")
    if options.k > options.raters:
        raise UsageError(f"--per-prompt {options.k} is more than --raters {options.raters}: give fewer, or more raters")


def _fill(
    study: Path,
    items: Sequence[Item],
    options: Options,
    training: Sequence[TrainingItem],
    tell: Callable[[str], None],
) -> Facts:
    wanted = [
        {"arm": arm, "prompt_id": item.prompt_id, "group": item.group, "file": str(item.files[arm]), "kind": "item"}
        for item in items
        for arm in item.files
    ]
    wanted += [
        {"arm": None, "prompt_id": None, "group": "", "file": str(file), "kind": "training"}
        for item in training
        for file in item.files
    ]
    tell(f"encoding {len(wanted)} pictures")
    key = _encode(study / PICTURES, wanted)
    _check_sizes(key.values(), items, training)
    ids = iter(key)
    arms = list(items[0].files)
    shown = [{arm: next(ids) for arm in item.files} for item in items]
    lessons = [(item, tuple(next(ids) for _ in item.files)) for item in training]
    prompts = _prompts(items, shown, arms, options.mode)
    facts = Facts(
        name=options.name,
        mode=options.mode,
        dimensions=load_rubric(options.mode),
        seed=options.seed,
        raters=options.raters,
        experts=options.experts,
        k=options.k,
        repeats=options.repeats,
        prompts=len(prompts),
        pictures=len(items) * len(arms),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        srpo=__version__,
    )
    people = _people(options)
    create(study / ANSWERS, people, _tasks(prompts, lessons, options, [rater for rater, role, _ in people]))
    _write_private(study / KEY, json.dumps(key, indent=1, ensure_ascii=False))
    _write_private(study / LINKS, _links(people))
    (study / FACTS).write_text(facts.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return facts


def _encode(folder: Path, wanted: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Write every picture under a new id, pixels only, and return what is known of each by its id."""

    def encode(entry: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        picture = open_picture(Path(entry["file"]))
        blind = Image.new("RGB", picture.size)  # a new one: Pillow writes the old one's colour profile again
        blind.paste(picture)
        encoded = io.BytesIO()
        blind.save(encoded, "PNG", compress_level=_PNG_LEVEL)
        name = _new_id()
        (folder / f"{name}.png").write_bytes(encoded.getvalue())
        digest = hashlib.sha256(encoded.getvalue()).hexdigest()
        return name, {**entry, "sha256": digest, "size": list(blind.size)}

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(pool.map(encode, wanted))


def _check_sizes(entries: Iterable[Mapping[str, Any]], items: Sequence[Item], training: Sequence[TrainingItem]) -> None:
    """Refuse pictures that are shown together, or of one prompt, in different sizes."""
    each = iter(entries)
    for together in [*(item.files.values() for item in items), *(item.files for item in training)]:
        alike = [next(each) for _ in together]
        if len({tuple(entry["size"]) for entry in alike}) > 1:
            named = ", ".join(f"{entry['file']} is {entry['size'][0]}x{entry['size'][1]}" for entry in alike)
            raise UsageError(f"the arms can be told apart by their size: {named}; draw them in one size")


def _prompts(
    items: Sequence[Item], shown: Sequence[Mapping[str, str]], arms: Sequence[str], mode: Mode
) -> list[_Prompt]:
    """The prompts with the ids of what is shown of them."""
    of_prompt: dict[str, list[int]] = {}
    for number, item in enumerate(items):
        of_prompt.setdefault(item.prompt_id, []).append(number)
    prompts = []
    for prompt_id, numbers in of_prompt.items():
        if mode == "grades":
            variants = [((shown[number][arm], None), items[number].group, 0) for number in numbers for arm in arms]
        else:
            variants = [
                ((shown[number][one], shown[number][other]), items[number].group, kind)
                for number in numbers
                for kind, (one, other) in enumerate(combinations(arms, 2))
            ]
        prompts.append(_Prompt(prompt_id, items[numbers[0]].prompt, *zip(*variants, strict=True)))
    return prompts


def _tasks(
    prompts: Sequence[_Prompt],
    lessons: Sequence[tuple[TrainingItem, tuple[str, ...]]],
    options: Options,
    names: Sequence[str],
) -> Iterator[Task]:
    """Everyone's tasks in order: the training, then the rater's share of the study."""
    raters_of = assign([prompt.groups[0] for prompt in prompts], options.raters, options.k, options.seed)
    for rater in range(options.raters):
        mine = [number for number, chosen in enumerate(raters_of) if rater in chosen]
        places = order(mine, [len(prompts[number].shown) for number in mine], options.repeats, options.seed, rater)
        swapped = sides([prompts[number].kinds for number in mine], options.seed, rater)
        swaps = dict(zip(mine, swapped, strict=True)) if options.mode == "pairs" else {}
        shown = [_lesson(item, pictures) for item, pictures in lessons]
        shown += [_share(prompts[place.prompt], place, swaps) for place in places]
        for position, task in enumerate(shown):
            yield Task(task=_new_id(), rater=names[rater], position=position, **task)


def _lesson(item: TrainingItem, pictures: Sequence[str]) -> dict[str, Any]:
    """A training task, but for whose it is."""
    return {
        "kind": "training",
        "picture": pictures[0],
        "other": pictures[1] if pictures[1:] else None,
        "prompt_id": None,
        "prompt": item.prompt,
        "known": item.known,
        "dimensions": list(item.known),
    }


def _share(prompt: _Prompt, place: Place, swaps: Mapping[int, Sequence[bool]]) -> dict[str, Any]:
    """A task of the study, but for whose it is."""
    left, right = prompt.shown[place.variant]
    if right and swaps[place.prompt][place.variant]:
        left, right = right, left
    return {
        "kind": "repeat" if place.repeat else "item",
        "picture": left,
        "other": right,
        "prompt_id": prompt.id,
        "prompt": prompt.prompt,
        "group_name": prompt.groups[place.variant],
    }


def _people(options: Options) -> list[tuple[str, str, str]]:
    """Name, role and secret token of everyone."""
    width = max(2, len(str(options.raters)), len(str(options.experts)))
    named = [(f"r{number:0{width}d}", "rater") for number in range(1, options.raters + 1)]
    named += [(f"e{number:0{width}d}", "expert") for number in range(1, options.experts + 1)]
    return [(name, role, secrets.token_urlsafe(24)) for name, role in named]


def _links(people: Sequence[tuple[str, str, str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["rater", "role", "link"])
    writer.writerows([rater, role, f"/r/{token}/"] for rater, role, token in people)
    return text.getvalue()


def _write_private(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(text)


def _new_id() -> str:
    return secrets.token_hex(8)
