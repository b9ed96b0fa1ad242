"""Export: a run's weights in the layouts that other programs read, with where they come from.

Tensors are read and written one shard at a time, so that a model of FLUX.1-dev's size is never in memory as a whole.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from srpo_cli import __version__
from srpo_cli.config.load import load_train_config
from srpo_cli.config.schema import TrainConfig
from srpo_cli.core.low_rank import nearest_low_rank
from srpo_cli.errors import MissingError, SrpoError, UsageError, one_line
from srpo_cli.models.flux_files import (
    LORA_FILE,
    TransformerFiles,
    make_transformer,
    pipeline_folder,
    tuned_weights,
)
from srpo_cli.models.flux_lora import linear_layers
from srpo_cli.models.quantised import is_modulation
from srpo_cli.recipes.model_card import Base, model_card, title
from srpo_cli.runtime.checkpoints import (
    EMA,
    Checkpoint,
    best_checkpoint,
    find_checkpoint,
    list_checkpoints,
    save_shards,
)
from srpo_cli.runtime.devices import best_device
from srpo_cli.runtime.folder import CONFIG, SUMMARY, RunFolder, disk_errors
from srpo_cli.runtime.progress import CountProgress
from srpo_cli.runtime.quiet import quiet_libraries

CARD = "README.md"
DEFAULT_RANK = 32
_SHARD = 10 * 10**9  # bytes
_PREFIX = "transformer."
_FACTOR = re.compile(r"transformer\.(.+)\.lora_[AB]\.weight")


@dataclass(frozen=True)
class Request:
    """What to export. None leaves it to the run.

    Args:
        run: a run's folder, or one of its checkpoints.
        output: folder to make; None: one below the run's ``exports``.
        form: "lora", "full", "merged" or "extract"; None: what was trained.
        rank: of the LoRA that "extract" makes.
        dtype: of the tensors written; None: float32 for a LoRA, the run's ``model.dtype`` for a transformer.
        step: whose checkpoint; None: the best by what the run's guard saw, the newest where there was no guard.
        ema: the moving average where the checkpoint has one.
    """

    run: Path
    output: Path | None = None
    form: str | None = None
    rank: int | None = None
    dtype: str | None = None
    step: int | None = None
    ema: bool = True

    def command(self) -> str:
        """What a user types for this."""
        options = {
            "--output": self.output,
            "--format": self.form,
            "--rank": self.rank,
            "--dtype": self.dtype,
            "--checkpoint": self.step,
        }
        given = [str(part) for name, value in options.items() if value is not None for part in (name, value)]
        return shlex.join(["srpo", "export", str(self.run), *given, *([] if self.ema else ["--no-ema"])])


@dataclass(frozen=True)
class Trained:
    """The weights of a checkpoint and the run that made them."""

    folder: RunFolder
    config: TrainConfig
    checkpoint: Checkpoint
    weights: Path
    averaged: bool

    @classmethod
    def find(cls, request: Request) -> Trained:
        """The checkpoint that is asked for; SrpoError if there is none, or if it is not whole."""
        checkpoint = _checkpoint(request.run, request.step)
        run = checkpoint.path.resolve().parent.parent
        if not (run / CONFIG).is_file():
            raise MissingError(f"{run} has no {CONFIG}, so what {checkpoint.path} was trained from is unknown")
        config = load_train_config(run / CONFIG).config
        averaged = request.ema and (checkpoint.path / EMA).is_dir()
        checkpoint.state()  # refuses a damaged one
        checkpoint.check_transformer()
        weights = checkpoint.path / EMA if averaged else checkpoint.transformer
        return cls(RunFolder(run), config, checkpoint, weights, averaged)

    @property
    def is_lora(self) -> bool:
        return (self.weights / LORA_FILE).is_file()

    @property
    def is_best(self) -> bool:
        """Whether this is the checkpoint that the run's guard found best."""
        best = best_checkpoint(self.folder.path)
        return best is not None and best.step == self.checkpoint.step

    def environment(self) -> dict[str, Any]:
        """Where and by which command the run was begun, as far as it is known."""
        try:
            return self.folder.environment()
        except SrpoError:
            return {"packages": {}}

    def summary(self) -> dict[str, Any] | None:
        """The run's figures where they are those of these weights."""
        path = self.folder.path / SUMMARY
        try:
            summary = json.loads(path.read_text()) if path.is_file() else None
        except ValueError as error:
            raise SrpoError(f"{path} cannot be read: remove it to export without figures") from error
        measured_the_average = (self.checkpoint.path / EMA).is_dir()
        measured = summary and (summary.get("best_step") or summary["steps"])
        same = measured == self.checkpoint.step and measured_the_average == self.averaged
        return summary if same else None

    def headers(self, base: Base, form: str) -> dict[str, str]:
        """Safetensors metadata: where the tensors come from, and what model browsers read (ModelSpec 1.0.1)."""
        config = (self.folder.path / CONFIG).read_bytes()
        architecture = base.architecture + ("/lora" if form in ("lora", "extract") else "")
        height, width = self.config.model.size
        return {
            "format": "pt",
            "srpo.version": __version__,
            "srpo.base_model": base.repo or base.name,
            "srpo.method": self.config.algorithm.name,
            "srpo.step": str(self.checkpoint.step),
            "srpo.weights": _kind(self.averaged),
            "srpo.config_sha256": hashlib.sha256(config).hexdigest(),
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": architecture,
            "modelspec.implementation": "diffusers",
            "modelspec.title": title(base, self.config.algorithm, form),
            "modelspec.resolution": f"{width}x{height}",
            "modelspec.date": datetime.now(UTC).isoformat(timespec="seconds"),
            "modelspec.license": base.licence_name or base.licence,
        }


@dataclass(frozen=True)
class Job:
    """One export under way: from where, to where, as what. ``remarks`` collects what its user must know."""

    trained: Trained
    folder: Path
    dtype: torch.dtype
    headers: dict[str, str]
    rank: int
    remarks: list[str] = field(default_factory=list)


def _kind(averaged: bool) -> str:
    return "average" if averaged else "trained"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checkpoint(run: Path, step: int | None) -> Checkpoint:
    """The checkpoint of a run after ``step``, by default its best."""
    if step is None:
        return find_checkpoint(run)
    checkpoints = {one.step: one for one in list_checkpoints(run / "checkpoints") or [find_checkpoint(run)]}
    if step not in checkpoints:
        there = ", ".join(map(str, checkpoints))
        raise UsageError(f"{run} holds no checkpoint of step {step}: --checkpoint can be {there}")
    return checkpoints[step]


def export(request: Request, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Write what is asked for to a folder that appears when it is whole; returns what was written.

    Args:
        request: what to export.
        say: where lines for the user go.

    Raises SrpoError for what a user can cause; no folder is there then.
    """
    quiet_libraries()
    trained = Trained.find(request)
    form = _form(request, trained)
    dtype = getattr(torch, request.dtype or (trained.config.model.dtype if form in ("full", "merged") else "float32"))
    output = request.output or trained.folder.path / "exports" / f"{trained.checkpoint.path.resolve().name}-{form}"
    base = Base.of(trained.config.model.name)
    with _whole_folder(output) as folder:
        job = Job(trained, folder, dtype, trained.headers(base, form), rank=request.rank or DEFAULT_RANK)
        result = {
            "format": form,
            "step": trained.checkpoint.step,
            "weights": _kind(trained.averaged),
            "dtype": _name(dtype),
            **_WRITERS[form](job),
            "output": str(output),
        }
        environment = trained.environment()
        card = model_card(
            config=trained.config,
            base=base,
            result=result,
            commands=[_run_command(environment), request.command()],
            environment=environment,
            summary=trained.summary(),
            start=_start(trained, form),
            remarks=job.remarks,
            best=trained.is_best,
        )
        (folder / CARD).write_text(card, encoding="utf-8")
    for remark in job.remarks:
        say(f"note: {remark}")
    return result


def _form(request: Request, trained: Trained) -> str:
    """The format that is asked for, or the one of what was trained; UsageError for one that this run cannot have."""
    form, run = request.form or ("lora" if trained.is_lora else "full"), request.run
    if trained.is_lora and form in ("full", "extract"):
        other = "--format merged folds it into the base" if form == "full" else "--format lora exports it as it is"
        raise UsageError(f"{run} trained a LoRA, --format {form} is for a run that trained every weight: {other}")
    if not trained.is_lora and form in ("lora", "merged"):
        other = "extract makes one of the difference to the base" if form == "lora" else "full writes them as they are"
        raise UsageError(f"{run} trained every weight, there is no LoRA for --format {form}: --format {other}")
    return form


def _run_command(environment: Mapping[str, Any]) -> str:
    """The command that began the run, as a user types it."""
    command = environment.get("command")
    return shlex.join(["srpo", *map(str, command[1:])]) if command else "# the run's own command is not known"


@contextmanager
def _whole_folder(output: Path) -> Iterator[Path]:
    """A folder to write to that becomes ``output`` at the end, and is gone if anything goes wrong before."""
    RunFolder(output).check_free()
    place = output.resolve()
    temporary = place.with_name(f".{place.name}.tmp")
    missing = [parent for parent in place.parents if not parent.exists()]
    with disk_errors(output):
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if temporary.exists():  # left by a process that was killed
                shutil.rmtree(temporary)
            temporary.mkdir()
            yield temporary
            if place.exists():
                place.rmdir()
            temporary.rename(place)
        except BaseException as error:
            shutil.rmtree(temporary, ignore_errors=True)
            for parent in missing:
                with suppress(OSError):
                    parent.rmdir()
            if isinstance(error, SafetensorError):  # so safetensors reports a full disk
                raise SrpoError(f"cannot write to {output}: {one_line(error)}") from error
            raise


@dataclass(frozen=True)
class Transformer:
    """A transformer's layout, without weights, and the files that hold them."""

    layout: FluxTransformer2DModel
    files: TransformerFiles

    @classmethod
    def open(cls, source: Path, pipeline: Path) -> Transformer:
        """The transformer of a folder or single file; ``pipeline`` is the folder of the one that it belongs to."""
        layout = make_transformer(source, pipeline)
        return cls(layout, TransformerFiles(source, _shapes(layout)))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return _shapes(self.layout)

    def read(self, name: str) -> Tensor:
        """A weight in float32, on the CPU."""
        return self.files.read(name).float()


def _shapes(layout: FluxTransformer2DModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in layout.named_parameters()}


def _base_files(name: str, weights: Path | None = None) -> tuple[Path, Path]:
    """Where the transformer of a model is, with tuned ``weights`` in it, and the folder of its pipeline."""
    tuned = tuned_weights(name, weights).transformer
    folder = pipeline_folder(name, () if tuned else ("transformer",))
    return tuned or folder / "transformer", folder


def _base_of(trained: Trained, tuned: Transformer) -> Transformer:
    """The transformer that the run's model has by its name; SrpoError unless it is one like ``tuned``."""
    source, _ = _base_files(trained.config.model.name)
    return Transformer(tuned.layout, TransformerFiles(source, tuned.shapes))


def _start(trained: Trained, form: str) -> Path | None:
    """The transformer that a LoRA goes onto where that is not the pipeline's own, as far as its files are here."""
    config = trained.config.model
    with suppress(SrpoError):
        return tuned_weights(config.name, None if form == "extract" else config.weights).transformer
    return None


# --- a LoRA ---------------------------------------------------------------------------------------------------------


def _folded_lora(file: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module to (up, down) of a LoRA file, its scale in ``up``: what it adds to the weight is ``up @ down``."""
    try:
        with safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name).float() for name in opened.keys()}  # noqa: SIM118 - no mapping
            packed = json.loads((opened.metadata() or {}).get(LORA_ADAPTER_METADATA_KEY, "{}"))
        options = {name.removeprefix(_PREFIX): value for name, value in packed.items()}
        config = LoraConfig(**options) if options else None
    except (OSError, SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise SrpoError(f"cannot read the LoRA {file}: {one_line(error)}") from error
    foreign = [name for name in tensors if not _FACTOR.fullmatch(name)]
    if foreign or not tensors:
        raise SrpoError(f"{file} is no plain LoRA of a transformer: it holds {(foreign or ['nothing'])[0]}")
    folded = {}
    for module in dict.fromkeys(_FACTOR.fullmatch(name)[1] for name in tensors):
        up, down = (tensors.get(f"{_PREFIX}{module}.{kind}.weight") for kind in ("lora_B", "lora_A"))
        if up is None or down is None:
            raise SrpoError(f"{file} is damaged: {module} has one of lora_A and lora_B only")
        folded[module] = (up * _scale(config, module, len(down)) if config else up, down)
    return folded


def _scale(config: LoraConfig, module: str, rank: int) -> float:
    """What peft multiplies a module's ``lora_B @ lora_A`` by."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern.keys(), module), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _write_lora_file(job: Job, lora: Mapping[str, tuple[Tensor, Tensor]], **headers: str) -> dict[str, Any]:
    """Write (up, down) by module in the layout of diffusers and peft; alpha is the rank, so nothing is left to scale.

    The header repeats ranks and alphas for versions of diffusers that would take one alpha for unequal ranks.
    """
    tensors = {}
    for module, (up, down) in lora.items():
        for kind, factor in (("lora_A", down), ("lora_B", up)):
            name = f"{_PREFIX}{module}.{kind}.weight"
            tensors[name] = _cast(name, factor, job.dtype).contiguous()
    ranks = {module: len(down) for module, (_, down) in lora.items()}
    rank = max(ranks.values())
    unequal = {f"^{re.escape(module)}": own for module, own in ranks.items() if own != rank}
    config = {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": unequal,
        "alpha_pattern": unequal,
        "target_modules": sorted(ranks),
    }
    packed = {f"{_PREFIX}{name}": value for name, value in config.items()}
    data = safetensors.torch.save(tensors)
    body = 8 + int.from_bytes(data[:8], "little")  # the header's length comes first
    digest = {"modelspec.hash_sha256": f"0x{hashlib.sha256(data[body:]).hexdigest()}"}
    headers = job.headers | headers | digest | {LORA_ADAPTER_METADATA_KEY: json.dumps(packed, sort_keys=True)}
    _check_room(job.folder, len(data))
    safetensors.torch.save_file(tensors, job.folder / LORA_FILE, headers)
    return {"rank": rank, "parameters": sum(tensor.numel() for tensor in tensors.values()), "bytes": _size(job.folder)}


def _write_lora(job: Job) -> dict[str, Any]:
    _remark_on_quantised_base(job)
    return _write_lora_file(job, _folded_lora(job.trained.weights / LORA_FILE))


def _remark_on_quantised_base(job: Job) -> None:
    if (kept := job.trained.config.lora.base) != "model":
        job.remarks.append(
            f"The LoRA was trained over a base whose weights were kept in {kept}: over the unquantised base its "
            "pictures differ a little from those of the run."
        )


def _write_extract(job: Job) -> dict[str, Any]:
    """The difference to the named base in every linear layer but the modulation's, as the nearest LoRA of a rank."""
    trained, rank, remarks = job.trained, job.rank, job.remarks
    tuned = Transformer.open(trained.weights, trained.weights)
    base = _base_of(trained, tuned)
    targets = {f"{name}.weight" for name in linear_layers(tuned.layout) if not is_modulation(name)}
    device = torch.device("cuda" if best_device().type == "cuda" else "cpu")  # it needs float64
    lora, layers = {}, []
    lost = covered = left_out = 0.0  # squared Frobenius norms
    with CountProgress(len(tuned.shapes), "tensors") as progress:
        for done, name in enumerate(tuned.shapes, 1):
            difference = (_cast(name, tuned.read(name), torch.float32) - base.read(name)).to(device)
            norm = _norm(difference)
            if name not in targets:
                left_out += norm**2
            elif norm:
                covered += norm**2
                module = name.removesuffix(".weight")
                up, down = (_cast(name, factor.cpu(), job.dtype) for factor in nearest_low_rank(difference, rank))
                rest = _norm(difference.cpu() - up.float() @ down.float())
                lost += rest**2
                lora[module] = (up, down)
                layers.append({"layer": module, "rank": len(down), "difference": norm, "error": rest / norm})
            progress.update(done)
    if not lora:
        raise SrpoError(f"{trained.weights} has the base's weights in every layer that a LoRA could be for")
    clipped = [layer for layer in layers if layer["rank"] < rank]
    if clipped:
        remarks.append(
            f"Rank {rank} is more than {len(clipped)} of {len(layers)} layers have: theirs is their smaller side, "
            f"from {min(layer['rank'] for layer in clipped)} up."
        )
    if trained.config.model.weights is not None:
        remarks.append(
            f"The run began from {trained.config.model.weights}: the LoRA holds that and what was trained, since it "
            "is the difference to the base itself."
        )
    errors = {
        "error": math.sqrt(lost / covered),
        "left_out": math.sqrt(left_out / (covered + left_out)),
        "total_error": math.sqrt((lost + left_out) / (covered + left_out)),
    }
    what = "modulation, norms, biases"
    remarks.append(
        f"The LoRA leaves out {what}, {errors['left_out']:.2%} of the difference, and misses {errors['error']:.2%} of "
        f"the rest (Frobenius norms): {errors['total_error']:.2%} in all."
    )
    by_layer = {layer["layer"]: round(layer["error"], 6) for layer in layers}
    report = json.dumps({**errors, "left_out_what": what, "layers": by_layer})
    written = _write_lora_file(job, lora, **{"srpo.extract": report})
    return {**written, **errors, "left_out_what": what, "layers": layers}


# --- a transformer --------------------------------------------------------------------------------------------------


def _write_full(job: Job) -> dict[str, Any]:
    trained = job.trained
    tuned = Transformer.open(trained.weights, trained.weights)
    base = None
    if job.dtype is not torch.float32:
        with suppress(SrpoError):  # without it only the share that rounding takes cannot be told
            base = _base_of(trained, tuned)

    def read(name: str) -> tuple[Tensor, Tensor | None]:
        return tuned.read(name), base.read(name) if base else None

    return _write_transformer(job, tuned.layout, read)


def _write_merged(job: Job) -> dict[str, Any]:
    config = job.trained.config.model
    source, pipeline = _base_files(config.name, config.weights)
    start = Transformer.open(source, pipeline)
    file = job.trained.weights / LORA_FILE
    lora = {f"{module}.weight": pair for module, pair in _folded_lora(file).items()}
    for name, (up, down) in lora.items():
        if start.shapes.get(name) != (len(up), down.shape[1]):
            raise SrpoError(f"{file} does not fit {source}: {name} has another shape or is not there")
    _remark_on_quantised_base(job)

    def read(name: str) -> tuple[Tensor, Tensor | None]:
        weight = start.read(name)
        if name not in lora:
            return weight, weight
        up, down = lora[name]
        return weight + up @ down, weight

    return _write_transformer(job, start.layout, read)


def _write_transformer(
    job: Job, layout: FluxTransformer2DModel, read: Callable[[str], tuple[Tensor, Tensor | None]]
) -> dict[str, Any]:
    """Write what ``FluxTransformer2DModel.from_pretrained`` reads, one shard at a time.

    ``read`` gives a weight and, where it is known, what it was before training, both in float32.
    """
    folder, dtype = job.folder, job.dtype
    counts = {name: math.prod(shape) for name, shape in _shapes(layout).items()}
    sizes = {name: count * dtype.itemsize for name, count in counts.items()}
    _check_room(folder, sum(sizes.values()))
    moved = rounded = 0.0  # squared Frobenius norms

    def weights(progress: CountProgress) -> Iterator[tuple[str, Tensor]]:
        nonlocal moved, rounded
        for done, name in enumerate(sizes, 1):
            weight, before = read(name)
            cast = _cast(name, weight, dtype)
            if before is not None and dtype is not torch.float32:
                moved += _norm(weight - before) ** 2
                rounded += _norm(cast.float() - weight) ** 2
            yield name, cast
            progress.update(done)

    with CountProgress(len(sizes), "tensors") as progress:
        save_shards(folder, sizes, weights(progress), job.headers, _SHARD)
    layout.save_config(folder)
    rounding = math.sqrt(rounded / moved) if moved else None
    if rounding:
        job.remarks.append(
            f"Rounding the weights to {_name(dtype)} moves them by {rounding:.1%} of what training "
            "moved them (Frobenius norms); --dtype float32 keeps them exact."
        )
    return {"parameters": sum(counts.values()), "bytes": _size(folder), "rounding": rounding}


def _norm(tensor: Tensor) -> float:
    """The Frobenius norm, summed up in float64."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).item()


def _finite(tensor: Tensor) -> bool:
    return all(bound.isfinite() for bound in tensor.aminmax())  # one pass, and a NaN is a bound of what it is in


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in ``dtype``; SrpoError if it does not fit."""
    cast = tensor.to(dtype)
    if not _finite(cast):
        if _finite(tensor):
            raise SrpoError(f"{name} is too large for {_name(dtype)}: choose another --dtype")
        raise SrpoError(f"{name} holds numbers that are not finite: the run went wrong, export an earlier --checkpoint")
    return cast


def _check_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise SrpoError(
            f"the export takes {size / 2**30:.1f} GiB and {folder.parent} has {free / 2**30:.1f} GiB free: "
            "free some space, or choose another --output"
        )


def _size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


_WRITERS = {"lora": _write_lora, "full": _write_full, "merged": _write_merged, "extract": _write_extract}
