"""The table of base and tuned that ends a training run."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

_BETTER = {
    "photo_distance": "lower",
    "photo_rate": "higher",
    "caption_accuracy": "higher",
    "sgp_gap": "higher",
}


def print_summary(summary: dict[str, Any]) -> None:
    """Write base and tuned with their 95 % intervals over prompts, and what the run cost."""
    if summary["tuned"]:
        table = Table(box=None, pad_edge=False, header_style="bold")
        table.add_column("")
        best = summary.get("best_step") or summary["steps"]
        tuned = "tuned" if best == summary["steps"] else f"step {best}"
        for name in ("base", tuned):
            table.add_column(f"{name} [95 % interval]", justify="right")
        table.add_column("better is")
        for name in summary["tuned"]:
            cells = [_cell(summary[side].get(name)) for side in ("base", "tuned")]
            table.add_row(name.replace("_", " "), *cells, _BETTER.get(name, ""))
        Console(markup=False, highlight=False).print(table)
    ledger = summary["ledger"]
    print(
        f"{summary['steps']} steps in {summary['seconds']} s (stopped by {summary['stopped_by']}): "
        f"{ledger['forwards']} forwards, {ledger['gradient_passes']} gradient passes, "
        f"{ledger['reward_calls']} reward calls, {ledger['peak_memory_gib']} GiB"
    )


def _cell(interval: dict[str, float] | None) -> str:
    if interval is None:
        return "not measured"
    return f"{interval['mean']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"
