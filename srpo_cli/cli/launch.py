"""``--gpus`` and ``--nodes``: one command in several processes that speak with one voice."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from srpo_cli.cli.output import note
from srpo_cli.errors import SrpoError, UsageError

if TYPE_CHECKING:  # commands import it when they are called, like all of its room
    from srpo_cli.runtime.launch import Launch

GpusOption = Annotated[
    int, typer.Option("--gpus", min=1, metavar="N", help="Processes to share the work here, one for each GPU.")
]
NodesOption = Annotated[
    int | None, typer.Option("--nodes", min=1, metavar="M", help="Machines to share it; run the same on each.")
]
RendezvousOption = Annotated[
    str | None,
    typer.Option("--rdzv", metavar="HOST:PORT", help="One of the machines, and a free port: they meet there."),
]
NodeRankOption = Annotated[
    int | None,
    typer.Option(
        "--node-rank", min=0, metavar="K", help="Number of this machine; 0 writes. Settled there if not given."
    ),
]

_TRUST = "--trust"


def plan_launch(gpus: int, nodes: int | None, rdzv: str | None, node_rank: int | None) -> Launch | None:
    """The processes that the flags ask for; None in one that does the work, which a launcher may have started."""
    from srpo_cli.runtime.launch import Launch

    return Launch.of(gpus, nodes, rdzv, node_rank)


def speaker(launch: Launch | None) -> Callable[[str], None]:
    """Where notes go: to the user from the process that talks, from others nowhere."""
    from srpo_cli.runtime.launch import leads

    return note if launch is None and leads() else _say_nothing


def start(launch: Launch, more: Sequence[str] = (), advice: Callable[[], str] = lambda: "") -> None:
    """Run this very command, with ``more`` arguments, in all processes, and leave with their exit code.

    ``advice`` says after a process was lost what to do next.
    """
    launch.check(note)
    # What the user agreed to is remembered by now, once for all.
    arguments = [argument for argument in sys.argv[1:] if argument != _TRUST]
    raise typer.Exit(launch.run([*arguments, *more], advice))


def refuse_company(launch: Launch | None, what: str) -> None:
    """UsageError where several processes would do what is not shared out."""
    from srpo_cli.runtime.launch import is_alone

    if launch or not is_alone():
        raise UsageError(f"{what} is work for one process: leave out --gpus and --nodes")


def refuse_standard_input(launch: Launch | None, what: str) -> None:
    """UsageError where several processes would each read a part of it."""
    from srpo_cli.runtime.launch import is_alone

    if launch or not is_alone():
        raise UsageError(f"{what} reads standard input, which several processes cannot share: write it to a file first")


@contextmanager
def told_once() -> Iterator[None]:
    """Several processes find the same mistake in the same command; one of them tells it."""
    from srpo_cli.runtime.launch import leads

    try:
        yield
    except SrpoError as error:
        if leads():
            raise
        raise typer.Exit(error.exit_code) from error


def _say_nothing(_message: str) -> None:
    pass
