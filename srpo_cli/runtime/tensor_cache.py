"""Tensors on disk that are costly to make and always come out alike: encoded prompts, latents of pictures."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from srpo_cli.runtime.folder import disk_errors


def cache_root() -> Path:
    """Where what can be made again is kept: ``$SRPO_CACHE``, ``$XDG_CACHE_HOME/srpo`` or ``~/.cache/srpo``."""
    if own := os.environ.get("SRPO_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "srpo"


class TensorCache:
    """One safetensors file for each key, named by the key's sha256; any number of processes may share a folder.

    Args:
        folder: made when the first tensors are put; None: ``tensors`` in :func:`cache_root`.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = cache_root() / "tensors" if folder is None else folder

    def get(self, key: str) -> dict[str, Tensor] | None:
        """What was put under ``key``, on the CPU; None for nothing, and for a file that is damaged, which goes."""
        path = self._path(key)
        try:
            return load(path.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except SafetensorError:
            path.unlink(missing_ok=True)
            return None

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep ``tensors`` under ``key``: readers see all of them or none. SrpoError where the disk refuses them."""
        path = self._path(key)
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
        with disk_errors(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")  # two processes may put at once
            try:
                with open(descriptor, "wb") as file:
                    file.write(content)
                os.replace(temporary, path)
            except BaseException:
                os.unlink(temporary)
                raise

    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self.folder.glob("*/*.safetensors"))

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(key.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.safetensors"
