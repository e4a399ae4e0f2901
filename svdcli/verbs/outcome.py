"""What compress and heal give back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from svdcli.files.report import Report
from svdcli.plan.plan import Plan

if TYPE_CHECKING:
    from svdcli.engine.costs import Costs
    from svdcli.verbs.evaluate import Evaluation


@dataclass(frozen=True)
class Outcome:
    """What compress did or would do: the report, the plan behind it, and where the output is (None
    for a dry run).

    evaluation compares the output with the original on text that calibration did not read;
    not_evaluated says why it is missing. refused says why a run would stop where this dry run did
    not; of a dry run, costs are those of the run's jobs, and unchecked says what only that will
    see.
    """

    report: Report
    plan: Plan
    path: Path | None
    started_over: bool = False
    evaluation: Evaluation | None = None
    not_evaluated: str = ""
    refused: str = ""
    costs: Costs | None = None
    unchecked: str = ""
