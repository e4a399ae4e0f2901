"""The `svdcli` command, and `python -m svdcli`."""

import os
import sys

from svdcli import startup

# As early as may be, but never for a program that imports this for another reason.
if __name__ == "__main__" or [os.path.basename(word) for word in sys.argv[:1]] == ["svdcli"]:
    startup.end_quietly_on_interrupt()


def main() -> None:
    """Run the command line."""
    startup.end_quietly_on_interrupt()
    startup.begin()
    from svdcli.cli.commands import main as run

    try:
        run()
    finally:
        startup.end()


if __name__ == "__main__":
    main()
