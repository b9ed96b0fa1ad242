"""Names that a user may write, where the code behind them is, and where their weights come from.

A registry maps a name to ``"module:attribute"`` and imports it on :meth:`Registry.get`, so that listing,
checking and ``--help`` never load torch. A new model, reward or algorithm is one line here, one file and one
test.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from srpo_cli.errors import UsageError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint


@dataclass(frozen=True)
class PluginFile:
    """A Python file that stands for a part, written PATH.py or PATH.py:ATTRIBUTE."""

    path: Path
    attribute: str = "load"


@dataclass(frozen=True)
class InstalledPlugin:
    """An entry point of an installed package that stands for a part; ``package`` is its name and version."""

    package: str
    entry: EntryPoint


class Registry:
    """Lazy ``name -> "module:attribute"`` table of one kind of part.

    A key may be a shell pattern ("clip:*", "*/*"): it stands for a family of names and is tried after the
    exact names, in the order given. ``families`` says what a user may write for a pattern.

    Where there is a ``plugin_loader``, a target like any other, other people's parts are found after these: a Python
    file by its path, and what installed packages offer under ``entry_points``. So no package can take the place of
    what is built in, or of a file, whose code is asked about before it runs.
    """

    def __init__(
        self,
        kind: str,
        targets: dict[str, str],
        families: dict[str, str] | None = None,
        *,
        entry_points: str = "",
        plugin_loader: str = "",
    ) -> None:
        self.kind = kind
        self._targets = targets
        self._families = families or {}
        self._entry_points = entry_points
        self._plugin_loader = plugin_loader

    @property
    def names(self) -> list[str]:
        """What a user may write, but for what installed packages offer."""
        files = ["FILE.py"] if self._plugin_loader else []
        return [*(self._families.get(key, key) for key in self._targets), *files]

    def find(self, name: str) -> str:
        """The target of ``name`` without importing it; ``UsageError`` with a suggestion if unknown."""
        target = self._built_in(name)
        if target is None and self.plugin(name):
            target = self._plugin_loader
        if target is None:
            installed = dict.fromkeys(plugin.entry.name for plugin in self._all_installed())
            raise UsageError.unknown(self.kind, name, [*self.names, *installed])
        return target

    def get(self, name: str) -> Any:
        """Import and return what ``name`` stands for."""
        module, attribute = self.find(name).split(":")
        return getattr(import_module(module), attribute)

    def plugin(self, name: str) -> PluginFile | InstalledPlugin | None:
        """Whose code ``name`` means; None for what is built in and for what nobody knows. Imports and reads none."""
        if not self._plugin_loader or self._built_in(name) is not None:
            return None
        file, colon, attribute = name.rpartition(":")
        if colon and file.endswith(".py"):
            if not attribute.isidentifier():
                raise UsageError(f"{self.kind} {name}: write FILE.py, or FILE.py:NAME with a name out of the file")
            return PluginFile(Path(file), attribute)
        return PluginFile(Path(name)) if name.endswith(".py") else self._installed(name)

    def shadowed(self, name: str) -> InstalledPlugin | None:
        """The plug-in of an installed package that cannot be reached, because its name is a built-in one."""
        return None if self._built_in(name) is None else self._installed(name)

    def _built_in(self, name: str) -> str | None:
        if name in self._targets:
            return self._targets[name]
        return next((target for pattern, target in self._targets.items() if fnmatchcase(name, pattern)), None)

    def _installed(self, name: str) -> InstalledPlugin | None:
        found = [plugin for plugin in self._all_installed() if plugin.entry.name == name]
        if len(found) > 1:
            packages = " and ".join(plugin.package for plugin in found)
            raise UsageError(f"{self.kind} {name} is offered by {packages}: uninstall all but one of them")
        return found[0] if found else None

    def _all_installed(self) -> list[InstalledPlugin]:
        if not self._entry_points:
            return []
        from importlib.metadata import entry_points

        entries = entry_points(group=self._entry_points)
        return [InstalledPlugin(f"{entry.dist.name} {entry.dist.version}", entry) for entry in entries]


MODELS = Registry(
    "model",
    {
        "flux.1-dev": "srpo_cli.models.flux:load_flux",
        "flux.1-krea-dev": "srpo_cli.models.flux:load_flux",
        "miniature": "srpo_cli.models.flux:load_flux",
        "*.safetensors": "srpo_cli.models.flux:load_flux",
        "*/*": "srpo_cli.models.flux:load_flux",
    },
    families={
        "*.safetensors": "the FILE.safetensors of a transformer",
        "*/*": "a folder, or OWNER/NAME of the Hugging Face Hub",
    },
)

REWARDS = Registry(
    "reward",
    {
        "aesthetic-v2.5": "srpo_cli.rewards.aesthetic:load_aesthetic",
        "hpsv2.0": "srpo_cli.rewards.hps:load_hps",
        "hpsv2.1": "srpo_cli.rewards.hps:load_hps",
        "imagereward": "srpo_cli.rewards.imagereward:load_imagereward",
        "laion-aesthetic-v1": "srpo_cli.rewards.laion:load_laion",
        "laion-aesthetic-v2": "srpo_cli.rewards.laion:load_laion",
        "miniature": "srpo_cli.rewards.miniature:load_miniature",
        "miniature:clip": "srpo_cli.rewards.miniature:load_miniature",
        "pickscore": "srpo_cli.rewards.pickscore:load_pickscore",
        "pickscore:cosine": "srpo_cli.rewards.pickscore:load_pickscore",
        "clip:*": "srpo_cli.rewards.clip:load_open_clip",
    },
    families={"clip:*": "clip:ARCHITECTURE[/TAG]"},
    entry_points="srpo.rewards",
    plugin_loader="srpo_cli.rewards.plugins:load_plugin",
)

ALGORITHMS = Registry(
    "algorithm",
    {
        "srpo": "srpo_cli.recipes.methods:srpo",
        "direct-align": "srpo_cli.recipes.methods:direct_align",
        "refl": "srpo_cli.recipes.methods:refl",
        "draft": "srpo_cli.recipes.methods:draft",
        "alignprop": "srpo_cli.recipes.methods:alignprop",
        "dance-grpo": "srpo_cli.recipes.methods:dance_grpo",
        "flow-grpo": "srpo_cli.recipes.methods:flow_grpo",
    },
)

METRICS = Registry(
    "metric",
    {
        "diversity:*": "srpo_cli.recipes.judges:plan_diversity",
        "fid": "srpo_cli.recipes.judges:plan_distances",
        "fid:*": "srpo_cli.recipes.judges:plan_distances",
        "geneval": "srpo_cli.recipes.geneval:plan_geneval",
        "kid": "srpo_cli.recipes.judges:plan_distances",
        "kid:*": "srpo_cli.recipes.judges:plan_distances",
        "oracle": "srpo_cli.recipes.judges:plan_oracle",
        "sgp:*": "srpo_cli.recipes.judges:plan_reward",
        "statistics": "srpo_cli.recipes.judges:plan_statistics",
    },
    families={f"{kind}:*": f"{kind}:REWARD" for kind in ("diversity", "fid", "kid", "sgp")},
)
"""What a benchmark can measure beside rewards, which are metrics under their own names."""

GENEVAL_COLOURS = "clip:ViT-L-14/openai"
"""The reward whose CLIP names an object's colour for GenEval."""


def metric_parts(name: str) -> tuple[str, str]:
    """A metric's kind and the reward that it reads, empty where it reads none; a reward's own kind is "reward".

    "sgp:hpsv2.1" is ("sgp", "hpsv2.1"), "statistics" is ("statistics", ""). ``UsageError`` with a suggestion for what
    is neither a metric nor a reward.
    """
    kind, colon, reward = name.partition(":")
    if colon and f"{kind}:REWARD" in METRICS.names:
        REWARDS.find(reward)
        return kind, reward
    if name in METRICS.names:
        return name, ""
    try:
        REWARDS.find(name)
    except UsageError as error:
        raise UsageError.unknown("metric", name, [*METRICS.names, *REWARDS.names]) from error
    return "reward", name


def rewards_of(metrics: Iterable[str]) -> list[str]:
    """The rewards that metrics read, each once; ``UsageError`` as for :func:`metric_parts`."""
    parts = [metric_parts(name) for name in metrics]
    rewards = [GENEVAL_COLOURS if kind == "geneval" else reward for kind, reward in parts]
    return [reward for reward in dict.fromkeys(rewards) if reward]


def weights_of(metrics: Iterable[str]) -> list[str]:
    """Names that ``--weights NAME=PATH`` may give for metrics: their rewards, and what is in ``METRIC_FILES``."""
    metrics = list(metrics)
    needed = {"geneval": "mask2former", "fid": "inception", "kid": "inception"}
    return [*rewards_of(metrics), *dict.fromkeys(needed[name] for name in metrics if name in needed)]


def check_parts(model: str, rewards: Iterable[str], algorithm: str) -> None:
    """Raise ``UsageError`` for the first name that stands for nothing; imports none of them."""
    MODELS.find(model)
    for reward in rewards:
        REWARDS.find(reward)
    ALGORITHMS.find(algorithm)


@dataclass(frozen=True)
class HubFiles:
    """Files on the Hugging Face Hub that a named model, reward or set of prompts needs before it can run.

    ``exclude`` names what the repository holds beside them; ``note`` is a condition of the download; ``size`` is
    that of all files together, empty where it is not known; ``repo_type`` is "model" or "dataset".
    """

    repo: str
    files: tuple[str, ...]
    exclude: tuple[str, ...] = ()
    note: str = ""
    size: str = ""
    repo_type: str = "model"

    @property
    def origin(self) -> str:
        """Where the files are, for people."""
        return self.repo

    @property
    def download(self) -> str:
        """The command that fetches the files into the Hub cache."""
        kind = [] if self.repo_type == "model" else ["--repo-type", self.repo_type]
        if self.exclude:
            return " ".join(["hf download", self.repo, *(f"--exclude {name}" for name in self.exclude), *kind])
        return " ".join(["hf download", self.repo, *self.files, *kind])


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


def _flux(repo: str, single_file: str) -> HubFiles:
    """A gated repository of Black Forest Labs that holds a whole FLUX pipeline, 12 billion weights in bfloat16."""
    return HubFiles(
        repo,
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
        exclude=(single_file, "ae.safetensors"),
        note=f"gated: first accept its licence at https://huggingface.co/{repo} and run `hf auth login`",
        size="33.7 GB",
    )


HUB_FILES = {
    "flux.1-dev": _flux("black-forest-labs/FLUX.1-dev", "flux1-dev.safetensors"),
    "flux.1-krea-dev": _flux("black-forest-labs/FLUX.1-Krea-dev", "flux1-krea-dev.safetensors"),
}
"""What a named model needs."""

_OPENAI_VIT_L_14 = HubFiles("timm/vit_large_patch14_clip_224.openai", ("open_clip_model.safetensors",), size="1.71 GB")
_PICKSCORE = (
    HubFiles("yuvalkirstain/PickScore_v1", ("model.safetensors", "config.json"), size="3.94 GB"),
    HubFiles("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ("tokenizer.json",), size="2.2 MB"),
)

REWARD_FILES: dict[str, tuple[HubFiles | WebFile, ...]] = {
    "aesthetic-v2.5": (
        HubFiles("google/siglip-so400m-patch14-384", ("model.safetensors",), size="3.51 GB"),
        WebFile(
            "https://github.com/discus0434/aesthetic-predictor-v2-5/raw/main/models/aesthetic_predictor_v2_5.pth",
            size="2.6 MB",
            sha256="a6caf256b3dc434273c98dcb12f6bf17c5d4fc647d8df11f038386923dd06220",
            note="AGPL-3.0",
        ),
    ),
    "imagereward": (
        HubFiles("THUDM/ImageReward", ("ImageReward.pt",), size="1.79 GB"),
        HubFiles("google-bert/bert-base-uncased", ("vocab.txt",), size="0.2 MB"),
    ),
    "hpsv2.0": (HubFiles("xswu/HPSv2", ("HPS_v2_compressed.pt",), size="1.97 GB"),),
    "hpsv2.1": (HubFiles("xswu/HPSv2", ("HPS_v2.1_compressed.pt",), size="1.97 GB"),),
    "laion-aesthetic-v1": (
        WebFile(
            "https://github.com/LAION-AI/aesthetic-predictor/raw/main/sa_0_4_vit_l_14_linear.pth",
            size="4 kB",
            note="MIT",
        ),
        _OPENAI_VIT_L_14,
    ),
    "laion-aesthetic-v2": (
        WebFile(
            "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/"
            "sac+logos+ava1-l14-linearMSE.pth",
            size="3.7 MB",
            note="Apache-2.0",
        ),
        _OPENAI_VIT_L_14,
    ),
    "pickscore": _PICKSCORE,
    "pickscore:cosine": _PICKSCORE,
}
"""What a named reward needs; the first file of the first entry is the one that ``--weights NAME=FILE`` stands for."""

MINIATURE_REWARDS = {"miniature": "reward.safetensors", "miniature:clip": "clip.safetensors"}
"""The rewards that know the miniature's world, and the weights of each in their folder of the package."""

METRIC_FILES: dict[str, tuple[HubFiles | WebFile, ...]] = {
    "mask2former": (
        HubFiles(
            "facebook/mask2former-swin-small-coco-instance",
            ("model.safetensors", "config.json", "preprocessor_config.json"),
            size="0.28 GB",
        ),
    ),
    "inception": (
        WebFile(
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
            "weights-inception-2015-12-05-6726825d.pth",
            size="96 MB",
            note="Apache-2.0",
        ),
    ),
}
"""What metrics need beside rewards: the detector of ``geneval``, the network of ``fid`` and ``kid``."""

PROMPT_FILES = {"hpdv2": HubFiles("ymhao/HPDv2", ("train.json",), repo_type="dataset")}
"""Where named sets of training prompts are."""
