"""The recorded training steps, in a process whose float32 exponentials round as they did when it was recorded.

diffusers computes its sinusoids in float32 even in a float64 model, and MKL's exp rounds by processor: one unit in the
last place of a frequency is 1e-4 of a phase at timestep 1000 and 1e-6 of a velocity, all that the vectors allow.
"""

import os
import subprocess
import sys
from pathlib import Path


def test_every_recorded_case_is_reproduced():
    tests = Path(__file__).with_name("reference_vectors.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "MKL_CBWR": "COMPATIBLE"}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert " passed" in outcome.stdout and "skipped" not in outcome.stdout
