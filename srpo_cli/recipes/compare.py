"""A comparison of training methods: choose their rates, train every cell, and measure all of them alike.

Each part is a command of this program in a process of its own, so that its cost is its own, anybody can type it, and
the same comparison goes on where it stopped: what is finished is kept.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from signal import SIGTERM
from typing import Any

from srpo_cli import __version__
from srpo_cli.config.benchmark import load_benchmark
from srpo_cli.config.comparison import BASE, Comparison
from srpo_cli.config.load import MINIATURE, Resolved, load_train_config
from srpo_cli.config.schema import TrainConfig
from srpo_cli.errors import SrpoError, UsageError
from srpo_cli.recipes.evaluate import SUMMARY_KEYS
from srpo_cli.recipes.judges import plan_judges
from srpo_cli.recipes.plan import count
from srpo_cli.recipes.results import RESULTS, read_result, settings_that_differ
from srpo_cli.recipes.resume import FREE
from srpo_cli.runtime.checkpoints import list_checkpoints
from srpo_cli.runtime.folder import CONFIG, SUMMARY, disk_errors, locked
from srpo_cli.runtime.plan import Counts, choose, this_machine
from srpo_cli.runtime.signals import StopRequest

COMPARISON = "comparison.json"

GRADIENT_PASS = 3
"""What a pass forward and backward costs, in forwards: the backward pass is two more of their size."""

_PAUSE = 0.2  # seconds between looks at the processes

Say = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """A command of this program.

    Attributes:
        name: what users call it.
        arguments: of ``srpo``.
        log: file that it speaks to.
    """

    name: str
    arguments: Sequence[str]
    log: Path

    def __str__(self) -> str:
        return shlex.join(["srpo", *self.arguments])


@dataclass(frozen=True)
class Cell:
    """One training: a method from one seed, or at one of the rates that it may get.

    Attributes:
        label: of the method.
        seed: of the run.
        lr: learning rate that it is tried at; None: it is a run of the table.
        folder: of the run.
        resolved: its configuration.
        arguments: of ``srpo train`` that give it.
    """

    label: str
    seed: int
    lr: float | None
    folder: Path
    resolved: Resolved
    arguments: Sequence[str]

    @property
    def name(self) -> str:
        return f"{self.label}, seed {self.seed}" if self.lr is None else f"{self.label} at lr {self.lr:g}"

    @property
    def model(self) -> str:
        """Label in the evaluation of its seed's runs."""
        return f"{self.label}.{self.seed}"

    def point(self, step: int) -> str:
        """Label of one of its checkpoints in the evaluation of all curves."""
        return f"{self.model}.{step:06d}"

    @property
    def is_finished(self) -> bool:
        return (self.folder / SUMMARY).is_file()

    def summary(self) -> dict[str, Any]:
        """What the finished run says of itself."""
        try:
            return json.loads((self.folder / SUMMARY).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SrpoError(
                f"{self.folder / SUMMARY} cannot be read: remove the folder, it is trained again"
            ) from error

    def check(self) -> None:
        """UsageError where its folder holds a run of other settings."""
        file = self.folder / CONFIG
        if not file.is_file():
            return
        try:
            found = load_train_config(file).config
        except UsageError as error:
            raise UsageError(f"{error} Remove {self.folder}, and it is trained again.") from error
        differing = list(settings_that_differ(_what_counts(found), _what_counts(self.resolved.config)))
        if differing:
            key, then, now = differing[0]
            more = f", and {len(differing) - 1} more" if len(differing) > 1 else ""
            raise UsageError(
                f"{self.folder} was trained with other settings than {self.label} has now ({key} was {then} and is "
                f"{now}{more}): choose another --output, or remove that folder"
            )

    def job(self, logs: Path) -> Job:
        """The command that trains it, or goes on with it."""
        begun = (self.folder / CONFIG).is_file()
        arguments = ["--resume", str(self.folder)] if begun else self.arguments
        return Job(self.name, ["train", *arguments, "--quiet"], logs / f"{'-'.join(self.folder.parts[-3:])}.log")


def _what_counts(config: TrainConfig) -> dict[str, Any]:
    """All of a run's settings but how often it is saved and shown."""
    settings = config.model_dump(mode="json", exclude=FREE)
    settings["train"]["steps"] = config.train.steps
    return {**settings, "evaluation": config.evaluation.model_dump(mode="json")}


@dataclass(frozen=True)
class Ended:
    """How the processes ended: what failed, by name the last line that it said, and the signal's exit code, or 0."""

    failed: Mapping[str, str]
    exit_code: int = 0


class Table:
    """A comparison and the folder that it is written to: ``tuning/``, ``runs/``, ``evaluation/`` and ``logs/``."""

    def __init__(self, comparison: Comparison, output: Path) -> None:
        self.comparison, self.output = comparison, output
        self.judges = plan_judges(load_benchmark(comparison.benchmark), {}, None)
        self._steps: dict[str, int] = {}
        self._counts: Counts | None = None

    def check(self) -> None:
        """UsageError for what nothing measures, and for folders that hold something else or runs of other settings."""
        comparison = self.comparison
        self._check_folder()
        known = [name for plan in self.judges for name in plan.headings]
        for name in (*comparison.columns, *([comparison.rate] if comparison.rate else [])):
            if name not in known:
                raise UsageError.unknown(f"measure of benchmark {comparison.benchmark}:", name, known)
        for method in comparison.methods:
            if method.tuning and method.tuning.by not in SUMMARY_KEYS:
                raise UsageError.unknown(f"figure that {method.label} is tuned by:", method.tuning.by, SUMMARY_KEYS)
        for cell in [*self.trials, *self.cells(self.rates())]:
            cell.check()
        for seed in comparison.seeds:
            for folder in (self.evaluation(seed), self.curves(seed)):
                self._check_prompts(folder)

    def _check_folder(self) -> None:
        """UsageError for one that is a training run's, or that has the result of a comparison of another name."""
        if (self.output / CONFIG).is_file():
            raise UsageError(f"{self.output} is the folder of a training run: choose another --output")
        try:
            name = json.loads((self.output / COMPARISON).read_text(encoding="utf-8"))["comparison"]["name"]
        except (OSError, ValueError, KeyError, TypeError):
            return  # nothing that could be lost
        if name != self.comparison.name:
            raise UsageError(
                f"{self.output} holds comparison {name}, not {self.comparison.name}: choose another --output"
            )

    def evaluation(self, seed: int) -> Path:
        """Where the runs of a seed are measured."""
        return self.output / "evaluation" / f"seed-{seed}"

    def curves(self, seed: int) -> Path:
        """Where the checkpoints of those runs are measured whose costs are compared."""
        return self.output / "evaluation" / f"curves-{seed}"

    def _check_prompts(self, folder: Path) -> None:
        """UsageError where a folder was measured on another number of prompts, of which it would keep the result."""
        if not (folder / RESULTS).is_file():
            return
        command = read_result(folder).data["environment"]["command"]
        limit = command[command.index("--limit") + 1] if "--limit" in command else None
        if limit != (self.comparison.prompts and str(self.comparison.prompts)):
            raise UsageError(
                f"{folder} was measured on {limit or 'all'} prompts, not {self.comparison.prompts or 'all'}: choose "
                "another --output, or remove that folder"
            )

    def steps(self, label: str) -> int:
        """How many steps of a method come nearest to the budget; fewer where the method says so.

        UsageError where that is none.
        """
        if label not in self._steps:
            config = self.comparison.resolve(label).config
            # What a step does goes by the configuration alone, so that all can share counts, which take seconds.
            self._counts = self._counts or count(config)
            plan = choose(self._counts, config, this_machine([], 1, 1))
            step = plan.forwards_per_step + GRADIENT_PASS * plan.gradient_passes_per_step
            most = round(self.comparison.budget / step)
            if most == 0:
                raise UsageError(
                    f"budget is {self.comparison.budget}: one step of {label} takes {step:,.0f}, so give at least that"
                )
            self._steps[label] = min(most, self.comparison.method(label).steps or most)
        return self._steps[label]

    @cached_property
    def trials(self) -> list[Cell]:
        """The runs that learning rates are chosen by."""
        comparison = self.comparison
        cells = []
        for method in comparison.methods:
            if method.tuning is None:
                continue
            steps = self.steps(method.label)
            measured = {"prompts": comparison.tuning_prompts, "split": "validation"}
            for lr in method.tuning.lr:
                folder = self.output / "tuning" / method.label / f"lr-{lr:g}"
                cells.append(self._cell(method.label, comparison.tuning_seed, lr, folder, steps, steps, measured))
        return cells

    def rates(self) -> dict[str, float]:
        """The learning rate of every tuned method: that of the trial which came out best.

        None for a method with a trial that is missing: another choice later would not be that of its runs.
        """
        best: dict[str, tuple[float, float]] = {}
        missing = {cell.label for cell in self.trials if not cell.is_finished}
        for cell in self.trials:
            if cell.label in missing:
                continue
            tuning = self.comparison.method(cell.label).tuning
            figures = cell.summary()["tuned"]
            if tuning.by not in figures:
                raise UsageError.unknown(f"figure of {cell.folder} to tune {cell.label} by:", tuning.by, figures)
            merit = tuning.merit(figures[tuning.by]["mean"])
            if math.isfinite(merit) and (cell.label not in best or merit > best[cell.label][0]):
                best[cell.label] = (merit, cell.lr)
        return {label: lr for label, (_, lr) in best.items()}

    def cells(self, rates: Mapping[str, float]) -> list[Cell]:
        """The runs of the table, seed by seed; of methods without a rate none."""
        comparison, cells = self.comparison, []
        for seed in comparison.seeds:
            for method in comparison.methods:
                owner = comparison.rate_owner(method.label)
                if owner not in rates and comparison.method(owner).tuning:
                    continue
                steps = self.steps(method.label)
                folder = self.output / "runs" / method.label / f"seed-{seed}"
                every = max(1, steps // method.checkpoints)
                cells.append(
                    self._cell(method.label, seed, None, folder, steps, every, {"prompts": 0}, rates.get(owner))
                )
        return cells

    def _cell(
        self,
        label: str,
        seed: int,
        trial: float | None,
        folder: Path,
        steps: int,
        every: int,
        measured: Mapping[str, Any],
        lr: float | None = None,
    ) -> Cell:
        comparison, method = self.comparison, self.comparison.method(label)
        rate = lr if trial is None else trial
        settings = {
            **({"optimizer.lr": rate} if rate is not None else {}),
            # All runs are to have the whole budget, and to pay for nothing but their method.
            "guard.action": "off",
            **{f"evaluation.{key}": value for key, value in measured.items()},
            "samples.count": 0,
            "checkpoint.every": every,
            "checkpoint.keep": steps // every + 1,
        }
        overrides = [f"{key}={value}" for key, value in settings.items()]
        flags = {"train.seed": seed, "train.steps": steps}
        resolved = comparison.resolve(label, overrides, flags)
        arguments = ["--preset", method.preset, "--model", comparison.model, "--seed", str(seed)]
        arguments += ["--steps", str(steps), "--output", str(folder)]
        for override in [*method.overrides, *overrides]:
            arguments += ["--set", override]
        return Cell(label, seed, trial, folder, resolved, arguments)

    def evaluations(self, cells: Sequence[Cell]) -> list[Job]:
        """The commands that measure the finished runs of a seed beside the untrained model, a result for each seed.

        Another one measures the checkpoints of those whose costs are compared. What has been measured so is left out.
        """
        comparison = self.comparison
        judges = [judge for judge in self.judges if comparison.rate in judge.headings]
        metrics = [word for judge in judges for metric in judge.metrics for word in ("--metric", metric)]
        base = f"{BASE}={comparison.model}"
        jobs = []
        for seed in comparison.seeds:
            own = [cell for cell in cells if cell.seed == seed and cell.is_finished]
            if not own:
                continue
            models = [f"{cell.model}={cell.folder}" for cell in own]
            limit = ["--limit", str(comparison.prompts)] if comparison.prompts else []
            jobs += self._evaluation(self.evaluation(seed), [base, *models], limit, own)
            followed = [cell for cell in own if self.has_curve(cell)]
            points = [
                f"{cell.point(checkpoint.step)}={checkpoint.path}"
                for cell in followed
                for checkpoint in list_checkpoints(cell.folder / "checkpoints")
            ]
            if points:
                jobs += self._evaluation(self.curves(seed), [base, *points], [*limit, *metrics], followed)
        return jobs

    def has_curve(self, cell: Cell) -> bool:
        """Whether a run's checkpoints are measured, too."""
        several = self.comparison.method(cell.label).checkpoints > 1
        return cell.is_finished and several and self.comparison.rate is not None

    def _evaluation(self, folder: Path, models: Sequence[str], more: Sequence[str], cells: Sequence[Cell]) -> list[Job]:
        arguments = ["eval", "run", *models, "--benchmark", self.comparison.benchmark, *more, "--output", str(folder)]
        benchmark = Path(self.comparison.benchmark)
        read = [*(cell.folder / SUMMARY for cell in cells), *([benchmark] if benchmark.is_file() else [])]
        if _is_measured(folder, arguments, read):
            return []
        log = self.output / "logs" / f"evaluation-{folder.name}.log"
        return [Job(f"evaluation {folder.name}", arguments, log)]


def _is_measured(folder: Path, arguments: Sequence[str], read: Sequence[Path]) -> bool:
    """Whether a folder holds the whole result of this command and program, younger than the files that it goes by."""
    try:
        made = (folder / RESULTS).stat().st_mtime_ns
        data = read_result(folder).data
    except (OSError, UsageError):
        return False
    same = data["srpo"] == __version__ and data["environment"]["command"][1:] == [*arguments]
    return same and not data["skipped"] and all(path.stat().st_mtime_ns <= made for path in read)


def compare(table: Table, at_once: int, stop: StopRequest, say: Say) -> Ended:
    """Do all that is missing of a comparison, ``at_once`` processes at a time.

    One run that fails does not end the others. Returns what failed; a signal ends the running processes as it would
    end a training, which saves, and nothing more is begun.
    """
    table.check()
    say(f"comparison: {table.output}")
    with disk_errors(table.output):
        (table.output / "logs").mkdir(parents=True, exist_ok=True)
    with locked(table.output):
        return _do_all(table, at_once, stop, say)


def _do_all(table: Table, at_once: int, stop: StopRequest, say: Say) -> Ended:
    logs = table.output / "logs"
    ended = _train(table.trials, "to choose learning rates by", logs, at_once, stop, say)
    if ended.exit_code:
        return ended
    failed = dict(ended.failed)
    rates = table.rates()
    for method in table.comparison.methods:
        if method.label in rates:
            lr = rates[method.label]
            end = method.tuning.end(lr)
            say(f"{method.label}: lr {lr:g}{f', the {end} that was tried' if end else ''}")
        elif method.tuning:
            say(f"{method.label}: left out, since a trial of its learning rate failed: mend it, or take that rate out")
    cells = table.cells(rates)
    for cell in cells:
        cell.check()
    ended = _train(cells, "of the table", logs, at_once, stop, say)
    failed |= ended.failed
    if ended.exit_code:
        return Ended(failed, ended.exit_code)
    ended = run_all(table.evaluations(cells), at_once, stop, say)
    return Ended(failed | ended.failed, ended.exit_code)


def _train(cells: Sequence[Cell], which: str, logs: Path, at_once: int, stop: StopRequest, say: Say) -> Ended:
    missing = [cell for cell in cells if not cell.is_finished]
    if missing:
        kept = f", {len(cells) - len(missing)} more are there" if len(missing) < len(cells) else ""
        say(f"{len(missing)} run{'s' * (len(missing) > 1)} {which}{kept}, {at_once} at a time")
    return run_all([cell.job(logs) for cell in missing], at_once, stop, say)


def run_all(jobs: Sequence[Job], at_once: int, stop: StopRequest, say: Say) -> Ended:
    """Run commands, ``at_once`` at a time, and say of each how it ended.

    A signal is passed on to the running ones, once, and is waited for.
    """
    waiting, running, failed = deque(jobs), {}, {}
    threads = max(1, len(os.sched_getaffinity(0)) // at_once)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    told = False
    try:
        while running or (waiting and not stop.signal):
            while waiting and len(running) < at_once and not stop.signal:
                job = waiting.popleft()
                running[_start(job, environment)] = (job, time.perf_counter())
            if stop.signal and not told:
                told = True
                for process in running:
                    process.send_signal(stop.signal)
            for process in [process for process in running if process.poll() is not None]:
                job, began = running.pop(process)
                if process.returncode == 0:
                    say(f"{job.name}: done in {time.perf_counter() - began:.0f} s ({len(waiting)} waiting)")
                elif not stop.signal:
                    failed[job.name] = _last_line(job.log).removeprefix("error: ") or f"exit code {process.returncode}"
                    say(f"{job.name}: failed: {failed[job.name]} (see {job.log})")
            time.sleep(_PAUSE if running else 0)
    finally:  # whatever happens here, nothing goes on that nobody waits for
        for process in running:
            process.send_signal(SIGTERM)
    return Ended(failed, stop.exit_code)


def _start(job: Job, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """The command in a session of its own: a terminal's Ctrl-C reaches it by way of this process, and once."""
    with disk_errors(job.log), job.log.open("ab") as log:
        log.write(f"$ {job}\n".encode())
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "srpo_cli", *job.arguments],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=dict(environment),
            start_new_session=True,
        )


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def is_miniature(comparison: Comparison) -> bool:
    """Whether a run takes one thread only, so that several fit beside each other."""
    return comparison.model == MINIATURE
