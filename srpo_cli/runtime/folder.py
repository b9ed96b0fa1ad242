"""A run is a folder: its configuration, environment, metrics, samples, checkpoints and summary."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from srpo_cli.errors import SrpoError, UsageError

CONFIG, ENVIRONMENT, METRICS, SUMMARY = "config.yaml", "environment.json", "metrics.jsonl", "summary.json"
PROMPTS = "prompts.jsonl"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
_PACKAGES = (
    "srpo-cli",
    "torch",
    "torchvision",
    "diffusers",
    "transformers",
    "open_clip_torch",
    "safetensors",
)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep a folder for this process alone, so that no other one writes there beside it; its end gives it back.

    UsageError where another process has it. Where a disk knows no locks nothing is kept.
    """
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"{folder} is in use by another process of srpo: wait for it, or end it") from error
        except OSError:
            pass
        yield
    finally:
        os.close(place)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn what a disk refuses, most often because it is full or read-only, into one line that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            remedy = "free some space, then resume the run or repeat the command"
            raise SrpoError(f"the disk of {path} is full: {remedy}") from error
        if error.errno in _FORBIDDEN:
            raise UsageError(f"cannot write to {path} ({error.strerror}): choose another --output") from error
        raise SrpoError(f"cannot write to {path} ({error.strerror or error})") from error


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or a crash, sees the old one or the new one and nothing between."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path.parent):
        try:
            with open(temporary, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def environment() -> dict[str, Any]:
    """Versions and platform of this process."""
    packages = {}
    for name in _PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": packages,
        "command": sys.argv,
    }


class RunFolder:
    """The folder of one training run.

    Args:
        path: the folder; made by :meth:`start`, there already for :meth:`go_on`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.prompts = path / PROMPTS

    def check_free(self) -> None:
        """UsageError where a run, or anything else, already is, and where nothing can be written."""
        with disk_errors(self.path):
            if (self.path / CONFIG).exists():
                raise UsageError(
                    f"{self.path} holds another run: go on with it by `srpo train --resume {self.path}`, "
                    "or choose another --output"
                )
            if self.path.exists() and not self.path.is_dir():
                raise UsageError(f"{self.path} is a file: choose another --output")
            if self.path.exists() and any(self.path.iterdir()):
                raise UsageError(f"{self.path} is not empty and holds no run: choose another --output")
            place = next(place for place in (self.path, *self.path.absolute().parents) if place.exists())
            if not os.access(place, os.W_OK | os.X_OK):
                raise UsageError(f"cannot write to {place}: choose another --output")

    def start(self, config_text: str, **facts: Any) -> None:
        """Make the folder of a new run; ``facts`` are noted beside the environment."""
        self.check_free()
        with disk_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path / CONFIG, config_text)
        self.write_json(ENVIRONMENT, {**environment(), **facts})
        self._make_folders()

    def go_on(self, config_text: str) -> None:
        """Prepare an earlier run to be continued, maybe to another length than it was begun with."""
        if (self.path / CONFIG).read_text() != config_text:
            write_atomically(self.path / CONFIG, config_text)
        self._make_folders()

    def _make_folders(self) -> None:
        with disk_errors(self.path):
            for folder in (self.samples, self.checkpoints):
                folder.mkdir(exist_ok=True)

    def keep_prompts(self, prompts: Sequence[str]) -> None:
        """Write prompts that nobody could read again."""
        rows = [json.dumps({"prompt": prompt}, ensure_ascii=False) + "\n" for prompt in prompts]
        write_atomically(self.prompts, "".join(rows))

    def environment(self) -> dict[str, Any]:
        """Where the run was begun; SrpoError if that cannot be read."""
        try:
            return {"packages": {}, **json.loads((self.path / ENVIRONMENT).read_text())}
        except (OSError, ValueError, TypeError) as error:
            raise SrpoError(
                f"{self.path / ENVIRONMENT} cannot be read, so that going on may not be exact: start a new run"
            ) from error

    def write_json(self, name: str, value: Any) -> None:
        write_atomically(self.path / name, json.dumps(value, indent=2) + "\n")

    def log(self, record: dict[str, Any]) -> None:
        """Append one record to ``metrics.jsonl``."""
        with disk_errors(self.path), open(self.path / METRICS, "a") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())  # the records of a checkpoint's steps must not be younger than it

    def records(self) -> list[dict[str, Any]]:
        """All complete records of ``metrics.jsonl``; a line that a crash cut off is left out."""
        path = self.path / METRICS
        records = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                records.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return records

    def truncate_log(self, step: int) -> None:
        """Drop the records after ``step``, which a resumed run will write again."""
        kept = [json.dumps(record) + "\n" for record in self.records() if record["step"] <= step]
        write_atomically(self.path / METRICS, "".join(kept))


def config_digest(config_json: str) -> str:
    """Short name of a configuration, to tell whether a checkpoint belongs to it."""
    return hashlib.sha256(config_json.encode()).hexdigest()[:16]
