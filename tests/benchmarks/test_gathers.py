"""Two processes share the weights: what travels in a step."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.slow
def test_weights_are_gathered_and_gradients_scattered_once_an_update():
    command = [sys.executable, "-m", "benchmarks.gathers", "algorithm.pairs=2", "rollout.steps=3"]
    told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout
    exchanged = json.loads(told.splitlines()[-1])
    assert exchanged["all_gathers"] == exchanged["reduce_scatters"] == 1
