"""The configuration of a training run: every field typed, documented with unit and range, and checked.

The models are frozen and refuse unknown keys. Fields without a default must come from a preset. A check that
needs two fields names both dotted keys in its message, because that message is all that the user sees.
"""

from __future__ import annotations

from math import floor
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    field_validator,
    model_validator,
)

LATENT_MULTIPLE = 8
"""Every family here needs picture edges divisible by at least this many pixels; a family may need more."""


def _refuse_bool(value: Any) -> Any:
    """Keep YAML's true and false from passing as 1 and 0."""
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


Number = Annotated[float, BeforeValidator(_refuse_bool)]
"""A finite float; text such as "1e-5" is read as a number."""

Whole = Annotated[int, Field(strict=True)]
"""An integer; neither text nor a float nor a bool passes for one."""

Curve = tuple[Number, Number]
"""Values of a straight line over sigma at the window's low and high end."""

Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
"""Text with something in it."""

Auto = Literal["auto"]
"""Leaves a choice to the memory plan, which says what it came to; see `srpo train --dry-run`."""


class Section(BaseModel):
    """Base of every part of the configuration: immutable, closed to unknown keys, finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Section):
    """The text-to-image model that is aligned."""

    name: Words = Field(description="flux.1-dev, miniature, a folder in diffusers layout or a Hugging Face repository")
    size: tuple[Whole, Whole] = Field((720, 720), description="[height, width] of rollouts in pixels, multiples of 8")
    dtype: Literal["float32", "bfloat16"] = Field(
        "bfloat16",
        description="arithmetic of the model; trained weights keep a float32 master in either case",
    )
    weights: Path | None = Field(
        None,
        description="tuned transformer (folder or single file) or LoRA file that is put into the model; null: the "
        "model as it is",
    )
    attention: Words = Field(
        "auto", description="attention backend by diffusers' name; auto: the fastest one that is installed here"
    )
    compile: Auto | bool = Field(
        "auto", description="compile the transformer's repeated blocks; auto: on accelerators that can, never on a CPU"
    )

    @field_validator("size")
    @classmethod
    def _whole_latents(cls, size: tuple[int, int]) -> tuple[int, int]:
        if any(edge < LATENT_MULTIPLE or edge % LATENT_MULTIPLE for edge in size):
            raise ValueError(f"both edges should be positive multiples of {LATENT_MULTIPLE}")
        return size


RewardFile = Annotated[
    Path | None, Field(description="file of the reward's weights; null: the place that its name means")
]
TrainingMode = Annotated[
    Words | None,
    Field(description="one of the reward's preprocessings that has a gradient; null: its own for training"),
]


class RewardPart(Section):
    """One reward of a weighted sum; a number alone stands for its ``weight``."""

    weight: Number = Field(1.0, description="factor of its rewards in the sum, negative to train against it")
    weights: RewardFile = None
    preprocess: TrainingMode = None

    @model_validator(mode="before")
    @classmethod
    def _from_a_number(cls, value: Any) -> Any:
        return value if isinstance(value, dict | cls) else {"weight": value}


class RewardConfig(Section):
    """The reward that is optimised, alone or in a weighted sum, and what is done to a picture before it is judged."""

    name: Words = Field(description="a built-in reward (`srpo score --help` lists them), a plug-in, or its Python file")
    weights: RewardFile = None
    preprocess: TrainingMode = None
    weight: Number = Field(1.0, description="factor of the named reward in what is optimised")
    others: dict[Words, RewardPart] = Field(
        default_factory=dict,
        description="rewards that are added to the named one, {NAME: WEIGHT} or {NAME: {weight: , weights: , "
        "preprocess: }}; in any order",
    )
    pair: Literal["words", "picture"] = Field(
        "words",
        description="what a relative method compares: one picture under two words, or, for a reward that reads no "
        "text, a picture with a slightly noised copy of it; under words such a reward cancels out",
    )
    pair_noise: Number = Field(
        0.05, gt=0, le=1, description="standard deviation of the copy's pixel noise, pictures being in [0, 1]"
    )
    shift: Whole = Field(0, ge=0, description="random translation before the reward, at most this many pixels")
    noise: Number = Field(
        0.0,
        ge=0,
        le=1,
        description="standard deviation of pixel noise before the reward, pictures being in [0, 1]",
    )

    @field_validator("others")
    @classmethod
    def _in_one_order(cls, others: dict[str, RewardPart]) -> dict[str, RewardPart]:
        """Sorted by name: the last bits of a sum depend on its order, and a run's ``config.yaml`` is sorted too."""
        return dict(sorted(others.items()))

    @model_validator(mode="after")
    def _parts_make_a_sum(self) -> RewardConfig:
        if self.name in self.others:
            raise ValueError(
                f"reward.others names {self.name}, as reward.name does: give it one weight, with reward.weight"
            )
        if not any(part.weight for part in self.parts.values()):
            raise ValueError(
                "reward.weight is 0, and so is every weight in reward.others: nothing would be optimised; "
                "give one of them another value"
            )
        return self

    @property
    def parts(self) -> dict[str, RewardPart]:
        """All rewards of the sum by name, the named one first."""
        own = RewardPart(weight=self.weight, weights=self.weights, preprocess=self.preprocess)
        return {self.name: own, **self.others}


class ControlWords(Section):
    """The words whose difference in reward is the training signal; the model itself sees the plain prompt."""

    positive: tuple[Words, ...] = Field(min_length=1, description="words to move towards, taken in turn, at least one")
    negative: tuple[Words, ...] = Field(
        min_length=1, description="words to move away from, taken in turn, at least one"
    )
    template: str = Field(
        "{word}. {prompt}", description="text given to the reward, with {word} and {prompt} once each"
    )

    @field_validator("template")
    @classmethod
    def _both_fields_once(cls, template: str) -> str:
        try:
            fields = sorted(name for _, name, _, _ in Formatter().parse(template) if name is not None)
        except ValueError:
            fields = []
        if fields != ["prompt", "word"]:
            raise ValueError("should hold {word} once, {prompt} once and no other braces")
        return template


class PromptsConfig(Section):
    """Where training prompts come from."""

    source: Words = Field(
        "hpdv2", description="hpdv2, miniature, miniature-unlit (prompts that name no light), a file, or - for stdin"
    )
    limit: Whole | None = Field(None, ge=1, description="use only this many prompts from the start; null: all")
    cache: Auto | Path | None = Field(
        "auto",
        union_mode="left_to_right",
        description="folder of encoded prompts; auto: the user's cache, none for the miniature; null: keep the text "
        "encoders loaded",
    )


class RolloutConfig(Section):
    """How the clean latents x_0 that gradients are taken at are made."""

    source: Literal["model", "pictures"] = Field(
        "model", description="sample x_0 from the model, or encode it from real pictures"
    )
    pictures: Path | None = Field(None, description="file that lists pictures and captions, for source pictures")
    steps: Whole = Field(25, ge=1, description="Euler steps of a rollout")
    guidance: Number = Field(1.0, ge=0, description="guidance scale of a rollout")
    shift: Number | None = Field(None, gt=0, description="shift of the rollout's sigmas; null: the model's own")
    shared_noise: bool = Field(
        True,
        description="all rollouts of a step, in every process and within its batch, start from the same noise; "
        "false: each from its own",
    )
    replay: Whole = Field(
        0,
        ge=0,
        description="steps after each that train on its rollouts again, with new noise levels; changes what is "
        "trained on",
    )
    dtype: Literal["model", "float8"] = Field(
        "model",
        description="arithmetic of the rollout's linear layers; float8 changes what is trained on, and a CPU only "
        "imitates it",
    )

    @model_validator(mode="after")
    def _pictures_have_a_list(self) -> RolloutConfig:
        if (self.source == "pictures") != (self.pictures is not None):
            raise ValueError(
                f"rollout.source is {self.source} and rollout.pictures is {self.pictures or 'null'}: "
                "source pictures needs a file, source model takes none"
            )
        return self


class ReferenceSchedule(Section):
    """The index form of the window that the method's published code uses (schedule ``reference``).

    The rollout-like grid of ``schedule_steps`` shifted steps gives the window's ends, a linear grid of
    ``timestep_length`` points fills it, and the model is trusted for ``1 - groundtruth_ratio`` of those
    points.
    """

    train_timestep: tuple[Whole, Whole] = Field(
        (5, 25), description="[first, last] index of the window in the shifted schedule, 0 being pure noise"
    )
    schedule_steps: Whole = Field(50, ge=2, description="steps of the shifted schedule that the indices refer to")
    timestep_length: Whole = Field(1000, ge=2, description="points of the linear grid inside the window")
    groundtruth_ratio: Number = Field(
        0.9, gt=0, lt=1, description="share of the window that is bridged with the known noise, in (0, 1)"
    )
    shift: Number = Field(3.0, gt=0, description="shift of the schedule's sigmas")
    discount_pos: Curve = Field(
        (0.1, 0.25), description="k of the denoise branch's (1 + k) C_positive - C_negative, [late, early]"
    )
    discount_inv: Curve = Field(
        (0.3, 0.01), description="k of the invert branch's (1 + k) C_negative - C_positive, [late, early]"
    )
    minimum_timestep: Whole = Field(5, ge=1, description="grid points at either end that are never drawn")

    @model_validator(mode="after")
    def _indices_lie_inside(self) -> ReferenceSchedule:
        key = "algorithm.reference"
        first, last = self.train_timestep
        if not 0 <= first < last < self.schedule_steps:
            raise ValueError(
                f"{key}.train_timestep is [{first}, {last}]: should be [first, last] with 0 <= first < last "
                f"< {key}.schedule_steps, which is {self.schedule_steps}"
            )
        if 2 * self.minimum_timestep >= self.timestep_length:
            raise ValueError(
                f"{key}.minimum_timestep is {self.minimum_timestep}: should be less than half of "
                f"{key}.timestep_length, which is {self.timestep_length}"
            )
        return self


class ReflConfig(Section):
    """ReFL: the model is called once, late in the sampling, and its one-step prediction is judged."""

    steps_left: tuple[Whole, Whole] = Field(
        (1, 10), description="fewest and most sampler steps that are left when the model is called; 1 is the last step"
    )

    @field_validator("steps_left")
    @classmethod
    def _rising_from_the_last(cls, steps_left: tuple[int, int]) -> tuple[int, int]:
        if not 1 <= steps_left[0] <= steps_left[1]:
            raise ValueError("should be [fewest, most] with 1 <= fewest <= most: [1, 10] for the last ten steps")
        return steps_left


class DraftConfig(Section):
    """DRaFT: the gradient goes through the sampler's last steps, or through the last one from several noises."""

    last_steps: Whole = Field(1, ge=1, description="DRaFT-K: last sampler steps that keep their gradient")
    noises: Whole = Field(
        0, ge=0, description="DRaFT-LV: times that a picture is noised again to the last step's level; 0: DRaFT-K"
    )
    include_last: bool = Field(False, description="DRaFT-LV: count the sampler's own last step as one more")

    @model_validator(mode="after")
    def _one_of_the_two(self) -> DraftConfig:
        key = "algorithm.draft"
        if self.noises and self.last_steps > 1:
            raise ValueError(
                f"{key}.noises is {self.noises} and {key}.last_steps is {self.last_steps}: DRaFT-LV noises to the last "
                f"step alone; set {key}.last_steps=1, or {key}.noises=0 for DRaFT-K"
            )
        if self.include_last and not self.noises:
            raise ValueError(
                f"{key}.include_last is true and {key}.noises is 0: without noises the last step is all there is; set "
                f"{key}.noises=2, or leave it out"
            )
        return self


class AlignPropConfig(Section):
    """AlignProp: the gradient goes through the whole sampler, truncated at random."""

    truncation: tuple[Whole, Whole] | None = Field(
        None,
        description="[low, high] of K, drawn for every step; step i keeps its gradient if i >= K; null: [0, "
        "rollout.steps], the original's",
    )

    @field_validator("truncation")
    @classmethod
    def _rising(cls, truncation: tuple[int, int] | None) -> tuple[int, int] | None:
        if truncation and not 0 <= truncation[0] <= truncation[1]:
            raise ValueError("should be [low, high] with 0 <= low <= high: [0, 0] keeps every step")
        return truncation


class GrpoConfig(Section):
    """DanceGRPO and Flow-GRPO; where a value is null it is the one that the method was published with."""

    group: Whole = Field(12, ge=2, description="pictures of one prompt, from one noise, that are compared")
    noise_level: Number | None = Field(
        None, description="of the SDE, above 0; null: eta 0.3 in dance-grpo, a 0.7 in flow-grpo"
    )
    fraction: Number | None = Field(
        None, gt=0, le=1, description="share of the sampler's steps but the last that train; null: 0.6 and 1"
    )
    order: Literal["random", "first"] | None = Field(
        None, description="which steps these are; null: random in dance-grpo, first in flow-grpo"
    )
    over: Literal["group", "batch"] | None = Field(
        None, description="what an advantage's standard deviation is of; null: group in dance-grpo, batch in flow-grpo"
    )
    mix: Literal["advantages", "rewards"] | None = Field(
        None,
        description="what is added, by their weights, where reward.others names several rewards: their advantages, so "
        "that none outweighs another by its scale, or they themselves; null: advantages in dance-grpo, rewards in "
        "flow-grpo",
    )
    clip: Number = Field(1e-4, gt=0, description="the ratio counts within 1 - clip and 1 + clip")
    advantage_clip: Number = Field(5.0, gt=0, description="largest advantage, in standard deviations")
    kl: Number = Field(
        0.0, ge=0, description="weight of the divergence from the untrained model; needs train.mode lora"
    )

    @field_validator("noise_level")
    @classmethod
    def _some_noise(cls, noise_level: float | None) -> float | None:
        if noise_level is not None and noise_level <= 0:
            raise ValueError(
                "should be above 0: steps without noise have no probability to learn from; published are 0.3 for "
                "dance-grpo and 0.7 to 0.9 for flow-grpo, and refl, draft and srpo need none"
            )
        return noise_level


METHODS = ("srpo", "direct-align", "refl", "draft", "alignprop", "dance-grpo", "flow-grpo")
"""What ``algorithm.name`` may be."""

POLICY_METHODS = ("dance-grpo", "flow-grpo")
"""Methods that need no gradient of the reward."""

_PUBLISHED = {
    "dance-grpo": {"noise_level": 0.3, "fraction": 0.6, "order": "random", "over": "group", "mix": "advantages"},
    "flow-grpo": {"noise_level": 0.7, "fraction": 1.0, "order": "first", "over": "batch", "mix": "rewards"},
}

PATH_METHODS = ("refl", "draft", "alignprop", *POLICY_METHODS)
"""Methods that go back along the sampler's own path."""


class AlgorithmConfig(Section):
    """The method, and for SRPO and Direct-Align where noise is injected, how far one model step goes, what counts.

    With schedule ``sigma`` the two branches of a pair remove the known noise at one sigma: denoise calls the
    model ``delta_sigma`` above it, invert ``delta_sigma`` below it. Every call stays inside ``window``, which
    therefore is at least two steps wide, and neither branch comes near pure noise, where the step's gain
    delta_sigma / (1 - sigma) has no bound. With schedule ``reference`` the keys of ``reference`` say all of
    this in the published code's index form instead.
    """

    name: Words = Field("srpo", description=", ".join(METHODS))
    relative: bool = Field(
        False,
        description="train the positive word's reward minus the negative's in place of the plain one; srpo always does",
    )
    schedule: Literal["sigma", "reference"] = Field(
        "sigma", description="window and weights over sigma, or the published code's index form"
    )
    window: tuple[Number, Number] = Field(
        (0.75, 0.96),
        description="[sigma_low, sigma_high] that every call of the model stays inside, both in (0, 1)",
    )
    delta_sigma: Number = Field(
        0.02,
        gt=0,
        lt=1,
        description="length of the model's one step, in sigma, at most half of the window's width",
    )
    branches: tuple[Literal["denoise", "invert"], ...] = Field(
        ("denoise", "invert"), min_length=1, description="branches of one gradient pair, each at most once"
    )
    semantic_weight: Curve = Field(
        (1.0, 1.0), description="weight of C_positive - C_negative at [sigma_low, sigma_high]"
    )
    common_weight: Curve = Field(
        (0.0, 0.0),
        description="weight of the plain prompt's reward at [sigma_low, sigma_high], negative to penalise it",
    )
    pairs: Whole = Field(1, ge=1, description="gradient pairs taken from one rollout")
    update: Literal["pair", "rollout"] = Field(
        "pair", description="optimizer step after every pair, or once for all pairs of a rollout"
    )
    guidance: Number = Field(3.5, ge=0, description="guidance scale of the training forward")
    hinge: Number | None = Field(None, description="loss is relu(hinge - reward), as upstream; null: minus the reward")
    target: Literal["auto"] | Number | None = Field(
        None,
        description="gap C_positive - C_negative to settle at; auto: measured first; null: no target",
    )
    at_target: Literal["stop", "hold"] = Field(
        "stop", description="where a target is met: end the run, or go on to its last step and be held there"
    )
    target_reach: Number = Field(
        1.35,
        gt=0,
        description="target auto, as a multiple of the way from the base's gap to its prompted gap",
    )
    captions: Literal["auto", "hold", "free"] = Field(
        "auto",
        description="hold: bring pictures back that fit their prompts worse than the prompted base's on the way to "
        "the target; free: let them; auto: hold where the target is held, but by dance-grpo and flow-grpo",
    )
    reference: ReferenceSchedule = Field(default_factory=ReferenceSchedule, description="keys of schedule reference")
    refl: ReflConfig = Field(default_factory=ReflConfig, description="keys of method refl")
    draft: DraftConfig = Field(default_factory=DraftConfig, description="keys of method draft")
    alignprop: AlignPropConfig = Field(default_factory=AlignPropConfig, description="keys of method alignprop")
    grpo: GrpoConfig = Field(default_factory=GrpoConfig, description="keys of methods dance-grpo and flow-grpo")

    @property
    def compares_words(self) -> bool:
        """Whether what is trained is the difference between two words' rewards."""
        return self.relative or self.name == "srpo"

    @property
    def target_asks(self) -> bool:
        """Whether the target is set by pictures of the untrained model that it is asked for the positive word for."""
        return self.target == "auto" or self.holds_captions

    @property
    def holds_captions(self) -> bool:
        """Whether pictures are held to their prompts on the way to the target."""
        if self.captions == "auto":
            return self.at_target == "hold" and self.name not in POLICY_METHODS
        return self.captions == "hold"

    @property
    def group(self) -> int:
        """Rollouts of one prompt in a row."""
        return self.grpo.group if self.name in POLICY_METHODS else 1

    @property
    def policy(self) -> GrpoConfig:
        """The keys of a policy method, null ones as it was published."""
        null = {key: value for key, value in _PUBLISHED[self.name].items() if getattr(self.grpo, key) is None}
        return self.grpo.model_copy(update=null)

    def policy_steps(self, steps: int) -> int:
        """Of a sampler's ``steps``, how many a policy method trains of each rollout: as its draws count them."""
        return max(1, floor(self.policy.fraction * (steps - 1) + 1e-9))

    @field_validator("window")
    @classmethod
    def _window_inside_the_unit_interval(cls, window: tuple[float, float]) -> tuple[float, float]:
        low, high = window
        if not 0 < low < high < 1:
            raise ValueError("should be [sigma_low, sigma_high] with 0 < sigma_low < sigma_high < 1")
        return window

    @field_validator("branches")
    @classmethod
    def _each_branch_once(cls, branches: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(branches)) < len(branches):
            raise ValueError("should name each branch at most once")
        return branches

    @model_validator(mode="after")
    def _there_is_something_to_hold(self) -> AlgorithmConfig:
        if self.at_target == "hold" and self.target is None:
            raise ValueError(
                "algorithm.at_target is hold and algorithm.target is null: nothing would be held; set "
                "algorithm.target=auto, or a gap"
            )
        return self

    @model_validator(mode="after")
    def _two_steps_fit_into_the_window(self) -> AlgorithmConfig:
        low, high = self.window
        if 2 * self.delta_sigma > high - low:
            raise ValueError(
                f"algorithm.delta_sigma is {self.delta_sigma:g}: should be at most half of the width of "
                f"algorithm.window, which is [{low:g}, {high:g}]"
            )
        return self


class OptimizerConfig(Section):
    """AdamW and its gradient clipping; the defaults are the published ones."""

    lr: Number = Field(5e-6, gt=0, description="learning rate")
    betas: tuple[Annotated[Number, Field(ge=0, lt=1)], Annotated[Number, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's averaging factors, each in [0, 1)"
    )
    eps: Number = Field(1e-8, gt=0, description="AdamW's epsilon")
    weight_decay: Number = Field(1e-4, ge=0, description="decoupled weight decay")
    grad_clip: Number | None = Field(0.1, gt=0, description="largest global gradient norm; null: no clipping")
    warmup_steps: Whole = Field(0, ge=0, description="optimizer steps of linear warm-up, then the rate is constant")


class TrainLoop(Section):
    """What is trained, and how long."""

    mode: Literal["full", "lora"] = Field(
        "full", description="train every weight of the transformer, or a LoRA beside them"
    )
    steps: Whole = Field(20, ge=1, description="rollout batches in the run")
    batch_size: Whole = Field(1, ge=1, description="rollouts of one step in each process")
    seed: Whole = Field(42, ge=0, description="seed of everything that is drawn")
    ema: Number | None = Field(
        None,
        gt=0,
        lt=1,
        description="decay of an exponential moving average of the weights, which is then what is measured and "
        "exported; null: none",
    )


class LoraConfig(Section):
    """The adapter of mode lora, through peft."""

    rank: Whole = Field(16, ge=1, description="rank of every adapter")
    alpha: Number | None = Field(None, gt=0, description="scale is alpha / rank; null: alpha = rank")
    targets: tuple[Words, ...] | None = Field(
        None,
        min_length=1,
        description="ends of the names of the linear layers that get one; null: all but the modulation's",
    )
    base: Literal["model", "float8", "int8", "nf4"] = Field(
        "model", description="how the frozen weights are kept: in model.dtype, or weight-only quantised"
    )


class MemoryConfig(Section):
    """Where a run keeps its state, and how finely: moments, and sums of gradients over several passes, may be rounded.

    Nothing else here changes what is computed, but for a bfloat16 master, which loses small updates altogether.
    """

    plan: Literal["auto", "replicated", "resident", "streamed", "sharded"] = Field(
        "auto",
        description="replicated: float32 weights in every process; resident: bfloat16 weights, their float32 master "
        "split beside them; streamed: low halves and optimizer on the host; sharded: FSDP2; auto: what fits",
    )
    master: Literal["float32", "bfloat16"] = Field(
        "float32", description="what updates are added to; bfloat16 loses those below half a step of the weights"
    )
    gradients: Auto | Literal["float32", "bfloat16"] = Field(
        "auto", description="what gradients are summed up in, in plans resident and streamed"
    )
    adam: Auto | Literal["float32", "bfloat16", "8bit"] = Field(
        "auto", description="how the optimizer's moments are kept, in plans resident and streamed"
    )
    micro_batch: Auto | Annotated[Whole, Field(ge=1)] = Field(
        "auto", description="rollouts of a process that are drawn and differentiated at a time"
    )
    batch_branches: Auto | bool = Field(
        "auto", description="both branches of a pair, or all steps and noises of one, in one pass of the model"
    )
    transformer_checkpointing: Auto | bool = Field(
        "auto", description="recompute each block of the transformer in its backward pass"
    )
    vae_checkpointing: Auto | bool = Field(
        "auto", description="recompute each block of the decoder in its backward pass"
    )
    shard: Auto | Annotated[Whole, Field(ge=1)] = Field(
        "auto", description="processes that share one copy in plan sharded; auto: those of a node"
    )


class SamplingConfig(Section):
    """How pictures are made for sample grids and evaluation."""

    steps: Whole = Field(50, ge=1, description="Euler steps of a sample")
    guidance: Number = Field(3.5, ge=0, description="guidance scale of a sample")


class EvaluationConfig(Section):
    """Held-out prompts that are sampled and measured."""

    prompts: Whole = Field(32, ge=0, description="held-out prompts; 0: no evaluation")
    split: Literal["evaluation", "validation"] = Field(
        "evaluation",
        description="captions of the miniature's world to hold out: to report on, or to choose settings by",
    )
    every: Whole = Field(0, ge=0, description="steps between evaluations; 0: only before and after the run")


class SamplesConfig(Section):
    """The grid of sample pictures that shows the run's progress."""

    count: Whole = Field(4, ge=0, description="pictures in a grid; 0: no grids")
    every: Whole = Field(10, ge=0, description="steps between grids; 0: only before and after the run")


class CheckpointConfig(Section):
    """What a run keeps to go on from."""

    every: Whole = Field(10, ge=0, description="steps between checkpoints; 0: only at the end")
    keep: Whole = Field(2, ge=1, description="checkpoints that are kept, the newest ones; the best one is kept besides")


class GuardConfig(Section):
    """What watches a run for reward hacking, by pictures and rewards that are not optimised."""

    action: Literal["stop", "warn", "off"] = Field(
        "stop", description="what happens when a run collapses: it ends, or it is only told"
    )
    share: Number = Field(
        0.05, gt=0, le=1, description="part of the run's planned work that the guard may add; a run too short has none"
    )
    alpha: Number = Field(
        0.05,
        gt=0,
        lt=1,
        description="probability of a false warning in a run in which nothing is trained, at most",
    )
    reach: Number = Field(
        1.25,
        ge=1,
        description="how far it is right to go: 1 is where the base model's pictures are when it is asked for the "
        "positive word, 0 where they are when it is not",
    )
    rewards: Auto | tuple[Words, ...] = Field(
        "auto",
        description="rewards to watch that are not optimised, such as [pickscore]; auto: the miniature's second one "
        "on the miniature, none elsewhere, because each takes memory",
    )

    @property
    def judges(self) -> tuple[str, ...]:
        """The rewards to watch that are named."""
        return () if self.rewards == "auto" or self.action == "off" else self.rewards


class TrainConfig(Section):
    """Everything that decides what a training run does."""

    description: str = Field("", description="one line about the run")
    model: ModelConfig
    reward: RewardConfig
    control_words: ControlWords
    prompts: PromptsConfig = Field(default_factory=PromptsConfig)
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    algorithm: AlgorithmConfig = Field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    train: TrainLoop = Field(default_factory=TrainLoop)
    lora: LoraConfig = Field(default_factory=LoraConfig)
    memory: MemoryConfig = Field(default_factory=MemoryConfig)
    sampling: SamplingConfig = Field(default_factory=SamplingConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    samples: SamplesConfig = Field(default_factory=SamplesConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    guard: GuardConfig = Field(default_factory=GuardConfig)

    @property
    def rewards(self) -> list[str]:
        """Every reward that the configuration names: what is trained, and what is watched."""
        return [*self.reward.parts, *self.guard.judges]

    @model_validator(mode="after")
    def _nothing_watched_is_trained(self) -> TrainConfig:
        for name in self.guard.judges:
            if name in self.reward.parts:
                raise ValueError(
                    f"guard.rewards names {name}, which reward.name or reward.others optimises: watch another one"
                )
        return self

    @model_validator(mode="after")
    def _captions_can_be_held(self) -> TrainConfig:
        algorithm = self.algorithm
        if algorithm.captions != "hold":
            return self
        why = ""
        if algorithm.name in POLICY_METHODS:
            why = f"algorithm.name is {algorithm.name}, which follows no gradient that could bring pictures back"
        elif self.rollout.source == "pictures":
            why = "rollout.source is pictures, which stay what they are"
        elif self.reward.pair == "picture" and not self.reward.others:
            why = "reward.pair is picture, whose reward reads no prompt"
        if why:
            raise ValueError(f"algorithm.captions is hold and {why}: set algorithm.captions=free")
        if algorithm.target is None:
            raise ValueError(
                "algorithm.captions is hold and algorithm.target is null: pictures are held to their prompts on the "
                "way to a target; set algorithm.target=auto, or a gap"
            )
        return self

    @model_validator(mode="after")
    def _a_target_is_of_what_the_model_draws(self) -> TrainConfig:
        if self.rollout.source == "pictures" and self.algorithm.target is not None:
            raise ValueError(
                f"rollout.source is pictures and algorithm.target is {self.algorithm.target}: the gap of given "
                "pictures stays what it is, so no target is ever reached; set algorithm.target=null and "
                "algorithm.at_target=stop, and count steps"
            )
        return self

    @model_validator(mode="after")
    def _the_method_can_run(self) -> TrainConfig:
        name = self.algorithm.name
        if name in PATH_METHODS:
            self._check_path()
            self._check_steps()
        if name in POLICY_METHODS:
            self._check_groups()
            self._check_noisy_steps()
        return self

    def _check_path(self) -> None:
        """ValueError for what leaves no sampler's path to go back along, or another one than the model is asked on."""
        name = self.algorithm.name
        alternative = "or train by srpo or direct-align, which need none"
        if self.rollout.source == "pictures":
            raise ValueError(
                f"algorithm.name is {name} and rollout.source is pictures: it goes back along the sampler's path, "
                f"which given pictures have not; set rollout.source=model, {alternative}"
            )
        if self.rollout.replay:
            raise ValueError(
                f"algorithm.name is {name} and rollout.replay is {self.rollout.replay}: it learns from fresh rollouts "
                f"only; set rollout.replay=0, {alternative}"
            )
        if self.algorithm.schedule == "reference":
            raise ValueError(
                f"algorithm.name is {name} and algorithm.schedule is reference: that is SRPO's published code; set "
                "algorithm.schedule=sigma"
            )
        if name != "refl" and self.rollout.guidance != self.algorithm.guidance:
            raise ValueError(
                f"rollout.guidance is {self.rollout.guidance:g} and algorithm.guidance is "
                f"{self.algorithm.guidance:g}: {name} takes the sampler's steps again, so give both one value"
            )

    def _check_steps(self) -> None:
        """ValueError for a method that would reach back further than the sampler goes."""
        algorithm, steps = self.algorithm, self.rollout.steps
        reach = {
            "refl": ("refl.steps_left", algorithm.refl.steps_left[1]),
            "draft": ("draft.last_steps", algorithm.draft.last_steps),
        }
        key, last = reach.get(algorithm.name, ("", 0))
        if last > steps:
            asked = f"[{algorithm.refl.steps_left[0]}, {last}]" if key.startswith("refl") else last
            raise ValueError(
                f"algorithm.{key} is {asked} and rollout.steps is {steps}: it cannot go back further than the sampler "
                "came; lower the one or raise the other"
            )
        low, high = algorithm.alignprop.truncation or (0, 0)
        if algorithm.name == "alignprop" and (high > steps or low == steps):
            raise ValueError(
                f"algorithm.alignprop.truncation is [{low}, {high}] and rollout.steps is {steps}: should be within "
                f"[0, {steps}] and keep a step, [{steps - 1}, {steps - 1}] keeps the last alone"
            )

    def _check_noisy_steps(self) -> None:
        """ValueError where a policy method has fewer steps to learn from than it makes updates."""
        algorithm, steps = self.algorithm, self.rollout.steps
        if steps < 2:
            raise ValueError(
                f"rollout.steps is {steps} and algorithm.name is {algorithm.name}: it learns from the steps before the "
                "last, the only ones with noise; set rollout.steps=2 or more"
            )
        drawn = algorithm.policy_steps(steps)
        if algorithm.pairs > drawn:
            raise ValueError(
                f"algorithm.pairs is {algorithm.pairs}, and {algorithm.name} trains {drawn} of the {steps} steps of "
                "rollout.steps: each pair needs one of its own; lower algorithm.pairs, or raise rollout.steps or "
                "algorithm.grpo.fraction"
            )

    def _check_groups(self) -> None:
        group = self.algorithm.grpo.group
        if self.train.batch_size % group:
            raise ValueError(
                f"train.batch_size is {self.train.batch_size}: should be a multiple of algorithm.grpo.group, which is "
                f"{group}"
            )
        if self.algorithm.grpo.kl and self.train.mode != "lora":
            raise ValueError(
                f"algorithm.grpo.kl is {self.algorithm.grpo.kl:g} and train.mode is {self.train.mode}: the untrained "
                "model is there only beneath a LoRA; set train.mode=lora, or algorithm.grpo.kl=0"
            )
