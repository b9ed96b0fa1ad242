"""Data goes to stdout, everything else to stderr; tables are for people, JSON is for scripts."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, TextIO

import typer

from srpo_cli.errors import UsageError

_WIDE = 400  # columns of a table that is not read on a terminal, so that no cell is broken


class OutputFormat(StrEnum):
    """How a command writes its result."""

    TABLE = "table"
    JSON = "json"


class RowFormat(StrEnum):
    """How a command writes many rows, one at a time as they come."""

    TABLE = "table"
    CSV = "csv"
    JSONL = "jsonl"

    @classmethod
    def of(cls, chosen: RowFormat | None, file: Path | None) -> RowFormat:
        """What ``--format`` says, else what the ending of the file says, else a table."""
        if chosen is not None or file is None:
            return chosen or cls.TABLE
        kinds = {".csv": cls.CSV, ".jsonl": cls.JSONL, ".txt": cls.TABLE}
        if file.suffix.lower() not in kinds:
            raise UsageError(f"--output {file}: say the format with --format, or end it in {', '.join(kinds)}")
        return kinds[file.suffix.lower()]


class RowWriter:
    """Writes rows with known columns to a file or stdout, each as soon as it is there.

    Args:
        columns: name to width of the column in a table; None is for text that is shown whole.
        row_format: one of :class:`RowFormat`. In a table a row's ``error`` comes last. JSONL leaves out what a row has
            no value for, and holds a row's further keys too.
        file: where to write; None: stdout.
    """

    def __init__(self, columns: Mapping[str, int | None], row_format: RowFormat, file: TextIO | None = None) -> None:
        self.columns, self.format = columns, row_format
        self._file = file or sys.stdout
        import csv

        self._csv = csv.DictWriter(self._file, list(columns), extrasaction="ignore", lineterminator="\n")
        self._started = False

    def write(self, row: Mapping[str, Any]) -> None:
        if not self._started:
            self._started = True
            if self.format is RowFormat.CSV:
                self._csv.writeheader()
            elif self.format is RowFormat.TABLE:
                self._line({name: name for name in self.columns})
        if self.format is RowFormat.CSV:
            self._csv.writerow(row)
        elif self.format is RowFormat.JSONL:
            import json

            present = {key: value for key, value in row.items() if value is not None}
            self._file.write(json.dumps(present, ensure_ascii=False) + "\n")
        else:
            self._line(row)
        self._file.flush()

    def _line(self, row: Mapping[str, Any]) -> None:
        cells = [
            _number(row.get(name)).rjust(width) if width else str(row.get(name) or "")
            for name, width in self.columns.items()
        ]
        if row.get("error"):
            cells.append(f"error: {row['error']}")
        self._file.write("  ".join(cells).rstrip() + "\n")


def print_rows(rows: Sequence[dict[str, Any]], output_format: OutputFormat, file: TextIO | None = None) -> None:
    """Write rows that share their keys, at least one, as a table or as one JSON list; to stdout if not to a file."""
    if output_format is OutputFormat.JSON:
        import json

        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False), file)
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*rows[0], box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    file = file or sys.stdout
    Console(file=file, width=None if file.isatty() else _WIDE, markup=False, highlight=False).print(table)


def note(message: str) -> None:
    """Tell the user something that is not the result, on stderr."""
    typer.echo(message, err=True)


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str("" if value is None else value)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return _number(value)
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")
