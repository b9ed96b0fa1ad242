"""``srpo eval compare`` as it is typed: its help, its plan, its mistakes, and what goes where."""

import json
import shlex
from pathlib import Path

import pytest

TINY = """
name: tiny
description: a method for a moment
budget: 10
seeds: [3]
prompts: 4
columns: [photo_distance, photo_rate]
methods:
  - label: refl
    preset: baselines:refl
    set: {train.batch_size: 1, rollout.steps: 4}
"""
TUNED = TINY.replace("    set:", "    tuning: {lr: [1e-5, 2e-5], by: reward}\n    set:")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """Every test types its commands in an empty folder, on a machine without an accelerator."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    return tmp_path / "here"


@pytest.fixture
def preset(tmp_path):
    """Write a comparison file beside the folder and return its path."""

    def write(text: str) -> str:
        (tmp_path / "tiny.yaml").write_text(text)
        return "../tiny.yaml"

    return write


def refused(outcome, *parts: str) -> None:
    """Bad usage, told on stderr, and nothing was written."""
    assert (outcome.exit_code, outcome.stdout) == (2, "")
    for part in parts:
        assert part in outcome.stderr
    assert not list(Path().iterdir())


def test_help_names_its_options_what_it_writes_and_examples(srpo):
    outcome = srpo("eval", "compare", "--help")
    assert outcome.exit_code == 0
    for part in ("--preset", "--output", "--jobs", "--dry-run", "--format", "comparison.json", "table1 --dry-run"):
        assert part in outcome.stdout
    assert "compare" in srpo("eval", "--help").stdout


def test_a_dry_run_prints_the_commands_and_writes_nothing(srpo, preset):
    outcome = srpo("eval", "compare", "--preset", preset(TUNED), "--dry-run")
    assert outcome.exit_code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert [line.endswith("  # at the rate that is chosen") for line in lines] == [False, False, True]
    for line, folder in zip(lines, ("tuning/refl/lr-1e-05", "tuning/refl/lr-2e-05", "runs/refl/seed-3"), strict=True):
        words = shlex.split(line, comments=True)
        assert words[:2] == ["srpo", "train"]
        assert words[words.index("--output") + 1] == f"evals/tiny/{folder}"
    (told,) = outcome.stderr.splitlines()
    assert told.startswith("2 runs to choose learning rates by and 1 of the table, of about 10 forwards each, ")
    assert not list(Path().iterdir())


def test_the_built_in_comparison_can_be_planned(srpo):
    outcome = srpo("eval", "compare", "--preset", "table1", "--dry-run", "-o", "out")
    assert outcome.exit_code == 0, outcome.stderr
    lines = outcome.stdout.splitlines()
    assert lines and all(line.startswith("srpo train --preset ") for line in lines)
    assert len(set(lines)) == len(lines)
    assert not list(Path().iterdir())


@pytest.mark.parametrize("jobs", ["0", "-1", "many"])
def test_a_number_of_processes_that_cannot_be_is_refused(srpo, preset, jobs):
    refused(srpo("eval", "compare", "--preset", preset(TINY), "--jobs", jobs), "--jobs")


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("table2", ["Unknown comparison 'table2'", "Did you mean 'table1'?"]),
        ("nope.yaml", ["Comparison file 'nope.yaml' does not exist"]),
    ],
)
def test_an_unknown_comparison_is_one_line(srpo, name, parts):
    outcome = srpo("eval", "compare", "--preset", name)
    refused(outcome, *parts)
    assert len(outcome.stderr.splitlines()) == 1 and outcome.stderr.startswith("error: ")


def test_a_measure_that_the_benchmark_does_not_have_is_one_line_before_anything_runs(srpo, preset):
    outcome = srpo("eval", "compare", "--preset", preset(TINY.replace("photo_rate", "photo_rat")))
    refused(outcome, "'photo_rat'", "Did you mean 'photo_rate'?")
    assert len(outcome.stderr.splitlines()) == 1 and outcome.stderr.startswith("error: ")


@pytest.mark.slow
def test_a_printed_command_can_be_typed_and_its_run_is_taken(srpo, preset):
    """And the table goes to stdout in the format that was asked for, with everything else on stderr."""
    arguments = ("eval", "compare", "--preset", preset(TINY), "--output", "out")
    (line,) = srpo(*arguments, "--dry-run").stdout.splitlines()
    typed = srpo(*shlex.split(line)[1:])
    assert typed.exit_code == 0, typed.stderr
    assert json.loads(Path("out/runs/refl/seed-3/summary.json").read_text())["steps"] == 1

    outcome = srpo(*arguments, "--format", "json")
    assert outcome.exit_code == 0, outcome.stderr
    data = json.loads(outcome.stdout)
    assert list(data["methods"]) == ["base", "refl"] and data["failed"] == {} and data["costs"] is None
    assert data == json.loads(Path("out/comparison.json").read_text())
    told = outcome.stderr.splitlines()
    assert told[0] == "comparison: out"
    assert told[1].startswith("evaluation seed-3: done in ") and told[1].endswith(" s (0 waiting)")
    assert told[2:] == [f"written: out/{name}" for name in ("table.md", "grid.png", "comparison.json")]

    planned = srpo(*arguments, "--dry-run")
    assert (planned.exit_code, planned.stdout) == (0, "")
    assert planned.stderr.startswith("0 runs to choose learning rates by and 0 of the table")

    again = srpo(*arguments)
    assert again.exit_code == 0, again.stderr
    title, head, *rows = again.stdout.splitlines()
    assert title == "methods" and head.split()[0] == "method" and "hacking rate" in head
    assert [row.split()[0] for row in rows if row] == ["base", "refl", "methods:", "method", "refl"]
    assert "done in" not in again.stderr


def test_a_reward_that_is_a_plug_in_is_asked_about_before_anything_runs(srpo, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(Path(__file__).parents[2])
    outcome = srpo("eval", "compare", "--preset", "docs/windows/windows.yaml", "--output", tmp_path / "out")
    assert outcome.exit_code == 2
    (line,) = outcome.stderr.splitlines()
    assert "docs/windows/sharpness.py is Python code that would run here" in line and "--trust" in line
    assert not (tmp_path / "out").exists()
