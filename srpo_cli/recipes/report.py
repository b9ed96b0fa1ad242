"""What a run shows of itself: figures on held-out prompts, and the same pictures before, during and after."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from srpo_cli.config.schema import TrainConfig
from srpo_cli.recipes.evaluate import Evaluation, Evaluator
from srpo_cli.recipes.parts import Parts, draw_pictures
from srpo_cli.recipes.pictures import Photographs, read_picture
from srpo_cli.runtime.folder import RunFolder
from srpo_cli.runtime.pictures import save_grid, save_png
from srpo_cli.runtime.seeding import generator

BASE, TUNED = "base.json", "tuned.json"
BEFORE_AFTER = "before_after.png"


class Report:
    """Measures and draws the model of a run as it is when asked, and writes what it finds into the run's folder.

    Args:
        parts: model and reward.
        config: what to draw, how, and how much of it.
        held_out: prompts that training never sees.
        folder: of the run.
    """

    def __init__(self, parts: Parts, config: TrainConfig, held_out: list[str], folder: RunFolder) -> None:
        self.parts, self.config, self.folder = parts, config, folder
        self.evaluator = Evaluator(parts, config, held_out[: config.evaluation.prompts])
        self._shown = held_out[: config.samples.count]

    def evaluate(self, name: str) -> Evaluation | None:
        """Measure the held-out prompts and write the figures to the file ``name``; None where there are none."""
        if not self.evaluator.prompts:
            return None
        with self._arithmetic():
            evaluation = self.evaluator.run()
        self.folder.write_json(name, evaluation.to_json())
        return evaluation

    def sample(self, step: int) -> None:
        """Draw the fixed prompts from their fixed noises: a folder of pictures and a grid, named after the step."""
        config = self.config
        if not self._shown:
            return
        noises = [generator(config.train.seed, "samples", i) for i in range(len(self._shown))]
        with self._arithmetic():
            pictures = draw_pictures(
                self.parts.model,
                self._shown,
                noises,
                config.model.size,
                config.sampling.steps,
                config.sampling.guidance,
                self.parts.pictures_at_a_time,
            )
        folder = self._samples_of(step)
        folder.mkdir(exist_ok=True)
        for i, (picture, prompt) in enumerate(zip(pictures, self._shown, strict=True)):
            metadata = {"prompt": prompt, "model": config.model.name, "step": step, "run": str(self.folder.path)}
            save_png(picture, folder / f"{i:02d}.png", metadata)
        save_grid([pictures], folder.with_suffix(".png"), captions=self._shown)

    def before_after(self, step: int) -> None:
        """One sheet with the fixed prompts before and after and, on the miniature, as the renderer's photographs."""
        size = self.config.model.size
        if not self._shown:
            return
        rows = [
            torch.stack([read_picture(path, size) for path in sorted(self._samples_of(at).glob("*.png"))])
            for at in (0, step)
        ]
        labels = ["base", "tuned"]
        if self.parts.knows_only_the_world:
            photographs = Photographs(self._shown, self.config.train.seed)
            pictures = torch.stack([photographs.picture(i, size) for i in range(len(self._shown))])
            rows.append(self.evaluator.round_trip(pictures))
            labels.append("photograph")
        save_grid(rows, self.folder.path / BEFORE_AFTER, labels, self._shown)

    def summary(self, tuned: Evaluation | None, **facts: Any) -> dict[str, Any]:
        """Base and tuned figures with ``facts`` about the run."""
        base = self.folder.path / BASE
        return {
            "base": json.loads(base.read_text()) if tuned and base.exists() else {},
            "tuned": tuned.to_json() if tuned else {},
            **facts,
            "seed": self.config.train.seed,
            "model": self.config.model.name,
            "evaluation_prompts": len(self.evaluator.prompts),
        }

    def _samples_of(self, step: int) -> Path:
        return self.folder.samples / f"step-{step:06d}"

    def _arithmetic(self) -> AbstractContextManager[object]:
        return self.parts.arithmetic()
