"""The pictures of a study's arms, matched by what they show: from folders, or from a result of ``srpo eval``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from srpo_cli.errors import UsageError
from srpo_cli.runtime.inputs import list_pictures, with_prompts
from srpo_cli.runtime.pictures import is_sheet, open_with_metadata, prompt_of

if TYPE_CHECKING:
    from pandas import DataFrame

_Key = tuple[str, int]  # a prompt, or its id, and a seed or number


@dataclass(frozen=True)
class Item:
    """What is compared: one prompt, and for it one picture from every arm.

    Attributes:
        prompt_id: the same for all items of one text, which may have several seeds.
        group: the prompt's style or category, "" if there is none.
        files: by arm.
    """

    prompt_id: str
    prompt: str
    group: str
    files: Mapping[str, Path]


@dataclass(frozen=True)
class _Found:
    """A picture of one arm; ``seed`` is None where nothing tells."""

    prompt: str
    seed: int | None
    file: Path


def items_of_folders(arms: Mapping[str, Path], prompts: str | None = None) -> list[Item]:
    """Match the pictures of folders, one for each arm, by their prompts and, where a prompt has several, their seeds.

    What a picture shows is said by ``prompts``, a file as `srpo score --prompts` reads it, else by the ``.txt`` beside
    it, else by its metadata. Pictures of one prompt that have no seeds are matched in the order of their names.
    UsageError for a picture without a prompt, for two with the same prompt and seed, and where an arm misses one that
    another has.
    """
    found = {arm: _find(folder, prompts) for arm, folder in arms.items()}
    several = any(max(Counter(each.prompt for each in pictures).values()) > 1 for pictures in found.values())
    seeded = all(each.seed is not None for pictures in found.values() for each in pictures)
    keyed = {arm: _by_key(arm, pictures, several and seeded) for arm, pictures in found.items()}
    ids: dict[str, str] = {}
    for prompt, _ in next(iter(keyed.values())):
        ids.setdefault(prompt, f"{len(ids):05d}")
    return [
        Item(ids[prompt], prompt, "", {arm: pictures[prompt, number] for arm, pictures in keyed.items()})
        for prompt, number in _crossed(keyed, lambda key: key[0])
    ]


def items_of_result(table: DataFrame, folder: Path, arms: Sequence[str] = ()) -> list[Item]:
    """The pictures of a result of ``srpo eval``; items of one text are one prompt, by the id of the first.

    Args:
        table: a row for each picture, as in ``images.parquet``.
        folder: the result's own, in which the table's files are.
        arms: labels of models in it, all of them if none are named.

    UsageError for a model that is not in it, and where a model misses a picture that another has.
    """
    labels = list(dict.fromkeys(table["model"]))
    for arm in arms:
        if arm not in labels:
            raise UsageError.unknown("model", arm, labels)
    table = table[table["model"].isin(arms or labels)]
    ids = table.groupby("prompt")["item"].transform("first")
    known = dict(zip(table["item"], zip(ids, table["prompt"], table["group"], strict=True), strict=True))
    keyed: dict[str, dict[_Key, Path]] = {arm: {} for arm in arms or labels}
    for model, item, image, file in table[["model", "item", "image", "file"]].itertuples(index=False):
        keyed[model][item, int(image)] = folder / file
    return [
        Item(*known[key[0]], {arm: pictures[key] for arm, pictures in keyed.items()})
        for key in _crossed(keyed, lambda key: known[key[0]][1])
    ]


def _find(folder: Path, prompts: str | None) -> list[_Found]:
    """The pictures of an arm with what they show, sheets left out."""
    pictures = list_pictures([str(folder)])
    found = []
    for picture in with_prompts(pictures, prompts) if prompts else pictures:
        file = Path(picture.file)
        metadata = open_with_metadata(file)[1]
        if is_sheet(metadata):
            continue
        prompt = picture.prompt or prompt_of(file, metadata)
        if not prompt:
            raise UsageError(f"{file} does not say what it shows: give the prompts with --prompts, or a .txt beside it")
        seed = metadata.get("seed")
        found.append(_Found(prompt, seed if isinstance(seed, int) else None, file))
    if not found:
        raise UsageError(f"{folder} holds sheets only: name a folder of single pictures")
    return found


def _by_key(arm: str, pictures: Sequence[_Found], by_seed: bool) -> dict[_Key, Path]:
    """Files by prompt and seed, or by prompt and how many of the prompt came before."""
    keyed: dict[_Key, Path] = {}
    before: Counter[str] = Counter()
    for each in pictures:
        key = (each.prompt, each.seed if by_seed and each.seed is not None else before[each.prompt])
        if key in keyed:
            raise UsageError(
                f"arm {arm} has two pictures of {each.prompt!r} with seed {each.seed}: {keyed[key]} and {each.file}; "
                "keep one"
            )
        before[each.prompt] += 1
        keyed[key] = each.file
    return keyed


def _crossed(keyed: Mapping[str, Mapping[_Key, Path]], prompt_of_key: Callable[[_Key], str]) -> list[_Key]:
    """The keys, in the first arm's order, which all arms must have; UsageError that names the first missing one."""
    for (arm, pictures), (other, theirs) in product(keyed.items(), keyed.items()):
        for key in theirs:
            if key not in pictures:
                raise UsageError(
                    f"arm {arm} has no picture of {prompt_of_key(key)!r} like {theirs[key]} of arm {other}: every "
                    "prompt needs the same pictures from every arm"
                )
    return list(next(iter(keyed.values())))
