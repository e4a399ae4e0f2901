"""The process around a command: streams, signals, one-line errors."""

from __future__ import annotations

import io
import os
import signal
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import typer

from svdcli.errors import FAILED, INTERRUPTED, SvdcliError, printable
from svdcli.memory import is_out_of_memory
from svdcli.ranks import FollowedError, LostRankError, leads_here

if TYPE_CHECKING:
    from collections.abc import Iterator


_TO_TELL = 5.0  # seconds
# A terminal or a batch system tells a launcher and its ranks to stop, and the launcher tells them
# again: so many seconds later it is somebody who insists.
_ONCE = 1.0


def print_note(text: str) -> None:
    """Tell something on standard error; of several ranks only the one that leads does."""
    if leads_here():
        _print_line(text)


def _print_line(text: str) -> None:
    print(f"svdcli: {text}", file=sys.stderr)


def one_rank_writes() -> None:
    """Of several ranks with the same arguments only the one that leads has a standard output."""
    if not leads_here():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Every failure becomes one line and an exit code; SVDCLI_DEBUG=1 shows the traceback."""
    try:
        yield
    except (KeyboardInterrupt, typer.Abort):
        goes_on = sys.argv[1:2] and sys.argv[1] in _RESUMABLE and "-" not in sys.argv
        print_note(
            "interrupted"
            + ("; the same command continues where this one stopped" if goes_on else "")
        )
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get("SVDCLI_DEBUG") == "1":
            raise
        text, code = explain(error)
        # What ended the rank that leads has been told there
        if not isinstance(error, FollowedError):
            if not isinstance(error, LostRankError):
                _let_the_leader_tell()
            _print_line(f"error: {printable(text)}")
        sys.exit(code)


def _let_the_leader_tell() -> None:
    """Before ranks have met, each meets an error by itself, as a rule the same one. The rank that
    leads tells it, and the launcher ends the others then; one that is still there was alone with
    it."""
    if not leads_here():
        try:
            time.sleep(_TO_TELL)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)


def explain(error: Exception) -> tuple[str, int]:
    """One line and the exit code for any exception."""
    if isinstance(error, SvdcliError):
        return str(error), error.exit_code
    if hasattr(error, "format_message"):  # what typer raises for arguments it cannot parse
        return " ".join(f"{error.format_message().rstrip('.')}; see --help".split()), int(
            getattr(error, "exit_code", 2)
        )
    if is_out_of_memory(error):
        return "out of memory; free some, or try a machine with more", FAILED
    if isinstance(error, OSError):
        return (
            f"{error.filename or 'input or output'}: {error.strerror or error}; check the path "
            f"and its permissions",
            FAILED,
        )
    if isinstance(error, UnicodeDecodeError):
        return f"the text is not UTF-8 ({error.reason}); convert it first", FAILED
    return (
        f"{type(error).__name__}: {' '.join(str(error).split())}; SVDCLI_DEBUG=1 shows where",
        FAILED,
    )


_RESUMABLE = ("compress", "expand", "heal")  # with an output that is no pipe


@contextmanager
def interruptible() -> Iterator[None]:
    """While a command runs, being told to stop raises, so that it cleans up; being told again at
    once does nothing more. Signals that the parent ignores stay ignored."""
    before = {
        number: signal.getsignal(number)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    heeded = {number: how for number, how in before.items() if how not in (signal.SIG_IGN, None)}
    told_at = -_ONCE

    def interrupt(*_: object) -> None:
        nonlocal told_at
        if time.monotonic() - told_at >= _ONCE:
            told_at = time.monotonic()
            raise KeyboardInterrupt

    for number in heeded:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, how in heeded.items():
            signal.signal(number, how)


class _Outliving(io.FileIO):
    """A stream whose reader may leave: what is written then goes nowhere, and the work goes on.
    Other errors are told once."""

    lost = False

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            told, self.lost = self.lost, True
            if told or isinstance(error, ConnectionError):
                return len(data)
            raise


def outlive_readers() -> None:
    """Put such streams in the place of the process's own."""
    for name in ("stdout", "stderr"):
        old = getattr(sys, name)
        if old is not getattr(sys, f"__{name}__") or not isinstance(old, io.TextIOWrapper):
            continue
        old.flush()
        raw = io.BufferedWriter(_Outliving(old.fileno(), "w", closefd=False))
        at_once = old.line_buffering or old.write_through
        setattr(sys, name, io.TextIOWrapper(raw, encoding=old.encoding, line_buffering=at_once))


def open_closed_streams() -> None:
    """A stream that the shell closed (`>&-`) has no object; and its number would go to the next
    file that is opened."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
