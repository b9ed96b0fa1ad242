"""The pictures of a report: thumbnails beside the page or in it, and the data that its script sorts and filters."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
from PIL import Image

from srpo_cli.errors import SrpoError, one_line
from srpo_cli.runtime.folder import write_atomically

THUMBNAILS = "thumbnails"
EDGE = 256
"""The longer side of a thumbnail in pixels."""

SMALL = 128
"""Pictures of a shorter longer side are kept as they are and enlarged by a whole factor."""

EMBEDDED = 3 * 2**20
"""Bytes of thumbnails that a page may hold; with more of them they lie beside it."""

_MEANS = ("first", "mean")  # reductions that say the same of one picture as of many
_OWN = "mean_absolute"  # one that says of a picture how far it is off itself, not how far it moves the mean
_TYPES = {".png": "image/png", ".webp": "image/webp"}
_NAME = re.compile(r"[0-9a-f]{16}\.(png|webp)")

Progress = Callable[[int, int], None]


def gallery(
    folder: Path, result: Mapping[str, Any], table: pd.DataFrame, progress: Progress | None = None
) -> dict[str, Any]:
    """What the page's script needs, as plain data, and the thumbnails in ``folder``.

    Rows are the (item, image) pairs in the order of the table; ``pictures[m][row]`` is an index into ``sources`` or -1,
    ``values[c][m][row]`` a figure or None, ``links`` the whole pictures where a thumbnail is less than that.
    """
    rows = table.drop_duplicates(["item", "image"])
    index = pd.MultiIndex.from_frame(rows[["item", "image"]])
    labels = [model["label"] for model in result["models"]]
    by_model = [_of_model(table, label, index) for label in labels]
    columns = picture_columns(result, table)
    sources, pictures, sizes = _pictures(folder, by_model, progress)
    whole = all(max(size) < SMALL for size in sizes)  # then a thumbnail is all there is to see
    groups = list(dict.fromkeys(rows["group"]))
    return {
        "models": labels,
        "groups": groups,
        "items": rows["item"].tolist(),
        "images": rows["image"].tolist(),
        "seeds": [None if pd.isna(seed) else int(seed) for seed in rows["seed"]],
        "prompts": rows["prompt"].tolist(),
        "group": rows["group"].map({group: i for i, group in enumerate(groups)}).tolist(),
        "columns": [{key: column[key] for key in ("name", "title", "better", "digits")} for column in columns],
        "values": [[_values(column, frame) for frame in by_model] for column in columns],
        "sources": sources,
        "pictures": pictures,
        "links": None if whole else [[_link(folder, file) for file in frame["file"]] for frame in by_model],
        "size": list(sizes[0]) if sizes else [],
        "pixelated": whole,
    }


def picture_columns(result: Mapping[str, Any], table: pd.DataFrame) -> list[Mapping[str, Any]]:
    """The measures that one picture has a figure of: means of the table's columns, each thing once.

    A mean of absolute values is the picture's own, and is called so: the model's figure is no mean of these.
    """
    return [
        {**measure, "title": f"{measure['title']} of the picture"} if measure["reduce"] == _OWN else measure
        for measure in result["measures"]
        if measure["columns"] and measure["reduce"] in (*_MEANS, _OWN) and set(measure["columns"]) <= set(table.columns)
    ]


def _values(column: Mapping[str, Any], frame: pd.DataFrame) -> list[float | None]:
    values = frame[list(column["columns"])]
    return _rounded((values.abs() if column["reduce"] == _OWN else values).mean(axis=1))


def _of_model(table: pd.DataFrame, label: str, index: pd.MultiIndex) -> pd.DataFrame:
    of_model = table[table["model"] == label].drop_duplicates(["item", "image"])
    return of_model.set_index(["item", "image"]).reindex(index)


def _rounded(values: pd.Series) -> list[float | None]:
    """Four significant digits, enough to sort by and to read."""
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values]


@dataclass(frozen=True)
class Thumbnail:
    """A small picture: its file relative to the page, the bytes of it, and (width, height) in pixels."""

    name: str
    data: bytes
    size: tuple[int, int]

    def as_uri(self) -> str:
        return f"data:{_TYPES[Path(self.name).suffix]};base64,{base64.b64encode(self.data).decode()}"

    def write(self, folder: Path) -> None:
        """Write the file, whole or not at all, where it is not there yet."""
        path = folder / self.name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, self.data)


def _pictures(
    folder: Path, by_model: Sequence[pd.DataFrame], progress: Progress | None
) -> tuple[list[str], list[list[int]], list[tuple[int, int]]]:
    """Addresses of the thumbnails, for each model their indices by row, and the thumbnails' (width, height)."""
    owners: dict[str, int] = {}  # file -> the number of the first model that has it
    for number, frame in enumerate(by_model):
        for file in frame["file"].dropna():
            if (folder / file).is_file():
                owners.setdefault(file, number)
    sources, sizes = _addresses(folder, owners, progress)
    place = {file: i for i, file in enumerate(owners)}
    return sources, [[place.get(file, -1) for file in frame["file"]] for frame in by_model], sizes


def _addresses(
    folder: Path, owners: Mapping[str, int], progress: Progress | None
) -> tuple[list[str], list[tuple[int, int]]]:
    """Where the page finds each thumbnail, in it or beside it, and their (width, height)."""
    made = _thumbnails(folder, owners, progress)
    few: list[Thumbnail] = []
    total = 0
    for thumbnail in made:
        few.append(thumbnail)
        total += len(thumbnail.data)
        if total > EMBEDDED:
            break
    else:
        _sweep(folder / THUMBNAILS, kept=set())
        return [each.as_uri() for each in few], [each.size for each in few]
    names, sizes = [], []
    for thumbnail in chain(few, made):
        thumbnail.write(folder)
        names.append(thumbnail.name)
        sizes.append(thumbnail.size)
    _sweep(folder / THUMBNAILS, kept={folder / name for name in names})
    return names, sizes


def _thumbnails(folder: Path, owners: Mapping[str, int], progress: Progress | None) -> Iterator[Thumbnail]:
    """The thumbnail of each file, in order, a few at a time."""
    files = iter(owners.items())
    done = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        while some := list(islice(files, 64)):
            for thumbnail in pool.map(lambda pair: _thumbnail(folder, *pair), some):
                done += 1
                if progress:
                    progress(done, len(owners))
                yield thumbnail


def _thumbnail(folder: Path, file: str, model: int) -> Thumbnail:
    """The thumbnail of a picture; one that is there, of the same file, is not made again."""
    source = folder / file
    status = source.stat()
    # The name is the file's identity, so that what exists under it matches; nothing of a user's is in it.
    identity = hashlib.sha256(f"{file}|{status.st_size}|{status.st_mtime_ns}".encode()).hexdigest()[:16]
    for suffix in _TYPES:
        name = f"{THUMBNAILS}/{model}/{identity}{suffix}"
        if (folder / name).is_file():
            data = (folder / name).read_bytes()
            return Thumbnail(name, data, Image.open(io.BytesIO(data)).size)
    try:
        with Image.open(source) as opened:
            picture = opened.convert("RGB")
    except OSError as error:
        raise SrpoError(f"{source} cannot be read as a picture ({one_line(error)}): draw it again") from error
    small = max(picture.size) < SMALL
    picture.thumbnail((EDGE, EDGE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, **({"format": "PNG", "optimize": True} if small else {"format": "WEBP", "quality": 82}))
    name = f"{THUMBNAILS}/{model}/{identity}{'.png' if small else '.webp'}"
    return Thumbnail(name, buffer.getvalue(), picture.size)


def _sweep(thumbnails: Path, kept: set[Path]) -> None:
    """Remove the thumbnails of pictures that the report no longer shows, and nothing else."""
    for path in thumbnails.glob("[0-9]*/*"):
        if path not in kept and _NAME.fullmatch(path.name):
            path.unlink()
    for path in [*thumbnails.glob("[0-9]*"), thumbnails]:
        with suppress(OSError):  # it holds something, or is not there
            path.rmdir()


def _link(folder: Path, file: Any) -> str | None:
    """The address of a whole picture, relative to the page."""
    if not isinstance(file, str) or not (folder / file).is_file():
        return None
    return quote(Path(os.path.relpath(folder / file, folder)).as_posix())
