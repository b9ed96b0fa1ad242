"""A run that is killed, stopped or extended ends where an unbroken one does, to the bit."""

import json
import shutil
import signal
import time

import pytest

from srpo_cli.config.load import load_train_config
from srpo_cli.recipes.resume import resume_from
from srpo_cli.runtime.checkpoints import find_checkpoint, link_best, list_checkpoints
from srpo_cli.runtime.distributed import Ranks
from srpo_cli.runtime.folder import CONFIG, RunFolder

pytestmark = [pytest.mark.usefixtures("on_the_cpu")]

KILL = {
    "right after a checkpoint": """
import os, signal
from srpo_cli.recipes import train
save = train.save_checkpoint
def save_and_die(folder, step, *rest):
    save(folder, step, *rest)
    os.kill(os.getpid(), signal.SIGKILL)
train.save_checkpoint = save_and_die
""",
    "between checkpoints": """
import os, signal
from srpo_cli.runtime.folder import RunFolder
log = RunFolder.log
def log_and_die(self, record):
    log(self, record)
    if record["step"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
RunFolder.log = log_and_die
""",
    "in the middle of a checkpoint": """
import os, signal, torch
from srpo_cli.runtime import checkpoints
def write_half_and_die(state, path):
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
checkpoints.torch.save = write_half_and_die
""",
}


@pytest.mark.parametrize("where", KILL)
def test_a_killed_run_goes_on_as_if_never_killed(where, finished, tmp_path, processes, tiny, srpo, assert_same):
    folder = tmp_path / "run"
    process = processes.start(*tiny(folder), before=KILL[where])
    assert process.wait() == -signal.SIGKILL, process.stderr.read_text()
    assert not (folder / "checkpoints" / "step-000004").exists()

    outcome = srpo("train", "--resume", folder)
    assert outcome.exit_code == 0, outcome.stderr
    assert_same(folder, finished)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000002", "step-000004"]


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    number, exit_code, finished, tmp_path, processes, tiny, srpo, assert_same
):
    folder = tmp_path / "my run"
    process = processes.start(*tiny(folder))
    end = time.monotonic() + 60
    while not (folder / "metrics.jsonl").exists() or not (folder / "metrics.jsonl").read_text():
        assert time.monotonic() < end, process.stderr.read_text()
        time.sleep(0.01)
    process.send(number)
    assert process.wait() == exit_code, process.stderr.read_text()

    step = json.loads((max((folder / "checkpoints").iterdir()) / "state.json").read_text())["step"]
    assert step < 4
    last = process.stderr.read_text().splitlines()[-1]
    assert last == f"stopped by {number.name} after step {step}; go on with: srpo train --resume '{folder}'"
    assert process.stdout.read_text() == ""

    assert srpo("train", "--resume", folder).exit_code == 0
    assert_same(folder, finished)


@pytest.mark.parametrize("when", ["base", "tuned"])
def test_a_signal_while_pictures_are_measured_stops_at_once_and_loses_nothing(
    when, finished, tmp_path, tiny, srpo, monkeypatch, assert_same
):
    measured = []

    def measure(evaluator):
        if len(measured) == ["base", "tuned"].index(when):
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("went on")
        measured.append(evaluator)
        return measure.original(evaluator)

    with monkeypatch.context() as patch:
        from srpo_cli.recipes.evaluate import Evaluator

        measure.original = Evaluator.run
        patch.setattr(Evaluator, "run", measure)
        outcome = srpo(*tiny(tmp_path / "run", "--set", "evaluation.prompts=2"))
    assert outcome.exit_code == 143
    assert outcome.stdout == ""
    assert f"after step {0 if when == 'base' else 4}; go on with" in outcome.stderr
    assert srpo("train", "--resume", tmp_path / "run").exit_code == 0
    assert_same(tmp_path / "run", finished)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["base"]["reward"]


def test_a_run_is_extended_by_steps(half_copy, finished, srpo, assert_same):
    before = (half_copy / "config.yaml").read_text().splitlines()
    assert srpo("train", "--resume", half_copy, "--steps", "4", "--quiet").exit_code == 0
    assert_same(half_copy, finished)

    changed = [line for line in (half_copy / "config.yaml").read_text().splitlines() if line not in before]
    assert [line.split() for line in changed] == [["steps:", "4", "#", "--steps"]]
    assert srpo("train", "--resume", half_copy, "--quiet").exit_code == 0, "a finished run is only measured again"
    assert_same(half_copy, finished)


def test_a_run_goes_on_from_its_newest_checkpoint_though_its_best_is_older(finished, tmp_path):
    run = RunFolder(shutil.copytree(finished, tmp_path / "run"))
    link_best(run.path, list_checkpoints(run.checkpoints)[0])
    assert find_checkpoint(run.path).step == 2
    assert resume_from(run, load_train_config(run.path / CONFIG).config, Ranks()).checkpoint.step == 4
