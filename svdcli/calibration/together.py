"""How the ranks of one launch share a calibration: each leaves its part in a folder that all of
them see, and rank 0 adds the parts up."""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from svdcli.errors import SvdcliError
from svdcli.progress import Progress
from svdcli.ranks import Team, comes_true, holds

# Seconds
TO_SEE_A_FILE = 30.0  # what another rank has written: file systems on a network take a while
_POLL = 0.02

_TOKEN = "token"


class Together:
    """The ranks that share one calibration into `out`; what they tell each other is told under
    names of its own."""

    def __init__(self, team: Team, out: Path) -> None:
        self.team = team
        self.out = out
        self._prefix = f"calibrate/{out.name}"

    # What they tell each other

    def agree(self, name: str, decide: Callable[[], str]) -> str:
        """Return what rank 0 decides."""
        if self.team.leads:
            value = decide()
            self.tell(name, value)
            return value
        return self.hear(name, 0)

    def tell(self, name: str, value: str) -> None:
        """Put a value where the others hear it."""
        self.team.put(f"{self._prefix}/{name}", value.encode())

    def hear(self, name: str, rank: int) -> str:
        """Return what that rank tells. Raises SvdcliError where any rank ended with an error, and
        LostRankError where that one is lost."""
        while True:
            self.team.check_others()
            value = self._heard(name)
            if value is not None:
                return value
            self.team.check_alive(rank)
            time.sleep(_POLL)

    def _heard(self, name: str) -> str | None:
        """Return a value that was put there, None where there is none yet."""
        value = self.team.peek(f"{self._prefix}/{name}")
        return None if value is None else value.decode()

    def checking(self, progress: Progress) -> Progress:
        """Return a progress that notices errors of other ranks; rank 0 alone shows it."""

        def report(phase: str, name: str, done: float, total: float) -> None:
            self.team.check_others()
            if self.team.leads:
                progress(phase, name, done, total)

        return report

    # The folder of the parts

    def folder(self, digest: str) -> Path:
        """Return the folder beside the output in which the parts of the calibration with this
        digest are left; rank 0 makes it. Raises SvdcliError where this rank does not see it."""
        folder = self.out.absolute().parent / f"{self._stem}{digest}"
        if self.team.leads:
            folder.mkdir(exist_ok=True)
        token = self.agree("token", lambda: _marked(folder))

        # Rank 0 may have removed it already, where this rank had no part and came late
        def seen_or_over() -> bool:
            return holds(folder / _TOKEN, token) or self._heard("added up") is not None

        if not comes_true(seen_or_over, TO_SEE_A_FILE):
            raise SvdcliError(
                f"this machine does not see {folder}, which rank 0 made",
                "write to a file system that all machines share, or use calibrate --part",
            )
        return folder

    @property
    def _stem(self) -> str:
        return f".{self.out.name}.parts-"

    def wait_for(self, path: Path, name: str, rank: int) -> None:
        """Wait until that rank says that a file is there, and until it is seen here."""
        self.hear(name, rank)
        if not comes_true(path.exists, TO_SEE_A_FILE):
            raise SvdcliError(
                f"rank {rank} wrote {path}, which this machine does not see",
                "write to a file system that all machines share",
            )

    @contextmanager
    def clean_where_nothing_is_whole(self) -> Iterator[None]:
        """On an error, have rank 0 remove the folder of the parts, unless there is one to continue
        with."""
        try:
            yield
        except BaseException:
            for path in self._folders() if self.team.leads else ():
                if not any(path.glob("*.safetensors")):
                    shutil.rmtree(path, ignore_errors=True)
            raise

    def clean_up(self) -> None:
        """Remove the parts, and those of other commands that were cut short before they wrote the
        same output."""
        for path in self._folders():
            shutil.rmtree(path, ignore_errors=True)

    def _folders(self) -> list[Path]:
        parent = self.out.absolute().parent
        return [path for path in parent.glob(".*") if path.name.startswith(self._stem)]


def _marked(folder: Path) -> str:
    """Leave a mark in the folder that no earlier run left there, and return it."""
    token = uuid.uuid4().hex
    (folder / _TOKEN).write_text(token)
    return token
