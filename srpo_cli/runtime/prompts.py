"""Prompts from arguments, a file (txt, jsonl, csv) or standard input."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from srpo_cli.errors import UsageError


def read_prompts(source: str) -> list[str]:
    """Read prompts from a file or, for ``-``, from standard input; UsageError if there are none.

    The ending decides: ``.jsonl`` and ``.csv`` have a ``prompt`` field, anything else is one prompt a line.
    Standard input is read as jsonl when its first line is an object.
    """
    if source == "-":
        text, name, kind = sys.stdin.read(), "standard input", ".txt"
        kind = ".jsonl" if text.lstrip().startswith("{") else kind
    else:
        path = Path(source)
        try:
            text, name, kind = path.read_text(encoding="utf-8-sig"), source, path.suffix.lower()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not UTF-8 text"
            raise UsageError(f"cannot read prompts from {source}: {reason}") from error
    prompts = [prompt.strip() for prompt in _parse(text, kind, name) if prompt.strip()]
    if not prompts:
        raise UsageError(f"{name} holds no prompt: give one prompt a line")
    return prompts


def _parse(text: str, kind: str, name: str) -> Iterable[str]:
    if kind == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    yield str(json.loads(line)["prompt"])
                except (ValueError, KeyError, TypeError) as error:
                    raise UsageError(f"{name}, line {number}: not a JSON object with a prompt") from error
    elif kind == ".csv":
        rows = csv.DictReader(text.splitlines())
        if "prompt" not in (rows.fieldnames or []):
            raise UsageError(f"{name} has no column 'prompt': its columns are {', '.join(rows.fieldnames or ['none'])}")
        yield from (row["prompt"] or "" for row in rows)
    else:
        yield from text.splitlines()
