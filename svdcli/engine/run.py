"""What stays the same from the first measurement of a run to its last byte."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from svdcli.files.source import Source
from svdcli.files.workspace import Workspace
from svdcli.progress import Progress

if TYPE_CHECKING:
    import torch

    from svdcli.engine.calibrated import Calibration


@dataclass(frozen=True)
class Run:
    """One run of a verb: what it reads, what computes, who is told, and where its work is kept.

    workspace is None where nothing is kept, as in a dry run. calibration is how errors count, None
    for all alike; seed that of randomised solvers.
    """

    source: Source
    device: torch.device
    progress: Progress
    workspace: Workspace | None = None
    calibration: Calibration | None = None
    seed: int = 0

    @property
    def kept(self) -> Workspace:
        """The workspace of a run that writes. Raises ValueError where it keeps nothing."""
        if self.workspace is None:
            raise ValueError("a run without a workspace writes nothing")
        return self.workspace
