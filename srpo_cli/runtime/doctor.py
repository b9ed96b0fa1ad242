"""What would run here: versions, a torchvision that fits its torch, devices, disk, and weights.

Nothing is downloaded and nothing is written. A check that fails says what to type next.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from srpo_cli.errors import UsageError
from srpo_cli.miniature import WEIGHTS
from srpo_cli.registry import (
    HUB_FILES,
    MINIATURE_REWARDS,
    PROMPT_FILES,
    REWARD_FILES,
    REWARDS,
    HubFiles,
    PluginFile,
    WebFile,
)
from srpo_cli.trust import check_trusted

PACKAGES = ("torch", "torchvision", "diffusers", "transformers", "huggingface_hub", "open_clip_torch")
EXTRAS = {
    "bitsandbytes": "for memory.adam=8bit and lora.base=nf4",
    "starlette": "for srpo eval rate serve, with uvicorn",
    "krippendorff": "for srpo eval rate analyze, with choix",
    "torch-fidelity": "for fid and kid",
}
"""Packages that only some settings need."""

ATTENTION = {
    "flash_attn": "FlashAttention 2 (flash)",
    "flash_attn_interface": "FlashAttention 3 (_flash_3)",
    "sageattention": "SageAttention (sage), without a gradient",
    "xformers": "xFormers (xformers)",
}
"""Packages that bring an attention backend, and what ``model.attention`` calls it."""

_GIB = 2**30


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; ``remedy`` is what to type where it is not ``ok``."""

    subject: str
    ok: bool
    found: str
    remedy: str = ""


@dataclass(frozen=True)
class Device:
    """An accelerator that torch can use; ``memory`` in bytes, 0 where torch does not say."""

    name: str
    model: str
    memory: int


def accelerators() -> list[Device]:
    """The accelerators that torch sees; imports torch."""
    import torch

    if not torch.accelerator.is_available():
        return []
    kind = torch.accelerator.current_accelerator().type
    properties_of = getattr(torch.get_device_module(kind), "get_device_properties", None)
    devices = []
    for index in range(torch.accelerator.device_count()):
        properties = properties_of(index) if properties_of else None
        model, memory = getattr(properties, "name", kind), getattr(properties, "total_memory", 0)
        devices.append(Device(f"{kind}:{index}", model, memory))
    return devices


def check_packages() -> list[Check]:
    """Python and the packages that everything rests on."""
    return [Check("python", ok=True, found=platform.python_version()), *map(_check_package, PACKAGES)]


def check_extras() -> list[Check]:
    """The packages that only some settings need, and the attention backends beside torch's own."""
    checks = []
    for name, use in EXTRAS.items():
        check = _check_package(name)
        checks.append(replace(check, found=f"{check.found}, {use}"))
    found = [label for package, label in ATTENTION.items() if find_spec(package)]
    return [*checks, Check("attention", ok=True, found=", ".join(["torch's own (native)", *found]))]


def check_loads(package: str) -> Check:
    """Import ``package`` in a process of its own; torchvision built for another torch fails there."""
    outcome = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True, check=False)
    subject = f"{package} loads"
    if outcome.returncode == 0:
        return Check(subject, ok=True, found="yes")
    last_line = (outcome.stderr.strip() or f"exit code {outcome.returncode}").splitlines()[-1]
    return Check(subject, ok=False, found=last_line, remedy=_reinstall_torch())


def check_hardware(devices: Sequence[Device]) -> list[Check]:
    """The processor, the accelerators and the free disk."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    checks = [Check("cpu", ok=True, found=f"{os.cpu_count()} cores, {memory / _GIB:.0f} GiB")]
    checks += [Check(device.name, ok=True, found=_describe(device)) for device in devices]
    if not devices:
        checks.append(Check("accelerator", ok=True, found="none: presets run on the built-in miniature"))
    usage = shutil.disk_usage(Path.cwd())
    disk = f"{usage.free / _GIB:.0f} GiB free of {usage.total / _GIB:.0f} in {Path.cwd()}"
    return [*checks, Check("disk", ok=True, found=disk)]


def check_hub_cache() -> Check:
    """Where weights from the Hugging Face Hub are kept, and how many models are there."""
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    count = len(list(cache.glob("models--*")))
    return Check("hub cache", ok=True, found=f"{count or 'no'} models in {cache}")


def check_path(subject: str, path: Path) -> Check:
    """Whether there is a file, or a folder with something in it, at ``path``."""
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        return Check(subject, ok=True, found=str(path))
    remedy = "install srpo-cli again" if path == WEIGHTS else f"put the weights at {path}"
    return Check(subject, ok=False, found=f"nothing at {path}", remedy=remedy)


def check_plugin(name: str) -> Check | None:
    """Whether a reward that is somebody else's code may run; None for a built-in one. Runs nothing of it."""
    plugin = REWARDS.plugin(name)
    subject = f"reward {name}"
    if plugin is None:
        return None
    if not isinstance(plugin, PluginFile):
        return Check(subject, ok=True, found=f"a plug-in of {plugin.package}")
    if not plugin.path.is_file():
        remedy = f"put the plug-in there, or name it from {Path.cwd()}"
        return Check(subject, ok=False, found=f"no file {plugin.path}", remedy=remedy)
    try:
        digest = check_trusted(plugin.path)
    except UsageError:
        remedy = "read it, then add --trust to the command that is to run it"
        return Check(subject, ok=False, found="a plug-in that you have not trusted as it is now", remedy=remedy)
    return Check(subject, ok=True, found=f"a plug-in that you trust, sha256 {digest[:12]}")


def check_weights(kind: str, name: str) -> Check:
    """Whether the weights of a named "model" or "reward" (``kind``) are on this machine.

    ``name`` is what a configuration may say: a registry name, a folder, or a repository on the Hub.
    """
    subject = f"{kind} {name}"
    if name == "miniature" or (kind == "reward" and name in MINIATURE_REWARDS):
        return check_path(subject, WEIGHTS)
    if kind == "reward" and (plugin := check_plugin(name)):  # it looks after its own
        return plugin
    if kind == "reward" and name.startswith("clip:"):  # it has none of its own
        return Check(subject, ok=False, found="reward.weights is not set", remedy="--set reward.weights=FILE")
    if kind == "reward":
        REWARDS.find(name)  # refuses a name that nobody knows
        return _check_sources(subject, REWARD_FILES.get(name, ()))
    if name.endswith(".safetensors") and Path(name).is_file():  # a transformer, whose other parts are FLUX.1-dev's
        base = HUB_FILES["flux.1-dev"]
        files = tuple(file for file in base.files if not file.startswith("transformer/"))
        return _check_sources(f"{subject}, its other parts", (replace(base, files=files),))
    if Path(name).exists():
        return check_path(subject, Path(name))
    if known := HUB_FILES.get(name):
        return _check_sources(subject, (known,))
    return _check_sources(subject, (HubFiles(name, ("model_index.json",)),), f"hf download {name}")


def check_prompts(source: str) -> Check:
    """Whether training prompts are on this machine, by what ``prompts.source`` may be."""
    subject = f"prompts {source}"
    if source in PROMPT_FILES:
        return _check_sources(subject, (PROMPT_FILES[source],))
    if source in ("miniature", "miniature-unlit"):
        return Check(subject, ok=True, found="built in")
    if source == "-":
        return Check(subject, ok=True, found="standard input")
    if Path(source).is_file():
        return Check(subject, ok=True, found="here")
    return Check(subject, ok=False, found=f"no file {source}", remedy="put it there, or --set prompts.source=FILE")


def _check_sources(subject: str, sources: Sequence[HubFiles | WebFile], command: str | None = None) -> Check:
    """Whether all files are in the caches; ``command`` is what to type in place of the source's own."""
    for source in sources:
        absent = [file for file in source.files if not _is_here(source, file)]
        if absent:
            found = f"{len(absent)} of {len(source.files)} files of {source.origin} are not here"
            remedy = command or source.download
            return Check(subject, ok=False, found=found, remedy=f"{remedy}  # {source.note}" if source.note else remedy)
    where = ", ".join(source.origin for source in sources)
    return Check(subject, ok=True, found=f"{where} in the cache" if where else "built in")


def _check_package(name: str) -> Check:
    try:
        return Check(name, ok=True, found=metadata.version(name))
    except metadata.PackageNotFoundError:
        return Check(name, ok=False, found="not installed", remedy=f"pip install {name}")


def _reinstall_torch() -> str:
    """The command that puts a matching pair of torch and torchvision in place, of the kind that is here."""
    command = "pip install --force-reinstall torch torchvision"
    if "+cpu" in _check_package("torch").found:
        return f"{command}, both from PyTorch's own index for CPU builds"
    return command


def _describe(device: Device) -> str:
    return f"{device.model}, {device.memory / _GIB:.1f} GiB" if device.memory else device.model


def _is_here(source: HubFiles | WebFile, file: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    if isinstance(source, WebFile):
        return source.place.is_file()
    is_repo = re.fullmatch(r"[\w.-]+/[\w.-]+", source.repo)
    return bool(is_repo) and isinstance(try_to_load_from_cache(source.repo, file, repo_type=source.repo_type), str)
