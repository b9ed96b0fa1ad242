"""Names that a user may write, where the code behind them is, and where their weights come from.

A registry maps a name to ``"module:attribute"`` and imports it on :meth:`Registry.get`, so that listing,
checking and ``--help`` never load torch. A new model, reward or algorithm is one line here, one file and one
test.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import Any

from srpo_cli.errors import UsageError


class Registry:
    """Lazy ``name -> "module:attribute"`` table of one kind of part.

    A key may be a shell pattern ("clip:*", "*/*"): it stands for a family of names and is tried after the
    exact names, in the order given. ``families`` says what a user may write for a pattern.
    """

    def __init__(self, kind: str, targets: dict[str, str], families: dict[str, str] | None = None) -> None:
        self.kind = kind
        self._targets = targets
        self._families = families or {}

    def find(self, name: str) -> str:
        """The target of ``name`` without importing it; ``UsageError`` with a suggestion if unknown."""
        if name in self._targets:
            return self._targets[name]
        for pattern, target in self._targets.items():
            if fnmatchcase(name, pattern):
                return target
        raise UsageError.unknown(self.kind, name, [self._families.get(key, key) for key in self._targets])

    def get(self, name: str) -> Any:
        """Import and return what ``name`` stands for."""
        module, attribute = self.find(name).split(":")
        return getattr(import_module(module), attribute)


MODELS = Registry(
    "model",
    {
        "flux.1-dev": "srpo_cli.models.flux:load_flux",
        "miniature": "srpo_cli.models.flux:load_flux",
        "*/*": "srpo_cli.models.flux:load_flux",
    },
    families={"*/*": "a folder, or OWNER/NAME of the Hugging Face Hub"},
)

REWARDS = Registry(
    "reward",
    {
        "hpsv2.1": "srpo_cli.rewards.hps:load_hps",
        "miniature": "srpo_cli.rewards.miniature:load_miniature",
        "clip:*": "srpo_cli.rewards.clip:load_open_clip",
    },
    families={"clip:*": "clip:ARCHITECTURE"},
)

ALGORITHMS = Registry("algorithm", {"srpo": "srpo_cli.algorithms.srpo:SRPO"})


def check_parts(model: str, reward: str, algorithm: str) -> None:
    """Raise ``UsageError`` for the first name that stands for nothing; imports none of them."""
    MODELS.find(model)
    REWARDS.find(reward)
    ALGORITHMS.find(algorithm)


@dataclass(frozen=True)
class HubFiles:
    """Files on the Hugging Face Hub that a named model or reward needs before it can run.

    ``exclude`` names what the repository holds beside them; ``note`` is a condition of the download; ``size`` is
    that of all files together.
    """

    repo: str
    files: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    note: str = ""
    size: str = ""

    @property
    def origin(self) -> str:
        """Where the files are, for people."""
        return self.repo

    @property
    def download(self) -> str:
        """The command that fetches the files into the Hub cache."""
        if self.exclude:
            return " ".join(["hf download", self.repo, *(f"--exclude {name}" for name in self.exclude)])
        return " ".join(["hf download", self.repo, *self.files])


@dataclass(frozen=True)
class WebFile:
    """One file with an address of its own; kept where ``torch.hub`` keeps such files.

    ``sha256`` is that of its bytes, empty where it is not known.
    """

    url: str
    size: str
    sha256: str = ""
    note: str = ""

    @property
    def files(self) -> tuple[str, ...]:
        """The file's name, as a tuple of one."""
        return (self.url.rpartition("/")[2],)

    @property
    def origin(self) -> str:
        """The site that it comes from."""
        return self.url.split("/")[2]

    @property
    def place(self) -> Path:
        """Where the file is looked for."""
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        home = os.environ.get("TORCH_HOME") or Path(cache) / "torch"
        return Path(home) / "hub" / "checkpoints" / self.files[0]

    @property
    def download(self) -> str:
        """The command that fetches the file to where it is looked for."""
        return f"curl -L --create-dirs -o {self.place} {self.url}"


HUB_FILES = {
    "flux.1-dev": HubFiles(
        repo="black-forest-labs/FLUX.1-dev",
        files=(
            "model_index.json",
            "scheduler/scheduler_config.json",
            "text_encoder/model.safetensors",
            "text_encoder_2/model-00001-of-00002.safetensors",
            "text_encoder_2/model-00002-of-00002.safetensors",
            "tokenizer/vocab.json",
            "tokenizer_2/tokenizer.json",
            "transformer/diffusion_pytorch_model-00001-of-00003.safetensors",
            "transformer/diffusion_pytorch_model-00002-of-00003.safetensors",
            "transformer/diffusion_pytorch_model-00003-of-00003.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
        ),
        exclude=("flux1-dev.safetensors", "ae.safetensors"),
        note="gated: first accept its licence at https://huggingface.co/black-forest-labs/FLUX.1-dev "
        "and run `hf auth login`",
    ),
}
"""What a named model needs."""

REWARD_FILES: dict[str, tuple[HubFiles | WebFile, ...]] = {
    "hpsv2.1": (HubFiles("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), size="1.97 GB"),),
}
"""What a named reward needs; the first file of the first entry is the one that ``--weights NAME=FILE`` stands for."""
