"""Tiny training runs on the miniature, in this process and in processes of their own that can be killed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

STEPS = 4
SETTINGS = {
    "train.batch_size": 2,
    "rollout.steps": 3,
    "algorithm.pairs": 2,
    "algorithm.update": "pair",
    "algorithm.target": "null",
    "optimizer.lr": 2e-5,
    "sampling.steps": 3,
    "checkpoint.every": 2,
    "samples.every": 2,
    "guard.action": "off",
}
"""A run of a second a step; without target and guard, so that all of its steps are taken."""
SERVER = """
import json, os, sys
import srpo_cli.recipes.train, srpo_cli.rewards.miniature
from srpo_cli.cli.app import main

for line in sys.stdin:
    request = json.loads(line)
    if "wait" in request:
        answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
    elif (answer := os.fork()) == 0:
        for number, name in enumerate(("/dev/null", request["stdout"], request["stderr"])):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
        os.environ.update(request["environment"])
        try:
            exec(request["before"])
            main(request["arguments"])
        except SystemExit as stop:
            sys.stdout.flush()
            os._exit(stop.code or 0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(99)
    print(answer, flush=True)
"""


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equality to the bit is promised there, and needs no accelerator to be shown."""
    monkeypatch.setattr("srpo_cli.recipes.train.best_device", lambda: torch.device("cpu"))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., list[str]]:
    """Arguments of a tiny run to a folder; later ones win. Only a measured one evaluates and draws."""

    def arguments(output: Path, *more: object, steps: int = STEPS, measured: bool = False) -> list[str]:
        pictures = {"evaluation.prompts": 8 * measured, "samples.count": 2 * measured}
        settings = [f"--set={key}={value}" for key, value in {**SETTINGS, **pictures}.items()]
        command = ["train", "--preset", "realism", "--model", "miniature", *settings]
        return [*command, "--steps", str(steps), "--output", str(output), *map(str, more)]

    return arguments


@dataclass(frozen=True)
class Process:
    """A running ``srpo``."""

    pid: int
    stdout: Path
    stderr: Path
    wait: Callable[[], int]
    """Waits for its end and returns its exit code, or minus the signal that ended it."""

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)


class Processes:
    """Starts ``srpo`` in processes of its own, forked from one that has imported all that takes seconds."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._running = folder, set()
        self._count = 0
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def start(self, *arguments: object, before: str = "", **environment: str) -> Process:
        """Run ``srpo`` with ``arguments`` after the Python code ``before``, and return at once."""
        self._count += 1
        stdout, stderr = (self._folder / f"{self._count}.{name}" for name in ("out", "err"))
        request = {
            "arguments": [str(argument) for argument in arguments],
            "before": before,
            "environment": environment,
            "stdout": str(stdout),
            "stderr": str(stderr),
        }
        pid = self._ask(request)
        self._running.add(pid)
        return Process(pid, stdout, stderr, lambda: self._wait(pid))

    def _wait(self, pid: int) -> int:
        code = self._ask({"wait": pid})
        self._running.discard(pid)
        return code

    def _ask(self, request: dict) -> int:
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """End the server, and what a test that failed has left running."""
        self._server.kill()
        for pid in self._running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._server.wait()


@pytest.fixture(scope="session")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    server = Processes(tmp_path_factory.mktemp("processes"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def finished(processes: Processes, tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an unbroken run, measured; what its process wrote lies beside it as ``stdout`` and ``stderr``."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    process = processes.start(*tiny(folder, measured=True))
    assert process.wait() == 0, process.stderr.read_text()
    process.stdout.rename(folder.parent / "stdout")
    process.stderr.rename(folder.parent / "stderr")
    return folder


@pytest.fixture(scope="session")
def half(processes: Processes, tiny: Callable, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run like ``finished`` that was asked for half of its steps only."""
    folder = tmp_path_factory.mktemp("half") / "run"
    process = processes.start(*tiny(folder, steps=STEPS // 2))
    assert process.wait() == 0, process.stderr.read_text()
    return folder


@pytest.fixture
def half_copy(half: Path, tmp_path: Path) -> Path:
    """A copy of ``half`` to do things to."""
    return Path(shutil.copytree(half, tmp_path / "half"))


@pytest.fixture(scope="session")
def read_metrics() -> Callable[[Path], list[dict]]:
    """Reads the records of a run, without what no two runs share."""

    def read(folder: Path) -> list[dict]:
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{key: value for key, value in record.items() if key != "seconds"} for record in records]

    return read


@pytest.fixture(scope="session")
def assert_same(read_metrics: Callable) -> Callable[..., None]:
    """Asserts that two runs did the same up to a step, to the bit: weights, optimizer, state and records."""

    def check(mine: Path, theirs: Path, step: int = STEPS) -> None:
        name = f"checkpoints/step-{step:06d}"
        assert_same_checkpoint(mine / name, theirs / name)
        assert read_metrics(mine)[:step] == read_metrics(theirs)[:step]
        assert len(read_metrics(mine)) == step

    return check


def assert_same_checkpoint(mine: Path, theirs: Path) -> None:
    """Weights, optimizer and state of two checkpoints are equal to the bit."""
    weights = [load_file(next((path / "transformer").glob("*.safetensors"))) for path in (mine, theirs)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    optimizers = [torch.load(path / "optimizer.pt", weights_only=True) for path in (mine, theirs)]
    assert optimizers[0]["param_groups"] == optimizers[1]["param_groups"]
    for one, other in zip(*(optimizer["state"].values() for optimizer in optimizers), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    states = [json.loads((path / "state.json").read_text()) for path in (mine, theirs)]
    for state in states:
        for spent in (state["ledger"], state["prepared"]):
            del spent["seconds"], spent["cpu_seconds"]
    assert states[0] == states[1]
