"""The main claim, as a user checks it: a run of the preset on the miniature makes its pictures more realistic."""

import json
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
def test_the_realism_preset_makes_the_miniature_more_realistic_in_three_minutes(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "srpo_cli", "train", "--preset", "realism", "--model", "miniature"]
    started = time.monotonic()
    subprocess.run([*command, "--seed", "6", "--quiet", "--output", run], check=True, capture_output=True)
    seconds = time.monotonic() - started
    summary = json.loads((run / "summary.json").read_text())
    base, tuned = ({name: value["mean"] for name, value in summary[part].items()} for part in ("base", "tuned"))
    assert tuned["photo_distance"] <= 0.5 * base["photo_distance"]
    assert tuned["photo_rate"] >= 3 * base["photo_rate"]
    assert tuned["caption_accuracy"] >= 0.95 * base["caption_accuracy"]
    assert tuned["reward"] <= base["reward"]
    assert summary["stopped_by"] == "target"
    assert seconds <= 180
