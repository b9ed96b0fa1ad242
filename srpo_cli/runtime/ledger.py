"""What a run cost, counted where it is spent."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import asdict, dataclass, field

import torch


@dataclass
class Ledger:
    """Counts of one run, in pictures: a batch of eight forwards counts eight.

    ``forwards`` are transformer calls without gradient, ``gradient_passes`` those with a backward,
    ``reward_calls`` pictures that the reward judged, ``updates`` optimizer steps. Evaluation is not part of the
    method's cost and is not counted; measuring the target is. ``seconds`` are of wall-clock time in both,
    ``cpu_seconds`` the processor's in all threads of this process, which other work on the machine stretches less.
    """

    rollouts: int = 0
    forwards: int = 0
    gradient_passes: int = 0
    reward_calls: int = 0
    updates: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _started: tuple[float, float] | None = field(default=None, repr=False)

    def __enter__(self) -> Ledger:
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, processor = self._started
        self.seconds += time.perf_counter() - wall
        self.cpu_seconds += time.process_time() - processor
        self._started = None

    def state_dict(self) -> dict[str, float]:
        """The counts, for a checkpoint."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("_")}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Go on counting from :meth:`state_dict`."""
        for name, value in state.items():
            setattr(self, name, value)

    def report(self) -> dict[str, float]:
        """The counts with the process's peak memory in GiB: of the accelerator where there is one."""
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated() / 2**30
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # bytes on macOS, KiB elsewhere
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
        return {**self.state_dict(), "peak_memory_gib": round(peak, 3)}
