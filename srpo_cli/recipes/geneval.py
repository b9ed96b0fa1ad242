"""GenEval's question, put to Mask2Former and CLIP: does a picture show what its prompt asks for?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from srpo_cli.errors import SrpoError
from srpo_cli.metrics.aggregate import Measure
from srpo_cli.metrics.geneval import (
    COLOUR_TEMPLATES,
    COLOURS,
    COUNTING_THRESHOLD,
    THRESHOLD,
    Found,
    check_metadata,
    class_name,
    cut_out,
    mistakes,
    sort_objects,
)
from srpo_cli.recipes.judges import Announce, How, JudgePlan, Picture, headings_of
from srpo_cli.recipes.parts import load_reward
from srpo_cli.recipes.score import to_images
from srpo_cli.registry import GENEVAL_COLOURS
from srpo_cli.rewards.clip import ClipReward
from srpo_cli.rewards.detector import Detector, load_detector
from srpo_cli.rewards.vision import unit_vectors
from srpo_cli.runtime.benchmarks import Item

NOTE = "GenEval-compatible, not GenEval: transformers' Mask2Former in place of mmdet's"


class GenEvalJudge:
    """Whether each picture is correct by GenEval's rules, 0 or 1; a prompt's ``extra`` says what it asks for.

    Args:
        detector: finds objects.
        clip: names their colours.
    """

    name = "geneval"
    columns = ("geneval",)
    measures = (Measure("geneval", "GenEval", ("geneval",), note=NOTE),)

    def __init__(self, detector: Detector, clip: ClipReward) -> None:
        self.detector, self.clip = detector, clip
        self.record: dict[str, Any] = {
            "weights": f"{detector.weights}; {clip.weights}",
            "preprocess": clip.preprocess.mode,
            "unit": "share correct",
            "note": NOTE,
        }
        self._colours: dict[str, Tensor] = {}

    def __call__(self, pictures: Sequence[Picture]) -> dict[str, Tensor]:
        correct = [not self.mistakes(picture) for picture in pictures]
        return {"geneval": torch.tensor(correct, dtype=torch.float64)}

    def mistakes(self, picture: Picture) -> list[str]:
        """What is wrong with a picture, a line each."""
        wanted = picture.item.extra
        self._check_classes(wanted)
        counting = wanted.get("tag", picture.item.group) == "counting"
        threshold = COUNTING_THRESHOLD if counting else THRESHOLD
        found = self.detector(picture.pixels, threshold)
        objects = sort_objects(found.labels, found.scores, found.masks, threshold)
        return mistakes(wanted, objects, lambda some, name: self.colours(picture.pixels, some, name))

    @torch.no_grad()
    def colours(self, pixels: Tensor, objects: Sequence[Found], name: str) -> list[str]:
        """The colour of each of some objects of a class, by CLIP, from 8-bit pixels (H, W, 3)."""
        crops = [to_images(cut_out(pixels, found).to(self.clip.device)) for found in objects]
        likeness = self.clip.image_features(crops) @ self._colour_features(name).T
        return [COLOURS[number] for number in likeness.argmax(1).tolist()]

    def _colour_features(self, name: str) -> Tensor:
        """Unit features of a class in every colour, (colours, D): the mean over the templates."""
        if name not in self._colours:
            texts = [text.format(colour=colour, name=name) for colour in COLOURS for text in COLOUR_TEMPLATES]
            features = self.clip.text_features(texts).unflatten(0, (len(COLOURS), len(COLOUR_TEMPLATES)))
            self._colours[name] = unit_vectors(features.mean(1))
        return self._colours[name]

    def _check_classes(self, wanted: Mapping[str, Any]) -> None:
        """SrpoError for a class that could never be found."""
        known = {class_name(label) for label in self.detector.labels}
        for asked in (*wanted["include"], *wanted.get("exclude", [])):
            if asked["class"] not in known:
                raise SrpoError(f"geneval: the detector knows no {asked['class']!r}: ask for COCO's classes")


def check_items(items: Sequence[Item]) -> None:
    """UsageError for a prompt that does not say what its picture should show."""
    for item in items:
        check_metadata(item.extra, item.prompt)


def plan_geneval(metrics: tuple[str, ...], _reward: str, how: How) -> JudgePlan:
    """The judge of objects, numbers, colours and places."""

    def make(device: torch.device, announce: Announce | None) -> GenEvalJudge:
        detector = load_detector("mask2former", how.weights.get("mask2former"), device, announce)
        clip = load_reward(GENEVAL_COLOURS, how.weights.get(GENEVAL_COLOURS), device, how.dtype, announce)
        return GenEvalJudge(detector, clip)

    return JudgePlan(GenEvalJudge.name, metrics, make, headings_of(GenEvalJudge.measures), check=check_items)
