"""The errors a person meets. Each is one line: what, why, and what to do next."""

from __future__ import annotations

import re

_CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

OK, FAILED, USAGE, NOTHING_SELECTED, INTERRUPTED = 0, 1, 2, 3, 130


def printable(text: str) -> str:
    """Control characters as escapes: a name in a file must not steer the terminal."""
    return _CONTROLS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class SvdcliError(Exception):
    """Something that a person can act on; printed as one line, never as a traceback."""

    exit_code = FAILED

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.message}; {self.hint}" if self.hint else self.message
        return " ".join(text.split())


class UsageError(SvdcliError):
    """The request itself cannot be met: options that contradict, values out of range, patterns that
    match nothing."""

    exit_code = USAGE


class NothingSelectedError(SvdcliError):
    """No layer would be factored, so there is nothing to write."""

    exit_code = NOTHING_SELECTED


class BadCheckpointError(SvdcliError):
    """The input is not a checkpoint that svdcli can read, or it is damaged."""


class NotFiniteError(SvdcliError):
    """A model met NaN or infinity on the way through it."""
