"""Pictures that a command is given: files, folders, runs, rows on standard input; and the prompts that go with them.

Nothing is decoded here, so a mistake in a command is found before torch is loaded.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from srpo_cli.errors import UsageError
from srpo_cli.runtime.folder import CONFIG
from srpo_cli.runtime.prompts import read_prompts

ENDINGS = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif"}
"""What a folder's pictures end in; a file that is named may end as it likes."""

_FILE_KEYS = ("file", "image")


@dataclass(frozen=True)
class Picture:
    """One picture of the input.

    Attributes:
        file: as the user named it, or as found below a folder that the user named.
        prompt: what the command line, a prompts file or a row says; None: whatever the picture itself says.
        found: it was not named but found in a folder.
        row: the keys of the row that named it.
    """

    file: str
    prompt: str | None = None
    found: bool = False
    row: Mapping[str, Any] = field(default_factory=dict)


def list_pictures(paths: Sequence[str]) -> list[Picture]:
    """Pictures of files, folders (whole trees, in the order of their names) and runs, whose samples they are.

    Raises UsageError for a path that is not there or a folder without pictures.
    """
    pictures: list[Picture] = []
    for path in paths:
        place = Path(path)
        if place.is_dir():
            pictures += [Picture(str(file), found=True) for file in _in_folder(place)]
        elif place.exists():
            pictures.append(Picture(path))
        else:
            raise UsageError(f"{path} does not exist: name pictures, folders or runs, or - for rows on standard input")
    return pictures


def read_rows(lines: Iterable[str], name: str = "standard input") -> Iterator[Picture]:
    """Pictures of JSONL rows with ``file`` (or ``image``) and, where they have one, ``prompt``; as the lines come."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            file = next(row[key] for key in _FILE_KEYS if key in row)
        except (ValueError, TypeError, StopIteration) as error:
            raise UsageError(
                f"{name}, line {number}: not a JSON object with a file, as `srpo sample` writes"
            ) from error
        prompt = row.get("prompt")
        if not isinstance(file, str) or not (prompt is None or isinstance(prompt, str)):
            raise UsageError(f"{name}, line {number}: file and prompt should be texts")
        yield Picture(file, prompt, row=row)


def with_prompts(pictures: Sequence[Picture], source: str) -> list[Picture]:
    """The pictures with the prompts of a file: by name where it has a ``file`` column, else one by one in order."""
    named = _named_prompts(source)
    if named is None:
        prompts = read_prompts(source)
        pictures = [picture for picture in pictures if not (picture.found and _is_sheet(picture.file))]
        if len(prompts) != len(pictures):
            raise UsageError(
                f"{source} holds {len(prompts)} prompts for {len(pictures)} pictures: give one each, in order, or a "
                ".jsonl or .csv with file and prompt"
            )
        return [_told(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)]
    by_path: dict[Path, str] = {}
    for file, prompt in named:
        by_path[(Path(source).parent / file).resolve()] = prompt
        by_path.setdefault(Path(file).resolve(), prompt)
    names = Counter(Path(file).name for file, _ in named)
    places = Counter(Path(picture.file).name for picture in pictures)
    by_name = {Path(file).name: prompt for file, prompt in named if names[Path(file).name] == 1}
    told = []
    for picture in pictures:
        path = Path(picture.file)
        prompt = by_path.get(path.resolve())
        if prompt is None and path.name in names:
            if names[path.name] > 1 or places[path.name] > 1:
                raise UsageError(f"{source} means several pictures by {path.name}: name them with their folders")
            prompt = by_name[path.name]
        told.append(_told(picture, prompt))
    return told


def standard_input() -> Iterator[str]:
    """Its lines as they come; UsageError where nothing is piped in."""
    if sys.stdin is None or sys.stdin.isatty():
        raise UsageError("- reads rows from standard input, but nothing is piped in")
    return iter(sys.stdin)


def _is_sheet(file: str) -> bool:
    from srpo_cli.runtime.pictures import is_sheet, read_metadata  # imports torch

    return is_sheet(read_metadata(Path(file)) or {})


def _told(picture: Picture, prompt: str | None) -> Picture:
    return Picture(picture.file, prompt, picture.found, picture.row)


def _named_prompts(source: str) -> list[tuple[str, str]] | None:
    """File names and prompts, of a ``.jsonl`` or ``.csv`` whose rows name files; None for any other."""
    path = Path(source)
    if path.suffix.lower() not in (".jsonl", ".csv") or not path.is_file():
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot read prompts from {source}: not UTF-8 text") from error
    if path.suffix.lower() == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        key = next((key for key in _FILE_KEYS if key in (rows.fieldnames or [])), None)
        if key is None or "prompt" not in rows.fieldnames:
            return None
        return [(row[key], row["prompt"]) for row in rows if row[key] and row["prompt"]]
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines or not any(f'"{key}"' in lines[0] for key in _FILE_KEYS):
        return None
    return [(picture.file, picture.prompt) for picture in read_rows(lines, source) if picture.prompt]


def _in_folder(folder: Path) -> list[Path]:
    """The pictures below a folder in a stable order; of a run those that it drew of its fixed prompts."""
    if (folder / CONFIG).is_file():
        files = sorted(folder.glob("samples/step-*/*.png"))
        if not files:
            raise UsageError(
                f"{folder} is a run without sample pictures: draw some with `srpo sample --model {folder}`"
            )
        return files
    files = sorted(
        (path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and not _is_hidden(path, folder)),
        key=lambda path: path.relative_to(folder).parts,
    )
    if not files:
        raise UsageError(f"{folder} holds no picture ({', '.join(sorted(ENDINGS))})")
    return files


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)
