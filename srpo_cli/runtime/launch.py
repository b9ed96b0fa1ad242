"""Several processes for one command: torchrun inside ``srpo``, and the launchers that have started it already.

Imports nothing heavy: a command asks here before anything else.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import TYPE_CHECKING

from srpo_cli.errors import LostRankError, SrpoError, UsageError, one_line

if TYPE_CHECKING:  # imports torch
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

LAUNCHED = "SRPO_LAUNCHED"
"""Set in processes that :class:`Launch` started: what ends them all is then told by the one that started them.

Names the file in which the first process that tells a mistake leaves its exit code; see :func:`leave_exit_code`.
"""

_MODULE = "srpo_cli"
_RENDEZVOUS = "srpo"
_MEETING = 600  # seconds that nodes wait for each other: people start them by hand
_FAREWELL = 900  # seconds to finish a step and write a checkpoint after a signal; torchrun's own 30 are too few
_ANSWER = 10.0  # seconds for whatever listens on the port of a rendezvous to say that it is one
_PORTS = range(12000, 32000)  # below those that Linux gives out by itself
_ASKED = (signal.SIGINT, signal.SIGTERM)


def is_rank() -> bool:
    """Whether a launcher has started this process as one of several, or of one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def is_alone() -> bool:
    """Whether no launcher has started other processes beside this one."""
    return os.environ.get("WORLD_SIZE", "1") == "1"


def leads() -> bool:
    """Whether this is the process that talks: the only one, or rank 0 of several."""
    return os.environ.get("RANK", "0") == "0"


def leave_exit_code(exit_code: int) -> None:
    """Keep the exit code of a mistake that this process tells, for the process that started it and others.

    torchrun knows only the processes that it found ended at its first look, and one that is aborted while it leaves,
    because the one that it was connected to has told what was wrong and is gone, may be all that it found. Later ones
    change nothing, nor does a folder that is gone or full.
    """
    if LAUNCHED in os.environ:
        with suppress(OSError), Path(os.environ[LAUNCHED]).open("x") as file:
            file.write(str(exit_code))


def slurm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a task of an ``srun`` of several; empty for any other process.

    A batch script is no such task, nor is a process that a launcher inside of one has started. The first node of the
    step is the master; the port comes from the numbers of job and step, so that all tasks find the same one.
    """
    size = int(environ.get("SLURM_STEP_NUM_TASKS", "1"))
    if size == 1 or "SLURM_PROCID" not in environ or "RANK" in environ:
        return {}
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    turn = 7 * int(environ.get("SLURM_JOB_ID", "0")) + int(environ.get("SLURM_STEP_ID", "0"))
    # With --gpus-per-task a task sees one device, which is its first.
    alone = len(environ.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": "0" if alone else environ.get("SLURM_LOCALID", "0"),
        "MASTER_ADDR": environ.get("MASTER_ADDR") or _first_host(nodes),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(_PORTS[turn % len(_PORTS)]),
    }
    here = _tasks_here(environ.get("SLURM_STEP_TASKS_PER_NODE", ""), int(environ.get("SLURM_NODEID", "0")))
    return {**found, "LOCAL_WORLD_SIZE": str(here)} if here else found


def _first_host(nodes: str) -> str:
    """The first host of a list like ``gpu[03-10,12],login``."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first)


def _tasks_here(tasks: str, node: int) -> int | None:
    """The number of a node's tasks in a list like ``4(x2),3``; None where the list does not say."""
    counts: list[int] = []
    for number, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(number)] * int(times or 1)
    return counts[node] if node < len(counts) else None


@dataclass(frozen=True)
class Launch:
    """Processes to start for one command.

    Attributes:
        gpus: processes on this node, one for each accelerator where there are any.
        nodes: machines that run the command together; None: this one alone, without a rendezvous.
        host, port: where nodes meet.
        node_rank: number of this node. None: the nodes settle that between them.
    """

    gpus: int
    nodes: int | None = None
    host: str = ""
    port: int = 0
    node_rank: int | None = None

    @classmethod
    def of(cls, gpus: int, nodes: int | None, rdzv: str | None, node_rank: int | None) -> Launch | None:
        """What the flags ask for; None where this process does the work: it is enough, or it is a rank already.

        Makes a task of ``srun`` a rank, unless there is one task a node and ``nodes`` says that each is to launch.
        Raises UsageError for flags that contradict each other.
        """
        if nodes is None or os.environ.get("SLURM_STEP_NUM_TASKS") != str(nodes):
            os.environ.update(slurm_environment(os.environ))
        if is_rank():
            return None
        if nodes is None:
            for flag, value in (("--rdzv", rdzv), ("--node-rank", node_rank)):
                if value is not None:
                    raise UsageError(f"{flag} {value} needs --nodes: say how many machines take part")
            return cls(gpus) if gpus > 1 else None
        if rdzv is None:
            raise UsageError(f"--nodes {nodes} needs --rdzv HOST:PORT: one of the machines, and a free port there")
        if node_rank is not None and node_rank >= nodes:
            raise UsageError(f"--node-rank {node_rank}: {nodes} nodes are numbered from 0 to {nodes - 1}")
        parsed = re.fullmatch(r"\[?([\w.-]+|[0-9a-fA-F:]+(?<=\w))\]?:(\d{1,5})", rdzv)
        if not parsed or not 0 < int(parsed[2]) < 2**16:
            raise UsageError(f"--rdzv {rdzv}: give HOST:PORT with a port of 1 to 65535, as in --rdzv node1:29500")
        return cls(gpus, nodes, parsed[1], int(parsed[2]), node_rank)

    @property
    def endpoint(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def check(self, say: Callable[[str], None]) -> None:
        """UsageError where there are fewer accelerators, or where nodes cannot meet; ``say`` is told of a bare CPU."""
        from srpo_cli.runtime.devices import has_accelerator

        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # or a lost connection is told in stack traces, too
        if has_accelerator():
            import torch

            if (here := torch.accelerator.device_count()) < self.gpus:
                raise UsageError(f"--gpus {self.gpus}: here are {here}; ask for at most {here}")
        else:
            say(f"no accelerator here: {self.gpus} process{'es' if self.gpus > 1 else ''} on the CPU")
        if self.nodes is not None:
            self._check_endpoint()

    def _check_endpoint(self) -> None:
        """UsageError for a host that is unknown, or a port that is not free and no rendezvous."""
        what = f"--rdzv {self.endpoint}"
        try:
            family, kind, *_, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise UsageError(f"{what}: unknown host ({error.strerror or error})") from error
        try:
            socket.create_connection((self.host, self.port), timeout=_ANSWER).close()
        except OSError:  # nobody listens yet: this may be the node that will
            with socket.socket(family, kind) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(address)
                except PermissionError as error:
                    raise UsageError(f"{what}: this port is not yours to open; choose one above 1023") from error
                except OSError:
                    pass  # another machine's address
            return
        if not self._answers():
            raise UsageError(f"{what}: the port is in use, and not by a rendezvous; choose another")

    def _answers(self) -> bool:
        """Whether a rendezvous is there. A client of torch's asks for ever, so that it is left behind in a thread."""
        from torch.distributed import TCPStore

        answers: list[TCPStore] = []

        def ask() -> None:
            patience = timedelta(seconds=_ANSWER)
            with suppress(RuntimeError):
                answers.append(TCPStore(self.host, self.port, timeout=patience, wait_for_workers=False))

        asking = Thread(target=ask, daemon=True)
        asking.start()
        asking.join(_ANSWER)
        return bool(answers)

    def torchrun(self) -> list[str]:
        """torchrun's command line, up to the arguments of ``srpo``."""
        if self.nodes is None:
            meeting = ["--standalone"]
        elif self.node_rank is None:
            meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", self.endpoint, "--rdzv-id", _RENDEZVOUS]
        else:  # with a number for each node rank 0 is where the user wants it
            meeting = ["--rdzv-backend", "static", "--master-addr", self.host, "--master-port", str(self.port)]
            meeting += ["--node-rank", str(self.node_rank)]
        if self.nodes is not None:
            meeting += ["--nnodes", str(self.nodes)]
            if "PET_RDZV_CONF" not in os.environ:  # torchrun's own way to say it
                names = ("read_timeout", "join_timeout") if self.node_rank is None else ("timeout",)
                meeting += ["--rdzv-conf", ",".join(f"{name}={_MEETING}" for name in names)]
        return [*meeting, "--nproc-per-node", str(self.gpus), "--module", _MODULE]

    def run(self, arguments: Sequence[str], advice: Callable[[], str] = lambda: "") -> int:
        """Run ``srpo`` with ``arguments`` in all processes; their exit code, after what they said themselves.

        Raises SrpoError for what no process could tell: that one was killed, or that nodes did not meet or parted.
        ``advice`` gives what to do next, for the end of that line.
        """
        with _environment(self.gpus) as told, _silent_elastic():
            from torch.distributed import DistError
            from torch.distributed.elastic.multiprocessing.api import SignalException
            from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
            from torch.distributed.elastic.rendezvous import RendezvousError
            from torch.distributed.run import get_args_parser, run

            parser = get_args_parser()
            known = "--shutdown-timeout" in parser.format_help()  # torch 2.11 does not have it
            patience = ["--shutdown-timeout", str(_FAREWELL)] if known else []
            # Where nobody asks for logs, torchrun leaves an empty folder for them in the temporary one each time.
            asked = any(name in os.environ for name in ("PET_LOG_DIR", "PET_REDIRECTS", "PET_TEE"))
            logs = [] if asked else ["--log-dir", str(told.parent)]
            parsed = parser.parse_args([*patience, *logs, *self.torchrun()])
            # Past the parser, which would look for its own options in them; torchrun takes each for a template.
            parsed.training_script_args = [argument.replace("$", "$$") for argument in arguments]
            try:
                run(parsed)
            except ChildFailedError as error:
                said = told.read_text() if told.exists() else ""
                return int(said) if said else self._exit_code(error.failures, advice)
            except SignalException as error:
                return 128 + int(error.sigval)
            except (RendezvousError, DistError) as error:
                reason = one_line(error.__cause__ or error).rstrip(".") or "nobody came in time"
                if self.nodes is None:
                    raise SrpoError(f"cannot start {self.gpus} processes ({reason})") from error
                raise SrpoError(
                    f"no connection between the {self.nodes} nodes at {self.endpoint} ({reason}): start the same "
                    f"command on each, and see what the others say{advice()}"
                ) from error
        return 0

    def _exit_code(self, failures: Mapping[int, ProcessFailure], advice: Callable[[], str]) -> int:
        """The exit code of the process that failed first, others having ended because of it.

        One that ended by itself comes before any that a signal ended.
        """
        causes = {rank: failure for rank, failure in failures.items() if failure.exitcode != LostRankError.exit_code}
        if not causes:
            where = "on another node " if self.nodes else ""
            raise SrpoError(f"a process {where}has ended, or the connection to it{advice()}")
        rank, cause = min(causes.items(), key=lambda item: (item[1].exitcode < 0, item[1].timestamp))
        if cause.exitcode >= 0:
            return cause.exitcode
        number = signal.Signals(-cause.exitcode)
        if number in _ASKED:
            return 128 + number
        hint = ", as Linux does when memory runs out" if number is signal.SIGKILL else ""
        raise SrpoError(f"rank {rank} was killed by {number.name}{hint}{advice()}")


@contextmanager
def _environment(processes: int) -> Iterator[Path]:
    """The environment that processes are started with, and where the first to tell a mistake leaves its exit code.

    What was here before is back afterwards.
    """
    before = dict(os.environ)
    # torchrun gives each process one thread, with a banner; these share out what there is.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    with TemporaryDirectory(prefix="srpo-") as folder:
        told = Path(folder) / "exit_code"
        os.environ[LAUNCHED] = str(told)
        try:
            yield told
        finally:
            os.environ.clear()
            os.environ.update(before)


@contextmanager
def _silent_elastic() -> Iterator[None]:
    """Keep torchrun's own account of an end off the terminal, unless LOGLEVEL, its own variable, asks for it."""
    if "LOGLEVEL" in os.environ:
        yield
        return
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)
