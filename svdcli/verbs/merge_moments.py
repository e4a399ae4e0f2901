"""Parts of one calibration, which machines read by themselves, added up to one file of moments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from svdcli.calibration.parts import open_part
from svdcli.engine.publish import check_place, disk_errors
from svdcli.errors import UsageError
from svdcli.verbs.calibrate import Calibrated, merged


def merge_moments(
    parts: Sequence[str | Path], out: str | Path, *, force: bool = False
) -> Calibrated:
    """Add up the files of `calibrate` with a part, in the order of their numbers, and write the
    moments to `out`, a file that must not be there yet unless force.

    Of every sum two are in memory at a time. Raises UsageError where a part is missing, there twice
    or of another calibration, with its name; BadCheckpointError for a file that is no part.
    """
    if not parts:
        raise UsageError("no parts are given", "give the files that calibrate --part wrote")
    for part in parts:
        check_place(Path(out), ".safetensors", source=Path(part), force=force)
    with disk_errors(Path(out), resumes=False):
        return merged([open_part(part) for part in parts], Path(out))
