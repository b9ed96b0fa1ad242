"""``--gpus``: one command in two processes over gloo, with one voice, one exit code and the rows of one process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
from pandas.testing import assert_frame_equal

from srpo_cli.miniature.world import PHOTO, draw_scenes_of, render
from srpo_cli.runtime.pictures import save_png

PROMPTS = ["a red sphere on sand", "a blue cone on snow", "a green cube on grass"]
SETTINGS = (
    "train.batch_size=2 rollout.steps=2 algorithm.pairs=1 algorithm.target=null sampling.steps=2 evaluation.prompts=0 "
    "samples.count=0 checkpoint.every=0"
)
TRAIN = ("train", "--preset", "realism", "--model", "miniature", *(f"--set={item}" for item in SETTINGS.split()))


def start(*arguments, folder: Path) -> subprocess.Popen:
    left_out = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    temporary = folder / "temporary"
    temporary.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "srpo_cli", *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        env={**environment, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
        # A test run that a shell put into the background ignores Ctrl-C, and its children would inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run(*arguments, folder: Path) -> tuple[int, str, str]:
    process = start(*arguments, folder=folder)
    stdout, stderr = process.communicate(timeout=300)
    return process.returncode, stdout, stderr


def errors(stderr: str) -> list[str]:
    """The lines of mistakes; a bug's traceback fails the test."""
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


def worker(process: subprocess.Popen, rank: int) -> int:
    """The process number of a rank that it started."""
    for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        if f"\0RANK={rank}\0" in f"\0{Path(f'/proc/{pid}/environ').read_text()}":
            return int(pid)
    raise AssertionError(f"rank {rank} is not there")


@pytest.fixture
def training(tmp_path):
    """A long run of two processes that has taken its first step."""
    process = start(*TRAIN, "--steps", 500, "--output", "run", "--gpus", 2, folder=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    end = time.monotonic() + 120
    while not metrics.exists() or not metrics.read_text():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)
    yield process
    process.kill()
    process.communicate()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())


# --- train --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_train_and_one_talks(tmp_path):
    exit_code, stdout, stderr = run(*TRAIN, "--steps", 2, "--gpus", 2, folder=tmp_path)
    assert (exit_code, errors(stderr)) == (0, [])
    assert stdout.count("2 steps in") == 1
    assert stderr.splitlines()[0] == "no accelerator here: 2 processes on the CPU"
    (folder,) = (tmp_path / "runs").iterdir()
    assert stderr.count(f"run: runs/{folder.name}") == 1
    assert json.loads((folder / "environment.json").read_text())["processes"] == 2
    left = {path.name for path in (tmp_path / "temporary").iterdir()}
    assert not [name for name in left if name.startswith(("torchelastic", "srpo"))]


@pytest.mark.slow
def test_a_mistake_that_the_processes_find_keeps_its_exit_code_and_is_told_once(tmp_path):
    more = ("--set=prompts.source=/nowhere", "--output", "run")
    exit_code, _, stderr = run(*TRAIN, *more, "--gpus", 2, folder=tmp_path)
    assert exit_code == 2
    (error,) = errors(stderr)
    assert "/nowhere" in error


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupt_ends_after_a_checkpoint(training, tmp_path, number):
    training.send_signal(number)
    stdout, stderr = training.communicate(timeout=60)
    assert (training.returncode, errors(stderr), stdout) == (128 + number, [], "")
    assert f"stopped by {number.name} after step" in stderr.splitlines()[-1]
    assert len(checkpoints(tmp_path)) == 1


@pytest.mark.slow
def test_a_killed_process_ends_all_with_one_line_that_says_how_to_go_on(training, tmp_path):
    os.kill(worker(training, rank=1), signal.SIGKILL)
    _, stderr = training.communicate(timeout=60)
    assert training.returncode == 1
    (error,) = errors(stderr)
    assert error.startswith("error: rank 1 was killed by SIGKILL")
    assert error.endswith("go on with: srpo train --resume run")
    assert len(checkpoints(tmp_path)) == 1


def test_a_mistake_in_the_command_is_told_before_anything_is_started(srpo):
    outcome = srpo("train", "--preset", "nope", "--gpus", "2")
    assert outcome.exit_code == 2
    assert outcome.stderr.startswith("error: Unknown preset 'nope'") and outcome.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "command", ["train --preset realism", "sample x", "score presets", "eval miniature -b miniature"]
)
def test_nodes_need_a_place_to_meet(srpo, command):
    outcome = srpo(*command.split(), "--nodes", "2")
    assert outcome.exit_code == 2
    assert "--nodes 2 needs --rdzv HOST:PORT" in outcome.stderr


# --- sample and score ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_draw_what_one_draws_and_go_on_with_what_is_missing(tmp_path):
    folders = [tmp_path / name for name in ("one", "two")]
    draw = ("sample", *PROMPTS, "-n", 7, "--model", "miniature", "--steps", 1, "-o", "out")  # three batches
    rows = []
    for folder, more in zip(folders, ((), ("--gpus", 2)), strict=True):
        folder.mkdir()
        exit_code, stdout, stderr = run(*draw, *more, folder=folder)
        assert (exit_code, errors(stderr)) == (0, [])
        assert stderr.count("pictures: out/grid.png") == 1
        rows.append(stdout)
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 21
    one, two = ({path.name: path.read_bytes() for path in (folder / "out").iterdir()} for folder in folders)
    assert one == two

    drawn = [folders[1] / json.loads(line)["file"] for line in rows[1].splitlines()]
    drawn[0].unlink()
    drawn[20].unlink()
    times = [path.stat().st_mtime_ns for path in drawn[1:20]]
    assert run(*draw, "--gpus", 2, folder=folders[1])[:2] == (0, rows[0])
    assert [path.stat().st_mtime_ns for path in drawn[1:20]] == times
    assert drawn[0].read_bytes() == one[drawn[0].name] and drawn[20].read_bytes() == one[drawn[20].name]


@pytest.mark.slow
def test_two_processes_score_as_one_does(tmp_path):
    for i, picture in enumerate(render(draw_scenes_of(PROMPTS * 3, PHOTO, 0))):
        save_png(picture, tmp_path / f"{i}.png", {"prompt": PROMPTS[i % 3], "model": "miniature"})
    (tmp_path / "4.png").write_bytes(b"no picture")
    judge = ("score", ".", "--pos", "photo", "--neg", "render", "--batch-size", 2, "--format", "jsonl")
    one, two = (run(*judge, *more, folder=tmp_path) for more in ((), ("--gpus", 2)))
    assert one[:2] == (3, two[1]) and two[0] == 3
    assert len(two[1].splitlines()) == 9
    noted = "no accelerator here: 2 processes on the CPU\n"
    assert two[2].startswith(noted) and two[2].count("win rate") == 1
    assert "1 of 9 rows have an error" in two[2].splitlines()[-1]


@pytest.mark.slow
def test_a_reward_that_is_missing_is_told_once(tmp_path):
    save_png(render(draw_scenes_of(PROMPTS[:1], PHOTO, 0))[0], tmp_path / "0.png", {"prompt": "x", "model": "other"})
    exit_code, stdout, stderr = run("score", ".", "--gpus", 2, folder=tmp_path)
    assert (exit_code, stdout) == (4, ""), stderr
    (error,) = errors(stderr)
    assert "hf download xswu/HPSv2" in error


# --- eval ---------------------------------------------------------------------------------------------------------

METRICS = (
    "oracle",
    "miniature",
    "sgp:miniature",
    "statistics",
    "diversity:miniature",
    "fid:miniature",
    "kid:miniature",
)
EVAL = ("eval", "miniature", "-b", "miniature", "--limit", 9, "-n", 2, "-o", "out", "--batch-size", 6)


@pytest.mark.slow
def test_two_processes_evaluate_as_one_does_and_go_on_with_what_is_missing(tmp_path):
    (tmp_path / "real").mkdir()
    for i, picture in enumerate(render(draw_scenes_of(PROMPTS * 2, PHOTO, 0))):
        save_png(picture, tmp_path / "real" / f"{i}.png", {})
    judged = [part for name in (*METRICS, "pickscore") for part in ("--metric", name)]
    given = (*EVAL, *judged, "--reference", tmp_path / "real")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, more in zip(folders, ((), ("--gpus", 2)), strict=True):
        folder.mkdir()
        exit_code, stdout, stderr = run(*given, *more, "--fail-under", "pickscore=1", folder=folder)
        assert (exit_code, errors(stderr)) == (5, [])
        assert stdout.count("photo distance") == 2
        told = [
            "miniature: drawing 18 pictures",
            "left out: pickscore: ",
            "report: out/report.html",
            "--fail-under pickscore=1:",
        ]
        assert [stderr.count(part) for part in told] == [1, 1, 1, 1]
    assert results(folders[1]) == results(folders[0])
    tables = [pd.read_parquet(folder / "out" / "images.parquet") for folder in folders]
    assert_frame_equal(tables[1], tables[0], check_exact=True)
    assert len(tables[1]) == 18

    drawn = sorted((folders[1] / "out" / "pictures" / "miniature").glob("*-seed*.png"))
    scores = next((folders[1] / "out" / "scores" / "miniature").glob("oracle*"))
    for path in (*drawn, scores):
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in scores.parent.iterdir()}
    assert run(*given, "--gpus", 2, folder=folders[1])[0] == 3
    assert results(folders[1]) == results(folders[0])
    assert {path: path.stat().st_mtime_ns for path in kept} == kept and len(kept) == 4


def results(folder: Path) -> dict:
    """What a result says, without what no two calls share."""
    data = json.loads((folder / "out" / "results.json").read_text())
    return {key: value for key, value in data.items() if key not in ("cost", "environment")}


@pytest.mark.slow
def test_what_a_benchmark_cannot_do_is_told_once(tmp_path):
    exit_code, stdout, stderr = run(*EVAL, "--style", "photo", "--gpus", 2, folder=tmp_path)
    assert (exit_code, stdout) == (2, ""), stderr
    (error,) = errors(stderr)
    assert "there is no group 'photo'" in error


# --- what cannot be shared out ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("score - --gpus 2", "- reads standard input, which several processes cannot share"),
        ("sample --prompts - --gpus 2", "--prompts - reads standard input, which several processes cannot share"),
        ("score presets --check --gpus 2", "--check is work for one process"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(srpo, arguments, message):
    outcome = srpo(*arguments.split())
    assert outcome.exit_code == 2
    assert message in outcome.stderr and outcome.stderr.count("\n") == 1


def test_a_rank_of_another_launcher_ignores_the_flags_and_stays_silent(srpo, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = srpo("sample", "--gpus", "8")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (2, "", "")
