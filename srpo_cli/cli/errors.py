"""One place that turns a user's mistake into one line on stderr and an exit code.

Typer itself deals with an interrupt (130) and a closed pipe (1, silently). Whatever is none of these is a bug and keeps
its traceback.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from typer.exceptions import TyperException

from srpo_cli.errors import LostRankError, SrpoError

_PARSERS_OWN = re.compile(r"Value error, |Input (?=should)")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Leave the process with the error's exit code after writing it, in red on a terminal, to stderr."""
    try:
        yield
    except SrpoError as error:
        if not isinstance(error, LostRankError):
            typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
            _keep_for_the_launcher(error.exit_code)
        sys.exit(error.exit_code)
    except TyperException as error:  # the parser's: a flag, a value or a command that it does not know
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(error.exit_code)
        message = _PARSERS_OWN.sub("", error.format_message()).rstrip(". \n")
        command = error.ctx.command_path if error.ctx else "srpo"
        typer.secho(f"error: {' '.join(message.split())}: see `{command} --help`", fg=typer.colors.RED, err=True)
        sys.exit(error.exit_code)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which must not be imported for it
            raise
        typer.secho(
            "error: the device is out of memory: ask for less at a time, with a smaller size or batch, or on a larger "
            "device",
            fg=typer.colors.RED,
            err=True,
        )
        _keep_for_the_launcher(SrpoError.exit_code)
        sys.exit(SrpoError.exit_code)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        typer.secho("error: no space left where the output goes: free some, or send it elsewhere", err=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more when it flushes at the end
        sys.exit(SrpoError.exit_code)


def _keep_for_the_launcher(exit_code: int) -> None:
    from srpo_cli.runtime.launch import leave_exit_code

    leave_exit_code(exit_code)
