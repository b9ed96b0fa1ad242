"""What ``srpo score --check`` and ``srpo score --calibrate`` print: studies of a reward on the pictures given."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from srpo_cli.cli.output import OutputFormat, RowFormat, RowWriter, note, print_rows
from srpo_cli.errors import SrpoError

if TYPE_CHECKING:  # they import torch
    from srpo_cli.recipes.calibrate import Calibration
    from srpo_cli.recipes.check import Check
    from srpo_cli.recipes.score import Request
    from srpo_cli.runtime.inputs import Picture

CHECKED = 16
"""Pictures that a check looks at: it takes some thirty passes for each, and a slip shows on a few."""

CALIBRATED = 512
"""Pictures that a calibration looks at: they stay in memory."""

PICTURE = Path("words.png")
_WORDS = ("word", "side", "shift", "interval", "shift_sd", "direction", "spread", "quality", "agreement", "understood")


def check_rewards(sources: Iterable[Picture], request: Request, row_format: RowFormat, file: TextIO | None) -> int:
    """Check each reward on its pictures; the number of pictures that could not be read. SrpoError if a reward fails."""
    from srpo_cli.recipes.check import check_reward
    from srpo_cli.recipes.score import judged_together

    groups, unreadable = judged_together(sources, request, CHECKED, note)
    checks = [check_reward(group.reward, group.images, group.prompts) for group in groups]
    if row_format is RowFormat.TABLE:
        _print_checks(checks, file)
    else:
        writer = RowWriter(dict.fromkeys(checks[0].row()), row_format, file)
        for check in checks:
            writer.write(check.row())
    failed = [check for check in checks if check.failures]
    if failed:
        raise SrpoError("; ".join(f"reward {check.reward}: {check.verdict}" for check in failed))
    return unreadable


def calibrate_words(
    sources: Iterable[Picture],
    request: Request,
    row_format: RowFormat,
    file: TextIO | None,
    picture: Path,
) -> int:
    """Calibrate the control words of each reward on its pictures; the number of pictures that could not be read."""
    from srpo_cli.recipes.calibrate import calibrate
    from srpo_cli.recipes.score import judged_together
    from srpo_cli.runtime.folder import disk_errors

    groups, unreadable = judged_together(sources, request, CALIBRATED, note)
    writer = None
    for group in groups:
        words = request.wording(group.reward.name).control_words()
        calibration = calibrate(group.reward, group.images, group.prompts, words)
        writer = _print_calibration(calibration, row_format, file, writer)
        place = picture if len(groups) == 1 else picture.with_stem(f"{picture.stem}-{_plain(group.reward.name)}")
        with disk_errors(place):
            place.parent.mkdir(parents=True, exist_ok=True)
            calibration.save_picture(place)
        note(f"picture: {place}")
    return unreadable


def _print_checks(checks: Sequence[Check], file: TextIO | None) -> None:
    """One line for each fact, one column for each reward."""
    rows = [check.row() for check in checks]
    facts = [fact for fact in rows[0] if fact != "reward" and any(row[fact] not in (None, "") for row in rows)]
    table = [{"check": fact, **{row["reward"]: _shown(row[fact]) for row in rows}} for fact in facts]
    print_rows(table, OutputFormat.TABLE, file=file)


def _print_calibration(
    calibration: Calibration, row_format: RowFormat, file: TextIO | None, writer: RowWriter | None
) -> RowWriter | None:
    """Print one reward's calibration; rows go to ``writer``, or to a new one, which is returned."""
    if row_format is RowFormat.TABLE:
        words = [
            {**row, "interval": f"[{row['shift_low']:+.4f}, {row['shift_high']:+.4f}]"} for row in calibration.words
        ]
        print_rows([{name: _shown(row[name]) for name in _WORDS} for row in words], OutputFormat.TABLE, file=file)
        pairs = [{**row, "interval": f"[{row['gap_low']:+.4f}, {row['gap_high']:+.4f}]"} for row in calibration.pairs]
        print(file=file)
        columns = ("positive", "negative", "gap", "interval", "spread", "win_rate", "redundancy")
        print_rows([{name: _shown(row[name]) for name in columns} for row in pairs], OutputFormat.TABLE, file=file)
    else:
        tables = {"word": calibration.words, "pair": calibration.pairs, "redundancy": calibration.redundancy}
        rows = [{"table": name, "reward": calibration.reward, **row} for name, rows in tables.items() for row in rows]
        writer = writer or RowWriter(dict.fromkeys(key for row in rows for key in row), row_format, file)
        for row in rows:
            writer.write(row)
    for line in calibration.summary():
        note(line)
    return writer


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.001 else f"{value:.4f}"
    return "" if value is None else str(value)


def _plain(name: str) -> str:
    """A reward's name as part of a file's."""
    return re.sub(r"[^\w.-]+", "-", name)
