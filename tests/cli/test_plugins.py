"""A reward that is somebody else's code: asked about before torch is loaded, told of whenever it runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from srpo_cli.cli.plugins import admit_plugin
from srpo_cli.config.load import preset_path
from srpo_cli.runtime import doctor
from srpo_cli.trust import digest_of, trust

RUN = """
import json, sys
from srpo_cli.cli.app import main

try:
    main(sys.argv[1:])
except SystemExit as stop:
    print(json.dumps({"exit_code": stop.code or 0, "torch": "torch" in sys.modules}), file=sys.stderr)
"""


@pytest.fixture(autouse=True)
def a_user_of_its_own(monkeypatch, tmp_path):
    """Nobody has trusted anything; relative paths start in ``tmp_path``."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("srpo_cli.trust._this_process", set())
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def canary(tmp_path):
    """A file that the plug-in ``judges/mine.py`` writes as soon as any of it runs."""
    (tmp_path / "judges").mkdir()
    (tmp_path / "judges" / "mine.py").write_text("open('canary', 'w')\n")
    return tmp_path / "canary"


@pytest.fixture
def preset(tmp_path):
    """A preset in a folder of its own whose reward is the plug-in, here and on the miniature."""
    (tmp_path / "presets").mkdir()
    path = tmp_path / "presets" / "mine.yaml"
    text = preset_path("realism").read_text()
    text = text.replace("name: hpsv2.1", "name: judges/mine.py")
    path.write_text(text.replace("reward:\n    name: miniature", "reward:\n    name: judges/mine.py"))
    return path


def run_apart(*arguments):
    """Runs ``srpo`` in a process of its own; its output, its lines of error, and how it ended with torch or without."""
    command = [sys.executable, "-c", RUN, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    *stderr, end = process.stderr.splitlines()
    return process.stdout, stderr, json.loads(end)


ASKED = "error: judges/mine.py is Python code that would run here: read it, then add --trust (asked once)"


def test_a_preset_does_not_bring_code_silently(preset, canary):
    stdout, stderr, end = run_apart("train", "--preset", preset)
    assert (stdout, stderr, end) == ("", [ASKED], {"exit_code": 2, "torch": False})
    assert not canary.exists()


def test_a_flag_does_not_either(canary):
    _, stderr, end = run_apart(
        "train", "--preset", "realism", "--model", "miniature", "--reward", "judges/mine.py:load"
    )
    assert (stderr, end) == ([ASKED], {"exit_code": 2, "torch": False})


def test_a_dry_run_runs_nothing_and_agrees_to_nothing(preset, canary, tmp_path):
    stdout, stderr, end = run_apart("train", "--preset", preset, "--model", "miniature", "--trust", "--dry-run")
    assert (stderr, end["exit_code"]) == ([], 0)
    assert "name: judges/mine.py" in stdout
    assert not canary.exists()
    assert not (tmp_path / "config").exists()


def test_a_run_folder_does_not_bring_code_silently(preset, canary, srpo, tmp_path):
    (tmp_path / "run").mkdir()
    outcome = srpo("train", "--preset", preset, "--model", "miniature", "--dry-run")
    (tmp_path / "run" / "config.yaml").write_text(outcome.stdout)
    assert run_apart("train", "--resume", "run")[1:] == ([ASKED], {"exit_code": 2, "torch": False})


def test_the_miniature_does_not_ask_about_a_reward_that_it_does_not_use(preset, srpo):
    text = preset.read_text().replace("reward:\n    name: judges/mine.py", "reward:\n    name: miniature")
    preset.write_text(text)  # there is no judges/mine.py here
    outcome = srpo("train", "--preset", preset, "--model", "miniature", "--dry-run")
    assert outcome.exit_code == 0, outcome.stderr


@pytest.mark.parametrize("arguments", [[], ["--dry-run"], ["--trust"]])
def test_a_file_that_is_not_there(arguments, preset, srpo):
    outcome = srpo("train", "--preset", preset, *arguments)
    assert outcome.exit_code == 2
    assert outcome.stderr == "error: cannot read the plug-in judges/mine.py: No such file or directory\n"


def test_only_rank_0_asks(preset, canary, srpo, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    outcome = srpo("train", "--preset", preset)
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (2, "", "")


def test_an_installed_plugin_is_told_of_and_so_is_one_that_is_not_used(tmp_path, monkeypatch):
    info = tmp_path / "my_judges-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-judges\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[srpo.rewards]\nmine = judges:load\nminiature = judges:load\n")
    monkeypatch.syspath_prepend(tmp_path)
    told = []
    for name in ("mine", "miniature", "hpsv2.1"):
        admit_plugin(name, False, told.append)
    assert told == [
        "reward: mine is a plug-in, judges:load of my-judges 1.2; its code runs here",
        "reward: miniature is the built-in one; the plug-in of that name in my-judges 1.2 is not used",
    ]


@pytest.fixture
def diagnosis(preset, srpo, monkeypatch):
    """Asks the doctor about the preset; its exit code and what it says of the reward."""
    monkeypatch.setattr(doctor, "check_loads", lambda package: doctor.Check(package, True, "yes"))
    monkeypatch.setattr(doctor, "accelerators", lambda: [])

    def ask():
        outcome = srpo("doctor", "--preset", preset, "--format", "json")
        rows = {row["check"]: row for row in json.loads(outcome.stdout)["checks"]}
        row = rows["reward judges/mine.py"]
        return outcome.exit_code, row["status"], row["found"], row["remedy"]

    return ask


def test_the_doctor_shows_what_may_run(diagnosis, canary, tmp_path):
    exit_code, status, found, remedy = diagnosis()
    assert (exit_code, status, found) == (4, "missing", "a plug-in that you have not trusted as it is now")
    assert "add --trust" in remedy
    trust(Path("judges/mine.py"))
    digest = digest_of(Path("judges/mine.py"))
    assert diagnosis() == (0, "ok", f"a plug-in that you trust, sha256 {digest[:12]}", "")
    assert not canary.exists()


def test_the_doctor_shows_it_beside_the_weights_that_it_is_given(diagnosis, canary, preset):
    preset.write_text(preset.read_text().replace("name: judges/mine.py", "name: judges/mine.py\n    weights: presets"))
    preset.write_text(preset.read_text().replace("mine.py\n    weights", "mine.py\n  weights", 1))
    assert diagnosis()[:2] == (4, "missing")


def test_the_doctor_looks_from_the_working_directory(diagnosis, tmp_path):
    expected = ("no file judges/mine.py", f"put the plug-in there, or name it from {tmp_path}")
    assert diagnosis()[2:] == expected


def test_the_doctor_refuses_a_reward_that_nobody_knows(diagnosis, preset, srpo):
    preset.write_text(preset.read_text().replace("judges/mine.py", "nobody"))
    outcome = srpo("doctor", "--preset", preset)
    assert (outcome.exit_code, outcome.stderr.partition(".")[0]) == (2, "error: Unknown reward 'nobody'")
