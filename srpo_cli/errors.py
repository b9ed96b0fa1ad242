"""The mistakes that a user can make or meet, each one line: what was wrong, the value seen, what to do next.

Raise these anywhere; ``srpo_cli.cli.errors`` turns them into one line on stderr and an exit code. Anything
else that is raised is a bug and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def one_line(error: Exception) -> str:
    """A library's message as part of one line, at most 200 characters of it."""
    return " ".join(str(error).split())[:200]


class SrpoError(Exception):
    """A failed run: the work started and could not be finished."""

    exit_code = 1
    agreed = False
    """Whether every process of the run has met it."""


class UsageError(SrpoError):
    """Bad usage: a flag, preset, configuration key or input file that cannot be used as given."""

    exit_code = 2

    @classmethod
    def unknown(cls, kind: str, name: str, known: Iterable[str]) -> UsageError:
        """An unknown ``name``, with the nearest of the ``known`` ones and all of them."""
        known = list(known)
        near = get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return cls(f"Unknown {kind} {name!r}.{hint} Available: {', '.join(known) or 'none'}.")


class MissingError(SrpoError):
    """Something that the run needs is not here: weights, a dependency or a device."""

    exit_code = 4


class LostRankError(SrpoError):
    """Another process of the run has ended, and the one that started them all tells why; this one leaves silently."""

    exit_code = 75  # no command ends with it: it is for the process that waits
