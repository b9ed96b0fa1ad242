"""The oracle plays the miniature's human raters, because it knows the world that the pictures come from.

Realism is never left to a learned judge, which an over-trained model fools: it is the two-sided distance of measured
picture statistics to the renderer's own photographs of the same prompts. A small classifier, which training never
sees, reads only *what* is in a picture: shape, colour, ground, light and style.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from srpo_cli.metrics.intervals import Interval, bootstrap, mean_interval, share_interval
from srpo_cli.metrics.pictures import STATISTICS, picture_statistics
from srpo_cli.miniature import WEIGHTS
from srpo_cli.miniature.world import (
    COLOURS,
    GROUNDS,
    LIGHTS,
    PHOTO,
    SHAPES,
    STYLES,
    draw_scenes_of,
    parse,
    render,
)

HEADS = {
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "ground": len(GROUNDS),
    "light": len(LIGHTS),
    "style": len(STYLES),
}
CONTENT = ("shape", "colour", "ground", "light")
PHOTOGRAPHS_PER_PROMPT = 2


class Classifier(nn.Module):
    """Reads shape, colour, ground, light and style from (B, 3, 48, 48) pictures; logits by head name."""

    def __init__(self, widths: tuple[int, ...] = (24, 48, 96, 128)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(before, width, 3, 2, 1), nn.GroupNorm(8, width), nn.SiLU()]
            layers += [nn.Conv2d(width, width, 3, 1, 1, groups=8), nn.GroupNorm(8, width), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleDict({name: nn.Linear(widths[-1] * 9, size) for name, size in HEADS.items()})

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        features = self.body(images * 2 - 1)
        return {name: head(features) for name, head in self.heads.items()}


@dataclass(frozen=True)
class Reference:
    """Photographs that one set of prompts is compared with: statistics (N * photographs, K) in prompt order."""

    prompts: list[str]
    statistics: Tensor


class Oracle:
    """Judges pictures of the miniature's world.

    ``cells`` (grounds, lights, K) are the mean statistics of photographs of each ground in each light, ``precision``
    (K, K) the inverse covariance around them, and ``radius`` the Mahalanobis distance that holds 90 % of them.
    """

    def __init__(self, classifier: Classifier, cells: Tensor, precision: Tensor, spread: Tensor, radius: float) -> None:
        self.classifier = classifier.eval().requires_grad_(False)
        self.cells, self.precision, self.spread, self.radius = cells, precision, spread, radius

    @classmethod
    def load(cls, weights: Path = WEIGHTS) -> Oracle:
        """Read the oracle of a folder of the miniature's weights."""
        state = load_file(weights / "oracle.safetensors")
        cells, precision, spread, radius = (state.pop(k).float() for k in ("cells", "precision", "spread", "radius"))
        classifier = Classifier()
        classifier.load_state_dict({name: value.float() for name, value in state.items()})
        return cls(classifier, cells, precision, spread, radius.item())

    def reference(self, prompts: list[str], round_trip: Callable[[Tensor], Tensor], seed: int) -> Reference:
        """Photograph every prompt's scene; ``round_trip`` sends pictures through the model's own autoencoder.

        What the autoencoder cannot draw is thereby not held against the model.
        """
        repeated = [prompt for prompt in prompts for _ in range(PHOTOGRAPHS_PER_PROMPT)]
        photographs = render(draw_scenes_of(repeated, PHOTO, seed))
        parts = [picture_statistics(round_trip(part)) for part in photographs.split(64)]
        return Reference(prompts, torch.cat(parts))

    def photo_distance(self, statistics: Tensor, reference: Reference) -> Interval:
        """Two-sided distance to the photographs, mean over statistics of |difference of means| / their spread.

        ``statistics`` (N, K) of one picture for each of the reference's prompts. 0 is a photograph. Chance only adds to
        an absolute value, so the interval of a distance near 0 lies to the right of it.
        """
        count = len(statistics)
        photographs = reference.statistics.view(count, PHOTOGRAPHS_PER_PROMPT, -1).mean(1)
        difference = (statistics - photographs) / self.spread
        return bootstrap(lambda index: difference[index].mean(1).abs().mean(1), count)

    def deviations(self, statistics: Tensor, prompts: list[str]) -> Tensor:
        """How far pictures lie from the mean photograph of their ground and light, in spreads, (N, K).

        The mean over pictures, its absolute value and the mean over statistics make a photo distance that needs no
        rendering.
        """
        return self._from_cells(statistics, prompts) / self.spread

    def _from_cells(self, statistics: Tensor, prompts: list[str]) -> Tensor:
        meanings = [parse(prompt) for prompt in prompts]
        by_light = self.cells.mean(0)  # for a prompt that leaves the ground open
        means = [by_light[m.light] if m.ground is None else self.cells[m.ground, m.light] for m in meanings]
        return statistics - torch.stack(means)

    def is_photo(self, statistics: Tensor, prompts: list[str]) -> Tensor:
        """Whether each picture lies in the region that holds 90 % of real photographs of its ground and light, (N,)."""
        difference = self._from_cells(statistics, prompts)
        return ((difference @ self.precision) * difference).sum(1).sqrt() <= self.radius

    def read(self, images: Tensor) -> dict[str, Tensor]:
        """What the classifier sees in (N, 3, 48, 48) pictures: index by head, each (N,)."""
        parts = [self.classifier(part) for part in images.split(128)]
        return {name: torch.cat([part[name].argmax(1) for part in parts]) for name in HEADS}

    def read_style(self, images: Tensor) -> Tensor:
        """Which of the named styles each of (N, 3, 48, 48) pictures shows best, an index into ``STYLES``, (N,).

        To tell whether a style word was followed. "" is no candidate: by construction unstyled pictures reach from
        CG renders almost to photographs, so that "" is always a fair guess and says nothing of the word.
        """
        logits = torch.cat([self.classifier(part)["style"] for part in images.split(128)])
        return logits[:, 1:].argmax(1) + 1

    def caption_hits(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Which of shape, colour, ground and light each picture shows as its prompt asks, (N, 4) of 0 or 1.

        A ground that the prompt leaves open counts as shown.
        """
        seen = self.read(images)
        rows = []
        for i, prompt in enumerate(prompts):
            meaning = parse(prompt)
            wanted = [getattr(meaning, name) for name in CONTENT]
            rows.append([float(w is None or int(seen[name][i]) == w) for name, w in zip(CONTENT, wanted, strict=True)])
        return torch.tensor(rows)

    def judge(self, images: Tensor, reference: Reference) -> dict[str, Interval]:
        """All of the oracle's words for one picture of each prompt, with 95 % intervals over prompts."""
        statistics = picture_statistics(images)
        hits = self.caption_hits(images, reference.prompts)
        parts = {f"{name}_accuracy": share_interval(hits[:, i]) for i, name in enumerate(CONTENT)}
        return {
            "photo_distance": self.photo_distance(statistics, reference),
            "photo_rate": share_interval(self.is_photo(statistics, reference.prompts).float()),
            "caption_accuracy": mean_interval(hits.mean(1)),
            **parts,
            "saturation": mean_interval(statistics[:, STATISTICS.index("saturation")]),
            "grain": mean_interval(statistics[:, STATISTICS.index("grain")]),
        }
