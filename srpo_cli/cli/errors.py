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
from typing import NoReturn

import typer
from typer.exceptions import TyperException

from srpo_cli.errors import LostRankError, SrpoError

_PARSERS_OWN = re.compile(r"Value error, |Input (?=should)")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Leave the process with the error's exit code after writing it, in red on a terminal, to stderr."""
    try:
        yield
    except LostRankError as error:  # the process that waits for this one tells it
        sys.exit(error.exit_code)
    except SrpoError as error:
        _leave(str(error), error.exit_code)
    except TyperException as error:  # the parser's: a flag, a value or a command that it does not know
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(error.exit_code)
        message = _PARSERS_OWN.sub("", error.format_message()).rstrip(". \n")
        command = error.ctx.command_path if error.ctx else "srpo"
        _leave(f"{' '.join(message.split())}: see `{command} --help`", error.exit_code)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which must not be imported for it
            raise
        _leave(
            "the device is out of memory: ask for less at a time, with a smaller size or batch, or on a larger device",
            SrpoError.exit_code,
        )
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python complains once more when it flushes at the end
        _leave("no space left where the output goes: free some, or send it elsewhere", SrpoError.exit_code)


def _leave(message: str, exit_code: int) -> NoReturn:
    """Tell a mistake in one line, and end with its exit code, which a launcher takes for that of all its processes."""
    from srpo_cli.runtime.launch import leave_exit_code

    typer.secho(f"error: {message}", fg=typer.colors.RED, err=True)
    leave_exit_code(exit_code)
    sys.exit(exit_code)
