"""``srpo train`` before the work begins: flags, help, --dry-run, and what is refused without torch."""

import json
import subprocess
import sys

import pytest

from srpo_cli.config.load import load_train_config
from srpo_cli.runtime.devices import _may_have_accelerator

RUN = """
import json, sys
from srpo_cli.cli.app import main

try:
    main(sys.argv[1:])
except SystemExit as stop:
    print(json.dumps({"exit_code": stop.code or 0, "torch": "torch" in sys.modules}), file=sys.stderr)
"""


def run_apart(*arguments):
    """Runs ``srpo`` in a process of its own; its output, its lines of error, and how it ended with torch or without."""
    process = subprocess.run([sys.executable, "-c", RUN, *arguments], capture_output=True, text=True, check=True)
    *stderr, end = process.stderr.splitlines()
    return process.stdout, stderr, json.loads(end)


@pytest.fixture
def run_folder(tmp_path, srpo):
    """A folder that holds the configuration of a run."""
    outcome = srpo("train", "--preset", "realism", "--model", "miniature", "--set", "train.batch_size=3", "--dry-run")
    (tmp_path / "config.yaml").write_text(outcome.stdout)
    return tmp_path


def test_a_dry_run_prints_the_configuration_and_writes_nothing(tmp_path):
    arguments = ["train", "--preset", "realism", "--model", "miniature", "--seed", "7", "--set", "optimizer.lr=1e-5"]
    stdout, stderr, end = run_apart(*arguments, "--output", str(tmp_path / "run"), "--dry-run")
    assert end["exit_code"] == 0
    assert not any(line.startswith("error") for line in stderr)
    lines = [line.split(" # ") for line in stdout.splitlines()]
    assert ["seed: 7", "--seed"] in [[part.strip() for part in line] for line in lines]
    (tmp_path / "printed.yaml").write_text(stdout)
    config = load_train_config(tmp_path / "printed.yaml").config
    assert (config.model.name, config.train.seed, config.optimizer.lr) == ("miniature", 7, 1e-5)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(_may_have_accelerator(), reason="torch is asked where there may be an accelerator")
def test_a_dry_run_says_that_the_preset_runs_on_the_miniature():
    stdout, stderr, end = run_apart("train", "--preset", "lighting:dark", "-n")
    assert end["exit_code"] == 0
    assert stderr[0] == "no accelerator here: the preset runs on the built-in miniature (--model decides otherwise)"
    assert "name: miniature" in stdout


def test_with_an_accelerator_the_preset_stays_what_it_is(srpo, monkeypatch):
    monkeypatch.setattr("srpo_cli.runtime.devices.has_accelerator", lambda: True)
    outcome = srpo("train", "--preset", "realism", "--dry-run")
    assert "name: flux.1-dev" in outcome.stdout
    assert outcome.stderr == ""


def test_the_miniature_may_also_be_named_by_set(srpo):
    by_set = srpo("train", "--preset", "realism", "--set", "model.name=miniature", "--dry-run").stdout
    by_flag = srpo("train", "--preset", "realism", "--model", "miniature", "--dry-run").stdout
    values = [[line.split("#")[0].rstrip() for line in text.splitlines()] for text in (by_set, by_flag)]
    assert values[0] == values[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "needs --preset NAME|FILE or --resume RUN"),
        ("--preset realism --model minature", "Unknown model 'minature'. Did you mean 'miniature'?"),
        (
            "--preset realism --model nope",
            "Available: flux.1-dev, flux.1-krea-dev, miniature, ",
        ),
        ("--preset realism --reward nope", ", FILE.py."),
        ("--preset realism --reward hpsv2", "Unknown reward 'hpsv2'. Did you mean 'hpsv2.1'?"),
        ("--preset realism --set algorithm.window=[0.9,0.3]", "sigma_low < sigma_high"),
        ("--preset realism --set algorithm.window=[0,0.3]", "sigma_low < sigma_high"),
        ("--preset realism --set model.size=[50,50]", "multiples of 8"),
        ("--preset realism --set optimizer.learning_rate=1", "Unknown key"),
        ("--resume nowhere", "nowhere holds no run (no config.yaml)"),
        ("--resume nowhere --seed 0", "--seed cannot be used with --resume"),
        ("--resume nowhere --preset realism", "--preset cannot be used with --resume"),
    ],
)
def test_a_mistake_is_one_line_without_torch(arguments, message):
    stdout, stderr, end = run_apart("train", *arguments.split())
    assert end == {"exit_code": 2, "torch": False}
    assert stdout == ""
    assert len(stderr) == 1 and stderr[0].startswith("error: ") and message in stderr[0]


def test_a_resumed_run_keeps_the_origin_of_every_value(run_folder, srpo):
    before = (run_folder / "config.yaml").read_text()
    assert _configuration(srpo("train", "--resume", run_folder, "--dry-run").stdout) == _configuration(before)
    extended = srpo("train", "--resume", run_folder, "--steps", "99", "--dry-run").stdout
    changed = [line for line in _configuration(extended) if line not in before.splitlines()]
    assert [line.split() for line in changed] == [["steps:", "99", "#", "--steps"]]


def _configuration(printed: str) -> list[str]:
    """What a dry run prints, without the plan in the comments at its end."""
    return printed[: printed.index("#\n# memory plan:")].splitlines()


def test_a_configuration_without_origins_can_be_resumed_too(run_folder, srpo):
    path = run_folder / "config.yaml"
    path.write_text("".join(line.split("  #")[0] + "\n" for line in path.read_text().splitlines()))
    assert (
        f"batch_size: 3                                   # preset {path}"
        in srpo("train", "--resume", run_folder, "--dry-run").stdout
    )


@pytest.mark.parametrize("columns", [80, 120])
def test_help_shows_every_option_and_examples_that_are_not_broken(columns, srpo, monkeypatch):
    from srpo_cli.cli.train import EXAMPLES

    monkeypatch.setenv("COLUMNS", str(columns))
    outcome = srpo("train", "--help")
    lines = [line.strip() for line in outcome.stdout.splitlines()]
    for example in EXAMPLES.split("\n\n"):
        assert example in lines
    for option in (
        "preset",
        "set",
        "model",
        "reward",
        "output",
        "seed",
        "steps",
        "resume",
        "trust",
        "dry-run",
        "quiet",
    ):
        assert f"--{option} " in outcome.stdout
    assert all(len(line) <= columns for line in outcome.stdout.splitlines())


def test_only_rank_0_tells_a_mistake(srpo, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    outcome = srpo("train", "--preset", "nope")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (2, "", "")
