"""A YAML file of nested sections, such as a benchmark's: how it is read, and its mistakes, each as one line."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from srpo_cli.config import dialect
from srpo_cli.errors import UsageError


def read_keys(path: Path, kind: str, origin: str, example: str) -> dict[str, Any]:
    """The keys of a file; UsageError where it cannot be read, or holds something else.

    Args:
        path: of the file.
        kind: what it is the file of.
        origin: what messages say that a key is from.
        example: keys that such a file could hold.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UsageError(f"{kind.capitalize()} file {str(path)!r} does not exist.") from error
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"{kind.capitalize()} file {str(path)!r} cannot be read: {reason}.") from error
    content = dialect.parse(text, origin)
    if not isinstance(content, dict):
        raise UsageError(f"{origin} should hold keys with values, such as `{example}`, not {short(content)}.")
    return content


class Keys:
    """The keys that a file may hold, by dotted name; numbers of rows are left out.

    Args:
        section: the outermost section.
        also: further keys beside its own, which are read before it is made.
    """

    def __init__(self, section: type[BaseModel], also: tuple[str, ...] = ()) -> None:
        self._meanings = dict(_walk(section)) | dict.fromkeys(also, "")
        self._sections = {key.rpartition(".")[0] for key in self._meanings}

    def refuse_unknown(self, content: Any, origin: str, prefix: str = "") -> None:
        """UsageError that names the first key that is not known, and those that may have been meant."""
        if isinstance(content, list):
            for row in content:
                self.refuse_unknown(row, origin, prefix)
        for name, value in content.items() if isinstance(content, dict) else ():
            key = f"{prefix}{name}"
            if key not in self._meanings:
                raise UsageError(self._unknown(key, origin))
            if key in self._sections:
                self.refuse_unknown(value, origin, f"{key}.")

    def _unknown(self, key: str, origin: str) -> str:
        section, _, last = key.rpartition(".")
        known = list(self._meanings)
        near = get_close_matches(last, [name.rpartition(".")[2] for name in known], n=1)
        meant = [name for name in known if name.rpartition(".")[2] in near]
        meant = [name for name in meant if name.rpartition(".")[0] == section] or meant
        beside = [name for name in known if name.rpartition(".")[0] == section]
        hint = f"Did you mean {' or '.join(meant)}?" if meant else f"There are {', '.join(beside)}."
        return f"Unknown key {key!r} from {origin}. {hint}"

    def first_problem(self, error: ValidationError, content: dict[str, Any], origin: str) -> str:
        """The first thing that is wrong with known keys: which, the value seen, what it should be."""
        problems = error.errors(include_url=False)
        more = f" ({len(problems) - 1} more after it.)" if len(problems) > 1 else ""
        location, message = problems[0]["loc"], problems[0]["msg"]
        message = re.sub("^(Value error, |(Input|Tuple|String) (?=should))", "", message)
        message = message.replace("a valid tuple", "a list").replace(" after validation", "")
        message = re.sub(r"a valid dictionary( or instance of \w+)?", "keys with values", message)
        key = ".".join(str(part) for part in location)
        meaning = self._meaning([part for part in location if isinstance(part, str)])
        if problems[0]["type"] == "missing":
            return f"{key} is missing from {origin}.{meaning}{more}"
        value: Any = content
        try:
            for part in location:
                value = value[part]
        except (KeyError, IndexError, TypeError):
            value = None
        is_check = problems[0]["type"] == "value_error"
        if is_check and (not location or isinstance(value, dict)):  # of several keys, which it names
            return f"{message}, in {origin}.{more}"
        return f"{key} is {short(value)}, from {origin}: {message}.{meaning}{more}"

    def _meaning(self, names: list[str]) -> str:
        """What is said of the innermost of nested keys that has a description."""
        keys = (".".join(names[:length]) for length in range(len(names), 0, -1))
        text = next((self._meanings[key] for key in keys if self._meanings.get(key)), "")
        return f" Meaning: {text}." if text else ""


def _walk(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, description) of everything below ``section``."""
    for name, field in section.model_fields.items():
        yield prefix + name, field.description or ""
        for inner in _sections(field.annotation):
            yield from _walk(inner, f"{prefix}{name}.")


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from _sections(part)


def short(value: Any) -> str:
    """``value`` on one line, at most 80 characters of it."""
    text = dialect.inline(value)
    return text if len(text) <= 80 else f"{text[:79]}…"
