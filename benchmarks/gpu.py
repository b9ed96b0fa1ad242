"""Measure one GPU with random weights of full size: ``python -m benchmarks.gpu --out DIR [--minutes 25]``.

Results go to ``DIR/gpu.json`` after every part, so that a timeout loses none of the finished ones. The parts are those
of docs/performance.md; ``--parts`` picks some, ``--tiny`` shows on any machine that all of them run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.bare_loop import BareLoop
from benchmarks.full_size import (
    FULL,
    TINY,
    Scale,
    make_clip,
    make_flux,
    make_vae,
    random_latents,
    random_texts,
    run_config,
    write_pipeline,
)
from benchmarks.scenes import given_of, make_run, randomise, take_step
from benchmarks.targets import Row, table
from benchmarks.upstream_loop import UpstreamLoop
from srpo_cli.config.load import load_train_config
from srpo_cli.models.flux import Flux
from srpo_cli.recipes.plan import count
from srpo_cli.recipes.train import Run
from srpo_cli.runtime.split_adamw import SplitAdamW

_GIB = 2**30
_CEILING = 798e12  # FLOP/s of bfloat16 products that an H100 or H200 was seen to reach


@dataclass
class Bench:
    """Where and how large, how often, and what was found so far."""

    scale: Scale
    device: torch.device
    out: Path
    folder: Path
    repeats: int = 5
    compiled: bool = True
    results: dict[str, Any] = field(default_factory=dict)

    @property
    def on_cuda(self) -> bool:
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Until the device has done all it was given."""
        if self.on_cuda:
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], warm: int = 1) -> float:
        """Median seconds of a call, the device's work included."""
        for _ in range(warm):
            call()
        return statistics.median(self.once(call) for _ in range(self.repeats))

    def once(self, call: Callable[[], Any]) -> float:
        """Seconds of one call."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def peak_gib(self, call: Callable[[], Any]) -> float | None:
        """The most memory that tensors took while ``call`` ran; None where nobody counts it."""
        if not self.on_cuda:
            call()
            return None
        torch.cuda.reset_peak_memory_stats()
        call()
        self.wait()
        return torch.cuda.max_memory_allocated() / _GIB

    def free(self) -> None:
        """Give back what nobody holds."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def save(self) -> None:
        temporary = self.out / ".gpu.json"
        temporary.write_text(json.dumps(self.results, indent=2) + "\n")
        temporary.replace(self.out / "gpu.json")

    def make_run(self, name: str, *overrides: str) -> Run:
        """A run of the product from files that are written once."""
        if not (self.folder / "pipeline").exists():
            write_pipeline(self.folder, self.scale, self.device)
            self.free()
        whole = overrides if self.on_cuda else ("model.compile=false", *overrides)
        return make_run(run_config(self.folder, self.scale, *whole), self.folder / name)


Found = Iterator[tuple[str, Any]]


# --- parts of a step --------------------------------------------------------------------------------------------------


def ceilings(bench: Bench) -> Found:
    """1: what the device can do at most: products, copies, transfers both ways at once."""
    side, like = bench.scale.matmul, {"device": bench.device, "dtype": torch.bfloat16}
    shapes = {"square": (side, side, side)}
    width, tokens = (3072, 2537) if bench.scale is FULL else (128, 48)
    shapes |= {"mlp_up": (tokens, width, 4 * width), "single_out": (tokens, 5 * width, width)}
    for name, (rows, inner, columns) in shapes.items():
        one, other = torch.randn(rows, inner, **like), torch.randn(inner, columns, **like)
        yield f"{name}_tflops", 2 * rows * inner * columns / bench.seconds(lambda a=one, b=other: a @ b) / 1e12
    data = torch.randn(side, side, 8, device=bench.device)
    target = torch.empty_like(data)
    yield "copy_tb_per_s", 2 * data.nbytes / bench.seconds(lambda: target.copy_(data)) / 1e12
    if bench.on_cuda:
        there, back = (torch.empty(data.shape, pin_memory=True) for _ in range(2))
        streams = torch.cuda.Stream(), torch.cuda.Stream()

        def both_ways() -> None:
            with torch.cuda.stream(streams[0]):
                target.copy_(there, non_blocking=True)
            with torch.cuda.stream(streams[1]):
                back.copy_(data, non_blocking=True)

        yield "pinned_gb_per_s_each_way", data.nbytes / bench.seconds(both_ways) / 1e9


def forwards(bench: Bench) -> Found:
    """2, 3, 4, 15: a forward pass without a gradient; eager, other attention, float8, compiled, larger, batched."""
    flux = make_flux(bench.scale, bench.device, torch.bfloat16)
    usual, large = bench.scale.sizes
    if bench.scale is FULL:
        yield "forward_flops", count(load_train_config("realism").config).transformer.forward
    with torch.no_grad():
        yield "eager_s", bench.seconds(_forward(flux, bench.scale, usual, 1), warm=2)
        yield "attention", flux.use_attention("auto")
        yield "fast_attention_s", bench.seconds(_forward(flux, bench.scale, usual, 1), warm=2)
        if not bench.on_cuda or torch.cuda.get_device_capability() >= (8, 9):
            with flux.float8_rollouts():
                yield "float8_eager_s", bench.seconds(_forward(flux, bench.scale, usual, 1), warm=2)
        if bench.compiled:
            flux.compile_blocks()
            yield "cold_compile_s", bench.once(_forward(flux, bench.scale, usual, 1))
        for name, size, batch in (("", usual, 1), ("_large", large, 1), ("_batch_2", usual, 2), ("_batch_4", usual, 4)):
            yield f"best{name}_s", _settled(bench, _forward(flux, bench.scale, size, batch)) / batch


def _settled(bench: Bench, call: Callable[[], Any]) -> float:
    """Median seconds of a call whose shapes are compiled on their own; RuntimeError if it is compiled once more."""
    torch.compiler.reset()
    for _ in range(2):
        call()
    with torch.compiler.set_stance("fail_on_recompile"):
        return bench.seconds(call, warm=0)


def _forward(flux: Flux, scale: Scale, size: tuple[int, int], batch: int) -> Callable[[], Tensor]:
    texts, latents = random_texts(flux, scale, batch), random_latents(flux, size, batch)
    sigma = torch.full((batch,), 0.8, device=flux.device)
    return lambda: flux.velocity(latents, sigma, texts, 3.5, size)


def gradient_passes(bench: Bench) -> Found:
    """5, 14: forward and backward of the transformer, every block recomputed; seconds of a sample."""
    flux = make_flux(bench.scale, bench.device, torch.bfloat16)
    flux.checkpoint_blocks(transformer=True, vae=True)
    size = bench.scale.sizes[0]

    def whole(batch: int) -> Callable[[], None]:
        forward = _forward(flux, bench.scale, size, batch)

        def both() -> None:
            forward().float().square().mean().backward()
            for parameter in flux.transformer.parameters():
                parameter.grad = None

        return both

    yield "eager_s", bench.seconds(whole(1))
    flux.use_attention("auto")
    if bench.compiled:
        flux.compile_blocks()
        yield "cold_compile_s", bench.once(whole(1))
    for batch in (1, 2):
        yield f"best_batch_{batch}_s", _settled(bench, whole(batch)) / batch


def decoding(bench: Bench) -> Found:
    """6: the decoder, forward and backward to the latents."""
    vae = make_vae(bench.scale, bench.device, torch.bfloat16).requires_grad_(False)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    for kind in ("plain", "checkpointed", "channels_last"):
        if kind == "checkpointed":
            vae.enable_gradient_checkpointing()
        if kind == "channels_last":
            vae.to(memory_format=torch.channels_last)
        for name, size in zip(("usual", "large"), bench.scale.sizes, strict=True):
            shape = (1, vae.config.latent_channels, *(edge // factor for edge in size))
            latents = torch.randn(shape, device=bench.device, dtype=torch.bfloat16, requires_grad=True)

            def both(latents: Tensor = latents) -> None:
                vae.decode(latents).sample.float().mean().backward()

            yield f"{kind}_{name}_s", bench.seconds(both)
            yield f"{kind}_{name}_peak_gib", bench.peak_gib(both)


def judging(bench: Bench) -> Found:
    """7: the reward's picture tower, forward and backward to the pixels, and what caching its texts saves."""
    clip = make_clip(bench.scale, bench.device, torch.bfloat16).requires_grad_(False)
    pixels = torch.randn(1, 3, 224, 224, device=bench.device, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.ones(1, clip.context_length, device=bench.device, dtype=torch.long)
    yield "image_tower_s", bench.seconds(lambda: clip.encode_image(pixels).float().mean().backward())
    with torch.no_grad():
        yield "text_tower_s", bench.seconds(lambda: clip.encode_text(tokens))


# --- whole steps ------------------------------------------------------------------------------------------------------


class _NoUpdate:
    """Stands for an optimizer where its time is measured on its own."""

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = parameters

    def step(self) -> None:
        """Nothing."""

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def steps(bench: Bench) -> Found:
    """8, 9, 10, 11, 12, 13: the product's step under plan streamed, the loops beside it, the update, the memory."""
    run = bench.make_run("streamed", "memory.plan=streamed", "memory.gradients=bfloat16")
    plan = run.plan
    yield (
        "plan",
        {"name": plan.name, "gib": plan.total_gib, "flops": plan.flops_per_step, "settings": vars(plan.settings)},
    )
    yield "first_step_s", bench.once(lambda: take_step(run))
    yield "peak_gib", bench.peak_gib(lambda: take_step(run))
    yield "host_waits", _host_waits(bench, run)
    update = run.trained.step
    spent: list[float] = []
    run.trained.step = lambda lr: spent.append(bench.once(lambda: update(lr)))
    for _ in range(bench.repeats):
        take_step(run)
    yield "update_streamed_s", statistics.median(spent)

    run.trained.step = lambda _: run.trained.drop_gradients()
    given = given_of(run, twin=False)
    given.optimizer = _NoUpdate(run.parameters)
    bare, upstream = BareLoop(given), UpstreamLoop(given)
    yield from _against(bench, run, lambda: bare.step(run.step))
    with torch.compiler.set_stance("force_eager"):
        yield "upstream_s", bench.seconds(lambda: upstream.step(run.step))
    yield from _cheaper(bench, run)


def _against(bench: Bench, run: Run, bare: Callable[[], Any]) -> Found:
    """The product's step and the bare loop's in turns, there and back, without the optimizer."""
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    turn = [("ours", lambda: take_step(run)), ("bare", bare)]
    for _, step in turn:
        step()
    for number in range(2 * bench.repeats):
        for name, step in turn if number % 2 == 0 else reversed(turn):
            seconds[name].append(bench.once(step))
    for name, values in seconds.items():
        yield f"{name}_s", {"min": min(values), "median": statistics.median(values), "max": max(values)}
    yield "ours_over_bare", statistics.median(seconds["ours"]) / statistics.median(seconds["bare"])


def _cheaper(bench: Bench, run: Run) -> Found:
    """Steps on kept rollouts, which is what offline steps on encoded pictures cost, and four pairs a rollout."""
    config = run.config
    run.config = config.model_copy(update={"rollout": config.rollout.model_copy(update={"replay": 10**6})})
    run.step = 1
    yield "kept_rollout_s", bench.seconds(lambda: take_step(run))
    algorithm = config.algorithm.model_copy(update={"pairs": 4})
    run.config = config.model_copy(update={"algorithm": algorithm})
    yield "four_pairs_s", bench.seconds(lambda: take_step(run))
    run.config = config


def _host_waits(bench: Bench, run: Run) -> int | None:
    """N4 on the device itself: warnings of torch's own debug mode in one step, blocking copies included."""
    if not bench.on_cuda:
        take_step(run)
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            take_step(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in caught)


def updates(bench: Bench) -> Found:
    """12: the update with everything on the device, of a tenth of the weights; seconds of all of them."""
    total = count(load_train_config("realism").config).parameters if bench.scale is FULL else 10**6
    share = total // 10 // 2**20 * 2**20 or 2**16
    for moments in ("float32", "8bit"):  # the latter needs bitsandbytes
        parameter = nn.Parameter(torch.empty(share, device=bench.device, dtype=torch.bfloat16))
        randomise(nn.ParameterList([parameter]))
        optimizer = SplitAdamW([parameter], 5e-6, moments=moments, gradients=torch.bfloat16)
        parameter.grad = torch.randn_like(parameter)
        yield f"resident_{moments}_s", bench.seconds(optimizer.step) * total / share
        del parameter, optimizer
        bench.free()


def lora(bench: Bench) -> Found:
    """13: a LoRA's whole step in the memory of a 24 GB card, with the settings that such a card would get."""
    smallest = ("memory.transformer_checkpointing=true", "memory.vae_checkpointing=true", "memory.batch_branches=false")
    for base in ("float8", "nf4"):
        with _small_card(bench):
            run = bench.make_run(f"lora-{base}", "train.mode=lora", f"lora.base={base}", *smallest)
            take_step(run)
            yield f"{base}_peak_gib", bench.peak_gib(lambda r=run: take_step(r))
            yield f"{base}_step_s", bench.seconds(lambda r=run: take_step(r), warm=0)
            yield f"{base}_planned_gib", run.plan.total_gib
            del run
        bench.free()


def memory(bench: Bench) -> Found:
    """13: the peak of a full-parameter step that sums up the gradients of several passes."""
    run = bench.make_run("several", "memory.plan=streamed", "train.batch_size=2", "memory.micro_batch=1")
    take_step(run)
    yield "peak_gib", bench.peak_gib(lambda: take_step(run))
    yield "planned_gib", run.plan.total_gib
    yield "settings", vars(run.settings)


@contextmanager
def _small_card(bench: Bench) -> Iterator[None]:
    if not bench.on_cuda:
        yield
        return
    torch.cuda.set_per_process_memory_fraction(24 * 10**9 / torch.cuda.get_device_properties(0).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


PARTS: dict[str, Callable[[Bench], Found]] = {
    part.__name__: part
    for part in (ceilings, forwards, gradient_passes, decoding, judging, steps, memory, updates, lora)
}


def rows(results: Mapping[str, Any]) -> Iterator[Row]:
    """What the results come to in the table of targets; nothing for what was not measured."""
    step, forward, whole, adapter = (results.get(name, {}) for name in ("steps", "forwards", "memory", "lora"))
    device = f"{results['device']}, {results['scale']}"
    if "ours_s" in step and step["plan"]["flops"]:
        online = step["ours_s"]["median"]
        yield Row("T4", device, online * _CEILING / step["plan"]["flops"], f"{online:.3f} s without the update")
    if "best_s" in forward and "forward_flops" in forward:
        yield Row("T5", device, forward["forward_flops"] / forward["best_s"] / _CEILING, f"{forward['best_s']:.4f} s")
    if "kept_rollout_s" in step:
        yield Row("T6", device, step["kept_rollout_s"] / step["ours_s"]["median"], "on kept rollouts")
    if whole.get("peak_gib"):
        yield Row("M2", device, whole["peak_gib"], f"planned {whole['planned_gib']:.1f}")
    for base in ("float8", "nf4"):
        if adapter.get(f"{base}_peak_gib"):
            planned = adapter[f"{base}_planned_gib"]
            yield Row("M3", device, adapter[f"{base}_peak_gib"], f"{base}, planned {planned:.1f}")


def measure(bench: Bench, parts: Sequence[str], minutes: float) -> bool:
    """Run the parts, each kept as it comes; a part that fails says why. Returns whether all were done."""
    bench.results |= {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name() if bench.on_cuda else "cpu",
        "torch": torch.__version__,
        "scale": "full" if bench.scale is FULL else "tiny",
    }
    started, whole = time.monotonic(), True
    for name in parts:
        found = bench.results[name] = {}
        begun = time.monotonic()
        if begun - started > 60 * minutes:
            found["skipped"] = f"after {minutes:g} minutes"
            whole = False
            bench.save()
            continue
        try:
            for key, value in PARTS[name](bench):
                found[key] = value
                bench.save()
        except Exception as error:  # the other parts are still worth their time, and the error is in the results
            found["error"] = f"{type(error).__name__}: {error}"
            whole = False
        bench.free()
        found["took_s"] = round(time.monotonic() - begun, 1)
        bench.save()
        print(f"{name}: {json.dumps(found)}", flush=True)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, and return the exit code: 1 where a part failed or was left out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where gpu.json is written")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; all")
    parser.add_argument("--minutes", type=float, default=25, help="after which no part is begun; 25")
    parser.add_argument("--tiny", action="store_true", help="tiny models on this CPU: figures mean nothing")
    options = parser.parse_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("no CUDA device here: add --tiny to see the parts run, or measure elsewhere", file=sys.stderr)
        return 2
    device = torch.device("cpu") if options.tiny else torch.device("cuda", 0)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as folder:  # 27 GB of random weights
        bench = Bench(TINY if options.tiny else FULL, device, options.out, Path(folder) / "models")
        if options.tiny:
            bench.repeats, bench.compiled = 1, False
        whole = measure(bench, options.parts, options.minutes)
        print(table(list(rows(bench.results))))
        return int(not whole)


if __name__ == "__main__":
    sys.exit(main())
