"""Rewards that compare a picture with a text in a CLIP space: plain CLIP, and what other rewards build on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from difflib import get_close_matches
from pathlib import Path
from threading import Lock
from typing import Any

import open_clip
import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download, try_to_load_from_cache
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from open_clip.transform import PreprocessCfg
from torch import Tensor, nn

from srpo_cli.errors import MissingError, SrpoError, UsageError, one_line
from srpo_cli.registry import HubFiles
from srpo_cli.rewards.preprocess import Images, Mode, Preprocess
from srpo_cli.rewards.vision import VisionReward, unit_vectors
from srpo_cli.rewards.weights import Announce, Weights, download_failure, find_weights, read_state, sha256

Tokenizer = Callable[[list[str]], Tensor]

# Texts go through the tower in batches of exactly this size, the last one padded: to the last bit, a text's
# features must not depend on which others were new beside it, or a resumed run would drift from the first.
_TEXT_BATCH = 16

_MODES: dict[str, tuple[Mode, ...]] = {  # open_clip's resize modes; it preprocesses in Pillow
    "shortest": ("crop-pil", "crop"),
    "squash": ("squash-pil", "squash"),
    "longest": ("pad-antialias",),
}
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "vocab.txt")
_SMALL_FILES = ("*.json", "*.txt", "*.model")


class ClipReward(VisionReward):
    """``scale * cos(picture, text)`` in the space of a frozen CLIP; higher is better.

    Args:
        clip: any model with ``encode_image`` and ``encode_text``. Frozen here.
        tokenizer: maps N texts to token ids, (N, context length).
        preprocess: how pictures come to its vision tower.
        modes: the preprocessings that may be asked for, reference first, the one for training last.
        scale: 1 for the raw cosine, as HPSv2 reports it.
        unit, name, weights: as for every :class:`Reward`.
    """

    def __init__(
        self,
        clip: nn.Module,
        tokenizer: Tokenizer,
        *,
        preprocess: Preprocess,
        modes: tuple[Mode, ...] = ("crop",),
        scale: float = 1.0,
        unit: str = "cosine",
        name: str = "clip",
        weights: str = "",
    ) -> None:
        super().__init__(clip, preprocess=preprocess, modes=modes, unit=unit, name=name, weights=weights)
        self.tokenizer = tokenizer
        self.scale = scale
        self._text_cache: dict[str, Tensor] = {}
        self._texts_prepared = False
        self._text_lock = Lock()  # two threads would compute one text twice

    @property
    def clip(self) -> nn.Module:
        """Both towers."""
        return self.tower

    def encode_image(self, pixels: Tensor) -> Tensor:
        return self.clip.encode_image(pixels)

    @property
    def device(self) -> torch.device:
        """Where pictures are judged; the text tower may be elsewhere."""
        return next(tensor for name, tensor in self._towers.named_parameters() if _is_vision(name)).device

    @property
    def _towers(self) -> nn.Module:
        return getattr(self.clip, "model", self.clip)  # transformers' CLIPModel is wrapped

    def prepare(self, texts: Sequence[str]) -> None:
        """Compute the features of ``texts``; from then on the text tower waits on the host for others."""
        self.text_features(texts)
        self._texts_prepared = True
        _move_text_tower(self._towers, "cpu")

    @torch.no_grad()
    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit features (N, D) of texts, computed once per distinct text."""
        with self._text_lock, self._own_precision():
            new = [text for text in dict.fromkeys(texts) if text not in self._text_cache]
            if new and self._texts_prepared:
                _move_text_tower(self._towers, self.device)
            for start in range(0, len(new), _TEXT_BATCH):
                batch = new[start : start + _TEXT_BATCH]
                padded = batch + batch[-1:] * (_TEXT_BATCH - len(batch))
                features = unit_vectors(self.clip.encode_text(self.tokenizer(padded).to(self.device)))
                self._text_cache.update(zip(batch, features, strict=False))
            if new and self._texts_prepared:
                _move_text_tower(self._towers, "cpu")
        return torch.stack([self._text_cache[text] for text in texts])

    def scores(self, images: Images, *texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Rewards of the same pictures for several lists of B texts, at the price of one vision pass.

        Returns one (B,) per list, float32 or wider, differentiable in ``images``.
        """
        features = self.image_features(images)
        return tuple(self.scale * (features * self.text_features(column)).sum(-1) for column in texts)

    def __call__(self, images: Images, prompts: Sequence[str]) -> Tensor:
        return self.scores(images, prompts)[0].float()


def _is_vision(name: str) -> bool:
    """Whether a part of a CLIP belongs to its picture side, in open_clip's names and in transformers'."""
    return name.startswith("vis")


def _move_text_tower(towers: nn.Module, device: str | torch.device) -> None:
    """Move all of a CLIP that pictures do not need."""
    for name, child in towers.named_children():
        if not _is_vision(name):
            child.to(device)
    for tensor in (*towers.parameters(recurse=False), *towers.buffers(recurse=False)):
        tensor.data = tensor.data.to(device)


def load_open_clip(
    name: str,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    announce: Announce | None = None,
) -> ClipReward:
    """A CLIP of open_clip, the raw cosine.

    A tag says how its weights were trained: their mean, deviation, resize and activation are used, also where the
    architecture's own file says another activation (open_clip warns of ViT-L-14/openai and computes it wrong). Without
    a tag the activation is the architecture's, and the preprocessing the one that all its tags share, else open_clip's
    default.

    Args:
        name: "clip:" and an open_clip architecture, e.g. "clip:ViT-B-32", with "/TAG" for its published weights.
        weights: an open_clip checkpoint (.safetensors, .pt or .bin) of that architecture, or a folder with the tag's.
        device, dtype: where and in what it runs.
        announce: told about a download before it starts; None: nothing is downloaded.

    Raises UsageError for an unknown architecture or tag; MissingError without weights, or without a tokenizer or
    configuration that another library would download; SrpoError if the weights do not fit.
    """
    architecture, _, tag = name.removeprefix("clip:").partition("/")
    if architecture not in open_clip.list_models():
        near = ", ".join(get_close_matches(architecture, open_clip.list_models(), n=3, cutoff=0.4))
        raise UsageError(f"{name}: {architecture!r} is no architecture of open_clip ({near or 'like ViT-B-32'})")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    trained = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    if tag and not trained:
        raise UsageError.unknown(f"tag of clip:{architecture}", tag, tags)
    if weights is None and not tag:
        known = f", or name one of open_clip's, like {name}/{tags[0]}" if tags else ""
        raise MissingError(f"{name} has no weights; give an open_clip checkpoint as --weights {name}=FILE{known}")

    config = open_clip.get_model_config(architecture)
    config["quick_gelu"] = config.get("quick_gelu", False) or trained.get("quick_gelu", False)
    config["text_cfg"], parts = _local_parts(name, config["text_cfg"], weights, announce)
    clip = _skeleton(config)
    found = _find_tagged(name, weights, announce, trained, clip) if tag else _find_given(weights)
    (file,) = found.files.values()
    how = _preprocessing([trained] if tag else [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags])
    modes = _MODES[how["resize_mode"]]
    return ClipReward(
        _fill(clip, file, device, dtype),
        _tokenizer(name, architecture, config["text_cfg"]),
        preprocess=Preprocess(
            _side(clip), modes[0], tuple(how["mean"]), tuple(how["std"]), interpolation=how["interpolation"]
        ),
        modes=modes,
        name=name,
        weights="; ".join([found.record, *parts]),
    )


def build_clip(config: dict[str, Any], weights: Path, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    """An open_clip model that holds exactly the tensors of ``weights``, cast to ``dtype``.

    Args:
        config: ``embed_dim``, ``vision_cfg``, ``text_cfg`` and whatever else open_clip's model files hold.
        weights: an open_clip checkpoint.
        device, dtype: where and in what it runs.

    Raises SrpoError if the tensors are not exactly those of the model.
    """
    return _fill(_skeleton(config), weights, device, dtype)


def _skeleton(config: dict[str, Any]) -> nn.Module:
    """The model to be filled, made as open_clip makes it.

    Without weights where that can be: initialising a ViT-H at random takes longer than reading it. Buffers are real,
    since no checkpoint holds a causal mask or a rotary table.
    """
    config = dict(config)
    custom = config.pop("custom_text", False) or "hf_model_name" in config["text_cfg"]
    kind = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP if custom else open_clip.CLIP
    try:
        with init_empty_weights(include_buffers=False):
            clip = kind(**config)
    except RuntimeError:  # timm's hybrids run a picture through themselves while they are made
        return kind(**config)
    return kind(**config) if any(buffer.is_meta for buffer in clip.buffers()) else clip


def _fill(clip: nn.Module, weights: Path, device: str | torch.device, dtype: torch.dtype) -> nn.Module:
    try:
        clip.load_state_dict(_todays_layout(read_state(weights), clip), assign=True)
    except (RuntimeError, KeyError, AttributeError) as error:
        raise SrpoError(f"{weights} is not a checkpoint of this CLIP architecture: {one_line(error)}") from error
    return clip.to(device, dtype)


def _todays_layout(state: dict[str, Tensor], clip: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names and shapes that this open_clip gives them; values are untouched."""
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    state = convert_state_dict(clip, state)
    if "positional_embedding" in state and not hasattr(clip, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for scalar in ("logit_scale", "logit_bias"):
        ours = getattr(clip, scalar, None)
        if ours is not None and scalar in state and state[scalar].numel() == 1:
            state[scalar] = state[scalar].reshape(ours.shape)
    return {name: tensor for name, tensor in state.items() if not name.endswith(".position_ids")}


def _side(clip: nn.Module) -> int:
    size = clip.visual.image_size
    return size[0] if isinstance(size, Sequence) else size


def _preprocessing(trained: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, std, interpolation and resize_mode that these weights share; open_clip's default where they do not."""
    default = asdict(PreprocessCfg())
    keys = ("mean", "std", "interpolation", "resize_mode")
    shared = [{key: tag[key] for key in keys} for tag in trained] or [default]
    return shared[0] if all(how == shared[0] for how in shared) else default


def _find_given(weights: str | Path) -> Weights:
    file = Path(weights)
    if not file.is_file():
        raise MissingError(f"Reward weights {file} not found.")
    return Weights({file.name: file}, f"{file.name} sha256:{sha256(file)}")


def _find_tagged(
    name: str, given: str | Path | None, announce: Announce | None, trained: dict[str, Any], clip: nn.Module
) -> Weights:
    """The weights of a tag; safetensors where its repository has them."""
    repo, _, file = trained["hf_hub"].rpartition("/")
    file = file or open_clip.constants.HF_WEIGHTS_NAME
    safe = file.rpartition(".")[0] + ".safetensors"
    if file == open_clip.constants.HF_WEIGHTS_NAME:
        safe = open_clip.constants.HF_SAFE_WEIGHTS_NAME
    size = f"{sum(parameter.numel() for parameter in clip.parameters()) * 4 / 1e9:.2f} GB in float32"
    choices = [HubFiles(repo, (choice,), size=size) for choice in dict.fromkeys([safe, file])]
    refusals: list[MissingError] = []
    for told in dict.fromkeys([None, announce]):
        for source in choices:
            try:
                return find_weights(name, given, told, (source,))
            except MissingError as refusal:
                refusals.append(refusal)
    other = "" if len(choices) == 1 else f" (or {file}, where the repository has no {safe})"
    raise MissingError(f"{refusals[0]}{other}") from refusals[-1]


def _local_parts(
    name: str, text: dict[str, Any], weights: str | Path | None, announce: Announce | None
) -> tuple[dict[str, Any], list[str]]:
    """``text_cfg`` with local folders for a text tower's configuration and a tokenizer of the transformers library.

    A tokenizer is looked for beside the weights that the user gave, then both in the Hub cache. Neither is ever
    fetched unannounced, as the libraries would by themselves. Returns the revisions as well.
    """
    text, records = dict(text), []
    if tower := text.get("hf_model_name"):
        folder = _hub_folder(name, tower, ("config.json",), announce)
        text |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
        records.append(f"{tower}@{folder.name}")
    if tokenizer := text.get("hf_tokenizer_name"):
        given = Path(weights) if weights else None
        folder = given.parent if given and given.is_file() else given
        if folder and (folder / "tokenizer.json").is_file():
            records.append(f"tokenizer.json sha256:{sha256(folder / 'tokenizer.json')}")
        else:
            folder = _hub_folder(name, tokenizer, _TOKENIZER_FILES, announce)
            records.append(f"{tokenizer}@{folder.name}")
        text["hf_tokenizer_name"] = str(folder)
    return text, list(dict.fromkeys(records))


def _hub_folder(name: str, repo: str, files: tuple[str, ...], announce: Announce | None) -> Path:
    """The cached snapshot of a repository that has one of ``files``, or a newly fetched one of its small files."""
    for file in files:
        if isinstance(found := try_to_load_from_cache(repo, file), str):
            return Path(found).parent
    command = " ".join(["hf download", repo, *(f"--include '{pattern}'" for pattern in _SMALL_FILES)])
    missing = f"{name} needs {' or '.join(files)} of {repo}, which is not here; fetch it with: {command}"
    if announce is None:
        raise MissingError(missing)
    announce(f"downloading the tokenizer or configuration (some MB) of {name} from {repo}")
    try:
        return Path(snapshot_download(repo, allow_patterns=list(_SMALL_FILES)))
    except Exception as error:  # of whatever library carries the bytes; what is there to do is the same
        raise MissingError(f"{missing} (the download failed: {download_failure(error)})") from error


def _tokenizer(name: str, architecture: str, text: dict[str, Any]) -> Tokenizer:
    """open_clip's tokenizer of the architecture, from the folder that ``text`` names where it is another library's."""
    folder = text.get("hf_tokenizer_name")
    if not folder:
        return open_clip.get_tokenizer(architecture)
    try:
        return open_clip.tokenizer.HFTokenizer(
            folder,
            context_length=text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH),
            tokenizer_mode=text.get("tokenizer_mode"),
            **text.get("tokenizer_kwargs", {}),
        )
    except (OSError, ValueError, ImportError) as error:
        raise MissingError(f"{name}: cannot read the tokenizer in {folder}: {one_line(error)}") from error
