"""Run folders: refused when taken, whole after a crash, one line when the disk says no."""

import json
import os
import subprocess
import sys

import pytest

from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.runtime.folder import CONFIG, RunFolder, disk_errors, locked, write_atomically


def test_a_new_run_holds_its_configuration_and_environment(tmp_path):
    RunFolder(tmp_path / "run").start("a: 1\n")
    assert (tmp_path / "run" / CONFIG).read_text() == "a: 1\n"
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["packages"]["torch"]


def test_a_folder_with_another_run_is_refused_and_left_alone(tmp_path):
    RunFolder(tmp_path).start("a: 1\n")
    with pytest.raises(UsageError, match="--resume"):
        RunFolder(tmp_path).start("a: 2\n")
    assert (tmp_path / CONFIG).read_text() == "a: 1\n"


def test_a_folder_with_anything_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UsageError, match="not empty"):
        RunFolder(tmp_path).start("")


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UsageError, match="choose another --output"):
        RunFolder(tmp_path / "file").start("")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_place_is_one_line(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UsageError, match="cannot write"):
        RunFolder(tmp_path / "run").start("")


def test_nothing_is_made_before_a_run_starts(tmp_path):
    RunFolder(tmp_path / "runs" / "new").check_free()
    assert not (tmp_path / "runs").exists()


def test_any_other_refusal_of_the_disk_is_one_line_too(tmp_path):
    with pytest.raises(SrpoError, match="Input/output error"), disk_errors(tmp_path):
        raise OSError(5, "Input/output error")


def test_a_full_disk_is_one_line_that_says_what_to_do(tmp_path):
    with pytest.raises(SrpoError, match="full: free some space"), disk_errors(tmp_path):
        raise OSError(28, "No space left on device")


def test_a_read_only_disk_is_bad_usage(tmp_path):
    with pytest.raises(UsageError, match="choose another --output"), disk_errors(tmp_path):
        raise OSError(30, "Read-only file system")


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "state.json"
    write_atomically(path, "old")
    with pytest.raises(TypeError):
        write_atomically(path, None)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_going_on_keeps_the_run_and_takes_its_new_length(tmp_path):
    run = RunFolder(tmp_path)
    run.start("steps: 2\n", processes=1)
    run.log({"step": 1})
    run.samples.rmdir()
    run.go_on("steps: 4\n")
    assert (tmp_path / CONFIG).read_text() == "steps: 4\n"
    assert run.records() == [{"step": 1}]
    assert run.samples.is_dir()
    assert run.environment()["processes"] == 1


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_an_environment_that_cannot_be_read_is_one_line(tmp_path, content):
    (tmp_path / "environment.json").write_text(content)
    with pytest.raises(SrpoError, match="start a new run"):
        RunFolder(tmp_path).environment()


def test_a_cut_off_line_is_dropped_and_later_steps_too(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log({"step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "los')
    folder.truncate_log(2)
    assert [record["step"] for record in folder.records()] == [1, 2]


def test_a_folder_is_one_processs_at_a_time(tmp_path):
    taken = f"""
from pathlib import Path
from srpo_cli.runtime.folder import locked
with locked(Path({str(tmp_path)!r})):
    pass
"""
    with locked(tmp_path):
        other = subprocess.run([sys.executable, "-c", taken], capture_output=True, text=True, check=False)
        assert "is in use by another process of srpo: wait for it, or end it" in other.stderr
        with pytest.raises(UsageError, match="in use"), locked(tmp_path):
            pass
    assert subprocess.run([sys.executable, "-c", taken], check=False).returncode == 0
