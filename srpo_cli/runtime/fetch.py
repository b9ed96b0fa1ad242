"""Downloads from the Hugging Face Hub and GitHub, by name and only where the user asked for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import DryRunError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from srpo_cli.errors import MissingError, one_line
from srpo_cli.registry import HubFiles, WebFile
from srpo_cli.runtime.tensor_cache import cache_root


@dataclass(frozen=True)
class GithubFile(WebFile):
    """One file as GitHub serves it; kept under its whole address, since names like ``test.txt`` are common there."""

    @property
    def place(self) -> Path:
        """Where the file is looked for."""
        return cache_root().joinpath("prompts", *self.url.split("/")[2:])


def cached(files: HubFiles, revision: str | None = None) -> Path | None:
    """The folder of the Hub cache that holds all of ``files``; None where one of them is not there."""
    found = [
        try_to_load_from_cache(files.repo, name, repo_type=files.repo_type, revision=revision) for name in files.files
    ]
    if not all(isinstance(path, str) for path in found):
        return None
    return Path(found[0]).parents[len(Path(files.files[0]).parts) - 1]


def download_command(files: HubFiles, revision: str | None = None) -> str:
    """The command that fetches ``files`` into the Hub cache."""
    return files.download if revision is None else f"{files.download} --revision {revision}"


def fetch_file(file: WebFile, announce: Callable[[str], None]) -> Path:
    """Bring a file to its place; otherwise as :func:`fetch`."""
    from torch.hub import download_url_to_file

    announce(f"downloading {file.files[0]} from {file.url}")
    try:
        file.place.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(file.url, str(file.place), hash_prefix=file.sha256 or None, progress=False)
    except Exception as error:  # of whatever library carries the bytes; what is there to do is the same
        raise MissingError(
            f"{file.url} could not be downloaded: {one_line(error)[:120]}; by hand: {file.download}"
        ) from error
    return file.place


def fetch(files: HubFiles, announce: Callable[[str], None], revision: str | None = None) -> Path:
    """Bring ``files`` into the Hub cache and return the folder that they are in.

    ``announce`` is told of the download, by name and size, before it starts; ``revision`` is a commit, None the newest
    one. MissingError with the command that does the same by hand, and the condition of the download if it has one,
    where it fails.
    """
    patterns = {"ignore_patterns": list(files.exclude)} if files.exclude else {"allow_patterns": list(files.files)}
    try:
        size = files.size or _size(files, patterns, revision)
        announce(f"downloading {files.repo} ({size}) from the Hugging Face Hub")
        return Path(snapshot_download(files.repo, repo_type=files.repo_type, revision=revision, **patterns))
    except Exception as error:  # of whatever library carries the bytes; what is there to do is the same
        note = f"; {files.note}" if files.note else ""
        raise MissingError(
            f"{files.repo} could not be downloaded: {_reason(error)}; by hand: "
            f"{download_command(files, revision)}{note}"
        ) from error


def _size(files: HubFiles, patterns: dict[str, list[str]], revision: str | None) -> str:
    """What is still to be downloaded, as people say it."""
    listed = snapshot_download(files.repo, repo_type=files.repo_type, revision=revision, dry_run=True, **patterns)
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
