"""Training items: pictures whose right answers are known and told, so that raters learn the scale first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srpo_cli.errors import UsageError
from srpo_cli.study.rubric import Dimension, Mode, answer_names

FILE = "training.jsonl"
"""What a folder of training items holds, beside their pictures."""


@dataclass(frozen=True)
class TrainingItem:
    """One picture, or a left and a right one, with the right value of each question that is asked."""

    prompt: str
    files: tuple[Path, ...]
    known: Mapping[str, int]


def read_training(path: Path, mode: Mode, dimensions: Sequence[Dimension]) -> list[TrainingItem]:
    """The items of a JSONL file, or of a folder's ``training.jsonl``.

    A row holds ``prompt``, ``image`` and ``grades``, the name of the right answer by the name of a dimension; for
    pairs ``other``, the right picture, too. Pictures are found beside the file. UsageError for a row that cannot be
    used, with its line.
    """
    file = path / FILE if path.is_dir() else path
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"cannot read training items from {file}: {reason}") from error
    items = [_item(row, file, place, mode, dimensions) for place, row in _rows(file, lines)]
    if not items:
        raise UsageError(f"{file} holds no training item: leave --training out, or give one object a line")
    return items


def _rows(file: Path, lines: Sequence[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{file}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise UsageError(f"{place}: not a JSON object ({error})") from error
            if not isinstance(row, dict):
                raise UsageError(f"{place}: not a JSON object")
            yield place, row


def _item(row: Mapping[str, Any], file: Path, place: str, mode: Mode, dimensions: Sequence[Dimension]) -> TrainingItem:
    keys = ("prompt", "image") if mode == "grades" else ("prompt", "image", "other")
    for key in keys:
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise UsageError(f"{place}: {key} is missing: give {', '.join(keys)} and grades")
    grades = row.get("grades")
    if not isinstance(grades, dict) or not grades:
        raise UsageError(f'{place}: grades are missing: give them as in "grades": {{"{dimensions[0].name}": ...}}')
    answers, names = answer_names(mode), [dimension.name for dimension in dimensions]
    for name, grade in grades.items():
        if name not in names:
            raise UsageError.unknown(f"dimension in {place},", name, names)
        if grade not in answers:
            raise UsageError.unknown(f"grade in {place},", str(grade), answers)
    files = tuple(file.parent / row[key] for key in keys[1:])
    known = {name: answers.index(grades[name]) for name in names if name in grades}
    return TrainingItem(row["prompt"].strip(), files, known)
