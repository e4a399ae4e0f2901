"""What the `svdcli` process does before its first import and after its last line, to start in a
blink and to end quietly. Nothing here is for programs that import svdcli.
"""

# `signal` names its numbers as enums first, which takes a millisecond.
import _signal  # type: ignore[import-not-found]
import gc
import os


def end_quietly_on_interrupt() -> None:
    """Until a command has begun, and when it has ended, an interrupt is the end and not a
    traceback. One that the parent ignores (nohup, jobs in the background) stays ignored."""
    # modules lose their names while the interpreter ends
    write, end = os.write, os._exit

    def leave(*_: object) -> None:
        try:  # noqa: SIM105  nothing more than must be is imported yet
            write(2, b"svdcli: interrupted\n")
        except OSError:
            pass
        end(130)

    if _signal.getsignal(_signal.SIGINT) is _signal.default_int_handler:
        _signal.signal(_signal.SIGINT, leave)


def begin() -> None:
    """Set what must be set before the first import."""
    # start-up makes many objects and no garbage
    gc.disable()
    # Page faults in large buffers took a sixth of the CPU time of `compress` (PyTorch's tuning
    # guide, transparent huge pages).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # The leading eigenvectors come from OpenBLAS, where two workers ask it side by side.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Of a store that is gone torch's C++ tells a page; the line that a person needs is svdcli's.
    if os.environ.get("SVDCLI_DEBUG") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")


def long_work_begins() -> None:
    """From here on a command may run for hours, and makes garbage."""
    gc.enable()


def end() -> None:
    """What is left goes with the process: looking through it for garbage takes 0.3 s where torch is
    loaded."""
    gc.freeze()
