"""Sample: one picture for each prompt and seed, from a base model, a run, a checkpoint or a LoRA."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from srpo_cli import __version__
from srpo_cli.config.load import load_train_config
from srpo_cli.errors import MissingError, UsageError
from srpo_cli.models.flux import Flux, load_flux
from srpo_cli.recipes.parts import check_miniature_prompts, chunks, draw_pictures
from srpo_cli.recipes.pictures import read_picture
from srpo_cli.runtime.checkpoints import find_checkpoint
from srpo_cli.runtime.devices import best_device
from srpo_cli.runtime.folder import CONFIG, disk_errors, write_atomically
from srpo_cli.runtime.pictures import read_metadata, save_grid, save_png

SAMPLES, GRID, COMPARISON = "samples.jsonl", "grid.png", "compare.png"
_GRID_LIMIT = 64  # pictures in a grid
_MINIATURE_STEPS, _STEPS = 12, 50


@dataclass(frozen=True)
class Source:
    """A model to sample from: its base and what is loaded in place of, or on top of, the base's transformer."""

    base: str
    weights: Path | None = None

    @classmethod
    def find(cls, name: str, base: str) -> Source:
        """Read a name as a run folder, one of its checkpoints, tuned weights or a LoRA on ``base``, or a base model."""
        path = Path(name)
        if (path / CONFIG).is_file():
            return cls(_base_of(path), find_checkpoint(path).transformer)
        if (path / "transformer").is_dir() and (path / "state.json").is_file():
            return cls(_base_of(path.parent.parent), path / "transformer")
        if (path / "model_index.json").is_file():
            return cls(name)
        if path.is_file() or (path.is_dir() and any(path.glob("*.safetensors"))):
            return cls(base, path)
        if path.is_dir() or path.suffix == ".safetensors":
            raise UsageError(
                f"{name} is no run, checkpoint, pipeline, transformer or LoRA: name one of these, or a model"
            )
        return cls(name)

    def __str__(self) -> str:
        return f"{self.base}+{self.weights}" if self.weights else self.base


def _base_of(run: Path) -> str:
    if not (run / CONFIG).is_file():
        raise MissingError(f"{run} has no {CONFIG}, so the base of its checkpoint is unknown: name the run folder")
    return load_train_config(run / CONFIG).config.model.name


@dataclass(frozen=True)
class Request:
    """What to draw: every prompt with ``num_images`` seeds from ``seed`` up. None: the model's own."""

    prompts: Sequence[str]
    seed: int = 0
    num_images: int = 1
    steps: int | None = None
    guidance: float = 3.5
    size: tuple[int, int] | None = None

    def settings(self, model: Flux) -> tuple[int, tuple[int, int]]:
        """Steps and size, by the model's own where they were not given."""
        steps = self.steps or (_MINIATURE_STEPS if model.name == "miniature" else _STEPS)
        edge = model.vae.config.sample_size
        return steps, self.size or (edge, edge)


def sample(source: Source, request: Request, output: Path, batch_size: int = 8) -> Iterator[dict[str, Any]]:
    """Draw what is missing in ``output`` and yield a row for every picture, those that were there included.

    A picture's file name holds a digest of all that decides it, so a file that exists is the picture that was asked
    for. ``samples.jsonl`` lists the rows and ``grid.png`` shows the pictures.
    """
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    if source.base == "miniature":
        check_miniature_prompts(list(request.prompts))
    model = load_flux(source.base, torch.bfloat16, best_device(), source.weights)
    steps, size = request.settings(model)
    rows = [
        _row(source, prompt, request.seed + i, steps, request.guidance, size)
        for prompt in request.prompts
        for i in range(request.num_images)
    ]
    for part in chunks(len(rows), batch_size):
        wanted = [row for row in rows[part] if read_metadata(output / row["file"]) is None]
        if wanted:
            generators = [torch.Generator().manual_seed(row["seed"]) for row in wanted]
            prompts = [row["prompt"] for row in wanted]
            pictures = draw_pictures(model, prompts, generators, size, steps, request.guidance, batch_size)
            for picture, row in zip(pictures, wanted, strict=True):
                save_png(picture, output / row["file"], row)
        for row in rows[part]:
            yield {**row, "file": str(output / row["file"])}
    write_atomically(output / SAMPLES, "".join(json.dumps(row) + "\n" for row in rows))
    _grid(output, rows, request.num_images, size)


def compare(sources: dict[str, Source], request: Request, output: Path) -> Iterator[dict[str, Any]]:
    """Draw the same prompts and seeds from several models, each in a folder of its label, and all side by side."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for label, source in sources.items():
        rows[label] = []
        for row in sample(source, request, output / label):
            rows[label].append(row)
            yield {"label": label, **row}
    first = next(iter(rows.values()))
    size = tuple(first[0]["size"])
    pictures = [torch.stack([read_picture(Path(row["file"]), size) for row in r[:_GRID_LIMIT]]) for r in rows.values()]
    captions = [row["prompt"] for row in first[:_GRID_LIMIT]]
    save_grid(pictures, output / COMPARISON, list(rows), captions)


def _row(source: Source, prompt: str, seed: int, steps: int, guidance: float, size: tuple[int, int]) -> dict[str, Any]:
    row = {
        "prompt": prompt,
        "seed": seed,
        "model": source.base,
        "weights": str(source.weights.resolve()) if source.weights else None,
        "steps": steps,
        "guidance": guidance,
        "size": list(size),
    }
    digest = hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48]
    return {"file": f"{slug}-seed{seed}-{digest}.png", **row, "srpo": __version__}


def _grid(output: Path, rows: list[dict[str, Any]], columns: int, size: tuple[int, int]) -> None:
    """The first pictures on one sheet: a row for each prompt with its seeds, or one row where there is one seed."""
    shown = rows[:_GRID_LIMIT]
    pictures = torch.stack([read_picture(output / row["file"], size) for row in shown])
    if columns == 1:
        save_grid([pictures], output / GRID, captions=[row["prompt"] for row in shown])
    else:
        whole = len(shown) - len(shown) % columns
        grid_rows = pictures[:whole].split(columns) if whole else [pictures]
        labels = [row["prompt"] for row in shown[: whole or 1 : columns]]
        save_grid(grid_rows, output / GRID, labels, [f"seed {row['seed']}" for row in shown[:columns]])
