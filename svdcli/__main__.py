"""The `svdcli` command, and `python -m svdcli`."""

import gc
import os


def main() -> None:
    """Set what must be set before the first import, then run the command line."""
    gc.disable()  # start-up makes many objects and no garbage; long commands turn it on again
    # Page faults in large buffers took a sixth of the CPU time of `compress` (PyTorch's tuning guide, transparent huge pages).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from svdcli.cli import main as run

    try:
        run()
    finally:
        gc.freeze()  # what is left goes with the process; looking through it for garbage takes 0.3 s where torch is loaded


if __name__ == "__main__":
    main()
