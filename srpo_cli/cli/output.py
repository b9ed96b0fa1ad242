"""Data goes to stdout, everything else to stderr; tables are for people, JSON is for scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

_WIDE = 400  # columns of a table that is not read on a terminal, so that no cell is broken


class OutputFormat(StrEnum):
    """How a command writes its result."""

    TABLE = "table"
    JSON = "json"


def print_rows(rows: Sequence[dict[str, Any]], output_format: OutputFormat) -> None:
    """Write rows that share their keys, at least one, as a table or as one JSON list."""
    if output_format is OutputFormat.JSON:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    table = Table(*rows[0], box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*(_cell(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else _WIDE, markup=False, highlight=False).print(table)


def note(message: str) -> None:
    """Tell the user something that is not the result, on stderr."""
    typer.echo(message, err=True)


def _cell(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value or "")
