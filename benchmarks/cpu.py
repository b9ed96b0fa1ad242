"""Measure the table of docs/performance.md on this CPU: ``python -m benchmarks.cpu [--quick] [--json FILE]``.

Counts are exact and the same everywhere. Times are CPU times on one thread, as ratios of loops that take turns, and
still vary by some percent where other programs share the caches. The exit code is 1 where a gate is missed.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from benchmarks.bare_loop import BareLoop
from benchmarks.counters import Counting, Counts
from benchmarks.scenes import (
    given_of,
    make_run,
    miniature_config,
    one_thread,
    random_config,
    take_step,
    write_random_pipeline,
)
from benchmarks.targets import Row, table
from benchmarks.upstream_loop import UpstreamLoop
from srpo_cli.config.load import load_train_config
from srpo_cli.config.schema import TrainConfig
from srpo_cli.recipes.plan import count, plan_for
from srpo_cli.recipes.train import Run
from srpo_cli.runtime.plan import known_machine
from srpo_cli.runtime.split_adamw import SplitAdamW
from srpo_cli.runtime.trained import Halves

_REPOSITORY = Path(__file__).parents[1]
_MINIATURE, _RANDOM = "miniature", "random FLUX"
_CHECKPOINTED = ("memory.transformer_checkpointing=true", "memory.vae_checkpointing=true")
_EMPTY_APP = "import typer\napp = typer.Typer()\n@app.command()\ndef main() -> None:\n    pass\napp()\n"
_IMPORTS = """
import contextlib, io, sys
from srpo_cli.cli.app import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main(["--help"])
sys.exit("torch" in sys.modules)
"""


@dataclass
class Loops:
    """The product's run and hand-written loops at the same step, from the same weights."""

    run: Run
    bare: BareLoop
    upstream: UpstreamLoop
    taken: int = 0

    @classmethod
    def of(cls, config: TrainConfig, folder: Path) -> Loops:
        run = make_run(config, folder)
        return cls(run, BareLoop(given_of(run)), UpstreamLoop(given_of(run)))

    def counting(self, transformer: nn.Module) -> Counting:
        model = self.run.model
        others = [part for part in (model.text_encoder, model.text_encoder_2) if part is not None]
        return Counting(transformer, model.vae, self.run.parts.reward.tower, others)

    def count(self) -> dict[str, Counts]:
        """What each loop does in one step."""
        with self.counting(self.run.model.transformer) as ours:
            take_step(self.run)
        with self.counting(self.bare.given.transformer) as bare:
            self.bare.step(self.taken)
        with self.counting(self.upstream.given.transformer) as upstream:
            self.upstream.step(self.taken)
        self.taken += 1
        return {"ours": ours, "bare": bare, "upstream": upstream}

    def difference(self) -> float:
        """The largest relative difference between run and bare loop in one step: what is logged, and the gradients.

        Gradients are compared in AdamW's first moments, their running mean over the steps so far.
        """
        ours, bare = take_step(self.run), self.bare.step(self.taken)
        self.upstream.step(self.taken)
        self.taken += 1
        pairs = [(ours[name], statistics.fmean(told[name] for told in bare)) for name in ("loss", "grad_norm")]
        pairs += [(ours[name], bare[0][name]) for name in ("reward", "sgp_gap")]
        one, other = (
            torch.cat([state["exp_avg"].flatten() for state in optimizer.state.values()])
            for optimizer in (self.run.trained.optimizer, self.bare.optimizer)
        )
        return max(((one - other).norm() / other.norm()).item(), *(abs(a - b) / abs(b) for a, b in pairs))


def minimum_flops(config: TrainConfig) -> float:
    """FLOPs that a step cannot do without, from counts of its parts on the meta device.

    Every rollout is decoded and judged once for the log, and once more where the gap is measured on changed pictures.
    """
    parts, memory, pairs = count(config, torch.float32), config.memory, config.algorithm.pairs
    judged = 2 if config.reward.shift or config.reward.noise else 1
    transformer = parts.transformer.recomputed if memory.transformer_checkpointing is True else parts.transformer.both
    decoder = parts.decoder.recomputed if memory.vae_checkpointing is True else parts.decoder.both
    rollout = config.rollout.steps * parts.transformer.forward + parts.decoder.forward + judged * parts.reward.forward
    branches = len(config.algorithm.branches)
    return config.train.batch_size * (rollout + branches * pairs * (transformer + decoder + parts.reward.both))


def counted_rows(scene: str, config: TrainConfig, counts: Mapping[str, Counts]) -> Iterator[Row]:
    """N1 to N5 and T2 of one warm step."""
    ours, bare, upstream = counts["ours"], counts["bare"], counts["upstream"]
    pairs = config.algorithm.pairs
    samples = config.train.batch_size * config.rollout.steps * pairs
    yield Row("N1", scene, ours.no_grad_samples / samples, f"K = {pairs}", good=1 / pairs)
    yield Row("N2", scene, ours.grad_calls / pairs, f"upstream-faithful {upstream.grad_calls / pairs:g}")
    yield Row("N3", scene, ours.text_encodes, f"upstream-faithful {upstream.text_encodes / pairs:g} a pair")
    yield Row("N4", scene, ours.syncs / pairs, f"upstream-faithful {upstream.syncs / pairs:g}")
    minimum = minimum_flops(config)
    yield Row("N5", scene, ours.flops / minimum, f"{ours.flops / 1e9:.2f} GFLOP; bare {bare.flops / minimum:.4f}")
    yield Row("T2", scene, ours.operator_count / bare.operator_count, f"{ours.operator_count} operators")


def timed_rows(scene: str, loops: Loops, rounds: int) -> Iterator[Row]:
    """T1 and T3, from CPU times of the three loops in turns, there and back."""

    def upstream() -> None:
        loops.upstream.step(loops.taken)

    def bare() -> None:
        loops.bare.step(loops.taken)

    turn: list[tuple[str, Callable[[], Any]]] = [
        ("ours", lambda: take_step(loops.run)),
        ("bare", bare),
        ("upstream", upstream),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, _ in turn}
    for number in range(rounds):
        for name, step in turn if number % 2 == 0 else reversed(turn):
            gc.collect()
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
        loops.taken += 1
    least, middle = ({name: of(values) for name, values in seconds.items()} for of in (min, statistics.median))
    spread = max(seconds["bare"]) / least["bare"]
    for name, one, other in (("T1", "ours", "bare"), ("T3", "upstream", "ours")):
        ratios = [each[one] / each[other] for each in (least, middle)]
        note = f"of minima {ratios[0]:.3f}, of medians {ratios[1]:.3f}, {rounds} rounds, bare max/min {spread:.2f}"
        yield Row(name, scene, (min if name == "T1" else max)(ratios), note)


def scene_rows(scene: str, config: TrainConfig, folder: Path, rounds: int) -> Iterator[Row]:
    """Everything that one scene shows."""
    loops = Loops.of(config, folder)
    loops.difference()  # a warm-up too: texts, optimizer state
    yield from counted_rows(scene, config, loops.count())
    yield Row("E1", scene, loops.difference(), "third step")
    yield from timed_rows(scene, loops, rounds)


def gathers_row(n6: Mapping[str, float]) -> Iterator[Row]:
    """N6 and S1 from what :func:`benchmarks.gathers.count_gathers` found."""
    note = f"{n6['reduce_scatters']:g} reduce-scatters, {n6['others']:g} small exchanges a step"
    yield Row("N6", _MINIATURE, n6["all_gathers"], note)
    parameters = count(load_train_config("realism").config).parameters
    share = 7 / 8 / 1e9
    volume = parameters * share * (2 * n6["all_gathers"] + 4 * n6["reduce_scatters"])
    yield Row("S1", "FLUX.1-dev", volume, "bfloat16 gathers, float32 scatters, by count")


def memory_rows() -> Iterator[Row]:
    """M1 to M4 of FLUX.1-dev at 720 px, counted on the meta device."""
    config = load_train_config("realism").config
    decoder = count(config).decoder
    yield Row("M1", "FLUX.1-dev", decoder.stash / decoder.saved, f"{decoder.stash / 1e9:.2f} GB kept for a picture")
    for identity, machine, gpus, overrides in (
        ("M2", "h100", 1, ("train.batch_size=32",)),
        ("M3", "rtx-4090", 1, ("train.mode=lora", "lora.base=float8")),
        ("M3", "rtx-4090", 1, ("train.mode=lora", "lora.base=nf4")),
        ("M4", "h100", 8, ("train.batch_size=1",)),
        ("M4", "h100", 8, ("train.batch_size=4",)),
    ):
        chosen = plan_for(load_train_config("realism", overrides=overrides).config, known_machine(machine, gpus))
        settings = chosen.settings
        note = f"{chosen.name}{'' if chosen.fits else ', does not fit'}, stage {chosen.stage}, adam {settings.adam}, "
        note += f"gradients {settings.gradients}, micro-batch {settings.micro_batch}, {' '.join(overrides)}"
        yield Row(identity, "FLUX.1-dev", chosen.total_gib, note)


def help_row(rounds: int) -> Row:
    """C1; infinite where help imports torch."""
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder) / "empty.py"
        empty.write_text(_EMPTY_APP)
        commands = {"srpo": ["-m", "srpo_cli", "--help"], "empty": [str(empty), "--help"]}
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        # With bytecode, as an installed package has it; the first round writes it where there is none.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        for number in range(rounds + 1):
            for name, arguments in commands.items():
                started = time.perf_counter()
                subprocess.run(
                    [sys.executable, *arguments],
                    stdout=subprocess.DEVNULL,
                    check=True,
                    cwd=_REPOSITORY,
                    env=environment,
                )
                if number:  # the first reads files from the disk
                    seconds[name].append(time.perf_counter() - started)
    if help_imports_torch():
        return Row("C1", "command line", float("inf"), "imports torch")
    least = {name: min(values) for name, values in seconds.items()}
    return Row("C1", "command line", least["srpo"] / least["empty"], f"minima of {rounds}, torch not imported")


def help_imports_torch() -> bool:
    """Whether ``srpo --help`` leaves torch imported."""
    return subprocess.run([sys.executable, "-c", _IMPORTS], check=False, cwd=_REPOSITORY).returncode != 0


def fidelity_rows() -> Iterator[Row]:
    """P1 for each form of the moments: 50 steps at 5e-6 of a small network whose weights are N(0, 0.03)."""
    start = _network()
    twin = _network()
    optimizer = torch.optim.AdamW(twin.parameters(), 5e-6, weight_decay=1e-4)

    def in_bfloat16(inputs: Tensor) -> Tensor:
        weights = {name: parameter.bfloat16() for name, parameter in twin.named_parameters()}
        return torch.func.functional_call(twin, weights, (inputs,))

    _descend(in_bfloat16, lambda limit: nn.utils.clip_grad_norm_(twin.parameters(), limit), optimizer)
    way = _moved(twin.parameters(), start)
    for moments in ("float32", "bfloat16", "8bit"):
        model = _network().bfloat16()
        split = SplitAdamW(model.parameters(), 5e-6, weight_decay=1e-4, masters=start.parameters(), moments=moments)
        _descend(model, Halves(dict(model.named_parameters()), split).clip, split)
        ours = _moved(map(split.master, model.parameters()), start)
        yield Row("P1", "small network", cosine_similarity(ours, way, dim=0).item(), f"split master, {moments} moments")


def _network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.03)
    return model


def _descend(call: Callable[[Tensor], Tensor], clip: Callable[[float], Any], optimizer: torch.optim.Optimizer) -> None:
    draw = torch.Generator().manual_seed(1)
    goal = torch.randn(64, 64, generator=draw)
    for _ in range(50):
        inputs = torch.randn(32, 64, generator=draw)
        (call(inputs.bfloat16()).float() - inputs @ goal).square().mean().backward()
        clip(0.1)
        optimizer.step()
        optimizer.zero_grad()


def _moved(weights: Any, start: nn.Module) -> Tensor:
    pairs = zip(weights, start.parameters(), strict=True)
    return torch.cat([(weight.detach() - before.detach()).double().flatten() for weight, before in pairs])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer rounds: counts as exact, times not to be quoted")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as one document, too")
    options = parser.parse_args(arguments)
    one_thread()
    rounds = 3 if options.quick else 9
    rows = [help_row(3 if options.quick else 10)]  # before this process fills the caches
    rows += gathers_row(_gathers())
    with tempfile.TemporaryDirectory() as name, _told(rows):
        folder = Path(name)
        rows += scene_rows(_MINIATURE, miniature_config("prompts.limit=8"), folder / "miniature", rounds)
        pipeline = write_random_pipeline(folder / "pipeline")
        rows += scene_rows(_RANDOM, random_config(pipeline, "prompts.limit=4"), folder / "random", rounds)
        checkpointed = random_config(pipeline, "prompts.limit=4", *_CHECKPOINTED)
        loops = Loops.of(checkpointed, folder / "checkpointed")
        rows += [
            row
            for row in counted_rows(f"{_RANDOM}, checkpointed", checkpointed, loops.count())
            if row.id in ("N2", "N5")
        ]
        rows += memory_rows()
        rows += fidelity_rows()
    if options.json:
        options.json.write_text(json.dumps(document(rows), indent=2) + "\n")
    return int(any(row.verdict == "missed" for row in rows))


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """The table with where and when it was measured."""
    return {
        "date": date.today().isoformat(),
        "processor": _processor(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "rows": [row.to_json() for row in rows],
    }


@contextmanager
def _told(rows: list[Row]) -> Iterator[None]:
    """Print what there is, also where a measurement fails."""
    try:
        yield
    finally:
        rows.sort(key=lambda row: row.id)
        print(table(rows))


def _gathers() -> dict[str, float]:
    """N6 in a process of its own: ranks are forked before anything was computed."""
    command = [sys.executable, "-m", "benchmarks.gathers"]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=_REPOSITORY).stdout
    return json.loads(told.splitlines()[-1])


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    sys.exit(main())
