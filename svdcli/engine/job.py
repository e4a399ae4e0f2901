"""One unit of the output: read, solve, write at its offset, note it in the journal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from svdcli.engine.calibrated import Calibration
from svdcli.engine.executor import spread
from svdcli.engine.solve import LayerFailedError, Ready, refitted, solve_layer
from svdcli.files.checkpoint import Checkpoint
from svdcli.files.dtypes import TORCH_DTYPES, bytes_of
from svdcli.files.record import Result
from svdcli.files.workspace import Workspace
from svdcli.files.writer import Unit, WeightWriter, checksum_at, chunks_at
from svdcli.linalg.layouts import CODECS
from svdcli.plan.plan import LayerPlan
from svdcli.plan.tensors import TensorInfo
from svdcli.progress import Progress


def run_units(
    checkpoint: Checkpoint,
    units: Sequence[Unit],
    layers: dict[str, LayerPlan],
    writer: WeightWriter,
    workspace: Workspace,
    *,
    seed: int,
    device: torch.device,
    progress: Progress,
    calibration: Calibration | None = None,
    ready: Ready | None = None,
) -> tuple[dict[str, Result], dict[str, str]]:
    """Do every unit that the journal does not have; (results of factored layers, failed layers with
    the reasons)."""
    results: dict[str, Result] = {}
    failed: dict[str, str] = {}
    _salvage(units, writer, workspace)
    costs = {unit.name: _seconds(unit, layers.get(unit.name)) for unit in units}
    largest_first = sorted(
        units, key=lambda unit: costs[unit.name], reverse=True
    )  # both workers then end together
    total, done = math.fsum(costs.values()), 0.0

    def do(unit: Unit) -> tuple[Unit, dict[str, Any]]:
        line = workspace.done.get(unit.name)
        if line is None or not _still_there(unit, line, writer):
            try:
                line = _do_unit(
                    checkpoint,
                    unit,
                    layers.get(unit.name),
                    writer,
                    seed,
                    device,
                    calibration,
                    ready,
                )
            except LayerFailedError as error:
                return unit, {"failed": str(error)}
            workspace.done[unit.name] = line
            workspace.note(line)
        return unit, line

    for unit, line in spread(do, largest_first, device):
        if "failed" in line:
            failed[unit.name] = line["failed"]
        if "error" in line:
            results[unit.name] = Result(line["error"], line["solver"], tuple(line["fell_back"]))
        done += costs[unit.name]
        progress("write", unit.name, done, total)
    return results, failed


def _salvage(units: Sequence[Unit], writer: WeightWriter, workspace: Workspace) -> None:
    """Copy what an older layout of the same output already had, after `set_aside`."""
    for unit in units:
        line = workspace.done.get(unit.name)
        with_bytes = [tensor for tensor in unit.writes if tensor.nbytes]
        if line is None or not workspace.before.exists() or len(line["crc"]) < len(with_bytes):
            continue
        # Those without bytes stand last, and may have come or gone since.
        for tensor, offset, file in zip(with_bytes, line["at"], line["files"], strict=False):
            chunks = chunks_at(workspace.before / file, offset, tensor.nbytes)
            writer.write(tensor.name, chunks)
        line["crc"] = line["crc"][: len(with_bytes)] + [0] * (len(unit.writes) - len(with_bytes))
        line.update(_places(unit, writer))
        workspace.note(line)
    workspace.drop_before()


def _places(unit: Unit, writer: WeightWriter) -> dict[str, list[Any]]:
    places = [writer.place(tensor.name) for tensor in unit.writes]
    return {
        "files": [writer.relative(path) for path, _ in places],
        "at": [offset for _, offset in places],
    }


def _do_unit(
    checkpoint: Checkpoint,
    unit: Unit,
    layer: LayerPlan | None,
    writer: WeightWriter,
    seed: int,
    device: torch.device,
    calibration: Calibration | None,
    ready: Ready | None,
) -> dict[str, Any]:
    line: dict[str, Any] = {"unit": unit.name}
    chunks: list[Iterator[bytes | bytearray | memoryview]]
    if unit.kind == "factor" and layer is not None:
        w = checkpoint.read_tensor(unit.name)
        moments = None if calibration is None else calibration.of(layer)
        stored, result = (
            solve_layer(w, layer, seed, device, moments) if ready is None else ready.take(w, layer)
        )
        if layer.bias is not None and ready is None:
            stored = (*stored, refitted(checkpoint, w, stored, layer, moments))
        chunks = [iter([bytes_of(tensor)]) for tensor in stored]
        line |= {
            "error": result.relative_error,
            "solver": result.solver,
            "fell_back": list(result.fell_back),
        }
    elif unit.kind == "expand" and layer is not None:
        chunks = [_expanded(checkpoint, layer, unit.writes[0])]
    elif unit.kind == "warn":
        chunks = [iter(())]
    else:
        chunks = [checkpoint.chunks(unit.name)]
    sums = [writer.write(t.name, part) for t, part in zip(unit.writes, chunks, strict=True)]
    return line | {"crc": sums} | _places(unit, writer)


def _expanded(
    checkpoint: Checkpoint, layer: LayerPlan, target: TensorInfo
) -> Iterator[bytes | bytearray | memoryview]:
    """The dense weight of a factored layer in its original dtype, a block of rows at a time."""
    stored = tuple(checkpoint.read_tensor(tensor.name) for tensor in layer.stored())
    compute = torch.float64 if "F64" in (layer.stored_dtype, target.dtype) else torch.float32
    step = max(1, 2**22 // max(1, target.shape[1]))
    for start in range(0, target.shape[0], step):
        rows = CODECS[layer.layout].rows(stored, compute, slice(start, start + step))
        yield bytes_of(rows.to(TORCH_DTYPES[target.dtype]))


def _still_there(unit: Unit, line: dict[str, Any], writer: WeightWriter) -> bool:
    """Does the file still hold what the journal says: a power cut may have kept the line and lost
    the data."""
    if any(line.get(key) != value for key, value in _places(unit, writer).items()):
        return False
    written = zip(unit.writes, line["crc"], strict=True)
    return all(
        checksum_at(*writer.place(tensor.name), tensor.nbytes) == crc for tensor, crc in written
    )


def guess_seconds(tensor: TensorInfo, *, share: float) -> float:
    """A guess at how long the mathematics on a matrix takes on a few cores; share is how much of an
    SVD is done."""
    small, large = sorted(tensor.shape)
    return 1e-4 + tensor.nbytes / 1e9 + share * small * small * large / 1e10


def _seconds(unit: Unit, layer: LayerPlan | None) -> float:
    if unit.kind == "factor" and layer is not None:
        return guess_seconds(layer.tensor, share=1.0)
    return 1e-4 + unit.nbytes / 1e9
