"""The schema takes what a run can do and refuses what it cannot."""

import pytest
from pydantic import ValidationError

from srpo_cli.config.load import FIELDS
from srpo_cli.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    ControlWords,
    ModelConfig,
    OptimizerConfig,
    ReferenceSchedule,
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
        (AlgorithmConfig, {"update": "step"}),
        (ReferenceSchedule, {"train_timestep": [25, 5]}),
        (ReferenceSchedule, {"train_timestep": [5, 50]}),
        (ReferenceSchedule, {"timestep_length": 10}),
        (ReferenceSchedule, {"groundtruth_ratio": 1}),
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
        (RolloutConfig, {"source": "pictures", "pictures": "list.jsonl"}),
        (RolloutConfig, {"shift": None}),
    ],
)
def test_the_edges_of_what_is_possible_are_taken(section, values):
    section(**values)
