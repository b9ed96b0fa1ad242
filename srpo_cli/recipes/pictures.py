"""Real pictures in place of rollouts (offline SRPO): a folder, a list in a file, or the miniature's photographs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Protocol

import torch
import torchvision.transforms.v2.functional as V
from PIL import Image, ImageOps
from torch import Tensor

from srpo_cli.config.schema import TrainConfig
from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.miniature.world import PHOTO, draw_scenes_of, render
from srpo_cli.runtime.pictures import open_picture, read_metadata
from srpo_cli.runtime.seeding import derive

ENDINGS = {".png", ".jpg", ".jpeg", ".webp"}


class PictureSource(Protocol):
    """Gives pictures and captions by number, round and round."""

    def digest(self) -> str:
        """Digest of what the configuration only names."""
        ...

    def caption(self, number: int) -> str: ...

    def picture(self, number: int, size: tuple[int, int]) -> Tensor:
        """A picture (3, H, W) in [0, 1] of ``size``."""
        ...

    def key(self, number: int) -> str | None:
        """Digest of the picture's content, the same whenever it comes round; None for one that never does."""
        ...


@dataclass(frozen=True)
class Files:
    """Picture files with a caption each, in order and round and round."""

    items: Sequence[tuple[Path, str]]

    def digest(self) -> str:
        """Digest of the pictures' bytes and captions."""
        whole = hashlib.sha256()
        for path, caption in self.items:
            whole.update(bytes.fromhex(_digest(path)) + caption.encode())
        return whole.hexdigest()[:16]

    def caption(self, number: int) -> str:
        return self.items[number % len(self.items)][1]

    def picture(self, number: int, size: tuple[int, int]) -> Tensor:
        return read_picture(self.items[number % len(self.items)][0], size)

    def key(self, number: int) -> str:
        return _digest(self.items[number % len(self.items)][0])


@dataclass(frozen=True)
class Photographs:
    """The renderer's photographs of prompts of the miniature's world."""

    prompts: Sequence[str]
    seed: int

    def digest(self) -> str:
        """Nothing that the configuration and the prompts do not say already."""
        return ""

    def caption(self, number: int) -> str:
        return self.prompts[number % len(self.prompts)]

    def picture(self, number: int, size: tuple[int, int]) -> Tensor:
        scene = draw_scenes_of([self.caption(number)], PHOTO, derive(self.seed, "photographs", number))
        return render(scene)[0]

    def key(self, number: int) -> None:
        return None  # every number is another scene


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """A picture file as (3, H, W) in [0, 1]: upright, RGB, covering ``size`` and cropped at the centre."""
    try:
        upright = open_picture(path)
    except SrpoError as error:
        raise UsageError(f"{error}: mend or remove it") from error
    fitted = ImageOps.fit(upright, (size[1], size[0]), Image.Resampling.LANCZOS)
    return V.to_dtype(V.pil_to_tensor(fitted), torch.float32, scale=True)


def open_pictures(config: TrainConfig, prompts: list[str]) -> PictureSource | None:
    """What ``rollout.source`` and ``rollout.pictures`` name; None where rollouts come from the model."""
    if config.rollout.source == "model":
        return None
    source = config.rollout.pictures
    if str(source) == "miniature":
        return Photographs(prompts, config.train.seed)
    items = _listed(source) if source.is_file() else _in_folder(source)
    if not items:
        raise UsageError(f"rollout.pictures {source} holds no picture with a caption (a .txt beside it, or metadata)")
    return Files(items)


def _listed(path: Path) -> list[tuple[Path, str]]:
    """Rows of a JSONL file with ``image``, relative to the file, and ``prompt``."""
    items = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
            items.append((path.parent / row["image"], str(row["prompt"])))
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path}, line {number}: not a JSON object with image and prompt") from error
    return items


def _in_folder(folder: Path) -> list[tuple[Path, str]]:
    """Pictures below a folder whose caption is in a ``.txt`` beside them or in their metadata, in a stable order."""
    if not folder.is_dir():
        raise UsageError(f"rollout.pictures {folder} does not exist: name a folder, a JSONL file or miniature")
    items = []
    for path in sorted(p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS):
        sidecar = path.with_suffix(".txt")
        caption = sidecar.read_text().strip() if sidecar.exists() else (read_metadata(path) or {}).get("prompt")
        if caption:
            items.append((path, caption))
    return items
