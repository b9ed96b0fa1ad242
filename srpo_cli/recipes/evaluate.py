"""Measure a model on held-out prompts: the reward, the semantic gap and, on the miniature, the oracle's words."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from srpo_cli.config.schema import TrainConfig
from srpo_cli.metrics.intervals import Interval, mean_interval, share_interval
from srpo_cli.metrics.pictures import STATISTICS, picture_statistics
from srpo_cli.miniature.oracle import Oracle, Reference
from srpo_cli.miniature.world import LIGHTS, STYLE_WORDS, STYLES, parse
from srpo_cli.recipes.parts import Parts, chunks, draw_pictures
from srpo_cli.runtime.distributed import Ranks
from srpo_cli.runtime.seeding import generator

NOISE_SEED = 0
"""Evaluation starts from the same noises in every run, whatever its seed, so that runs can be compared in pairs."""

SUMMARY_KEYS = (
    "photo_distance",
    "photo_rate",
    "caption_accuracy",
    "shape_accuracy",
    "colour_accuracy",
    "ground_accuracy",
    "light_accuracy",
    "word_followed",
    "reward",
    "sgp_gap",
    "saturation",
    "grain",
)
"""Rows of the table and keys of ``summary.json``; the oracle's are there on the miniature only."""

_MINIATURE_BATCH = 32
_WINDOW = 64  # rollout pictures behind the live photo distance


@dataclass(frozen=True)
class Evaluation:
    """What was measured, by name, with 95 % intervals over prompts."""

    intervals: Mapping[str, Interval]

    def to_json(self) -> dict[str, dict[str, float]]:
        return {name: self.intervals[name]._asdict() for name in SUMMARY_KEYS if name in self.intervals}


class Evaluator:
    """Samples the same held-out prompts from the same noises and measures the pictures.

    Args:
        parts: model and reward; the model's weights may change between calls.
        config: sampling settings and control words.
        prompts: held-out prompts.
    """

    def __init__(self, parts: Parts, config: TrainConfig, prompts: list[str]) -> None:
        self.parts, self.config, self.prompts = parts, config, prompts
        self.oracle = Oracle.load() if parts.knows_only_the_world else None
        self._reference: Reference | None = None
        self.window = torch.zeros(0, len(STATISTICS))

    def run(self) -> Evaluation:
        """Draw one picture for each prompt and measure all of them."""
        config, sampling = self.config, self.config.sampling
        batch_size = _MINIATURE_BATCH if self.oracle else self.parts.pictures_at_a_time
        noises = [generator(NOISE_SEED, "evaluation", i) for i in range(len(self.prompts))]
        pictures = draw_pictures(
            self.parts.model,
            self.prompts,
            noises,
            config.model.size,
            sampling.steps,
            sampling.guidance,
            batch_size,
        )
        intervals = self._judge(pictures)
        reward, gap = self._reward_and_gap(pictures, batch_size)
        return Evaluation({**intervals, "reward": mean_interval(reward), "sgp_gap": mean_interval(gap)})

    def _judge(self, pictures: Tensor) -> dict[str, Interval]:
        if self.oracle:
            if self._reference is None:
                self._reference = self.oracle.reference(self._as_meant(self.prompts), self.round_trip, NOISE_SEED)
            shown = self._shows_word(self.oracle, pictures)
            followed = {} if shown is None else {"word_followed": share_interval(shown.float())}
            return {**self.oracle.judge(pictures, self._reference), **followed}
        statistics = picture_statistics(pictures)
        return {name: mean_interval(statistics[:, STATISTICS.index(name)]) for name in ("saturation", "grain")}

    def _as_meant(self, prompts: list[str]) -> list[str]:
        """What tuned pictures should show: a control word that is a light sets it where a prompt leaves it open."""
        word = self.config.control_words.positive[0].lower()
        if word not in LIGHTS:
            return prompts
        return [prompt if parse(prompt).light else f"{prompt}, {word}" for prompt in prompts]

    def _shows_word(self, oracle: Oracle, pictures: Tensor) -> Tensor | None:
        """Which pictures show the first positive control word, (N,); None for a word that the oracle cannot see."""
        word = self.config.control_words.positive[0].lower()
        if word in LIGHTS:
            return oracle.read(pictures)["light"] == LIGHTS.index(word)
        styles = [i for i, name in enumerate(STYLES) if word in STYLE_WORDS[name]]
        return oracle.read_style(pictures) == styles[0] if styles else None

    @torch.no_grad()
    def round_trip(self, pictures: Tensor) -> Tensor:
        """Pictures through the model's own autoencoder, as the oracle sees photographs, (N, 3, H, W) in [0, 1]."""
        model = self.parts.model
        return model.decode(model.encode(pictures), tuple(pictures.shape[-2:])).cpu()

    @torch.no_grad()
    def _reward_and_gap(self, pictures: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
        """Plain reward, and positive minus negative reward averaged over the lists of control words, each (N,)."""
        words = self.parts.algorithm.control_words
        rewards, gaps = [], []
        for part in chunks(len(pictures), batch_size):
            prompts = self.prompts[part]
            texts = [words.texts(word, prompts) for word in words.all]
            plain, *terms = self.parts.reward.scores(pictures[part].to(self.parts.reward.device), prompts, *texts)
            rewards.append(plain.float().cpu())
            gaps.append(words.gap(terms).float().cpu())
        return torch.cat(rewards), torch.cat(gaps)

    def live_distance(self, pictures: Tensor, prompts: list[str], ranks: Ranks) -> Tensor | None:
        """Photo distance of all ranks' last rollout pictures to the oracle's mean photographs, a scalar; None without
        an oracle."""
        if not self.oracle:
            return None
        rows = self.oracle.deviations(picture_statistics(pictures.cpu()), self._as_meant(prompts))
        rows = torch.cat(ranks.gather(rows))
        self.window = torch.cat([self.window.to(rows), rows])[-_WINDOW:]
        return self.window.mean(0).abs().mean()

    def state_dict(self) -> dict[str, list[list[float]]]:
        """What the live photo distance remembers."""
        return {"window": self.window.tolist()}

    def load_state_dict(self, state: Mapping[str, list[list[float]]]) -> None:
        self.window = torch.tensor(state["window"]).view(-1, len(STATISTICS))
