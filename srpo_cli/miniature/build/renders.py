"""Render the training set of the miniature once and keep it as bytes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing as mp
from torch import Tensor

from srpo_cli.miniature.world import Scenes, captions, draw_scenes, render


@dataclass(frozen=True)
class Renders:
    """Pictures (N, 3, 48, 48) uint8 with the scenes they show and one caption each."""

    images: Tensor
    scenes: Scenes
    texts: list[str]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def held_out(self) -> int:
        """How many pictures, the last ones, the classifiers are tested on and never trained on."""
        return min(1000, len(self) // 10)

    def batch(self, index: Tensor) -> Tensor:
        """Pictures at ``index``, (B, 3, 48, 48) float in [0, 1]."""
        return self.images[index].float() / 255


def _render_part(part: tuple[int, int]) -> tuple[Tensor, Scenes, list[str]]:
    seed, count = part
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(seed)
    scenes = draw_scenes(count, generator)
    return (render(scenes) * 255).round().byte(), scenes, captions(scenes, generator)


def load_renders(folder: Path, count: int, seed: int, workers: int, part: int = 1000) -> Renders:
    """Render ``count`` scenes (or read them back from ``folder``) in parts that do not depend on ``workers``."""
    path = folder / f"renders-{seed}-{count}.pt"
    if not path.exists():
        jobs = [(seed + i, min(part, count - i * part)) for i in range(-(-count // part))]
        if workers > 1:
            with mp.get_context("spawn").Pool(workers) as pool:
                parts = pool.map(_render_part, jobs, chunksize=1)
        else:
            parts = [_render_part(job) for job in jobs]
        scenes = {name: torch.cat([getattr(p[1], name) for p in parts]) for name in Scenes.__dataclass_fields__}
        texts = [text for p in parts for text in p[2]]
        unfinished = path.with_suffix(".tmp")
        torch.save({"images": torch.cat([p[0] for p in parts]), "scenes": scenes, "texts": texts}, unfinished)
        unfinished.replace(path)
    stored = torch.load(path, weights_only=True)
    return Renders(stored["images"], Scenes(**stored["scenes"]), stored["texts"])
