"""Pictures on disk: PNGs that say how they were made, grids, and the sheet that shows before and after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin
from torch import Tensor

from srpo_cli.runtime.folder import disk_errors

METADATA_KEY = "srpo"
"""Name of the PNG text chunk that holds a picture's metadata as one JSON object."""

_MARGIN, _SMALL = 4, 144  # pixels between pictures; smaller pictures are enlarged to about this


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
    """The metadata of a PNG that :func:`save_png` wrote; None for any other or damaged file."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info[METADATA_KEY])
    except (OSError, KeyError, ValueError, SyntaxError):
        return None


def save_grid(rows: Sequence[Tensor], path: Path, row_labels: Sequence[str] = (), captions: Sequence[str] = ()) -> None:
    """Write rows of pictures, each (N, 3, H, W) in [0, 1], as one PNG.

    ``row_labels`` stand before the rows, ``captions`` under the columns. Small pictures are enlarged by a whole
    factor without smoothing, so that pixels stay what they are.
    """
    count, _, height, width = rows[0].shape
    scale = max(1, _SMALL // max(height, width))
    cell_width, cell_height = width * scale, height * scale
    font = ImageFont.load_default(size=13)
    left = max([int(font.getlength(label)) for label in row_labels], default=-2 * _MARGIN) + 2 * _MARGIN
    wrapped = [_wrap(caption, font, cell_width) for caption in captions]
    footer = max([len(lines) for lines in wrapped], default=0) * 16
    sheet = Image.new(
        "RGB",
        (
            left + count * (cell_width + _MARGIN) + _MARGIN,
            len(rows) * (cell_height + _MARGIN) + _MARGIN + footer,
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    for r, row in enumerate(rows):
        top = _MARGIN + r * (cell_height + _MARGIN)
        if row_labels:
            draw.text((_MARGIN, top + cell_height // 2), row_labels[r], "black", font, anchor="lm")
        for c, image in enumerate(row):
            enlarged = to_pil(image).resize((cell_width, cell_height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left + _MARGIN + c * (cell_width + _MARGIN), top))
    bottom = len(rows) * (cell_height + _MARGIN) + _MARGIN
    for c, lines in enumerate(wrapped):
        position = (left + _MARGIN + c * (cell_width + _MARGIN), bottom)
        draw.multiline_text(position, "\n".join(lines), "black", font, spacing=2)
    _save(sheet, path)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _save(image: Image.Image, path: Path, **options: Any) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path.parent):
        image.save(temporary, "PNG", **options)
        temporary.replace(path)
