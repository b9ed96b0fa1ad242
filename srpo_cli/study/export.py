"""The answers of a study as a long table, a row for each answer, with the arms that the raters never see."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.study.rubric import GRADES, SIDES, Mode
from srpo_cli.study.store import KEY, Store, Waiting

if TYPE_CHECKING:
    from pandas import DataFrame

_SELECTED = (
    *("rater", "role", "task", "position", "kind", "picture", "other", "prompt_id", "group_name", "known"),
    *("dimension", "value", "ms", "answered_at"),
)
_ANSWERS = f"SELECT {', '.join(_SELECTED)} FROM answers JOIN tasks USING (task) JOIN raters USING (rater)"


@dataclass(frozen=True)
class Study:
    """What there is to answer, and by whom.

    Attributes:
        name: the study's own.
        mode: "grades": a picture gets a grade on each dimension; "pairs": one of two pictures is preferred, or neither.
        dimensions: name to title, in the rubric's order.
        arms: labels of what made the pictures, the baseline first.
        raters, experts: how many there are.
        prompts, pictures: how many are shown, without those of the training.
        due: answers that the raters are asked for, repeats included, training and resolution not.
        waiting: disputed pictures without the experts' grades.
    """

    name: str
    mode: Mode
    dimensions: Mapping[str, str]
    arms: tuple[str, ...]
    raters: int
    experts: int
    prompts: int
    pictures: int
    due: int
    waiting: Waiting


def read_study(study: Path, baseline: str | None = None) -> Study:
    """What the folder of a study says about it; ``baseline`` is the arm that comes first, None: the one that was named
    first when the study was made.

    UsageError for a folder that is no study and for a baseline that is no arm.
    """
    store, key = Store(study), _read_key(study)
    facts = store.facts
    arms = list(dict.fromkeys(entry["arm"] for entry in key.values() if entry.get("arm")))
    if baseline is not None and baseline not in arms:
        raise UsageError.unknown("arm", baseline, arms)
    arms.sort(key=lambda arm: arm != baseline)
    ((tasks,),) = store.read("SELECT COUNT(*) FROM tasks WHERE kind IN ('item', 'repeat')")
    return Study(
        name=facts.name,
        mode=facts.mode,
        dimensions={each.name: each.title for each in facts.dimensions},
        arms=tuple(arms),
        raters=facts.raters,
        experts=facts.experts,
        prompts=facts.prompts,
        pictures=facts.pictures,
        due=len(facts.dimensions) * tasks,
        waiting=store.waiting(),
    )


def read_answers(study: Path) -> DataFrame:
    """Every answer that stands, a row each, by rater and in the order of the tasks.

    Columns: study, rater, role ("rater" or "expert"), task, kind ("training", "item", "repeat" or "resolution"), arm
    and picture, prompt_id, group, dimension, value, grade (its name), ms (from showing to answering), answered_at, and
    known, the right value of a training answer. For pairs arm_left, arm_right, picture_left and picture_right stand
    for arm and picture; value is 0 for the left one, 1 for a tie, 2 for the right one.

    UsageError for a folder that is no study.
    """
    import pandas as pd

    store, key = Store(study), _read_key(study)
    facts = store.facts
    frame = pd.DataFrame(map(tuple, store.read(_ANSWERS)), columns=_SELECTED)
    pairs = facts.mode == "pairs"
    for side, column in {"_left": "picture", "_right": "other"}.items() if pairs else {"": "picture"}.items():
        frame[f"arm{side}"] = [_arm(key, *shown) for shown in zip(frame[column], frame["kind"], strict=True)]
        frame[f"picture{side}"] = frame[column]
    names = SIDES if pairs else GRADES
    frame["study"] = facts.name
    frame["group"] = frame["group_name"].fillna("")
    frame["grade"] = frame["value"].map(dict(enumerate(names)))
    known = [_known_value(*each, names) for each in zip(frame["known"], frame["dimension"], strict=True)]
    frame["known"] = pd.array(known, dtype="Int64")
    frame["place"] = frame["dimension"].map({each.name: place for place, each in enumerate(facts.dimensions)})
    return frame.sort_values(["rater", "position", "place"], ignore_index=True)[_columns(pairs)]


def write_answers(frame: DataFrame, path: Path, text_format: str | None = None) -> None:
    """Write a table of answers as csv, jsonl or parquet, by the ending of ``path`` unless ``text_format`` says it.

    UsageError for another ending, and where nothing can be written.
    """
    from srpo_cli.runtime.folder import disk_errors, write_atomically

    writers = {"csv": csv_of, "jsonl": jsonl_of, "parquet": lambda table: table.to_parquet(index=False)}
    chosen = text_format or path.suffix.lower().removeprefix(".")
    if chosen not in writers:
        raise UsageError(f"--output {path}: end it in .{', .'.join(writers)}, or say --format csv or jsonl")
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, writers[chosen](frame))


def csv_of(frame: DataFrame) -> str:
    """The table with a line of names and a line for each row; what is not known is empty."""
    return frame.to_csv(index=False, lineterminator="\n")


def jsonl_of(frame: DataFrame) -> str:
    """The table as one JSON object a line; what is not known is null."""
    return frame.to_json(orient="records", lines=True, force_ascii=False)


def _columns(pairs: bool) -> list[str]:
    shown = ["arm_left", "arm_right", "picture_left", "picture_right"] if pairs else ["arm", "picture"]
    who, what = ["study", "rater", "role", "task", "kind"], ["prompt_id", "group", "dimension", "value", "grade"]
    return [*who, *shown, *what, "ms", "answered_at", "known"]


def _arm(key: Mapping[str, Mapping[str, Any]], picture: str, kind: str) -> str:
    if kind == "training":  # made by hand, of no arm
        return ""
    if picture not in key:
        raise SrpoError(f"{KEY} does not know picture {picture}: restore the key that the study was made with")
    return key[picture]["arm"]


def _known_value(known: Any, dimension: str, names: tuple[str, ...]) -> int | None:
    """The right value of a training answer out of the task's JSON, in which it may stand by name; not all have one."""
    value = json.loads(known).get(dimension) if isinstance(known, str) else None
    return names.index(value) if isinstance(value, str) else value


def _read_key(study: Path) -> dict[str, dict[str, Any]]:
    try:
        key = json.loads((study / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise UsageError(f"{study / KEY} cannot be read ({reason}): name a folder of `srpo eval rate new`") from error
    if not isinstance(key, dict):
        raise UsageError(f"{study / KEY} is no JSON object: name a folder of `srpo eval rate new`")
    return key
