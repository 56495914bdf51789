"""Return one clear sentence for everything that can go wrong: what was found, what was expected, what to do.

Two kinds, because a person and a script need to tell them apart. The command line prints the message alone and exits
with 2 for the first and 1 for the second; a traceback appears only with ``--debug``.
"""

from __future__ import annotations

__all__ = ["DataError", "ExhaustedError", "InputError"]


class InputError(ValueError):
    """What was asked for cannot be done: a wrong path, option, name, weight or combination. Exit code 2."""


class DataError(RuntimeError):
    """The request was fine, but the data or the run is not: a damaged shard, a NaN loss, a full disk. Exit code 1."""


class ExhaustedError(DataError):
    """A domain (or all of them) has been read as often as the user allowed, and the policy is to stop."""
