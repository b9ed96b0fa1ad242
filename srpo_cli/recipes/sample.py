"""Sample: one picture for each prompt and seed, from a base model, a run, a checkpoint or a LoRA."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srpo_cli import __version__
from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.miniature.world import SIZE
from srpo_cli.models.flux import Flux, load_flux
from srpo_cli.models.flux_files import tuned_weights
from srpo_cli.recipes.parts import check_miniature_prompts, chunks, draw_pictures, fingerprint
from srpo_cli.recipes.pictures import read_picture
from srpo_cli.runtime.devices import best_device
from srpo_cli.runtime.distributed import ALONE, Ranks
from srpo_cli.runtime.fetch import fetch
from srpo_cli.runtime.folder import disk_errors, write_atomically
from srpo_cli.runtime.pictures import read_metadata, save_grid, save_png, thumbnail_size
from srpo_cli.runtime.quiet import quiet_libraries
from srpo_cli.runtime.sources import Source

SAMPLES, GRID, COMPARISON = "samples.jsonl", "grid.png", "compare.png"
_GRID_LIMIT = 64  # pictures in a grid
_MINIATURE_STEPS, _STEPS = 12, 50
_LARGEST_BATCH, _BATCH_PIXELS = 8, 2 * 1024**2


@dataclass(frozen=True)
class Request:
    """What to draw: every prompt with ``num_images`` seeds from ``seed`` up. None: the model's own.

    ``seeds`` are each prompt's own first seeds in place of ``seed``. ``lora_scale`` is how much of the model's LoRA is
    added, 1 as it was trained; a model without one has no scale.
    """

    prompts: Sequence[str]
    seed: int = 0
    num_images: int = 1
    steps: int | None = None
    guidance: float = 3.5
    size: tuple[int, int] | None = None
    seeds: Sequence[int] | None = None
    lora_scale: float | None = None

    def pictures(self) -> list[tuple[str, int]]:
        """Prompt and seed of every picture, those of a prompt together; what is asked for twice is one."""
        first = self.seeds or [self.seed] * len(self.prompts)
        starts = product(zip(self.prompts, first, strict=True), range(self.num_images))
        return list(dict.fromkeys((prompt, seed + number) for (prompt, seed), number in starts))

    def settings(self, model: Flux) -> tuple[int, tuple[int, int]]:
        """Steps and size, by the model's own where they were not given."""
        steps = self.steps or (_MINIATURE_STEPS if model.name == "miniature" else _STEPS)
        edge = model.vae.config.sample_size
        return steps, self.size or (edge, edge)

    def scale_of(self, model: Flux) -> float | None:
        """The scale of the model's LoRA; None where it has none."""
        if not model.has_lora:
            return None
        return 1.0 if self.lora_scale is None else float(self.lora_scale)


@dataclass(frozen=True)
class _Loaded:
    """A model, what it was read from, and the digest of its weights."""

    source: Source
    model: Flux
    fingerprint: str


def sample(
    source: Source,
    request: Request,
    output: Path,
    ranks: Ranks = ALONE,
    announce: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Draw what is missing in ``output`` and yield a row for every picture, those that were there included.

    A picture's file name holds a digest of all that decides it, the model's weights among it, so a file that exists
    is the picture that was asked for. ``samples.jsonl`` lists all pictures that were ever made in the folder,
    ``grid.png`` shows the first of those that were asked for now. Several ranks draw a batch each at a time, into one
    folder; all of them yield all rows. ``announce`` is told about downloads before they start; None: nothing is
    downloaded.
    """
    loaded = _load(source, request, output, ranks, announce)
    yield from _draw_all(loaded, request, output, ranks)


def _load(
    source: Source, request: Request, output: Path, ranks: Ranks, announce: Callable[[str], None] | None
) -> _Loaded:
    """Load a model that can draw what is asked for, the same on all ranks, once ``output`` can be written to."""
    with ranks.together():
        if source.base == "miniature":
            check_miniature_prompts(list(request.prompts))
            if request.size not in (None, (SIZE, SIZE)):  # it can, but it repeats its picture like a tile
                named = "x".join(map(str, request.size))
                raise UsageError(f"size {named}: the miniature draws {SIZE}x{SIZE} and no other")
        if request.lora_scale is not None:
            _check_lora(source, request.lora_scale)
        quiet_libraries()  # an error of one line would otherwise come after the progress bars of loading
        download = None if announce is None else partial(fetch, announce=announce)
        with _folder(output):
            model = load_flux(source.base, torch.bfloat16, best_device(), source.tuned, download=download)
            steps, size = request.settings(model)
            model.sigmas(steps, size)  # refuses a size that the model cannot make
    digest = _fingerprint(model)
    with ranks.together():
        if digest != ranks.from_rank_0(digest):
            raise UsageError(f"the weights of {source.base} are not those of rank 0: give all machines the same files")
    return _Loaded(source, model, digest)


def _check_lora(source: Source, scale: float) -> None:
    """Refuse to scale the LoRA of a model that has none, before it is loaded."""
    if tuned_weights(source.base, source.tuned).lora is None:
        raise UsageError(
            f"lora scale {scale:g}: {source.weights or source.base} has no LoRA to scale: name one, or a run that "
            "trained one (srpo export RUN --format extract makes one of any other run)"
        )


def _draw_all(loaded: _Loaded, request: Request, output: Path, ranks: Ranks) -> Iterator[dict[str, Any]]:
    """Draw what is missing in ``output``, yield all rows, then list them and show them on a grid."""
    model = loaded.model
    with ranks.together(), disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    scale = request.scale_of(model)
    if scale is not None:
        model.scale_lora(scale)
    rows = ranks.from_rank_0(_rows(loaded, request))
    _, size = request.settings(model)
    parts = list(chunks(len(rows), _batch_size(size)))
    for first in range(0, len(parts), ranks.size):
        together = parts[first : first + ranks.size]
        with ranks.together():
            for part in together[ranks.rank : ranks.rank + 1]:
                _draw(model, rows[part], request, output)
        for part in together:
            for row in rows[part]:
                yield {**row, "file": str(output / row["file"])}
    if not ranks.leads:
        return
    earlier = [row for row in _read_rows(output / SAMPLES) if (output / row["file"]).is_file()]
    listed = {row["file"]: row for row in [*earlier, *rows]}
    write_atomically(output / SAMPLES, "".join(json.dumps(row) + "\n" for row in listed.values()))
    _grid(output, rows, request.num_images, size)


def _draw(model: Flux, rows: Sequence[dict[str, Any]], request: Request, output: Path) -> None:
    """Draw a batch, but for the pictures that are there already."""
    wanted = [row for row in rows if read_metadata(output / row["file"]) is None]
    if not wanted:
        return
    steps, size = request.settings(model)
    generators = [torch.Generator().manual_seed(row["seed"]) for row in wanted]
    prompts = [row["prompt"] for row in wanted]
    pictures = draw_pictures(model, prompts, generators, size, steps, request.guidance, len(wanted))
    for picture, row in zip(pictures, wanted, strict=True):
        save_png(picture, output / row["file"], row)


@contextmanager
def _folder(output: Path) -> Iterator[None]:
    """A folder to draw into, known to be writable before models are loaded; what then fails leaves no empty one."""
    new = not output.exists()
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except SrpoError:
        if new:
            with suppress(OSError):  # another rank has put something there
                output.rmdir()
        raise


def compare(
    sources: dict[str, Source],
    request: Request,
    output: Path,
    ranks: Ranks = ALONE,
    announce: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Draw the same prompts and seeds from several models, each in a folder of its label, and all side by side."""
    drawn = {label: sample(source, request, output / label, ranks, announce) for label, source in sources.items()}
    yield from _side_by_side(drawn, request, output, ranks)


def compare_scales(
    source: Source,
    scales: Sequence[float],
    request: Request,
    output: Path,
    ranks: Ranks = ALONE,
    announce: Callable[[str], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Draw the same prompts and seeds at several scales of a model's LoRA, as :func:`compare` does several models.

    Their labels are ``scale-0``, ``scale-0.5`` ...; the model is loaded once.
    """
    scaled = {f"scale-{float(scale)}".removesuffix(".0"): replace(request, lora_scale=scale) for scale in scales}
    loaded = _load(source, next(iter(scaled.values())), output, ranks, announce)
    drawn = {label: _draw_all(loaded, wanted, output / label, ranks) for label, wanted in scaled.items()}
    yield from _side_by_side(drawn, request, output, ranks)


def _side_by_side(
    drawn: Mapping[str, Iterator[dict[str, Any]]], request: Request, output: Path, ranks: Ranks
) -> Iterator[dict[str, Any]]:
    """Draw one label after the other, yield its rows with it, then show all on one sheet, a row for each label."""
    rows: dict[str, list[dict[str, Any]]] = {}
    for label, drawing in drawn.items():
        rows[label] = []
        for row in drawing:
            rows[label].append(row)
            yield {"label": label, **row}
    if not ranks.leads:
        return
    shown = {label: drawn[:_GRID_LIMIT] for label, drawn in rows.items()}
    first = next(iter(shown.values()))
    size = tuple(first[0]["size"])
    pictures = [_read_all([Path(row["file"]) for row in drawn], size) for drawn in shown.values()]
    many = request.num_images > 1
    captions = [f"{row['prompt']} (seed {row['seed']})" if many else row["prompt"] for row in first]
    save_grid(pictures, output / COMPARISON, list(shown), captions)


def _batch_size(size: tuple[int, int]) -> int:
    """Pictures drawn at a time: as many as are of use to the device, few enough for its memory."""
    return max(1, min(_LARGEST_BATCH, _BATCH_PIXELS // (size[0] * size[1])))


def _fingerprint(model: Flux) -> str:
    """Digest of the whole model, a LoRA included: a run may have been trained again, the miniature rebuilt."""
    parts = (model.transformer, model.vae, model.text_encoder, model.text_encoder_2)
    return fingerprint(parameter for part in parts for parameter in part.parameters())


def _rows(loaded: _Loaded, request: Request) -> list[dict[str, Any]]:
    """What is known of each picture before it is drawn."""
    source, fingerprint = loaded.source, loaded.fingerprint
    steps, size = request.settings(loaded.model)
    scale = request.scale_of(loaded.model)
    scaled = [] if scale in (None, 1) else [scale]  # at 1 a picture is what it was before there were scales
    rows = []
    for prompt, seed in request.pictures():
        decides = [fingerprint, prompt, seed, steps, request.guidance, list(size), *scaled]
        digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()[:8]
        slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48] or "picture"
        rows.append(
            {
                "file": f"{slug}-seed{seed}-{digest}.png",
                "prompt": prompt,
                "seed": seed,
                "model": source.base,
                "weights": str(source.weights.resolve()) if source.weights else None,
                "fingerprint": fingerprint,
                "lora_scale": scale,
                "steps": steps,
                "guidance": request.guidance,
                "size": list(size),
                "srpo": __version__,
            }
        )
    return rows


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier ``samples.jsonl``; lines that are none are left out."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("file"), str):
            rows.append(row)
    return rows


def _read_all(files: Sequence[Path], size: tuple[int, int]) -> Tensor:
    """Pictures for a sheet, (N, 3, H, W): as they are, but no larger than a sheet shows them."""
    shown = min(size, thumbnail_size(size))
    return torch.stack([read_picture(file, shown) for file in files])


def _grid(output: Path, rows: list[dict[str, Any]], seeds: int, size: tuple[int, int]) -> None:
    """The first pictures on one sheet: a row for each prompt with its seeds, or one row where there is one seed."""
    shown = rows[:_GRID_LIMIT]
    whole = len(shown) - len(shown) % seeds or len(shown)
    shown = shown[:whole]
    pictures = _read_all([output / row["file"] for row in shown], size)
    if seeds == 1:
        save_grid([pictures], output / GRID, captions=[row["prompt"] for row in shown])
    else:
        captions = [f"seed {row['seed']}" for row in shown[:seeds]]
        save_grid(pictures.split(seeds), output / GRID, [row["prompt"] for row in shown[::seeds]], captions)
