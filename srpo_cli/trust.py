"""Which Python files the user has agreed to run; a reward plug-in must not be able to run silently.

Agreement is for a file's content: it is asked for once, remembered by the content's sha256 in
``$XDG_CONFIG_HOME/srpo/trusted.json`` (``~/.config`` if not set), which holds one digest for each path, and asked for
again when the file changes. It covers that file and nothing that the file imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from contextlib import suppress
from pathlib import Path

from srpo_cli.errors import UsageError

_this_process: set[str] = set()
_NOWHERE = (OSError, RuntimeError)  # the latter where a user has no home


def trust(path: Path) -> None:
    """Remember that the file as it is now may run; for this process only where it cannot be written down."""
    digest = digest_of(path)
    _this_process.add(digest)
    noted, place = _read_list(), str(path.resolve())
    if noted.get(place) != digest:
        with suppress(*_NOWHERE):
            _write_list(noted | {place: digest})


def check_trusted(path: Path, agreed: bool = False) -> str:
    """The file's sha256; UsageError unless the user has agreed to run it as it is now.

    ``agreed``: the user does so now.
    """
    digest = digest_of(path)
    if not agreed:
        _refuse_untrusted(path, digest)
    return digest


def read_trusted(path: Path) -> tuple[bytes, str]:
    """The file's content and its sha256; UsageError unless the user has agreed to run it.

    What is run must be this content: the file may change between a check and another reading.
    """
    content = _read(path)
    digest = hashlib.sha256(content).hexdigest()
    _refuse_untrusted(path, digest)
    return content, digest


def digest_of(path: Path) -> str:
    """sha256 of a file; UsageError where it cannot be read."""
    return hashlib.sha256(_read(path)).hexdigest()


def _refuse_untrusted(path: Path, digest: str) -> None:
    noted = _read_list()
    if digest in _this_process or digest in noted.values():
        return
    if str(path.resolve()) in noted:
        raise UsageError(f"{path} has changed since you trusted it: read it again, then add --trust")
    raise UsageError(f"{path} is Python code that would run here: read it, then add --trust (asked once)")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read the plug-in {path}: {error.strerror}") from error


def _list() -> Path:
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "srpo" / "trusted.json"


def _read_list() -> dict[str, str]:
    """Digest by absolute path; empty where there is no list or none that can be read, so that it is asked again."""
    try:
        content = json.loads(_list().read_text(encoding="utf-8"))
    except (*_NOWHERE, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_list(noted: dict[str, str]) -> None:
    """Replace the list as a whole: processes that trust the same file at once leave the same list behind."""
    place = _list()
    place.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=place.parent, prefix=".trusted-")  # readable by the user only
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(noted, file, indent=2, sort_keys=True)
        os.replace(temporary, place)
    except BaseException:
        os.unlink(temporary)
        raise
