"""Ctrl-C, SIGTERM and a closed terminal let the step finish and be saved; asking again ends the process at once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")

_ECHO = 1.0  # seconds: a launcher passes on what a terminal has already sent to the whole group, and nobody asked twice


class _Interrupted(BaseException):
    """Ends work that is not worth finishing; no handler of ordinary errors may catch it."""


class StopRequest:
    """Which signal asked the run to stop, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._asked_at = 0.0
        self._interruptible = False

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP, 0 when nothing asked."""
        return 128 + self.signal if self.signal else 0

    def unless_asked(self, work: Callable[[], T]) -> T | None:
        """Do work that a resumed run does anew; a signal, now or before, ends it at once, and the result is None."""
        if self.signal:
            return None
        try:
            self._interruptible = True
            try:
                return work()
            finally:
                self._interruptible = False
        except _Interrupted:
            return None

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """The signal handler: note the first signal, obey the second."""
        if self.signal is None:
            self.signal, self._asked_at = signal.Signals(number), time.monotonic()
            if self._interruptible:
                raise _Interrupted
        elif time.monotonic() - self._asked_at > _ECHO:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch the first SIGINT, SIGTERM or SIGHUP in the returned request; the handlers of before are back afterwards.

    A SIGHUP that was ignored, as ``nohup`` has it, still is.
    """
    request = StopRequest()
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, request.handle) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
