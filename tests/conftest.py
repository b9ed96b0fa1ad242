"""What every test shares: no network, one thread, a plain terminal, and ``srpo`` as a function."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import pytest

# Before anything imports torch or the Hub client. A second thread gains nothing at the miniature's sizes.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def srpo(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Outcome]:
    """Run ``srpo`` with the given arguments in this process."""
    from srpo_cli.cli.app import main

    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "dumb")

    def run(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as stop:
            main([str(argument) for argument in arguments])
        output = capsys.readouterr()
        return Outcome(int(stop.value.code or 0), output.out, output.err)

    return run
