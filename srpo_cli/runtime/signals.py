"""Ctrl-C and SIGTERM let the step finish and be saved; a second signal ends the process at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Which signal asked the run to stop, if any."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 0 when nothing asked."""
        return 128 + self.signal if self.signal else 0


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catch the first SIGINT or SIGTERM in the returned request; the handlers of before are back afterwards."""
    request = StopRequest()

    def handle(number: int, _frame: FrameType | None) -> None:
        if request.signal:  # the user means it
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        request.signal = signal.Signals(number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
