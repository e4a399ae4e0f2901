"""The `svdcli` command, and `python -m svdcli`."""

import _signal  # type: ignore[import-not-found]  # a millisecond earlier than `signal`, which names its numbers first
import gc
import os
import sys


def _leave_quietly() -> None:
    """Until a command has begun, and when it has ended, an interrupt is the end and not a
    traceback. One that the parent ignores (nohup, jobs in the background) stays ignored."""
    write, end = os.write, os._exit  # modules lose their names while the interpreter ends

    def leave(*_: object) -> None:
        try:  # noqa: SIM105  nothing more than must be is imported yet
            write(2, b"svdcli: interrupted\n")
        except OSError:
            pass
        end(130)

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, leave)


# As early as may be, but never for a program that imports this for another reason.
if __name__ == "__main__" or [os.path.basename(word) for word in sys.argv[:1]] == ["svdcli"]:
    _leave_quietly()


def main() -> None:
    """Set what must be set before the first import, then run the command line."""
    _leave_quietly()
    gc.disable()  # start-up makes many objects and no garbage; long commands turn it on again
    # Page faults in large buffers took a sixth of the CPU time of `compress` (PyTorch's tuning
    # guide, transparent huge pages).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from svdcli.cli.commands import main as run

    try:
        run()
    finally:
        # what is left goes with the process; looking through it for garbage takes 0.3 s where torch
        # is loaded
        gc.freeze()


if __name__ == "__main__":
    main()
