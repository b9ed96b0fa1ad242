"""A comparison is data: which methods, from which seeds, on what budget, tuned how, and measured by which benchmark.

The built-in ones are files beside this module, in ``comparisons/``; a user's own has the same keys.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, ValidationError, field_validator, model_validator

from srpo_cli.config import dialect
from srpo_cli.config.document import Keys, read_keys
from srpo_cli.config.load import MINIATURE, SECTIONS, Resolved, load_train_config
from srpo_cli.config.schema import Number, Section, Whole, Words
from srpo_cli.errors import UsageError

BASE = "base"
"""Label of the untrained model, which is in every table."""

Label = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""The name of a folder; without a dot, which stands between the parts of a trained model's name."""

_SETTLED = ("model.name", "train.seed", "train.steps", "guard.", "evaluation.", "samples.", "checkpoint.")
_RATE = "optimizer.lr"


class Tuning(Section):
    """How a method's learning rate is chosen: each is trained on the whole budget, from a seed that no table shows."""

    lr: tuple[Annotated[Number, Field(gt=0)], ...] = Field(min_length=2, description="learning rates to try, rising")
    by: Words = Field(
        description="what decides, measured on held-out prompts of the validation split: reward, sgp_gap, "
        "photo_distance or another figure of a run's tuned.json"
    )
    better: Literal["higher", "lower"] | None = Field(
        None, description="which side of it; null: the lower one of photo_distance, else the higher one"
    )

    def merit(self, figure: float) -> float:
        """A figure, turned round where the lower one is better."""
        better = self.better or ("lower" if self.by == "photo_distance" else "higher")
        return figure if better == "higher" else -figure

    def end(self, lr: float) -> Literal["lowest", "highest"] | None:
        """Which end of the ladder a rate is at, beyond which a better one may lie; None: at neither."""
        return {self.lr[0]: "lowest", self.lr[-1]: "highest"}.get(lr)

    @field_validator("lr")
    @classmethod
    def _rising(cls, lr: tuple[float, ...]) -> tuple[float, ...]:
        if list(lr) != sorted(set(lr)):
            raise ValueError("should rise, each rate once")
        return lr


class Method(Section):
    """A row of the table: a preset, and what is changed in it."""

    label: Label
    preset: Words | None = Field(None, description="NAME, NAME:VARIANT or a file, as `srpo train --preset` takes it")
    like: Label | None = Field(
        None, description="in place of preset: an earlier method, with its rate and steps, to vary"
    )
    set: dict[Words, Any] = Field({}, description="values by dotted key, as `srpo train --set` takes them")
    groups: tuple[Words, ...] = Field(("methods",), min_length=1, description="the tables that it stands in")
    tuning: Tuning | None = Field(None, description="null: the learning rate is the preset's")
    steps: Whole | None = Field(
        None, ge=1, description="of a run that nothing ends in time; null: as many as the budget pays for"
    )
    checkpoints: Whole = Field(
        1, ge=1, description="how often a run is measured, evenly over its steps; above 1 it gets a cost ratio"
    )
    note: str = Field("", description="where its settings come from")

    @model_validator(mode="after")
    def _one_origin(self) -> Method:
        if (self.preset is None) == (self.like is None):
            raise ValueError(f"method {self.label}: give either preset or like")
        if self.like and self.tuning:
            raise ValueError(f"method {self.label} has like and tuning: its rate is that of {self.like}")
        section = next((key for key in self.set if key in SECTIONS), None)
        if section:  # what is settled could hide below it
            raise ValueError(
                f"method {self.label} sets {section}, a section: give its keys by dotted name, each by itself"
            )
        settled = next((key for key in self.set if key.startswith(_SETTLED)), None)
        if settled:
            raise ValueError(f"method {self.label} sets {settled}, which the comparison settles: leave it out")
        if self.tuning and _RATE in self.set:
            raise ValueError(f"method {self.label} sets {_RATE}, which its tuning chooses: leave one of them out")
        return self

    @property
    def overrides(self) -> list[str]:
        """What ``set`` says, as ``--set`` takes it."""
        return [f"{key}={dialect.inline(value)}" for key, value in self.set.items()]


class Comparison(Section):
    """The protocol of a comparison. All methods have one model, one budget and the same seeds, prompts and noises."""

    name: Words
    description: Words = Field(description="one line")
    model: Words = Field(MINIATURE, description="as `srpo train --model` takes it")
    benchmark: Words = Field(MINIATURE, description="as `srpo eval --benchmark` takes it")
    prompts: Whole | None = Field(None, ge=2, description="measure on so many of its prompts only; null: all")
    budget: Whole = Field(
        ge=1,
        description="what a run may spend, in forwards of the transformer for one picture; a pass with a gradient "
        "counts three. It gives the number of steps; a target may end a run earlier",
    )
    seeds: tuple[Annotated[Whole, Field(ge=0)], ...] = Field(min_length=1, description="of the runs of each method")
    tuning_seed: Whole = Field(0, ge=0, description="of the runs that learning rates are chosen by")
    tuning_prompts: Whole = Field(64, ge=1, description="held-out prompts that they are measured on")
    columns: tuple[Words, ...] = Field(min_length=1, description="names of the benchmark's measures, in order")
    rate: Words | None = Field(None, description="the measure at which costs are compared; null: no cost ratios")
    levels: tuple[Number, ...] = Field((), description="values of rate at which costs are told; needed with rate")
    reference: Label | None = Field(None, description="the method that others are told apart from; needed with rate")
    methods: tuple[Method, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _methods_are_known(self) -> Comparison:
        earlier: dict[str, Method] = {}
        for method in self.methods:
            if method.label == BASE or method.label in earlier:
                raise ValueError(f"methods has {method.label} twice: {BASE} is the untrained model, others are yours")
            if method.like and (method.like not in earlier or earlier[method.like].like):
                raise ValueError(f"method {method.label} is like {method.like}: should be an earlier one with a preset")
            if method.like and _RATE in method.set and earlier[method.like].tuning:
                raise ValueError(
                    f"method {method.label} sets {_RATE}, which {method.like}'s tuning chooses: leave it out"
                )
            earlier[method.label] = method
        if (self.rate is None) != (not self.levels) or (self.rate and self.reference is None):
            raise ValueError(
                f"rate is {dialect.inline(self.rate)}: give rate, levels and reference together, or neither of the two"
            )
        if self.reference and self.reference not in earlier:
            raise ValueError(f"reference is {self.reference}: should be the label of a method")
        if self.rate and earlier[self.reference].checkpoints == 1:
            raise ValueError(f"reference is {self.reference}: should be a method with several checkpoints")
        return self

    @model_validator(mode="after")
    def _seeds_are_apart(self) -> Comparison:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds is {dialect.inline(list(self.seeds))}: should hold each seed once")
        if self.tuning_seed in self.seeds and any(method.tuning for method in self.methods):
            raise ValueError(f"tuning_seed is {self.tuning_seed}, which is in seeds: rates are chosen by another one")
        return self

    @property
    def groups(self) -> dict[str, list[str]]:
        """The labels in each table, in order."""
        names = dict.fromkeys(group for method in self.methods for group in method.groups)
        return {name: [method.label for method in self.methods if name in method.groups] for name in names}

    @property
    def rewards(self) -> list[str]:
        """The rewards that methods are trained on, each once."""
        known = (name for method in self.methods for name in self.resolve(method.label).config.rewards)
        return list(dict.fromkeys(known))

    def method(self, label: str) -> Method:
        """A method as it is trained: one that is ``like`` another has its preset, settings and steps below its own."""
        named = {method.label: method for method in self.methods}
        own = named[label]
        if own.like is None:
            return own
        below = named[own.like]
        settings = {"preset": below.preset, "set": {**below.set, **own.set}, "steps": own.steps or below.steps}
        return own.model_copy(update=settings)

    def rate_owner(self, label: str) -> str:
        """The method whose tuning decides this one's learning rate."""
        return next(method.like or label for method in self.methods if method.label == label)

    def resolve(self, label: str, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None) -> Resolved:
        """The training configuration of a method; UsageError that names it where it has a mistake."""
        method = self.method(label)
        try:
            return load_train_config(
                method.preset,
                overrides=[*method.overrides, *overrides],
                flags={"model.name": self.model, **(flags or {})},
                miniature=self.model == MINIATURE,
                overrides_from="its set",
            )
        except UsageError as error:
            raise UsageError(f"method {label} of comparison {self.name}: {error}") from error


COMPARISONS_FOLDER = Path(__file__).with_name("comparisons")
_KEYS = Keys(Comparison)


def comparison_names() -> list[str]:
    """The built-in comparisons."""
    return sorted(path.stem for path in COMPARISONS_FOLDER.glob("*.yaml"))


def load_comparison(name: str) -> Comparison:
    """A built-in comparison by name, or that of a ``.yaml`` file, each of its methods checked.

    UsageError for what is neither, or has a mistake.
    """
    is_file = Path(name).suffix.lower() in (".yaml", ".yml")
    if not is_file and name not in comparison_names():
        raise UsageError.unknown("comparison", name, [*comparison_names(), "a .yaml file"])
    path = Path(name) if is_file else COMPARISONS_FOLDER / f"{name}.yaml"
    origin = f"comparison {name}"
    content = read_keys(path, "comparison", origin, example="budget: 12000")
    _KEYS.refuse_unknown(content, origin)
    try:
        comparison = Comparison.model_validate(content)
    except ValidationError as error:
        raise UsageError(_KEYS.first_problem(error, content, origin)) from error
    for method in comparison.methods:
        comparison.resolve(method.label)
    return comparison
