"""Pictures on disk: PNGs that say how they were made, grids, and the sheet that shows before and after."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
from torch import Tensor

from srpo_cli.errors import SrpoError, UsageError, one_line
from srpo_cli.runtime.folder import write_atomically

METADATA_KEY = "srpo"
"""Name of the PNG text chunk that holds a picture's metadata as one JSON object."""

SHEET = {"sheet": True}
"""Metadata of a picture that is no single picture: a grid, a curve."""

_PARAMETERS = "parameters"  # text chunk in which stable-diffusion-webui and its like keep the prompt
_MARGIN = 4  # px between pictures
_SMALL, _LARGE = 144, 512  # px: on a sheet smaller pictures are enlarged to about the one, larger ones reduced
_WIDEST = 1600  # px: a sheet that people look at without scrolling sideways
_LABEL, _LINES = 160, 6  # px of a row's label and lines of a caption; prompts can be a paragraph
_FONT = 13  # px, the least that is legible


def to_pil(image: Tensor) -> Image.Image:
    """A PIL picture of (3, H, W) in [0, 1]."""
    array = (image.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(array)


def save_png(image: Tensor, path: Path, metadata: dict[str, Any]) -> None:
    """Write (3, H, W) in [0, 1] with its metadata, atomically."""
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, json.dumps(metadata))
    _save(to_pil(image), path, pnginfo=info)


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata of a PNG that :func:`save_png` wrote; None for any other, cut off or damaged file."""
    try:
        with Image.open(path) as image:
            image.load()  # the metadata stands before the pixels, so a file that was cut off has it too
            return json.loads(image.info[METADATA_KEY])
    except (OSError, KeyError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def open_picture(path: Path) -> Image.Image:
    """A picture file as people see it: upright, 8-bit RGB, transparency over white.

    Sixteen-bit and floating-point greys keep their upper eight bits. SrpoError, in one line, for a file that is not
    there, no picture, cut off, or so large that it may be a decompression bomb.
    """
    return open_with_metadata(path)[0]


def open_with_metadata(path: Path) -> tuple[Image.Image, dict[str, Any]]:
    """As :func:`open_picture`, and what is written in the file: our own metadata, or another program's prompt."""
    try:
        with Image.open(path) as image:
            image.load()
            metadata = _metadata_of(image)
            ImageOps.exif_transpose(image, in_place=True)
            return _as_seen(image), metadata
    except UnidentifiedImageError as error:
        raise SrpoError(f"{path} is not a picture") from error
    except Image.DecompressionBombError as error:
        raise SrpoError(f"{path} has more than {2 * Image.MAX_IMAGE_PIXELS} pixels: refused") from error
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        raise SrpoError(f"cannot read {path}: {getattr(error, 'strerror', None) or one_line(error)}") from error


def prompt_of(path: Path, metadata: Mapping[str, Any]) -> str | None:
    """What a picture shows: the ``.txt`` beside it, else the prompt in its metadata."""
    sidecar = path.with_suffix(".txt")
    try:
        text = sidecar.read_text(encoding="utf-8").strip() if sidecar.is_file() else ""
    except (OSError, UnicodeError) as error:
        raise UsageError(f"cannot read the prompt in {sidecar}: not UTF-8 text") from error
    prompt = metadata.get("prompt")
    return text or (prompt if isinstance(prompt, str) and prompt.strip() else None)


def is_sheet(metadata: Mapping[str, Any]) -> bool:
    """Whether a picture is a sheet of several that :func:`save_grid` made."""
    return bool(metadata.get("sheet"))


def _metadata_of(image: Image.Image) -> dict[str, Any]:
    try:
        ours = json.loads(image.info[METADATA_KEY])
    except (KeyError, ValueError, TypeError):
        ours = None
    if isinstance(ours, dict):
        return ours
    told = image.info.get(_PARAMETERS)  # the prompt, then a line of negative prompt, then one of settings
    if not isinstance(told, str):
        return {}
    lines = takewhile(lambda line: not line.startswith(("Negative prompt:", "Steps: ")), told.splitlines())
    return {"prompt": " ".join(lines).strip()}


def _as_seen(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        grey = np.asarray(image, dtype=np.float64)  # PNGs of 16 bits open as "I;16" or, in older files, as "I"
        whole = 1.0 if image.mode == "F" else 65535.0
        return Image.fromarray((np.clip(grey / whole, 0, 1) * 255).round().astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        over = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def thumbnail_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width in which :func:`save_grid` shows a picture of ``size``."""
    longest = max(size)
    if longest > _LARGE:
        return tuple(max(1, round(edge * _LARGE / longest)) for edge in size)
    scale = max(1, _SMALL // longest)
    return size[0] * scale, size[1] * scale


def save_grid(rows: Sequence[Tensor], path: Path, row_labels: Sequence[str] = (), captions: Sequence[str] = ()) -> None:
    """Write rows of equally many pictures, each (N, 3, H, W) in [0, 1], as one PNG.

    ``row_labels`` stand before the rows, ``captions`` under the columns. Small pictures are enlarged by a whole
    factor without smoothing, so that pixels stay what they are; large ones are reduced. Columns that would make the
    sheet wider than a screen go on in another band of all rows below.
    """
    count = len(rows[0])
    cell_height, cell_width = thumbnail_size(tuple(rows[0].shape[-2:]))
    font = ImageFont.load_default(size=max(_FONT, cell_width // 24))
    line = int(font.size) + 3
    labels = [_wrap(label, font, max(_LABEL, cell_width // 2), cell_height // line) for label in row_labels]
    left = max([int(font.getlength(text)) + 1 for lines in labels for text in lines], default=-2 * _MARGIN)
    left += 2 * _MARGIN

    fitting = max(1, (_WIDEST - left) // (cell_width + _MARGIN))
    bands = -(-count // fitting)
    columns = -(-count // bands)  # as many in each band, so that the last one is not a lonely picture
    wrapped = [_wrap(caption, font, cell_width - _MARGIN, _LINES) for caption in captions]
    footers = [
        max([len(lines) * line + 2 * _MARGIN for lines in wrapped[first : first + columns]], default=0)
        for first in range(0, count, columns)
    ]
    body = len(rows) * (cell_height + _MARGIN)
    width = left + columns * (cell_width + _MARGIN) + _MARGIN
    sheet = Image.new("RGB", (width, _MARGIN + sum(body + footer for footer in footers)), "white")
    draw = ImageDraw.Draw(sheet)

    top = _MARGIN
    for band, footer in enumerate(footers):
        for r, row in enumerate(rows):
            y = top + r * (cell_height + _MARGIN)
            if labels:
                draw.text((_MARGIN, y + cell_height // 2), "\n".join(labels[r]), "black", font, anchor="lm", spacing=3)
            for c, image in enumerate(row[band * columns : (band + 1) * columns]):
                position = (left + _MARGIN + c * (cell_width + _MARGIN), y)
                sheet.paste(_resized(to_pil(image), (cell_width, cell_height)), position)
        for c, lines in enumerate(wrapped[band * columns : (band + 1) * columns]):
            position = (left + _MARGIN + c * (cell_width + _MARGIN), top + body)
            draw.text(position, "\n".join(lines), "black", font, spacing=3)
        top += body + footer
    info = PngImagePlugin.PngInfo()
    info.add_text(METADATA_KEY, json.dumps(SHEET))
    _save(sheet, path, pnginfo=info)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    enlarged = size[0] >= image.width
    return image.resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int, limit: int) -> list[str]:
    """Lines of ``text`` that fit into ``width`` px; words that do not are cut, and so is what ``limit`` leaves over."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while font.getlength(word) > width and len(word) > 1:
            fitting = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            lines.append(word[:fitting])
            word = word[fitting:]
        lines.append(word)
    if len(lines) > limit:
        last = lines[limit - 1]
        while last and font.getlength(f"{last}…") > width:
            last = last[:-1]
        lines = [*lines[: limit - 1], f"{last.rstrip()}…"]
    return lines


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    encoded = io.BytesIO()
    image.save(encoded, "PNG", **options)
    write_atomically(path, encoded.getvalue())
