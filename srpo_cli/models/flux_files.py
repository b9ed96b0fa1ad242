"""The files of FLUX-layout models: where they are, what kind of weights they hold, and reading them.

A transformer is read tensor by tensor into the dtype and onto the device where it is to be, so that loading takes no
more memory than the model. Only safetensors are read. Nothing is downloaded but by a ``Download`` that was handed in.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from srpo_cli.errors import MissingError, SrpoError, UsageError, one_line
from srpo_cli.models.flux_layout import Piece, bfl_pieces
from srpo_cli.models.flux_lora import LowRank
from srpo_cli.models.flux_text import LONGEST_PROMPT, PromptEncoder
from srpo_cli.models.quantised import quantise_linears
from srpo_cli.registry import HUB_FILES, HubFiles

Download = Callable[[HubFiles], Path]
"""Fetches files of the Hub, tells of it before it starts, and returns the folder that they are in."""

LORA_FILE = "pytorch_lora_weights.safetensors"
_MODELS = ("transformer", "vae", "text_encoder", "text_encoder_2")  # folders with a config.json
PARTS = (*_MODELS, "scheduler", "tokenizer", "tokenizer_2")
"""The folders of a FLUX pipeline."""

TEXT_PARTS: dict[str, Any] = {
    "text_encoder": CLIPTextModel,
    "text_encoder_2": T5EncoderModel,
    "tokenizer": CLIPTokenizer,
    "tokenizer_2": T5TokenizerFast,
}
"""Those of them that read prompts."""

_SAMPLES, _SAMPLE_BYTES = 64, 4096  # what a fingerprint reads of every large file
_SINGLE_FILE_BASE = "flux.1-dev"
_PIPELINE_PATTERNS = ("model_index.json", *(f"*/*.{ending}" for ending in ("json", "safetensors", "txt", "model")))
_COMFY_PREFIX = "model.diffusion_model."
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_EXACT_IN_BFLOAT16 = ("BF16", "F8_E4M3", "F8_E5M2")
_QUANTISED = re.compile(r"scaled_fp8|scale_(weight|input)|weight_scale|input_scale|quant_state|comfy_quant")
_READ_ERRORS = (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError)


def is_single_file(name: str) -> bool:
    """Whether a model's name is the file of a transformer, whose other parts are FLUX.1-dev's."""
    return name.endswith(".safetensors") and Path(name).is_file()


def pipeline_folder(name: str, parts: Sequence[str] = PARTS, download: Download | None = None) -> Path:
    """The local folder of a pipeline by its name; of the Hub's files only those of ``parts`` must be there."""
    if name == "miniature":
        from srpo_cli.miniature import WEIGHTS

        if not (WEIGHTS / "pipeline").is_dir():
            raise MissingError(f"The miniature's weights are not in {WEIGHTS / 'pipeline'}; reinstall srpo-cli.")
        return WEIGHTS / "pipeline"
    if Path(name).is_dir():
        return Path(name)
    if name.endswith(".safetensors") and not Path(name).is_file():
        raise MissingError(f"Model {name} not found.")
    hub = HUB_FILES.get(_SINGLE_FILE_BASE if is_single_file(name) else name)
    repo = hub.repo if hub else name
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", repo):
        raise UsageError(f"Model {name!r} is neither a known name, nor a folder, nor a Hugging Face repository.")
    needed = _needed(hub, parts)
    try:
        return _complete_snapshot(repo, name, needed, _command(hub, repo, parts))
    except MissingError:
        if download is None:
            raise
    download(hub or HubFiles(repo, _PIPELINE_PATTERNS))
    return _complete_snapshot(repo, name, needed, _command(hub, repo, parts))


def _needed(hub: HubFiles | None, parts: Sequence[str]) -> list[str]:
    whole = len(parts) == len(PARTS)
    if hub is None:
        return ["model_index.json"] if whole else [f"{part}/config.json" for part in parts if part in _MODELS]
    return [file for file in hub.files if (whole and "/" not in file) or file.partition("/")[0] in parts]


def _command(hub: HubFiles | None, repo: str, parts: Sequence[str]) -> str:
    if len(parts) == 1:
        return f'hf download {repo} --include "{parts[0]}/*"'
    return hub.download if hub else f"hf download {repo}"


def _complete_snapshot(repo: str, name: str, needed: Sequence[str], command: str) -> Path:
    try:
        folder = Path(snapshot_download(repo, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise MissingError(f"{name} is not in the Hugging Face cache; fetch it with: {command}") from error
    for file in needed:
        if not (folder / file).is_file():
            raise MissingError(f"{name} is incomplete in the Hugging Face cache ({file}); continue with: {command}")
    return folder


# --- what kind of weights -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tuned:
    """What is put into a pipeline: a transformer in place of its own, a LoRA on top, or both."""

    transformer: Path | None = None
    lora: Path | None = None


def tuned_weights(name: str, weights: str | Path | Sequence[str | Path] | None) -> Tuned:
    """Tell transformers from LoRAs by what the files say of themselves.

    Args:
        name: the model; its own transformer comes first where it is a single file.
        weights: a folder of ``save_pretrained``, a LoRA's folder, or a safetensors file of either kind; or several,
            of which one may be a transformer and one a LoRA.
    """
    listed = [weights] if isinstance(weights, (str, Path)) else list(weights or [])
    found: dict[str, Path] = {}
    for path in map(Path, listed):
        kind, file = _sort(path)
        if kind in found:
            raise UsageError(f"Weights {found[kind]} and {file} are both a {kind}: give one of them.")
        found[kind] = file
    if is_single_file(name):
        found.setdefault("transformer", Path(name))
    return Tuned(found.get("transformer"), found.get("LoRA"))


def _sort(path: Path) -> tuple[str, Path]:
    if not path.exists():
        raise MissingError(f"Weights {path} not found.")
    if path.is_dir():
        lora = path / LORA_FILE
        return ("LoRA", lora) if lora.is_file() else ("transformer", path)
    if path.suffix != ".safetensors":
        raise UsageError(f"Weights {path}: only safetensors are read, as a LoRA file or a transformer's.")
    names = list(_open(path).keys())
    if any(re.search(r"lora|lokr|loha", name, re.IGNORECASE) for name in names):
        return "LoRA", path
    if any("transformer_blocks." in name or "double_blocks." in name for name in names):
        return "transformer", path
    first = next(iter(names), "none")
    raise SrpoError(f"{path} holds neither a FLUX transformer nor a LoRA: its first tensor is {first}.")


def _open(file: Path) -> Any:
    try:
        return safe_open(file, "pt")
    except SafetensorError as error:
        raise SrpoError(
            f"{file} is not a safetensors file, or is cut short ({one_line(error)}): fetch or copy it again."
        ) from error
    except OSError as error:
        raise SrpoError(f"Cannot read {file}: {one_line(error)}") from error


# --- a transformer, tensor by tensor --------------------------------------------------------------------


class TransformerFiles:
    """The tensors of a transformer by diffusers' names, read one at a time from files in either layout.

    Args:
        source: a folder of ``save_pretrained``, or one file in diffusers' or Black Forest Labs' layout.
        shapes: the transformer's tensors.

    Raises SrpoError that names the first tensor that is missing, of another shape, foreign or quantised.
    """

    def __init__(self, source: Path, shapes: Mapping[str, Sequence[int]]) -> None:
        self._source = source
        self._handles = {name: handle for handle in map(_open, _shards(source)) for name in list(handle.keys())}
        if any(name.startswith(_COMFY_PREFIX) for name in self._handles):  # what else is in there are other parts
            own = {name: handle for name, handle in self._handles.items() if name.startswith(_COMFY_PREFIX)}
        else:
            own = self._handles
        prefix = _COMFY_PREFIX if own is not self._handles else ""
        in_bfl = any(name.startswith(f"{prefix}double_blocks.") for name in own)
        pieces = bfl_pieces(shapes) if in_bfl else {name: Piece(name, 0, *shape[:1]) for name, shape in shapes.items()}
        self._pieces = {
            name: Piece(prefix + piece.name, piece.start, piece.stop, piece.swapped) for name, piece in pieces.items()
        }
        self._check(shapes, own)

    def dtype(self, name: str) -> str:
        """What a tensor is stored in, as safetensors spells it: "F32", "BF16" ..."""
        return self._stored(name).get_dtype()

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored, on the CPU."""
        piece = self._pieces[name]
        try:
            tensor = self._stored(name)[piece.start : piece.stop]
        except _READ_ERRORS as error:
            raise SrpoError(f"Cannot read {piece.name} of {self._source}: {one_line(error)}") from error
        return torch.cat(tensor.chunk(2)[::-1]) if piece.swapped else tensor

    def _stored(self, name: str) -> Any:
        stored = self._pieces[name].name
        return self._handles[stored].get_slice(stored)

    def _check(self, shapes: Mapping[str, Sequence[int]], own: Mapping[str, Any]) -> None:
        quantised = next((name for name in own if _QUANTISED.search(name)), None)
        if quantised:
            raise SrpoError(f"{self._source} is quantised ({quantised}): give it in bfloat16, float16 or float32.")
        rows: dict[str, int] = {}
        for name, piece in self._pieces.items():
            rows[piece.name] = max(rows.get(piece.name, 0), piece.stop)
            if piece.name not in own:
                raise SrpoError(f"{self._source} does not hold this transformer: {piece.name} is missing.")
            stored = self._stored(name)
            if stored.get_dtype() not in _FLOATS:
                raise SrpoError(
                    f"{self._source} is quantised ({piece.name} is {stored.get_dtype()}): "
                    "give it in bfloat16, float16 or float32."
                )
        for name, piece in self._pieces.items():
            there, here = list(self._stored(name).get_shape()), [rows[piece.name], *shapes[name][1:]]
            if there != here:
                raise SrpoError(f"{self._source} is for another model: {piece.name} is {there} there and {here} here.")
        foreign = next((name for name in own if name not in rows), None)
        if foreign:
            raise SrpoError(f"{self._source} is for another model: this transformer has no {foreign}.")


def _shards(source: Path) -> list[Path]:
    """The safetensors files of a transformer."""
    if source.is_file():
        return [source]
    index, whole = source / SAFE_WEIGHTS_INDEX_NAME, source / SAFETENSORS_WEIGHTS_NAME
    if index.is_file():
        try:
            return [source / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise SrpoError(f"Cannot read {index}: {one_line(error)}") from error
    return [whole] if whole.is_file() else sorted(source.glob("*.safetensors"))


def make_transformer(source: Path, pipeline: Path) -> FluxTransformer2DModel:
    """The transformer of ``source`` on the meta device; a single file has the shape of the ``pipeline``'s own."""
    folder = pipeline / "transformer" if source.is_file() else source
    if not (folder / "config.json").is_file() or not (source.is_file() or any(source.glob("*.safetensors"))):
        raise MissingError(f"No FluxTransformer2DModel in {folder}: config.json and *.safetensors are needed.")
    try:
        config = FluxTransformer2DModel.load_config(folder, local_files_only=True)
        with torch.device("meta"):
            return FluxTransformer2DModel.from_config(config).eval()
    except _READ_ERRORS as error:
        raise SrpoError(f"Cannot load {folder}: {one_line(error)}") from error


def load_transformer(
    source: Path, pipeline: Path, dtype: torch.dtype, device: str | torch.device, base: str = "model"
) -> FluxTransformer2DModel:
    """Read a transformer to ``device``.

    Args:
        source: a folder or a single file; see :class:`TransformerFiles`.
        pipeline: the folder of the pipeline that it belongs to.
        dtype: of its parameters.
        base: "float8", "int8" or "nf4" keeps the linear layers of its blocks, modulation included, in that form; they
            are quantised block by block as they are read. "model": everything in ``dtype``.
    """
    transformer = make_transformer(source, pipeline)
    files = TransformerFiles(source, _shapes(transformer))
    for prefix, module in _regions(transformer):
        names = [name for name, _ in module.named_parameters()]
        state = {name: files.read(prefix + name).to(device=device, dtype=dtype) for name in names}
        module.load_state_dict(state, assign=True)
        if base != "model" and "blocks." in prefix:
            quantise_linears(module.requires_grad_(False), base)
    return transformer


def _regions(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The blocks of a transformer and its other parts, each with the prefix of its names."""
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{number}.", block) for number, block in enumerate(child))
        else:
            yield f"{name}.", child


def _shapes(transformer: nn.Module) -> dict[str, Sequence[int]]:
    return {name: tuple(parameter.shape) for name, parameter in transformer.named_parameters()}


class Masters(Mapping[str, Tensor]):
    """The weights of a transformer in float32 as its files hold them, each read when it is asked for.

    ``added``: what a LoRA that was folded in adds to them.
    """

    def __init__(self, files: TransformerFiles, names: Sequence[str], added: Mapping[str, LowRank]) -> None:
        self._files, self._names, self._added = files, dict.fromkeys(names), added

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        weight = self._files.read(name).float()
        return weight + self._added[name].delta().to(weight.device) if name in self._added else weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def load_masters(
    name: str,
    weights: str | Path | Sequence[str | Path] | None,
    parameters: Mapping[str, nn.Parameter],
    added: Mapping[str, LowRank] | None = None,
) -> Masters | None:
    """The exact float32 values of a transformer's ``parameters``, by their names; read from its files one by one.

    ``name`` and ``weights`` are what :func:`load_flux` was given, ``added`` what :meth:`Flux.fuse_lora` returned. None
    where bfloat16 is all that there is: every parameter is then its own master.
    """
    files = _stored_weights(name, weights)
    if added or any(files.dtype(parameter) not in _EXACT_IN_BFLOAT16 for parameter in parameters):
        return Masters(files, list(parameters), added or {})
    return None


def read_weights(
    name: str, weights: str | Path | Sequence[str | Path] | None, parameters: Mapping[str, nn.Parameter]
) -> Masters:
    """What ``load_flux(name, weights=weights, empty=True)`` left out: float32 weights by name, read one by one."""
    return Masters(_stored_weights(name, weights), list(parameters), {})


def _stored_weights(name: str, weights: str | Path | Sequence[str | Path] | None) -> TransformerFiles:
    tuned = tuned_weights(name, weights)
    folder = pipeline_folder(name, () if tuned.transformer else ("transformer",))
    source = tuned.transformer or folder / "transformer"
    return TransformerFiles(source, _shapes(make_transformer(source, folder)))


# --- the other parts ------------------------------------------------------------------------------------


def load_helper(cls: Any, folder: Path) -> Any:
    """A scheduler or tokenizer, which hold no tensors."""
    if not folder.is_dir():
        raise MissingError(f"No {folder.name} in {folder.parent}; a FLUX pipeline has one.")
    try:
        return cls.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise SrpoError(f"Cannot load {folder}: {one_line(error)}") from error


def load_model(cls: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A model from a ``save_pretrained`` folder; every one of its tensors must be there and fit."""
    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise MissingError(f"No {cls.__name__} in {folder}: config.json and *.safetensors are needed.")
    try:
        model, info = cls.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except _READ_ERRORS as error:
        raise SrpoError(f"Cannot load {folder}: {one_line(error)}") from error
    wrong = [*info["missing_keys"], *info["mismatched_keys"]]
    if wrong:
        raise SrpoError(f"{folder} does not hold a {cls.__name__}: {len(wrong)} tensors missing or misshapen.")
    return model


# --- text encoders --------------------------------------------------------------------------------------


def load_prompt_encoder(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    download: Download | None = None,
    *,
    literal: bool = False,
) -> PromptEncoder:
    """Load only the text encoders of what ``load_flux`` takes as ``name``; the CPU computes in float32.

    ``literal``: in ``dtype`` on the CPU, too. Raises what ``load_flux`` raises.
    """
    dtype = dtype if literal or torch.device(device).type != "cpu" else torch.float32
    parts = load_text_parts(pipeline_folder(name, tuple(TEXT_PARTS), download), dtype, device)
    return PromptEncoder(**parts, fingerprint=encoder_fingerprint(name, dtype, device, literal=True))


def load_text_parts(folder: Path, dtype: torch.dtype, device: str | torch.device) -> dict[str, Any]:
    """What a :class:`PromptEncoder` is made of, from a pipeline's folder."""
    parts: dict[str, Any] = {}
    for part, cls in TEXT_PARTS.items():
        is_model = part in _MODELS
        parts[part] = load_model(cls, folder / part, dtype).to(device) if is_model else load_helper(cls, folder / part)
    return parts | {"max_sequence_length": min(parts["tokenizer_2"].model_max_length, LONGEST_PROMPT)}


def encoder_fingerprint(
    name: str,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cpu",
    download: Download | None = None,
    *,
    literal: bool = False,
) -> str:
    """Which encodings the text encoders of ``name`` make: a digest of their files, dtype and kind of device.

    Takes what :func:`load_prompt_encoder` takes, and is its encoder's ``fingerprint``; but nothing is loaded: of large
    files the size and some places are read.
    """
    device = torch.device(device).type
    folder = pipeline_folder(name, tuple(TEXT_PARTS), download)
    digest = hashlib.sha256(f"{dtype if literal or device != 'cpu' else torch.float32} {device}".encode())
    for part in TEXT_PARTS:
        for file in sorted(path for path in (folder / part).rglob("*") if path.is_file()):
            size = file.stat().st_size
            digest.update(f"{file.relative_to(folder).as_posix()} {size}".encode())
            with file.open("rb") as stream:
                for start in range(0, size, max(_SAMPLE_BYTES, size // _SAMPLES)):
                    stream.seek(start)
                    digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]
