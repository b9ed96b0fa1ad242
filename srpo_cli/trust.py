"""Which Python files the user has agreed to run; a reward plug-in must not be able to run silently.

Agreement is for a file's content: it is asked for once, remembered by the content's sha256 in
``$XDG_CONFIG_HOME/srpo/trusted`` (``~/.config`` if not set), and asked for again when the file changes.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from srpo_cli.errors import UsageError

_this_process: set[str] = set()


def trust(path: Path) -> None:
    """Remember that the file as it is now may run; for this process only where it cannot be written down."""
    digest = digest_of(path)
    _this_process.add(digest)
    if not _is_noted(digest):
        try:
            _list().parent.mkdir(parents=True, exist_ok=True)
            with _list().open("a", encoding="utf-8") as file:
                file.write(f"{digest}  {path.resolve()}\n")
        except OSError:
            pass


def check_trusted(path: Path) -> str:
    """The file's sha256; UsageError unless the user has agreed to run it as it is now."""
    digest = digest_of(path)
    if digest not in _this_process and not _is_noted(digest):
        raise UsageError(f"{path} is Python code that would run here: read it, then add --trust (asked once)")
    return digest


def digest_of(path: Path) -> str:
    """sha256 of a file; UsageError where it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UsageError(f"cannot read the plug-in {path}: {error.strerror}") from error


def _list() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "srpo" / "trusted"


def _is_noted(digest: str) -> bool:
    try:
        return any(line.startswith(digest) for line in _list().read_text(encoding="utf-8").splitlines())
    except OSError:
        return False
