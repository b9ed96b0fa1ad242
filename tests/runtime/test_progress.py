"""Off a terminal progress is a plain line now and then; quiet shows nothing."""

import contextlib
import os
import pty
import subprocess
import sys

import pytest

from srpo_cli.runtime import progress
from srpo_cli.runtime.progress import StepProgress

VALUES = {"reward": 0.5, "photo_distance": None}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_plain_line_has_rate_remaining_time_and_values(clock, capsys):
    with StepProgress(10, done=4) as shown:
        clock[0] += 3
        shown.update(5, VALUES)
    assert capsys.readouterr().err == "step 5/10  3.00 s/step  eta 15 s  reward 0.500\n"


def test_there_is_a_line_at_the_first_and_the_last_step_and_every_15_seconds(clock, capsys):
    with StepProgress(40) as shown:
        for step in range(1, 41):
            clock[0] += 1
            shown.update(step, VALUES)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in lines] == ["1/40", "16/40", "31/40", "40/40"]


def test_quiet_shows_nothing(clock, capsys):
    with StepProgress(1, quiet=True) as shown:
        shown.update(1, VALUES)
    assert capsys.readouterr() == ("", "")


def test_a_terminal_of_80_columns_shows_everything(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    with StepProgress(100) as shown:
        clock[0] += 2
        shown.update(50, {"reward": 0.5, "sgp_gap": -0.25, "photo_distance": 0.75})
    text = capsys.readouterr().err
    for part in (" 50/100", "0.04 s/step", "reward 0.500  sgp_gap -0.250  photo_distance 0.750"):
        assert part in text
    assert "…" not in text


COUNT = """
from srpo_cli.runtime.progress import CountProgress

with CountProgress(2, "pictures") as progress:
    for number in (1, 2):
        print(f"row {number}")
        progress.update(number)
"""


def test_rows_go_to_stdout_while_the_bar_is_on_the_terminal(tmp_path):
    """The terminal is stderr's alone, as in ``srpo score images > rows``."""
    terminal, side = pty.openpty()
    with (tmp_path / "rows").open("wb") as rows:
        process = subprocess.Popen([sys.executable, "-c", COUNT], stdout=rows, stderr=side)
        os.close(side)
        seen = b""
        with contextlib.suppress(OSError):  # how the end of a terminal is told
            while part := os.read(terminal, 4096):
                seen += part
        assert process.wait() == 0
    os.close(terminal)
    assert (tmp_path / "rows").read_text() == "row 1\nrow 2\n"
    assert b"pictures" in seen and b"row" not in seen
