"""Prompts from a file (txt, jsonl, csv, parquet) or standard input."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterable
from pathlib import Path

from srpo_cli.errors import UsageError, one_line


def read_prompts(source: str) -> list[str]:
    """Read prompts from a file or, for ``-``, from standard input; UsageError if there are none.

    The ending decides: ``.jsonl``, ``.csv`` and ``.parquet`` have a ``prompt`` field, anything else is one prompt a
    line. Standard input is read as jsonl when its first line is an object.
    """
    if source == "-":
        name, kind = "standard input", ".txt"
    else:
        name, kind = source, Path(source).suffix.lower()
    if kind == ".json":
        raise UsageError(f"cannot read prompts from {source}: write it as .jsonl, one object with a prompt a line")
    if kind == ".parquet":
        return _some(_read_parquet(source), name)
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
        text.encode()  # standard input may smuggle bytes that are no text through as lone surrogates
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"cannot read prompts from {name}: {reason}") from error
    text = text.removeprefix("\ufeff")  # a byte order mark, which some editors leave
    if source == "-" and text.lstrip().startswith("{"):
        kind = ".jsonl"
    return _some(_parse(text, kind, name), name)


def _some(found: Iterable[str], name: str) -> list[str]:
    prompts = [prompt.strip() for prompt in found if prompt.strip()]
    if not prompts:
        raise UsageError(f"{name} holds no prompt: give one prompt a line")
    return prompts


def _read_parquet(source: str) -> Iterable[str]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(source) as file:
            if "prompt" not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names) or "none"
                raise UsageError(f"{source} has no column 'prompt': its columns are {columns}")
            prompts = file.read(["prompt"])["prompt"].to_pylist()
    except OSError as error:
        raise UsageError(f"cannot read prompts from {source}: {error.strerror or one_line(error)}") from error
    except ArrowException as error:
        raise UsageError(f"{source} is not Parquet ({one_line(error)})") from error
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str | None):
            raise UsageError(f"{source}, row {number}: prompt is {str(prompt)[:40]}, not a text")
    return (prompt or "" for prompt in prompts)


def _parse(text: str, kind: str, name: str) -> Iterable[str]:
    # Line feeds only: str.splitlines would break a JSON string or a prompt at U+2028 and its like.
    lines = text.split("\n")
    if kind == ".jsonl":
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    prompt = json.loads(line)["prompt"]
                except (ValueError, KeyError, TypeError) as error:
                    raise UsageError(f"{name}, line {number}: not a JSON object with a prompt") from error
                if not isinstance(prompt, str):
                    raise UsageError(f"{name}, line {number}: prompt is {json.dumps(prompt)[:40]}, not a text")
                yield prompt
    elif kind == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))  # a quoted prompt may hold line breaks
        try:
            if "prompt" not in (rows.fieldnames or []):
                columns = ", ".join(rows.fieldnames or ["none"])
                raise UsageError(f"{name} has no column 'prompt': its columns are {columns}")
            yield from (row["prompt"] or "" for row in rows)
        except csv.Error as error:
            raise UsageError(f"{name}, line {rows.line_num}: not CSV ({error})") from error
    else:
        yield from lines
