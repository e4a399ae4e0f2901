"""What the jobs of a run read, as a value that another process can open for itself."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from svdcli.calibration.moments import open_moments
from svdcli.engine.calibrated import Calibration
from svdcli.engine.solve import Ready
from svdcli.files.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Opened:
    """The same, open in this process. ready holds layers that are solved already, if any."""

    checkpoint: Checkpoint
    calibration: Calibration | None = None
    ready: Ready | None = None


@dataclass(frozen=True)
class Inputs:
    """Paths of a model and of its calibration, and the run that reads them."""

    run: str
    model: Path
    state_dict: str | None
    moments: Path | None
    metric: str

    def open(self) -> Opened:
        """Open them once a process and run."""
        if self.run not in _OPENED:
            _OPENED[self.run] = self._open()
        return _OPENED[self.run]

    def _open(self) -> Opened:
        checkpoint = open_checkpoint(self.model, state_dict=self.state_dict)
        if self.moments is None:
            return Opened(checkpoint)
        return Opened(checkpoint, Calibration(open_moments(self.moments), self.metric))


# By run, not by path: a later run may find other bytes under the same name.
_OPENED: dict[str, Opened] = {}


@contextmanager
def shared(opened: Opened) -> Iterator[Inputs]:
    """Inputs for the jobs of one run, which find them open in this process."""
    checkpoint, calibration = opened.checkpoint, opened.calibration
    inputs = Inputs(
        run=uuid.uuid4().hex,
        model=checkpoint.path,
        state_dict=checkpoint.state_dict or None,
        moments=None if calibration is None else calibration.moments.path,
        metric="" if calibration is None else calibration.metric,
    )
    _OPENED[inputs.run] = opened
    try:
        yield inputs
    finally:
        del _OPENED[inputs.run]
