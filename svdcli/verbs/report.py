"""What a compression saved and cost, read from its record."""

from __future__ import annotations

from pathlib import Path

from svdcli.errors import SvdcliError
from svdcli.files.checkpoint import STANDARD, open_from_pipe
from svdcli.files.record import record_in
from svdcli.files.report import Report, newest_output, read_report, report_of


def report(output: str | Path | None = None) -> Report:
    """Read what an output saved and cost from its record. Without one take the newest output in the
    current folder; "-" reads a pipe to its end.

    Raises BadCheckpointError where svdcli did not write it.
    """
    if output is None:
        return read_report(newest_output(Path()))
    if str(output) != STANDARD:
        return read_report(Path(output))
    # What comes through a pipe is a file, whose record lies in its header
    header = open_from_pipe()
    record = record_in(header.metadata, "standard input")
    if record is None:
        raise SvdcliError(
            "standard input was not written by svdcli compress", "try `svdcli inspect -`"
        )
    return report_of(record, {STANDARD: header.size}, STANDARD)
