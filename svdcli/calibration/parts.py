"""Parts of a calibration: sums over a share of the text, one file each, that are added up to what
reading the whole text gives.

A safetensors file with the sums as they are, `input.K`, `mean.K` and `output.L` as in the file of
moments, all float32. The metadata key `svdcli_moments_part` has what turns them into moments: how
many rows and losses were read, and of which calibration the part is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from svdcli.calibration.moments import METADATA_OF_PART, Provenance, Spool, write_sums
from svdcli.calibration.sums import Sums
from svdcli.errors import BadCheckpointError, UsageError
from svdcli.files.checkpoint import Checkpoint, open_output
from svdcli.text.tokens import TOKENS_IN_A_BATCH
from svdcli.version import __version__

FORMAT = 1


@dataclass(frozen=True)
class Part:
    """One share of a text's batches: the `number`-th of `of`, counted from 1. It has every `of`-th
    batch, so that all shares hold batches of all lengths. Raises UsageError where there is no such
    share."""

    number: int
    of: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.of:
            raise UsageError(f"there is no part {self}", "count from 1, such as --part 2/8")

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def indices(self, count: int) -> range:
        """Return which of so many batches belong to this part. Raises UsageError where none
        does."""
        if self.of > count:
            batches = "one batch" if count == 1 else f"{count} batches"
            raise UsageError(
                f"the text has {batches}, too few for {self.of} parts",
                f"a batch is one window, or about {TOKENS_IN_A_BATCH} tokens in several: give more "
                "--samples, or take fewer parts",
            )
        return range(self.number - 1, count, self.of)


@dataclass(frozen=True)
class Whole:
    """The calibration that a part belongs to: the same in all of them. layers maps the name of
    every selected weight to whether it is stored as (in, out); side names the part of the model
    that reads, where it is not the whole; batches is how many the whole text has."""

    provenance: Provenance
    layers: Mapping[str, bool]
    side: str
    batches: int
    version: str = __version__

    def differs(self, other: Whole) -> str:
        """Say in what the other one is another calibration; "" where it is the same. Of the text
        its digest counts, since machines may have it in different places."""
        # What is named, with both values
        mine, its = self.provenance, other.provenance
        pairs = {
            "model": (mine.fingerprint[:12], its.fingerprint[:12]),
            "text": (mine.text_sha256[:12], its.text_sha256[:12]),
            "version of svdcli": (self.version, other.version),
            "number of batches": (self.batches, other.batches),
        }
        for field, value in asdict(mine).items():
            if field not in ("fingerprint", "text", "text_sha256"):
                pairs[field.replace("_", "-")] = (value, getattr(its, field))

        # The first that differs
        for what, (one, another) in pairs.items():
            if one == another:
                continue
            if isinstance(another, bool):
                return f"it was read {'with' if another else 'without'} {what}"
            return f"its {what} is {another}, not {one}"
        return "" if (self.layers, self.side) == (other.layers, other.side) else "its layers differ"


class PartFile:
    """An open file of a part. Sums are read when they are asked for; leaders, rows, events and
    nats are as in `Sums`, rounds is how often the model was run."""

    def __init__(self, checkpoint: Checkpoint, data: Mapping[str, Any]) -> None:
        self._checkpoint = checkpoint
        self.part = Part(int(data["part"]), int(data["parts"]))
        self.whole = Whole(
            provenance=Provenance.of(data),
            layers=dict(data["layers"]),
            side=str(data["side"]),
            batches=int(data["batches"]),
            version=str(data["version"]),
        )
        self.leaders: Mapping[str, str] = dict(data["leaders"])
        self.rows = {name: int(count) for name, count in data["rows"].items()}
        self.events = int(data["events"])
        self.rounds = int(data["rounds"])

    @property
    def shown(self) -> str:
        """What to call it in a message."""
        return self._checkpoint.shown

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every sum, by its key."""
        return {name: tuple(ref.info.shape) for name, ref in self._checkpoint.tensors.items()}

    def sum_of(self, key: str) -> Tensor:
        """Return one sum. Raises BadCheckpointError where it is not finite."""
        value: Tensor = self._checkpoint.read_tensor(key)
        if not bool(value.isfinite().all()):
            raise BadCheckpointError(
                f"{self.shown}: {key} holds NaN or infinity", "calibrate this part again"
            )
        return value


def write_part(path: Path, part: Part, whole: Whole, sums: Sums, rounds: int) -> None:
    """Write the sums over one part into a file that appears whole or not at all."""
    about = {"format": FORMAT, "version": whole.version, "part": part.number, "parts": part.of}
    about |= asdict(whole.provenance)
    about |= {
        "layers": whole.layers,
        "side": whole.side,
        "batches": whole.batches,
        "leaders": sums.leaders,
        "rows": sums.rows,
        "events": sums.events,
        "rounds": rounds,
    }
    write_sums(path, sums.spool, {METADATA_OF_PART: json.dumps(about)})


def open_part(path: str | Path) -> PartFile:
    """Open a file of `calibrate --part`. Raises BadCheckpointError where it is none, or damaged."""
    checkpoint = open_output(path)
    text = next(iter(checkpoint.metadata.values()), {}).get(METADATA_OF_PART)
    if text is None:
        raise BadCheckpointError(
            f"{path} was not written by svdcli calibrate --part", "give the files of all parts"
        )

    # What it says must be what the tensors are; whatever may be wrong in it is one error
    try:
        data = json.loads(text)
        if data["format"] > FORMAT:
            raise BadCheckpointError(
                f"{path} has format {data['format']}, this svdcli knows {FORMAT}", "upgrade svdcli"
            )
        file = PartFile(checkpoint, data)
        _check_sums(file)
    except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
        raise BadCheckpointError(
            f"{path}: its sums are damaged ({error})", "calibrate this part again"
        ) from error
    return file


def _check_sums(file: PartFile) -> None:
    """Raise KeyError or ValueError where a sum is missing or has no shape of one."""
    shapes = file.shapes
    for name, leader in file.leaders.items():
        if name not in file.whole.layers:
            raise KeyError(name)
        mean = shapes[f"mean.{leader}"]
        if len(mean) != 1 or shapes[f"input.{leader}"] != mean * 2 or file.rows[leader] < 0:
            raise ValueError(leader)
        output = shapes.get(f"output.{name}", (1,))
        if len(output) not in (1, 2) or len({*output}) != 1:
            raise ValueError(name)


# Adding up ----------------------------------------------------------------------------------------


def in_order(files: Sequence[PartFile]) -> list[PartFile]:
    """Return the parts by their numbers. Raises UsageError, with the name of the file or the number
    of the part, where they are not all parts of one calibration, once each."""
    # All of one calibration: that of the first file
    first = files[0]
    for file in files[1:]:
        difference = first.whole.differs(file.whole)
        if file.part.of != first.part.of:
            difference = f"it is one of {file.part.of} parts, not of {first.part.of}"
        if difference:
            raise UsageError(
                f"{file.shown} is of another calibration than {first.shown}: {difference}",
                "give the parts of one calibration",
            )

    # Each once
    by_number: dict[int, PartFile] = {}
    for file in files:
        other = by_number.setdefault(file.part.number, file)
        if other is not file:
            both = f"{other.shown} and {file.shown} are both part {file.part}"
            if other.shown == file.shown:
                both = f"{file.shown} is given twice"
            raise UsageError(both, "give every part once")
    for number in range(1, first.part.of + 1):
        if number not in by_number:
            missing = Part(number, first.part.of)
            raise UsageError(f"part {missing} is missing", f"run calibrate with --part {missing}")
    return [by_number[number] for number in sorted(by_number)]


def added(files: Sequence[PartFile], spool: Spool) -> Sums:
    """Return the sums of these parts, added in this order.

    They are kept in the spool; of a sum at most two are in memory. Raises SvdcliError where a
    layer shares its input in one part only, and BadCheckpointError where a part is damaged.
    """
    whole = files[0].whole
    sums = Sums(spool, dict(whole.layers), nats=whole.provenance.unit == "nats")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        # How much was read, and which layers share what they read
        sums.events += file.events
        for name, leader in file.leaders.items():
            sums.lead(name, leader)
        for name, count in file.rows.items():
            sums.count(name, count)
        for key, shape in file.shapes.items():
            if shapes.setdefault(key, shape) != shape:
                raise BadCheckpointError(
                    f"{file.shown}: {key} has another shape than in the parts before",
                    "calibrate this part again",
                )

    # One sum after the other, over all parts that have it: an expert may see nothing of a part
    for key in shapes:
        holders = [file for file in files if key in file.shapes]
        total = holders[0].sum_of(key)
        for file in holders[1:]:
            total += file.sum_of(key)
        sums.spool.put(key, total)
    return sums
