"""The ratios to reach, and what a measurement comes to beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Target:
    """One ratio.

    Attributes:
        what: what is measured, with its unit.
        gate, good, excellent: limits; a measurement must be on the right side of ``gate``. None: there is none.
        higher: whether more is better.
    """

    what: str
    gate: float
    good: float
    excellent: float | None
    higher: bool = False

    def verdict(self, measured: float) -> str:
        """The best limit that is met, "missed" where none is."""
        for name, limit in (("excellent", self.excellent), ("good", self.good), ("gate", self.gate)):
            if limit is not None and (measured >= limit if self.higher else measured <= limit):
                return name
        return "missed"


TARGETS = {
    "N1": Target("no-grad transformer samples per rollout step and gradient pair", 1, 1, 0),
    "N2": Target("calls of the transformer with a gradient per pair of branches", 2, 1, None),
    "N3": Target("calls of the reward's text tower per warm step", 0, 0, None),
    "N4": Target("reads of the device by the host per optimizer step", 4, 2, 1),
    "N5": Target("FLOPs / analytic minimum", 1.02, 1.01, 0.97),
    "N6": Target("all-gathers per block and optimizer step", 5, 2, 1),
    "T1": Target("CPU time / bare loop", 1.10, 1.05, 1.02),
    "T2": Target("aten operators / bare loop", 1.05, 1.02, 1.00),
    "T3": Target("CPU time of the upstream-faithful loop / ours", 1.25, 1.35, 1.5, higher=True),
    "T4": Target("seconds of a full step at 720 px / its FLOPs at 798 TFLOP/s", 2.2, 1.9, 1.55),
    "T5": Target("share of 798 TFLOP/s that a forward pass reaches", 0.45, 0.55, 0.70, higher=True),
    "T6": Target("seconds of a step without rollout / with", 0.30, 0.27, 0.256),
    "E1": Target("relative difference to the bare loop: what is logged, and gradients", 1e-6, 1e-6, 0),
    "M1": Target("bytes kept by the decoder, checkpointed / plain", 0.20, 0.15, 0.14),
    "M2": Target("full-parameter on one H100, exact float32 master, GiB", 76, 62, 58),
    "M3": Target("LoRA on one 24 GB GPU at 720 px, GiB", 22.5, 20, 15),
    "M4": Target("FSDP2 on eight H100, GiB each", 64, 58, 52),
    "C1": Target("`srpo --help` / `--help` of an empty Typer app", 1.5, 1.2, 1.1),
    "S1": Target("GB exchanged per rank and optimizer step, 8 GPUs", 150, 63, 42),
    "P1": Target("cosine of 50 updates with those of float32 AdamW", 0.99, 0.999, 1.0, higher=True),
}
"""By the id of docs/performance.md."""


@dataclass(frozen=True)
class Row:
    """A measurement of one target in one scene; ``note`` says what the number alone does not."""

    id: str
    scene: str
    measured: float
    note: str = ""
    good: float | None = None
    """In place of the target's, where it depends on the scene."""

    @property
    def target(self) -> Target:
        target = TARGETS[self.id]
        return target if self.good is None else Target(**{**asdict(target), "good": self.good})

    @property
    def verdict(self) -> str:
        return self.target.verdict(self.measured)

    def to_json(self) -> dict[str, Any]:
        target = asdict(self.target)
        return {"id": self.id, "scene": self.scene, "measured": self.measured, **target} | {
            "verdict": self.verdict,
            "note": self.note,
        }


def table(rows: Sequence[Row]) -> str:
    """The rows for people, in columns."""
    head = ("id", "scene", "ratio", "measured", "gate", "good", "excellent", "verdict", "note")
    cells = [head]
    for row in rows:
        target = row.target
        limits = ("-" if limit is None else f"{limit:g}" for limit in (target.gate, target.good, target.excellent))
        cells.append((row.id, row.scene, target.what, f"{row.measured:.6g}", *limits, row.verdict, row.note))
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join(lines)
