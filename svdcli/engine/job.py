"""One unit of the output as a value, and the driver that has all of them done.

A job holds paths, a plan and small numbers, and its answer is a line of the journal, so that it can
be done in this process or in another one that sees the same files. The driver alone writes the
journal.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svdcli.calibration.moments import LayerMoments
from svdcli.engine.executor import Local, solving
from svdcli.engine.footprint import bytes_to_solve
from svdcli.engine.inputs import Inputs, Opened, shared
from svdcli.engine.packing import parts_of
from svdcli.engine.run import Run
from svdcli.engine.solve import (
    LayerFailedError,
    Ready,
    check_finite,
    largest_of,
    read_weight,
    refitted,
    solve_layer,
    span_values,
)
from svdcli.files.dtypes import TORCH_DTYPES, bytes_of
from svdcli.files.record import Result
from svdcli.files.source import Source
from svdcli.files.workspace import Workspace
from svdcli.files.writer import Unit, WeightWriter, checksum_at, chunks_at, write_at
from svdcli.linalg.layouts import CODECS
from svdcli.linalg.machine import placed_on
from svdcli.memory import ROOM
from svdcli.plan.packing import PLAIN
from svdcli.plan.plan import LayerPlan
from svdcli.plan.tensors import TensorInfo

# A line of the journal: what unit it is of, where its tensors are and their checksums.
Line = dict[str, Any]
Chunks = Iterable[bytes | bytearray | memoryview]


@dataclass(frozen=True)
class Job:
    """One unit of an output.

    layer is what a factored layer is to become, or was; experts are those of a stack. folder holds
    the files to be, files and offsets say where in them each tensor that the unit
    writes belongs. earlier is the line that a run before this one left, if any.
    """

    unit: Unit
    layer: LayerPlan | None
    inputs: Inputs
    folder: Path
    files: tuple[str, ...]
    offsets: tuple[int, ...]
    seed: int
    device: str
    earlier: Line | None = None
    experts: tuple[LayerPlan, ...] = ()

    def places(self) -> Iterator[tuple[Path, int]]:
        """The file and the offset of every tensor that is written."""
        for file, offset in zip(self.files, self.offsets, strict=True):
            yield self.folder / file, offset


@dataclass(frozen=True)
class Loaded:
    """What a factored layer is solved from. placed is the weight again, on a GPU that it is solved
    on."""

    weight: Tensor
    moments: LayerMoments | None
    placed: Tensor


@dataclass(frozen=True)
class Solved:
    """The bytes of every tensor that is written, and how a factored layer was solved."""

    chunks: Sequence[Chunks]
    result: Result | None = None


def run_job(job: Job) -> Line:
    """Do one job, unless what an earlier run left is still there: load, solve, store.

    The line says `failed`, and why, where every solver failed on a layer.
    """
    if job.earlier is not None and _still_there(job, job.earlier):
        return job.earlier
    opened = job.inputs.open()
    with ROOM.taking(_memory_of(job)):
        try:
            loaded = load(job, opened)
            with solving(job.device):
                solved = solve(job, loaded, opened)
        except LayerFailedError as error:
            return {"unit": job.unit.name, "failed": str(error)}
        return store(job, solved)


def _memory_of(job: Job) -> int:
    """About how many bytes of memory a job takes; what is copied takes next to none."""
    layer = job.layer
    if job.unit.kind != "factor" or layer is None:
        return 0
    if layer.role:
        return 2 * layer.tensor.nbytes  # a few rows of a table at a time
    shapes = [tensor.shape for tensor in layer.originals]
    return bytes_to_solve(shapes, layer.metric, rounding=layer.packing != PLAIN)


def load(job: Job, opened: Opened) -> Loaded | None:
    """The weight of a layer that is to be factored, and its moments; None for what is streamed.
    Raises UnsoundError for a weight that no solver takes."""
    if job.unit.kind != "factor" or job.layer is None:
        return None
    moments = None if opened.calibration is None else opened.calibration.of(job.layer)
    weight = read_weight(opened.source, job.layer.originals)
    if not job.layer.role and largest_of(weight) is None:  # a table would stay dense
        check_finite([tensor.name for tensor in job.layer.originals], opened.source.shown)
    on_device = opened.ready is None and job.layer.packing == PLAIN
    placed = placed_on(weight, torch.device(job.device)) if on_device else weight
    return Loaded(weight, moments, placed)


def solve(job: Job, loaded: Loaded | None, opened: Opened) -> Solved:
    """The bytes that take the unit's place. Raises LayerFailedError."""
    layer, source = job.layer, opened.source
    if loaded is not None and layer is not None:
        stored, result = _factors(job, layer, loaded, opened)
        return Solved([[bytes_of(tensor)] for tensor in stored], result)
    if job.unit.kind == "expand" and layer is not None:
        return Solved(_all_expanded(source, layer))
    if job.unit.kind == "stack":
        return Solved([_stacked(source, job)])
    if job.unit.kind == "warn":
        return Solved([()])
    name = job.unit.reads[0] if job.unit.kind == "again" else job.unit.name
    return Solved([source.chunks(name)])


def store(job: Job, solved: Solved) -> Line:
    """Write every tensor at its place."""
    line: Line = {"unit": job.unit.name}
    if solved.result is not None:
        line["error"] = solved.result.relative_error
        line["solver"] = solved.result.solver
        line["fell_back"] = list(solved.result.fell_back)
        if solved.result.rounding_share is not None:
            line["rounding_share"] = solved.result.rounding_share
    places = zip(job.places(), solved.chunks, strict=True)
    line["crc"] = [write_at(path, offset, chunks) for (path, offset), chunks in places]
    return line | _where(job)


def _factors(
    job: Job, layer: LayerPlan, loaded: Loaded, opened: Opened
) -> tuple[tuple[Tensor, ...], Result]:
    """The tensors that are written for a factored layer."""
    if opened.ready is not None:
        return opened.ready.take(loaded.weight, layer)
    device = torch.device(job.device)
    stored, result = solve_layer(loaded.placed, layer, job.seed, device, loaded.moments)
    biases = refitted(opened.source, loaded.weight, stored, layer, loaded.moments)
    return (*stored, *span_values(layer), *biases), result


def _all_expanded(source: Source, layer: LayerPlan) -> list[Iterator[memoryview]]:
    """The dense weight of a factored layer, or of every layer of a group."""
    expanded = []
    stop = 0
    for target in layer.originals:
        start, stop = stop, stop + target.shape[0]
        expanded.append(_expanded(source, layer, range(start, stop)))
    return expanded


def _expanded(source: Source, layer: LayerPlan, rows: range) -> Iterator[memoryview]:
    """Rows of the dense weight of a factored layer in its original dtype, a block at a time."""
    stored = tuple(source.read_tensor(tensor.name) for tensor in layer.stored())
    dtype = layer.tensor.dtype
    compute = torch.float64 if "F64" in (layer.stored_dtype, dtype) else torch.float32
    parts = parts_of(layer, stored)
    step = max(1, 2**22 // max(1, layer.tensor.shape[1]))
    for start in range(rows.start, rows.stop, step):
        block = slice(start, min(start + step, rows.stop))
        dense = CODECS[layer.layout].rows(parts, compute, block)
        yield bytes_of(dense.to(TORCH_DTYPES[dtype]))


def _stacked(source: Source, job: Job) -> Iterator[bytes | memoryview]:
    """The matrices of all experts one after the other, dense, those multiplied out that were
    factored."""
    layers = {layer.tensor.name: layer for layer in job.experts}
    for name in job.unit.reads:
        if name in layers:
            yield from _expanded(source, layers[name], range(layers[name].tensor.shape[0]))
        else:
            yield from source.chunks(name)


def _where(job: Job) -> Line:
    return {"files": list(job.files), "at": list(job.offsets)}


def _still_there(job: Job, line: Line) -> bool:
    """Does the file still hold what the journal says: a power cut may have kept the line and lost
    the data."""
    if any(line.get(key) != value for key, value in _where(job).items()):
        return False
    for (path, offset), tensor, crc in zip(job.places(), job.unit.writes, line["crc"], strict=True):
        if checksum_at(path, offset, tensor.nbytes) != crc:
            return False
    return True


# The driver ---------------------------------------------------------------------------------------


def run_units(
    run: Run,
    units: Sequence[Unit],
    layers: Mapping[str, LayerPlan],
    writer: WeightWriter,
    ready: Ready | None = None,
) -> tuple[dict[str, Result], dict[str, str]]:
    """Do every unit that the journal does not have; (results of factored layers, failed layers with
    the reasons)."""
    results: dict[str, Result] = {}
    failed: dict[str, str] = {}
    workspace = run.kept
    _salvage(units, writer, workspace)

    # the longest first, so that all workers end together
    costs = {unit.name: _seconds(unit, layers.get(unit.name)) for unit in units}
    ordered = sorted(units, key=lambda unit: costs[unit.name], reverse=True)
    total, done = math.fsum(costs.values()), 0.0

    def note(line: Line) -> None:
        if "failed" not in line and line != workspace.done.get(line["unit"]):
            workspace.done[line["unit"]] = line
            workspace.note(line)

    with shared(Opened(run.source, run.calibration, ready)) as inputs:
        jobs = [_job(run, unit, layers, inputs, writer) for unit in ordered]
        # layers that are solved already are in the memory of this process alone
        crew = run.crew if ready is None else Local(run.device)
        for line in crew.map_unordered(run_job, jobs, note):
            name = line["unit"]
            if "failed" in line:
                failed[name] = line["failed"]
            if "error" in line:
                results[name] = Result(
                    line["error"],
                    line["solver"],
                    tuple(line["fell_back"]),
                    line.get("rounding_share"),
                )
            done += costs[name]
            run.progress("write", name, done, total)
    return results, failed


def _job(
    run: Run, unit: Unit, layers: Mapping[str, LayerPlan], inputs: Inputs, writer: WeightWriter
) -> Job:
    places = [writer.place_in(tensor.name) for tensor in unit.writes]
    experts: tuple[LayerPlan, ...] = ()
    if unit.kind == "stack":
        experts = tuple(layers[name] for name in unit.reads if name in layers)
    return Job(
        unit=unit,
        experts=experts,
        layer=layers.get(unit.name),
        inputs=inputs,
        folder=run.kept.data,
        files=tuple(file for file, _ in places),
        offsets=tuple(offset for _, offset in places),
        seed=run.seed,
        device=str(run.device),
        earlier=run.kept.done.get(unit.name),
    )


def _salvage(units: Sequence[Unit], writer: WeightWriter, workspace: Workspace) -> None:
    """Copy what an older layout of the same output already had, after `set_aside`."""
    for unit in units:
        line = workspace.done.get(unit.name)
        with_bytes = [tensor for tensor in unit.writes if tensor.nbytes]
        if line is None or len(line["crc"]) < len(with_bytes):
            continue
        # an earlier run may have been killed while it removed them
        if not all((workspace.before / file).is_file() for file in line["files"]):
            continue
        # Those without bytes stand last, and may have come or gone since.
        for tensor, offset, file in zip(with_bytes, line["at"], line["files"], strict=False):
            chunks = chunks_at(workspace.before / file, offset, tensor.nbytes)
            writer.write(tensor.name, chunks)
        line["crc"] = line["crc"][: len(with_bytes)] + [0] * (len(unit.writes) - len(with_bytes))
        places = [writer.place_in(tensor.name) for tensor in unit.writes]
        line["files"] = [file for file, _ in places]
        line["at"] = [offset for _, offset in places]
        workspace.note(line)
    workspace.drop_before()


def guess_seconds(tensor: TensorInfo, *, share: float) -> float:
    """A guess at how long the mathematics on a matrix takes on a few cores; share is how much of an
    SVD is done."""
    small, large = sorted(tensor.shape)
    return 1e-4 + tensor.nbytes / 1e9 + share * small * small * large / 1e10


def _seconds(unit: Unit, layer: LayerPlan | None) -> float:
    if unit.kind == "factor" and layer is not None:
        return guess_seconds(layer.tensor, share=0.0 if layer.role else 1.0)
    return 1e-4 + unit.nbytes / 1e9
