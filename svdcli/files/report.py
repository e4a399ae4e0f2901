"""What an output saved, from its headers and its record. No torch, no tensor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from svdcli.errors import BadCheckpointError
from svdcli.files.checkpoint import RECORD, read_file_header
from svdcli.files.record import left_out_copies, read_record
from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.loss import expected_loss
from svdcli.plan.packing import PLAIN
from svdcli.plan.plan import Healing, TextRead, layer_from_json
from svdcli.plan.tensors import DTYPE_BITS, TensorInfo

JSON_VERSION = 1
SOLVERS_FAILED = "every solver failed"  # so begins the reason of a layer that stays dense for it
MISSED = "the target is missed:"  # so begins a note of it
# An error counts as above the bound from here on: the record has it in seven digits.
_ABOVE = 1 + 1e-6


@dataclass(frozen=True)
class LayerRow:
    """One selected layer, or a group that shares a basis: it has the name of the first of its
    members, and the shape of all of them one below the other. relative_error is ||W - W_stored||_F
    / ||W||_F; energy_kept is 1 - relative_error^2. bits are those of one stored number;
    rounding_share is the part of the squared error, in the metric that counts, that comes of
    rounding and not of the rank, where layers are packed. role is "embedding" for a packed table,
    which is no selected layer, or empty.

    Dense layers have rank None, a reason, and no error. Bytes are those of the tensors.
    """

    name: str
    shape: tuple[int, int]
    dtype: str
    rank: int | None
    layout: str
    stored_dtype: str
    bits: int
    rounding_share: float | None
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    saved_bytes: int
    relative_error: float | None
    energy_kept: float | None
    predicted_loss: float | None
    solver: str
    fell_back: tuple[str, ...]
    reason: str
    role: str = ""
    members: tuple[str, ...] = ()

    @property
    def layers(self) -> int:
        """How many layers it is."""
        return len(self.members) or 1


@dataclass(frozen=True)
class Total:
    """Sums before and after: over the selected layers, or over the whole output with every file of
    it."""

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    saved_parameters: int
    saved_bytes: int
    keep: float


@dataclass(frozen=True)
class Report:
    """What a record says of one output, or, with predicted=True, of a plan for one.

    predicted_loss is the sum over the layers in loss_unit ("nats" a prediction, "1 - cosine", ""
    where layers' losses are shares of their own energy and do not add up); expected_loss is what
    the model is likely to show, corrected as measured. healing tells text and blocks where the
    factors were refined; calibration the text that errors were counted by. left_out maps files that
    were not carried over to the reason, left_out_bytes to their sizes, where they are files.
    embeddings sums over packed tables, which are no selected layers, where there are any.
    """

    path: str
    predicted: bool
    source: Mapping[str, Any]
    recipe: Mapping[str, Any]
    layers: tuple[LayerRow, ...]
    skipped: tuple[Mapping[str, Any], ...]
    left_out: Mapping[str, str]
    notes: tuple[str, ...]
    selected: Total
    total: Total
    files: Mapping[str, int]
    failed: tuple[str, ...] = field(default=())
    loss_unit: str = ""
    predicted_loss: float | None = None
    expected_loss: float | None = None
    healing: Mapping[str, Any] | None = None
    calibration: Mapping[str, Any] | None = None
    left_out_bytes: Mapping[str, int] = field(default_factory=dict)
    embeddings: Total | None = None

    def to_json(self) -> dict[str, Any]:
        return {"svdcli_json": JSON_VERSION, "kind": "report"} | asdict(self)


def read_report(path: Path) -> Report:
    """The report of an output on disk. Raises BadCheckpointError where svdcli did not write it."""
    if not path.exists():
        raise BadCheckpointError(f"{path} does not exist", "check the path")
    record = read_record(path)
    if record is None:
        raise BadCheckpointError(
            f"{path} was not written by svdcli compress", f"try `svdcli inspect {path}`"
        )
    sizes, gone = _sizes(path, record)
    report = report_of(record, sizes, str(path))
    gone_notes = [f"{name} was written too, and is gone" for name in gone]
    return replace(report, notes=(*report.notes, *gone_notes))


def report_of(
    record: Mapping[str, Any], sizes: Mapping[str, int], path: str, *, predicted: bool = False
) -> Report:
    """Build the report from a record and the bytes of every file.

    Raises BadCheckpointError where the record is only one weight file's part of a directory's.
    """
    if "recipe" not in record:
        raise BadCheckpointError(
            f"{path} is one weight file of a directory", "report on the directory"
        )
    try:
        return _report_of(record, sizes, path, predicted=predicted)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadCheckpointError(
            f"{path}: its svdcli record is damaged ({error})", "write the output again"
        ) from error


def _report_of(
    record: Mapping[str, Any], sizes: Mapping[str, int], path: str, *, predicted: bool
) -> Report:
    # A row for every selected layer, and sums over them and over the whole output.
    rows = []
    for group in ("layers", "dense"):
        for name, layer in record[group].items():
            rows.append(_row(name, layer, predicted))
    selected = _total([row for row in rows if not row.role])
    tables = [row for row in rows if row.role]
    source = record["source"]
    copies = sum(copy.parameters for copy, _ in left_out_copies(record, path))
    total = _sums(
        source["parameters"],
        source["parameters"] - selected.saved_parameters - copies,
        source["bytes"],
        sum(sizes.values()),
    )

    # Losses add up where they are the model's own, and hold until the factors are healed.
    loss_unit = str(record.get("loss_unit", ""))
    predicted_loss = None
    expected = None
    if loss_unit and record.get("healing") is None:
        predicted_loss = math.fsum(row.predicted_loss or 0.0 for row in rows)
        expected = expected_loss(predicted_loss, loss_unit)

    report = Report(
        path=path,
        predicted=predicted,
        source=source,
        recipe=record["recipe"],
        layers=tuple(sorted(rows, key=lambda row: _natural(row.name))),
        skipped=_skipped(record),
        left_out=record["left_out"],
        notes=(*record["notes"], *_above_the_bound(record["recipe"], rows)),
        selected=selected,
        total=total,
        files=dict(sizes),
        failed=tuple(row.name for row in rows if row.reason.startswith(SOLVERS_FAILED)),
        loss_unit=loss_unit,
        predicted_loss=predicted_loss,
        expected_loss=expected,
        embeddings=_total(tables) if tables else None,
    )
    return _with_optional_fields(report, record)


def _skipped(record: Mapping[str, Any]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"name": name, **tensor, "reason": str(tensor["reason"])}
        for name, tensor in record["skipped"].items()
    )


def _with_optional_fields(report: Report, record: Mapping[str, Any]) -> Report:
    """The report with what only some records have, checked as it is read."""
    healing = record.get("healing")
    if healing is not None:
        report = replace(report, healing=Healing.from_json(healing).to_json())
    calibration = record.get("calibration")
    if calibration is not None:
        report = replace(report, calibration=TextRead.from_json(calibration).to_json())
    left_out_bytes = record.get("left_out_bytes", {})
    nbytes = {str(name): int(size) for name, size in left_out_bytes.items()}
    return replace(report, left_out_bytes=nbytes)


def _above_the_bound(recipe: Mapping[str, Any], rows: Sequence[LayerRow]) -> list[str]:
    """A note where what is stored has a larger error than `--error` allows: rounding is estimated
    before, and measured after."""
    if recipe["target"] != "error":
        return []
    bound = recipe["value"]
    above = [row for row in rows if (row.relative_error or 0.0) > bound * _ABOVE]
    if not above:
        return []
    worst = max(above, key=lambda row: row.relative_error or 0.0)
    return [
        f"{len(above)} of {len(rows)} layers have a larger error than --error {bound:g}, once "
        f"rounded: the largest is {worst.relative_error:.4g} ({worst.name})"
    ]


def newest_output(folder: Path) -> Path:
    """The output of svdcli in `folder` that was written last. Raises BadCheckpointError where there
    is none."""
    outputs = []
    for path in folder.iterdir():
        try:
            if _is_output(path):
                outputs.append((path.stat().st_mtime_ns, path))
        except (BadCheckpointError, OSError):
            continue
    if not outputs:
        raise BadCheckpointError(
            "there is no output of svdcli in this folder", "name one: svdcli report PATH"
        )
    return max(outputs)[1]


def _is_output(path: Path) -> bool:
    """Did svdcli write this directory or file. Raises BadCheckpointError or OSError where it cannot
    be read."""
    if path.is_dir() and (path / RECORD).is_file():
        return True
    return path.suffix == ".safetensors" and bool(read_record(path))


def _sizes(path: Path, record: Mapping[str, Any]) -> tuple[dict[str, int], list[str]]:
    """(the bytes of every file, what the record lists and is not there). Raises BadCheckpointError
    where weights are not."""
    if not path.is_dir():
        read_file_header(path)
        return {path.name: path.stat().st_size}, []
    files = record.get("files")
    if not isinstance(files, dict):
        raise BadCheckpointError(f"{path / RECORD} lists no files", "write the output again")
    gone = [name for name in files if not (path / name).is_file()]
    for name in gone:
        if name.endswith(".safetensors"):
            raise BadCheckpointError(
                f"{path} lacks {name!r}, which its record lists", "write the output again"
            )
    present = [name for name in [*files, RECORD] if name not in gone]
    return {name: (path / name).stat().st_size for name in present}, gone


def _row(name: str, layer: Mapping[str, Any], predicted: bool) -> LayerRow:
    """One layer of a record; it has no error yet where the record is that of a plan."""
    plan = layer_from_json(name, dict(layer))
    tensor = plan.tensor
    m, n = tensor.shape

    # A dense layer: its values before are those after.
    stored: Sequence[TensorInfo] = (tensor,)
    layout = "dense"
    stored_dtype = tensor.dtype
    solver = ""
    parameters = tensor.parameters
    error = energy_kept = None
    bits = DTYPE_BITS[tensor.dtype]

    # A factored one. Numbers of rows are bytes, and no parameters: they have a dtype of their own.
    rank = layer["rank"]
    if rank is not None:
        layout, stored_dtype = plan.layout, plan.stored_dtype
        solver = layer["solver"]
        bits = plan.packing.bits if plan.packing != PLAIN else DTYPE_BITS[stored_dtype]
        stored = (*plan.stored(), *plan.spans())
        plain = LAYOUTS[layout].tensors(tensor, rank, stored_dtype)
        parameters = sum(part.parameters for part in plain if part.dtype == stored_dtype)
    if rank is not None and not predicted:
        error = float(layer["relative_error"])
        energy_kept = 1 - error**2

    nbytes = sum(part.nbytes for part in stored)
    return LayerRow(
        name=name,
        shape=(m, n),
        dtype=tensor.dtype,
        rank=rank,
        layout=layout,
        stored_dtype=stored_dtype,
        bits=bits,
        rounding_share=layer.get("rounding_share"),
        parameters_before=tensor.parameters,
        parameters_after=parameters,
        bytes_before=tensor.nbytes,
        bytes_after=nbytes,
        saved_bytes=tensor.nbytes - nbytes,
        relative_error=error,
        energy_kept=energy_kept,
        predicted_loss=layer.get("loss"),
        solver=solver,
        fell_back=tuple(layer.get("fell_back", ())),
        reason=layer.get("reason", ""),
        role=str(layer.get("role", "")),
        members=tuple(member.name for member in plan.members),
    )


def _total(rows: Sequence[LayerRow]) -> Total:
    return _sums(
        sum(row.parameters_before for row in rows),
        sum(row.parameters_after for row in rows),
        sum(row.bytes_before for row in rows),
        sum(row.bytes_after for row in rows),
    )


def _sums(
    parameters_before: int, parameters_after: int, bytes_before: int, bytes_after: int
) -> Total:
    keep = parameters_after / parameters_before if parameters_before else 1.0
    return Total(
        parameters_before=parameters_before,
        parameters_after=parameters_after,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        saved_parameters=parameters_before - parameters_after,
        saved_bytes=bytes_before - bytes_after,
        keep=keep,
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
