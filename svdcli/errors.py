"""The errors a person meets. Each is one line: what, why, and what to do next."""

from __future__ import annotations

OK, FAILED, USAGE, NOTHING_SELECTED, INTERRUPTED = 0, 1, 2, 3, 130


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
    """The request itself cannot be met: options that contradict, values out of range, patterns that match nothing."""

    exit_code = USAGE


class NothingSelectedError(SvdcliError):
    """No layer would be factored, so there is nothing to write."""

    exit_code = NOTHING_SELECTED


class BadCheckpointError(SvdcliError):
    """The input is not a checkpoint that svdcli can read, or it is damaged."""
