"""What the jobs of a run read, as a value that another process can open for itself."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from svdcli.calibration.moments import open_moments
from svdcli.engine.calibrated import Calibration
from svdcli.engine.solve import Ready
from svdcli.files.source import Source


@dataclass(frozen=True)
class Opened:
    """A source and its calibration, open in this process. ready holds layers that are solved
    already, if any: those are in memory, and no other process has them."""

    source: Source
    calibration: Calibration | None = None
    ready: Ready | None = None


@dataclass(frozen=True)
class Inputs:
    """How to open a source and its calibration, and the run that reads them. here says that the run
    has more than files: its jobs can only be done in the process that it began in."""

    run: str
    source: Callable[[], Source]
    moments: Path | None
    metric: str
    here: bool = False

    def open(self) -> Opened:
        """Open them once a process and run. Raises ValueError in another process where that cannot
        be done."""
        if self.run not in _OPENED and self.here:
            raise ValueError("layers that are solved already are in the memory of another process")
        if self.run not in _OPENED:
            _OPENED[self.run] = self._open()
        return _OPENED[self.run]

    def _open(self) -> Opened:
        source = self.source()
        if self.moments is None:
            return Opened(source)
        return Opened(source, Calibration(open_moments(self.moments), self.metric))


# By run, not by path: a later run may find other bytes under the same name.
_OPENED: dict[str, Opened] = {}


@contextmanager
def shared(opened: Opened) -> Iterator[Inputs]:
    """Inputs for the jobs of one run, which find them open in this process."""
    moments, metric = None, ""
    if opened.calibration is not None:
        moments, metric = opened.calibration.moments.path, opened.calibration.metric
    here = opened.ready is not None
    inputs = Inputs(uuid.uuid4().hex, opened.source.opener, moments, metric, here)
    _OPENED[inputs.run] = opened
    try:
        yield inputs
    finally:
        del _OPENED[inputs.run]
