"""The schema takes what a run can do and refuses what it cannot."""

import pytest
from pydantic import ValidationError

from srpo_cli.algorithms.grpo import StepDraws
from srpo_cli.config.load import FIELDS
from srpo_cli.config.schema import (
    POLICY_METHODS,
    AlgorithmConfig,
    AlignPropConfig,
    CheckpointConfig,
    ControlWords,
    DraftConfig,
    GrpoConfig,
    ModelConfig,
    OptimizerConfig,
    ReferenceSchedule,
    ReflConfig,
    RewardConfig,
    RolloutConfig,
    TrainLoop,
)


def test_every_value_is_described():
    assert all(FIELDS.values())


def test_numbers_written_as_text_are_read():
    assert OptimizerConfig(lr="1e-5").lr == 1e-5
    assert AlgorithmConfig(target="0.3").target == 0.3


def test_a_configuration_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        TrainLoop().steps = 5


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (AlgorithmConfig, {"window": [0.9, 0.3]}),
        (AlgorithmConfig, {"window": [0.5, 0.5]}),
        (AlgorithmConfig, {"window": [0.0, 0.5]}),
        (AlgorithmConfig, {"window": [0.5, 1.0]}),
        (AlgorithmConfig, {"window": [0.5]}),
        (AlgorithmConfig, {"delta_sigma": 0}),
        (AlgorithmConfig, {"window": [0.5, 0.8], "delta_sigma": 0.2}),
        (AlgorithmConfig, {"branches": []}),
        (AlgorithmConfig, {"branches": ["denoise", "denoise"]}),
        (AlgorithmConfig, {"branches": ["inversion"]}),
        (AlgorithmConfig, {"pairs": 0}),
        (AlgorithmConfig, {"target": "automatic"}),
        (AlgorithmConfig, {"target_reach": 0}),
        (AlgorithmConfig, {"target": "auto", "at_target": "go"}),
        (AlgorithmConfig, {"at_target": "hold"}),
        (AlgorithmConfig, {"captions": "keep"}),
        (AlgorithmConfig, {"update": "step"}),
        (ReferenceSchedule, {"train_timestep": [25, 5]}),
        (ReferenceSchedule, {"train_timestep": [5, 50]}),
        (ReferenceSchedule, {"timestep_length": 10}),
        (ReferenceSchedule, {"groundtruth_ratio": 1}),
        (ReflConfig, {"steps_left": [0, 4]}),
        (ReflConfig, {"steps_left": [4, 3]}),
        (DraftConfig, {"last_steps": 0}),
        (DraftConfig, {"noises": 1, "last_steps": 2}),
        (DraftConfig, {"include_last": True}),
        (AlignPropConfig, {"truncation": [-1, 3]}),
        (AlignPropConfig, {"truncation": [4, 3]}),
        (GrpoConfig, {"group": 1}),
        (GrpoConfig, {"noise_level": 0}),
        (GrpoConfig, {"noise_level": -0.3}),
        (GrpoConfig, {"fraction": 1.1}),
        (GrpoConfig, {"clip": 0}),
        (GrpoConfig, {"kl": -1}),
        (CheckpointConfig, {"keep": 0}),
        (ControlWords, {"positive": [], "negative": ["flat"]}),
        (ControlWords, {"positive": ["real"], "negative": [" "]}),
        (ControlWords, {"positive": ["real"], "negative": ["flat"], "template": "{word}"}),
        (ControlWords, {"positive": ["real"], "negative": ["flat"], "template": "{word} {prompt} {light}"}),
        (ControlWords, {"positive": ["real"], "negative": ["flat"], "template": "{word} {prompt"}),
        (ModelConfig, {"name": "miniature", "size": [48, 50]}),
        (ModelConfig, {"name": "miniature", "size": [0, 48]}),
        (OptimizerConfig, {"lr": 0}),
        (OptimizerConfig, {"lr": float("inf")}),
        (OptimizerConfig, {"lr": True}),
        (OptimizerConfig, {"betas": [0.9, 1.0]}),
        (OptimizerConfig, {"grad_clip": 0}),
        (RewardConfig, {"name": "miniature", "shift": -1}),
        (RewardConfig, {"name": "miniature", "noise": 2}),
        (RewardConfig, {"name": "miniature", "pair_noise": 0}),
        (RewardConfig, {"name": "miniature", "weight": 0}),
        (RewardConfig, {"name": "miniature", "weight": float("inf")}),
        (RewardConfig, {"name": "miniature", "weight": 0, "others": {"pickscore": 0}}),
        (RewardConfig, {"name": "miniature", "others": {"miniature": 1}}),
        (RewardConfig, {"name": "miniature", "others": {"pickscore": None}}),
        (RewardConfig, {"name": "miniature", "others": {" ": 1}}),
        (RolloutConfig, {"source": "pictures"}),
        (RolloutConfig, {"pictures": "list.jsonl"}),
        (RolloutConfig, {"shift": 0}),
        (TrainLoop, {"steps": 0}),
        (TrainLoop, {"steps": 2.5}),
        (TrainLoop, {"steps": True}),
        (TrainLoop, {"epochs": 1}),
    ],
)
def test_impossible_values_are_refused(section, values):
    with pytest.raises(ValidationError):
        section(**values)


@pytest.mark.parametrize(
    ("section", "values"),
    [
        (AlgorithmConfig, {"window": [0.25, 0.75], "delta_sigma": 0.25}),  # every pair recovers at 0.5
        (AlgorithmConfig, {"branches": ["invert"]}),
        (AlgorithmConfig, {"target": None, "hinge": None}),
        (OptimizerConfig, {"grad_clip": None}),
        (ReflConfig, {"steps_left": [1, 1]}),
        (DraftConfig, {"noises": 1, "include_last": True}),
        (AlignPropConfig, {"truncation": [0, 0]}),
        (GrpoConfig, {"fraction": 1, "noise_level": 1e-3}),
        (RewardConfig, {"name": "miniature", "weight": 0, "others": {"pickscore": 1}}),
        (RewardConfig, {"name": "miniature", "weight": -1, "others": {"pickscore": "1e-3"}}),
        (RolloutConfig, {"source": "pictures", "pictures": "list.jsonl"}),
        (RolloutConfig, {"shift": None}),
    ],
)
def test_the_edges_of_what_is_possible_are_taken(section, values):
    section(**values)


def test_what_a_policy_method_does_not_say_is_as_it_was_published():
    dance, flow = (AlgorithmConfig(name=name).policy for name in POLICY_METHODS)
    assert (dance.noise_level, dance.fraction, dance.order, dance.over) == (0.3, 0.6, "random", "group")
    assert (flow.noise_level, flow.fraction, flow.order, flow.over) == (0.7, 1.0, "first", "batch")
    own = AlgorithmConfig(name="dance-grpo", grpo={"fraction": 1, "order": "first"}).policy
    assert (own.noise_level, own.fraction, own.order, own.over) == (0.3, 1, "first", "group")


@pytest.mark.parametrize("name", POLICY_METHODS)
@pytest.mark.parametrize("fraction", [None, 0.01, 0.29, 0.6, 1])
@pytest.mark.parametrize("steps", [2, 3, 10, 16, 101])
def test_the_steps_that_a_policy_method_trains_are_those_that_are_drawn(name, fraction, steps):
    algorithm = AlgorithmConfig(name=name, grpo={"fraction": fraction})
    assert algorithm.policy_steps(steps) == StepDraws(steps, algorithm.policy.fraction).drawn
