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
    from svdcli.engine.executor import Workers


@dataclass(frozen=True)
class Run:
    """One run of a verb: what it reads, what computes, who is told, and where its work is kept.

    workspace is None where nothing is kept, as in a dry run. calibration is how errors count, None
    for all alike; seed that of randomised solvers; workers are those that do the jobs, where these
    are not threads of this process.
    """

    source: Source
    device: torch.device
    progress: Progress
    workspace: Workspace | None = None
    calibration: Calibration | None = None
    seed: int = 0
    workers: Workers | None = None

    @property
    def crew(self) -> Workers:
        """Those that do the jobs."""
        if self.workers is not None:
            return self.workers
        from svdcli.engine.executor import Local

        return Local(self.device)

    @property
    def kept(self) -> Workspace:
        """The workspace of a run that writes. Raises ValueError where it keeps nothing."""
        if self.workspace is None:
            raise ValueError("a run without a workspace writes nothing")
        return self.workspace
