"""The first signal is a request, an echo of it is none, asking again ends the process."""

import signal
import subprocess
import sys

import pytest

from srpo_cli.runtime import signals
from srpo_cli.runtime.signals import stop_on_signals

ASK_TWICE = """
import signal, time
from srpo_cli.runtime import signals
signals._ECHO = 0.05
with signals.stop_on_signals():
    signal.raise_signal(signal.{number})
    time.sleep(0.1)
    signal.raise_signal(signal.{number})
    print("still here")
"""


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_is_noted_and_the_handlers_of_before_come_back(number, exit_code):
    earlier = signal.signal(number, signal.default_int_handler)  # under nohup, SIGHUP is ignored
    try:
        with stop_on_signals() as stop:
            assert (stop.signal, stop.exit_code) == (None, 0)
            signal.raise_signal(number)
            assert (stop.signal, stop.exit_code) == (number, exit_code)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, earlier)


def test_a_terminal_that_nohup_has_done_away_with_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.signal is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_launcher_passes_on_at_once_is_the_same_request():
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.signal is signal.SIGINT


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asking_again_ends_the_process(number):
    process = subprocess.run(
        [sys.executable, "-c", ASK_TWICE.format(number=number.name)], capture_output=True, text=True, check=False
    )
    assert process.returncode == -number
    assert process.stdout == ""


def test_work_that_is_done_anew_anyway_ends_at_once():
    reached = []

    def work():
        reached.append("start")
        signal.raise_signal(signal.SIGTERM)
        reached.append("end")

    with stop_on_signals() as stop:
        assert stop.unless_asked(lambda: 7) == 7
        assert stop.unless_asked(work) is None
        assert stop.unless_asked(work) is None, "asked before"
        signal.raise_signal(signal.SIGTERM)
    assert reached == ["start"]


def test_an_error_in_such_work_is_not_hidden():
    def work():
        raise ValueError("mine")

    with stop_on_signals() as stop, pytest.raises(ValueError, match="mine"):
        stop.unless_asked(work)
    assert not stop._interruptible


def test_a_handler_of_ordinary_errors_does_not_catch_the_interruption():
    assert not issubclass(signals._Interrupted, Exception)
