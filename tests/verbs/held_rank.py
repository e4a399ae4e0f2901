"""svdcli as one of several ranks, that does the first jobs, and the others once a file is gone.

    python held_rank.py FILE ARGUMENT...

So a test does something to a run that is certainly under way.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from unittest import mock

from svdcli.__main__ import main
from svdcli.engine import crew

AT_ONCE = 6  # jobs


def held(holding: Path) -> None:
    """Run the command line with jobs that wait for the file to go."""
    plain = crew._Phase.do

    def do(phase: crew._Phase, index: int) -> None:
        while index >= AT_ONCE and holding.exists():
            time.sleep(0.01)
        plain(phase, index)

    with mock.patch.object(crew._Phase, "do", do):
        main()


if __name__ == "__main__":
    held(Path(sys.argv.pop(1)))
