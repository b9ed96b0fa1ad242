"""The questions of a study, each with the rule by which it is answered."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

GRADES = ("Fail", "Pass", "Good", "Excellent")
SIDES = ("left", "tie", "right")

Mode = Literal["grades", "pairs"]

MODES: tuple[Mode, ...] = ("grades", "pairs")


class Dimension(BaseModel):
    """One question about a picture or a pair.

    Attributes:
        look_for: what the answer depends on, a line each.
        prompt: "hidden": the prompt must not be on the screen.
        grades: what each answer means, by its name, one of ``GRADES`` or ``SIDES``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    title: str
    question: str
    look_for: tuple[str, ...]
    grades: Mapping[str, str]
    prompt: Literal["shown", "hidden"] = "shown"


class Facts(BaseModel):
    """What ``study.json`` says of a study; which arms there are is in its private folder only.

    Attributes:
        k: raters of each prompt.
        repeats: share of a rater's tasks that are asked once more.
        prompts, pictures: how many are shown, without those of the training.
    """

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    name: str
    mode: Mode
    dimensions: tuple[Dimension, ...] = Field(min_length=1)
    seed: int
    raters: int
    experts: int
    k: int
    repeats: float
    prompts: int
    pictures: int
    created: str
    srpo: str

    @property
    def asked(self) -> tuple[Dimension, ...]:
        """The dimensions in the order of asking: those that hide the prompt come before it is seen."""
        return tuple(sorted(self.dimensions, key=lambda dimension: dimension.prompt == "shown"))


def answer_names(mode: Mode) -> tuple[str, ...]:
    """Names of the values that an answer can have, from 0 up."""
    return GRADES if mode == "grades" else SIDES


def load_rubric(mode: Mode) -> tuple[Dimension, ...]:
    """The paper's dimensions for grades, one question for pairs."""
    data: dict[str, list[Any]] = yaml.safe_load(Path(__file__).with_name("rubric.yaml").read_text(encoding="utf-8"))
    return tuple(Dimension.model_validate(entry) for entry in data[mode])
