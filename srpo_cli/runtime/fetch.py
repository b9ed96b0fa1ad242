"""Downloads from the Hugging Face Hub, by name and only where the user asked for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import DryRunError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from srpo_cli.errors import MissingError, one_line
from srpo_cli.registry import HubFiles


def fetch(files: HubFiles, announce: Callable[[str], None]) -> Path:
    """Bring ``files`` into the Hub cache and return the folder that they are in.

    ``announce`` is told of the download, by name and size, before it starts. MissingError with the command that does
    the same by hand, and the condition of the download if it has one, where it fails.
    """
    patterns = {"ignore_patterns": list(files.exclude)} if files.exclude else {"allow_patterns": list(files.files)}
    try:
        size = files.size or _size(files, patterns)
        announce(f"downloading {files.repo} ({size}) from the Hugging Face Hub")
        return Path(snapshot_download(files.repo, repo_type=files.repo_type, **patterns))
    except Exception as error:  # of whatever library carries the bytes; what is there to do is the same
        note = f"; {files.note}" if files.note else ""
        raise MissingError(
            f"{files.repo} could not be downloaded: {_reason(error)}; by hand: {files.download}{note}"
        ) from error


def _size(files: HubFiles, patterns: dict[str, list[str]]) -> str:
    """What is still to be downloaded, as people say it."""
    listed = snapshot_download(files.repo, repo_type=files.repo_type, dry_run=True, **patterns)
    size = float(sum(file.file_size or 0 for file in listed if file.will_download))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _reason(error: Exception) -> str:
    """Why it failed, in a few words; the libraries' own texts are paragraphs of advice."""
    if isinstance(error, DryRunError) and isinstance(
        error.__cause__, Exception
    ):  # of which there was no size to be had
        error = error.__cause__
    if isinstance(error, GatedRepoError):
        return "access to it has not been granted"
    if isinstance(error, RepositoryNotFoundError):
        return "there is no such repository, or it is private"
    if isinstance(error, (LocalEntryNotFoundError, ConnectionError)):
        return "the Hub cannot be reached"
    return one_line(error)[:120]
