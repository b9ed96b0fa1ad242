"""Where a reward's weights are: a path that the user gave, a cache, or a download announced before it starts."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.hub import download_url_to_file

from srpo_cli.errors import MissingError, SrpoError, one_line
from srpo_cli.registry import REWARD_FILES, HubFiles, WebFile

Announce = Callable[[str], None]
"""Told about a download, by name and size, before it starts."""


@dataclass(frozen=True)
class Weights:
    """The files of a reward, by the names that they have where they are published.

    ``record`` says which weights these are: OWNER/NAME@REVISION of a repository, sha256 of a file.
    """

    files: Mapping[str, Path]
    record: str

    def __getitem__(self, name: str) -> Path:
        return self.files[name]


def find_weights(
    name: str,
    given: str | Path | None = None,
    announce: Announce | None = None,
    sources: tuple[HubFiles | WebFile, ...] | None = None,
) -> Weights:
    """The files that the reward ``name`` needs.

    Args:
        name: the reward, a key of ``registry.REWARD_FILES`` unless ``sources`` is given.
        given: a folder with the files under their published names, or the first of them under any name; what is not
            there is looked for in the caches.
        announce: what to tell of a download before it starts; None: nothing is downloaded.
        sources: what to look for, in place of the registry's.

    Raises MissingError with the command that fetches what is not here.
    """
    path = None if given is None else Path(given)
    if path is not None and not path.exists():
        raise MissingError(f"{name}: there is nothing at {path}; give its weights as --weights {name}=PATH")
    sources = REWARD_FILES[name] if sources is None else sources
    wanted = [(source, file) for source in sources for file in source.files]
    main = wanted[0][1]
    files: dict[str, Path] = {}
    records: list[str] = []
    for source, file in wanted:
        local = _beside(path, file, is_main=file == main)
        files[file] = local or _cached(source, file) or _fetch(name, source, file, announce)
        if local or isinstance(source, WebFile):
            records.append(f"{Path(file).name} sha256:{sha256(files[file])}")
        else:
            records.append(f"{source.repo}@{_revision(files[file])}")
    return Weights(files, "; ".join(dict.fromkeys(records)))


def read_state(weights: Path) -> dict[str, Tensor]:
    """The state dict of a checkpoint; pickles are read with ``weights_only``, so that no code in them runs."""
    if not weights.is_file():
        raise MissingError(f"Reward weights {weights} not found.")
    try:
        if weights.suffix == ".safetensors":
            return load_file(weights)
        state = torch.load(weights, map_location="cpu", weights_only=True)
        return state.get("state_dict", state)
    except pickle.UnpicklingError as error:  # torch's own message advises to run the file's code
        raise SrpoError(f"Cannot read reward weights {weights}: no checkpoint of plain tensors") from error
    except (
        SafetensorError,
        RuntimeError,
        OSError,
        EOFError,
        AttributeError,
    ) as error:
        raise SrpoError(f"Cannot read reward weights {weights}: {one_line(error)}") from error


@lru_cache(maxsize=64)
def sha256(path: Path) -> str:
    """Digest of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _beside(path: Path | None, file: str, *, is_main: bool) -> Path | None:
    """The place of ``file`` at or beside the path that the user gave."""
    if path is None:
        return None
    if path.is_file() and is_main:
        return path
    folder = path if path.is_dir() else path.parent
    return next((place for place in (folder / file, folder / Path(file).name) if place.is_file()), None)


def _cached(source: HubFiles | WebFile, file: str) -> Path | None:
    if isinstance(source, WebFile):
        return source.place if source.place.is_file() else None
    found = try_to_load_from_cache(source.repo, file)
    return Path(found) if isinstance(found, str) else None


def _fetch(name: str, source: HubFiles | WebFile, file: str, announce: Announce | None) -> Path:
    missing = f"{name} needs {file} ({source.size}), which is not here; fetch it with: {source.download}"
    if announce is None:
        raise MissingError(missing)
    announce(f"downloading {file} ({source.size}) of {name} from {source.origin}")
    try:
        if isinstance(source, HubFiles):
            return Path(hf_hub_download(source.repo, file))
        source.place.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(source.url, str(source.place), hash_prefix=source.sha256 or None, progress=False)
        return source.place
    except Exception as error:  # of whatever library carries the bytes; what is there to do is the same
        raise MissingError(f"{missing} (the download failed: {download_failure(error)})") from error


def download_failure(error: Exception) -> str:
    """Why a download failed, in a few words."""
    if isinstance(error, LocalEntryNotFoundError):  # its own text is a paragraph of advice
        return "the Hub cannot be reached"
    return one_line(error)[:120]


def _revision(file: Path) -> str:
    """The commit in the path of a file in the Hub cache: .../snapshots/REVISION/FILE."""
    parts = file.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else "unknown"
