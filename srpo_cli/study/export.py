"""The answers of a study as a long table, a row for each answer, with the arms that the raters never see."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from srpo_cli.errors import SrpoError, UsageError

if TYPE_CHECKING:
    from pandas import DataFrame

GRADES = ("Fail", "Pass", "Good", "Excellent")
SIDES = ("left", "tie", "right")

_FILES = ("study.json", "private/key.json", "answers.sqlite")
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
        dimensions: name to title, in the order in which they are asked.
        arms: labels of what made the pictures, the baseline first.
        raters, experts: how many there are.
        prompts, pictures: how many are shown, without those of the training.
        due: answers that the raters are asked for, repeats included, training and resolution not.
    """

    name: str
    mode: Literal["grades", "pairs"]
    dimensions: Mapping[str, str]
    arms: tuple[str, ...]
    raters: int
    experts: int
    prompts: int
    pictures: int
    due: int


def read_study(study: Path, baseline: str | None = None) -> Study:
    """What the folder of a study says about it; ``baseline`` is the arm that comes first, None: the one that was named
    first when the study was made.

    UsageError for a folder that is no study and for a baseline that is no arm.
    """
    facts, key = _facts(study), _key(study)
    arms = list(dict.fromkeys(entry["arm"] for entry in key.values() if entry.get("arm")))
    if baseline is not None and baseline not in arms:
        raise UsageError.unknown("arm", baseline, arms)
    arms.sort(key=lambda arm: arm != baseline)
    dimensions = {each["name"]: each.get("title", each["name"]) for each in facts["dimensions"]}
    with closing(_connect(study)) as database:
        roles = dict(_query(database, "SELECT role, COUNT(*) FROM raters GROUP BY role", study))
        tasks = _query(database, "SELECT kind, picture, other, prompt_id FROM tasks", study)
    items = [task for task in tasks if task[0] == "item"]
    return Study(
        name=facts["name"],
        mode=facts["mode"],
        dimensions=dimensions,
        arms=tuple(arms),
        raters=roles.get("rater", 0),
        experts=roles.get("expert", 0),
        prompts=len({prompt for *_, prompt in items}),
        pictures=len({picture for _, *shown, _ in items for picture in shown if picture}),
        due=len(dimensions) * sum(kind in ("item", "repeat") for kind, *_ in tasks),
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

    facts, key = _facts(study), _key(study)
    with closing(_connect(study)) as database:
        rows = _query(database, _ANSWERS, study)
    frame = pd.DataFrame(rows, columns=_SELECTED)
    pairs = facts["mode"] == "pairs"
    for side, column in {"_left": "picture", "_right": "other"}.items() if pairs else {"": "picture"}.items():
        frame[f"arm{side}"] = [_arm(key, *shown) for shown in zip(frame[column], frame["kind"], strict=True)]
        frame[f"picture{side}"] = frame[column]
    names = SIDES if pairs else GRADES
    frame["study"] = facts["name"]
    frame["group"] = frame["group_name"].fillna("")
    frame["grade"] = frame["value"].map(dict(enumerate(names)))
    known = [_known_value(*each, names) for each in zip(frame["known"], frame["dimension"], strict=True)]
    frame["known"] = pd.array(known, dtype="Int64")
    asked_in = {each["name"]: place for place, each in enumerate(facts["dimensions"])}
    frame["place"] = frame["dimension"].map(asked_in)
    return frame.sort_values(["rater", "position", "place"], ignore_index=True)[_columns(pairs)]


def write_answers(frame: DataFrame, path: Path, text_format: str | None = None) -> None:
    """Write a table of answers as csv, jsonl or parquet, by the ending of ``path`` unless ``text_format`` says it.

    UsageError for another ending, and where nothing can be written.
    """
    from srpo_cli.runtime.folder import write_atomically

    writers = {"csv": csv_of, "jsonl": jsonl_of, "parquet": lambda table: table.to_parquet(index=False)}
    chosen = text_format or path.suffix.lower().removeprefix(".")
    if chosen not in writers:
        raise UsageError(f"--output {path}: end it in .{', .'.join(writers)}, or say --format csv or jsonl")
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
        raise SrpoError(
            f"private/key.json does not know picture {picture}: restore the key that the study was made with"
        )
    return key[picture]["arm"]


def _known_value(known: Any, dimension: str, names: tuple[str, ...]) -> int | None:
    """The right value of a training answer out of the task's JSON, in which it may stand by name; not all have one."""
    value = json.loads(known).get(dimension) if isinstance(known, str) else None
    return names.index(value) if isinstance(value, str) else value


def _facts(study: Path) -> dict[str, Any]:
    missing = [name for name in _FILES if not (study / name).is_file()]
    if missing:
        raise UsageError(f"{study} is no study, it has no {missing[0]}: name a folder of `srpo eval rate new`")
    facts = _read_json(study / "study.json")
    if not {"name", "mode", "dimensions"} <= facts.keys():
        raise UsageError(f"{study / 'study.json'} is not of a study: name a folder of `srpo eval rate new`")
    return facts


def _key(study: Path) -> dict[str, dict[str, Any]]:
    return _read_json(study / "private" / "key.json")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not JSON"
        raise UsageError(f"{path} cannot be read ({reason}): name a folder of `srpo eval rate new`") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} is no JSON object: name a folder of `srpo eval rate new`")
    return value


def _connect(study: Path) -> sqlite3.Connection:
    """For reading only: raters may be answering meanwhile."""
    return sqlite3.connect(f"{(study / 'answers.sqlite').absolute().as_uri()}?mode=ro", uri=True, timeout=30)


def _query(database: sqlite3.Connection, query: str, study: Path) -> list[tuple[Any, ...]]:
    try:
        return database.execute(query).fetchall()
    except sqlite3.DatabaseError as error:
        raise UsageError(
            f"{study / 'answers.sqlite'} holds no answers of a study ({error}): name a folder of `srpo eval rate new`"
        ) from error
