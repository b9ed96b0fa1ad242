"""Progress on stderr: a live display on a terminal, a plain line now and then anywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

_PLAIN_EVERY = 15.0  # seconds between plain lines


class StepProgress:
    """Shows how far a run is, how fast it goes and what it measures.

    Args:
        total: steps in the run.
        done: steps that an earlier part of the run did.
        quiet: show nothing.
    """

    def __init__(self, total: int, done: int = 0, quiet: bool = False) -> None:
        self.total, self.done, self.quiet = total, done, quiet
        self._first, self._started, self._last = done, time.monotonic(), -math.inf
        self._live: Live | None = None
        if not quiet and sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[rate]}  eta"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task("", total=total, completed=done, rate="")
            self._values = Text(no_wrap=True, overflow="ellipsis")
            # Two lines: beside a bar and a rate the values have no room on a terminal of 80 columns.
            self._live = Live(Group(self._bar, self._values), console=Console(stderr=True), refresh_per_second=4)

    def __enter__(self) -> StepProgress:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def update(self, step: int, values: Mapping[str, float | None], last: bool = False) -> None:
        """Report that ``step`` steps are done, the ``last`` ones at once; values that are None are left out."""
        self.done = step
        seconds = (time.monotonic() - self._started) / max(step - self._first, 1)
        text = "  ".join(f"{name} {value:.3f}" for name, value in values.items() if value is not None)
        if self._live:
            self._bar.update(self._task, completed=step, rate=f"{seconds:.2f} s/step")
            self._values.plain = text
        elif not self.quiet and (last or step == self.total or time.monotonic() - self._last >= _PLAIN_EVERY):
            self._last = time.monotonic()
            eta = seconds * (self.total - step)
            print(
                f"step {step}/{self.total}  {seconds:.2f} s/step  eta {eta:.0f} s  {text}",
                file=sys.stderr,
                flush=True,
            )


class CountProgress:
    """A bar of how many are done, on stderr and only on a terminal; gone when it ends.

    Args:
        total: how many there will be; None: not known.
        what: the things that are counted.
    """

    def __init__(self, total: int | None, what: str) -> None:
        self._bar = None
        if sys.stderr.isatty():
            columns = (TextColumn(what), MofNCompleteColumn(), BarColumn(bar_width=24), TimeRemainingColumn())
            # Rows on the same terminal are written above the bar; rows that go elsewhere must not be led here.
            together = sys.stdout.isatty()
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=together)
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> CountProgress:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, done: int) -> None:
        """Show that ``done`` are done."""
        if self._bar:
            self._bar.update(self._task, completed=done)
