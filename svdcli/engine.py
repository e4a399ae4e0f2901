"""Where the work is done: read one tensor, solve, check the residual, write, note it in the journal."""

from __future__ import annotations

import ctypes
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from svdcli.errors import SvdcliError, UsageError
from svdcli.files.bytes_of import TORCH_DTYPES, bytes_of
from svdcli.files.checkpoint import Checkpoint
from svdcli.files.moments import LayerMoments, Moments, metric_of
from svdcli.files.record import Result
from svdcli.files.workspace import Workspace
from svdcli.files.writer import Unit, WeightWriter, checksum_at, chunks_at
from svdcli.linalg.scratch import keep_scratch, keeping_scratch, scratch
from svdcli.linalg.solvers import SOLVERS, Factors, squared_norm, squared_singular_values, transposed
from svdcli.linalg.storage import dense_rows, residual_energy, to_stored
from svdcli.linalg.whitening import refit_bias, weighted, weighted_energies, weighted_error
from svdcli.models.modules import is_row_order
from svdcli.plan.decide import UNSOUND, Measured
from svdcli.plan.recipe import LayerPlan, Recipe
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo
from svdcli.plan.words import WEIGHTED, Device
from svdcli.progress import Progress

Item = TypeVar("Item")
Answer = TypeVar("Answer")
_WORKERS = 2
_TINY = 1e-140  # the squares of smaller numbers, or larger than one over it, leave float64
_MMAP_THRESHOLD = -3  # mallopt's name for it in glibc's malloc.h

_NoConvergence: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]

# After a failure: each solver is more robust, and slower, than the one before.
_LADDER = (("gram", torch.float32), ("svd", torch.float32), ("svd", torch.float64))
# A float32 Gram matrix knows singular values down to about 3e-4 of the largest; a smaller tail is not to be trusted.
_GRAM_FLOOR = {torch.float32: 1e-4, torch.float64: 1e-11}


@dataclass(frozen=True)
class Compute:
    """Where and how fast the mathematics runs. device is cpu, cuda, mps or auto; threads None leaves torch's choice."""

    device: Device = "auto"
    threads: int | None = None

    def start(self) -> torch.device:
        """Set the threads and find the device. Raises UsageError where this machine has no such device."""
        if self.threads is not None:
            if not 1 <= self.threads <= 4096:
                raise UsageError(f"--threads {self.threads} is outside [1, 4096]", "leave it out for torch's own choice")
            torch.set_num_threads(self.threads)
        available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        if self.device == "auto":
            return torch.device("cuda" if available["cuda"] else "cpu")
        if not available.get(self.device, False):
            raise UsageError(
                f"--device {self.device} is not available here", f"use {', '.join(d for d in available if available[d])}"
            )
        return torch.device(self.device)


def _give_memory_back() -> None:
    """Let glibc return every buffer of a megabyte or more when it is freed.

    Its threshold grows with what it sees, up to 32 MB: freed matrices then stay in the heaps of the two workers, in pieces.
    Reading and training, which need the same small buffers again and again, do better without.
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, 2**20)


def spread(work: Callable[[Item], Answer], items: Iterable[Item], device: torch.device) -> Iterator[Answer]:
    """Do `work` on every item, two at a time on a CPU with two threads or more, and yield the answers as they come.

    Each worker gets its share of the threads: reading and writing one layer then hides behind the mathematics of the other.
    Two, so that memory still follows the largest layer. An error, or an interrupt, lets the work under way end first.
    """
    _give_memory_back()
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads < 2:
        with keeping_scratch():
            yield from map(work, items)
        return
    queue, running = iter(items), set[Future[Answer]]()
    pool = ThreadPoolExecutor(_WORKERS, initializer=_start_worker, initargs=(threads_each(device),))
    try:
        running = {pool.submit(work, item) for item in itertools.islice(queue, _WORKERS)}
        while running:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            running |= {pool.submit(work, item) for item in itertools.islice(queue, len(done))}
            for future in done:
                yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def threads_each(device: torch.device) -> int:
    """Threads of one worker on a CPU: products of several are rounded in another order."""
    return max(1, torch.get_num_threads() // _WORKERS) if device.type == "cpu" else 0


def _start_worker(threads: int) -> None:
    torch.set_num_threads(threads)
    keep_scratch()


@dataclass(frozen=True)
class Calibration:
    """The moments that a recipe counts with, and how much of them."""

    moments: Moments
    metric: str

    @property
    def unit(self) -> str:
        """Of the predicted losses: that of the model's own loss where gradients or sensitivities count, else none."""
        known = self.moments.provenance
        counts = known.sensitivity and not known.gradients if self.metric == "inputs" else known.gradients or known.sensitivity
        return known.unit if counts else ""

    def kind(self, name: str) -> str:
        """The metric of one layer: "" where the moments say nothing of it."""
        known = self.moments.kind(name)
        if self.moments.provenance.gradients and known == "inputs" and self.metric != "inputs":
            return ""  # no gradient reached it, so nothing compares it with the others
        if self.moments.provenance.sensitivity and self.moments.weight(name) is None:
            return ""
        if self.metric == "diagonal" and known == "full":
            return "diagonal"
        return known if self.metric in ("auto", "full", "diagonal") or not known else "inputs"

    def weight(self, name: str, kind: str) -> float | None:
        """The measured sensitivity of one layer, where it was measured in the metric that counts here."""
        return self.moments.weight(name) if kind and kind == self.moments.kind(name) else None

    def of(self, layer: LayerPlan) -> LayerMoments | None:
        """The moments of one planned layer, cut to its metric."""
        return self.cut(layer.tensor.name, layer.metric) if layer.metric else None

    def cut(self, name: str, kind: str) -> LayerMoments:
        found = self.moments.of(name)
        if found is None:
            raise SvdcliError(f"the calibration lacks {name}, which the plan needs", "give the calibration it was made with")
        outputs = None if kind == "inputs" else found.outputs
        if kind == "diagonal" and outputs is not None and outputs.ndim == 2:
            outputs = outputs.diagonal().contiguous()
        return LayerMoments(found.inputs, found.mean, outputs, found.transposed)


def check_metric(recipe: Recipe, moments: Moments) -> None:
    """Raises UsageError where the recipe asks for gradients that the calibration did not measure."""
    if recipe.metric in ("diagonal", "full") and not moments.provenance.gradients:
        raise UsageError(
            f"--metric {recipe.metric} needs gradients, which the calibration left out", "calibrate with --gradients"
        )


@dataclass(frozen=True)
class Ready:
    """Layers whose stored tensors exist already, bias included where it is the layer's, and which solver they came from."""

    tensors: Callable[[LayerPlan], tuple[Tensor, ...]]
    results: Mapping[str, Result]

    def take(self, w: Tensor, layer: LayerPlan) -> tuple[tuple[Tensor, ...], Result]:
        """The tensors of one layer, and their exact error against its weight."""
        tensors = self.tensors(layer)
        without_bias = tensors[: len(layer.stored())]
        return tensors, replace(self.results[layer.tensor.name], relative_error=_relative_error(w, without_bias, layer))


class LayerFailedError(Exception):
    """Every solver failed on a layer; str() says how each did."""


def measure_layer(
    w: Tensor, *, spectra: bool, device: torch.device, moments: LayerMoments | None = None, centred: bool = False
) -> Measured:
    """Is the weight finite, its squares included, and, where asked, what are its squared singular values, in the metric of its
    moments if any.

    Weights of 16 bits are measured through a float32 Gram matrix, whose noise is below their own rounding; others in float64.
    """
    largest = max(abs(value) for value in map(float, w.aminmax()))
    if not math.isfinite(largest) or (w.dtype == torch.float64 and largest > 0 and not _TINY < largest < 1 / _TINY):
        return Measured(finite=False)
    if not spectra:
        return Measured(finite=True)
    if moments is not None:
        where = torch.device("cpu") if device.type == "mps" else device
        matrix = (w.T if moments.transposed else w).to(where)
        weighed = weighted_energies(matrix, metric_of(moments, where, centred=centred))
        if not moments.inputs.any() or (moments.outputs is not None and not moments.outputs.any()):
            weighed = torch.zeros_like(weighed)  # solved as if all mattered alike, but worth nothing to the model
        return Measured(finite=True, energies=tuple(weighed.tolist()))
    work = w.to(device, _work_dtype(device, torch.float64 if w.dtype in (torch.float32, torch.float64) else torch.float32))
    exponent = math.frexp(largest)[1]
    # A power of two keeps every bit, and squares of very large or small weights inside the dtype's range.
    energies = squared_singular_values(torch.ldexp(work, torch.tensor(-exponent))).to("cpu", torch.float64)
    energies = torch.ldexp(energies, torch.tensor(2 * exponent))
    return Measured(finite=True, energies=tuple(energies.tolist()))


def measure(
    checkpoint: Checkpoint,
    tensors: Sequence[TensorInfo],
    *,
    spectra: bool,
    device: torch.device,
    workspace: Workspace | None,
    progress: Progress,
    calibration: Calibration | None = None,
) -> dict[str, Measured]:
    """Measure every layer that the journal does not have yet; with a calibration, in its metric."""
    known = workspace.measured if workspace is not None else {}
    share = 0.3 if spectra else 0.0
    total, done = math.fsum(guess_seconds(tensor, share=share) for tensor in tensors), 0.0
    found = {}

    def look(tensor: TensorInfo) -> tuple[TensorInfo, dict[str, Any]]:
        line = known.get(tensor.name)
        if line is None or (spectra and line["energies"] is None and line["finite"]):
            kind = "" if calibration is None else calibration.kind(tensor.name)
            moments = calibration.cut(tensor.name, kind) if calibration is not None and kind else None
            bias = bias_of(checkpoint, tensor, moments)
            w = checkpoint.read_tensor(tensor.name)
            layer = measure_layer(w, spectra=spectra, device=device, moments=moments, centred=bias is not None)
            line = {"measured": tensor.name, "finite": layer.finite, "energies": layer.energies, "metric": kind}
            line["refit"] = bias is not None
            line["weight"] = None if calibration is None else calibration.weight(tensor.name, kind)
            if workspace is not None:
                workspace.note(line)
        return tensor, line

    for tensor, line in spread(look, tensors, device):
        energies = None if line["energies"] is None else tuple(line["energies"])
        bias = checkpoint.tensors[f"{tensor.module}.bias"].info if line["refit"] else None
        found[tensor.name] = Measured(line["finite"], energies, line["metric"], bias, line["weight"])
        done += guess_seconds(tensor, share=share)
        progress("measure", tensor.name, done, total)
    return {tensor.name: found[tensor.name] for tensor in tensors}


def bias_of(checkpoint: Checkpoint, tensor: TensorInfo, moments: LayerMoments | None) -> TensorInfo | None:
    """The bias that can be refitted when this weight is truncated; None where there is none, or nothing is known of the mean."""
    ref = checkpoint.tensors.get(f"{tensor.module}.bias")
    if moments is None or ref is None or ref.info.dtype not in FACTORED_DTYPES:
        return None
    outputs = tensor.shape[1 if moments.transposed else 0]
    return ref.info if ref.info.shape == (outputs,) else None


def solve_layer(
    w: Tensor, layer: LayerPlan, seed: int, device: torch.device, moments: LayerMoments | None = None
) -> tuple[tuple[Tensor, ...], Result]:
    """The stored tensors of one layer and the exact error of what they stand for.

    A solver that does not converge, or whose result is worse than its spectrum promised, gives way to the next of
    gram, svd in float32, svd in float64. Raises LayerFailedError where all of them fail.
    """
    if layer.rank is None:
        raise ValueError(f"{layer.tensor.name} is dense")
    fell_back: list[str] = []
    for solver, dtype in _attempts(layer, device):
        work = _in_dtype(w, device, dtype)
        label = solver if dtype == _attempts(layer, device)[0][1] else f"{solver} {str(dtype).removeprefix('torch.')}"
        try:
            factors = _factor(work, layer, solver, seed, moments)
            stored = tuple(t.cpu() for t in to_stored(factors, layer.layout, TORCH_DTYPES[layer.stored_dtype]))
        except _NoConvergence:
            fell_back.append(f"{label}: no convergence")
            continue
        total = squared_norm(work)
        error = residual_energy(work, tuple(t.to(device) for t in stored), layer.layout)
        if solver == WEIGHTED and moments is not None:
            problem = _weighted_problem(work, stored, layer, factors, moments)
        else:
            problem = _problem(layer, solver, dtype, factors, error, total)
        if problem:
            fell_back.append(f"{label}: {problem}")
            continue
        relative = math.sqrt(max(0.0, error) / total) if total > 0 else 0.0
        return stored, Result(relative, label, tuple(fell_back))
    raise LayerFailedError(", ".join(fell_back))


def _in_dtype(w: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight to compute with: itself where nothing changes; `scratch`, its long side in rows, where the CPU converts it."""
    if device.type != "cpu" or w.dtype == dtype:
        return w.to(device, dtype)
    tall = w.shape[0] > w.shape[1]
    lying = w.T.contiguous() if tall else w  # transposed first: both at once is eight times as slow
    work = scratch("weight", tuple(lying.shape), w.new_empty(0, dtype=dtype)).copy_(lying)
    return work.T if tall else work


def _factor(work: Tensor, layer: LayerPlan, solver: str, seed: int, moments: LayerMoments | None) -> Factors:
    rank = int(layer.rank or 0)
    if solver != WEIGHTED or moments is None:
        return SOLVERS[solver](work, rank, seed)
    metric = metric_of(moments, work.device, centred=layer.bias is not None)
    return transposed(weighted(work.T, rank, metric)) if moments.transposed else weighted(work, rank, metric)


def _dense(stored: tuple[Tensor, ...], layer: LayerPlan, moments: LayerMoments, device: torch.device) -> Tensor:
    """What the stored factors stand for, (out, in) in float64."""
    dense = dense_rows(tuple(part.to(device) for part in stored), layer.layout, torch.float64, slice(None))
    return dense.T if moments.transposed else dense


def _weighted_problem(work: Tensor, stored: tuple[Tensor, ...], layer: LayerPlan, factors: Factors, moments: LayerMoments) -> str:
    """Does the stored layer's error in the metric keep what the spectrum promised, rounding aside."""
    w = work.T if moments.transposed else work
    error = weighted_error(
        w, _dense(stored, layer, moments, work.device), metric_of(moments, work.device, centred=layer.bias is not None)
    )
    if not math.isfinite(error):
        return "not finite"
    total = factors.tail + float(factors.sigma.square().sum())
    rounding = FACTORED_DTYPES[layer.stored_dtype] ** 2 * (8 if layer.layout == "factored" else 256)
    return "missed its spectrum" if error > 1.01 * factors.tail + (rounding + 1e-9) * total else ""


def _refitted(
    checkpoint: Checkpoint, w: Tensor, stored: tuple[Tensor, ...], layer: LayerPlan, moments: LayerMoments | None
) -> Tensor:
    """The bias that takes up the mean of what the truncation loses; as it was where a plain solver had to step in."""
    assert layer.bias is not None
    bias = checkpoint.read_tensor(layer.bias.name)
    if moments is None:
        return bias
    approx = _dense(stored, layer, moments, torch.device("cpu"))
    return refit_bias(w.T if moments.transposed else w, approx, moments.mean, bias)


def has_row_order(compressed: Checkpoint, layer: LayerPlan) -> bool:
    """Is the stored order of a pivoted layer's rows one; other layouts need none."""
    return layer.layout != "pivoted" or is_row_order(compressed.read_tensor(layer.stored()[-1].name))


def stored_error(original: Checkpoint, compressed: Checkpoint, layer: LayerPlan) -> float:
    """The relative Frobenius error of one stored layer against the original weight, from the files."""
    stored = tuple(compressed.read_tensor(tensor.name) for tensor in layer.stored())
    return _relative_error(original.read_tensor(layer.tensor.name), stored, layer)


def _relative_error(weight: Tensor, stored: tuple[Tensor, ...], layer: LayerPlan) -> float:
    work = weight.to(torch.float64 if "F64" in (layer.tensor.dtype, layer.stored_dtype) else torch.float32)
    total = squared_norm(work)
    return math.sqrt(residual_energy(work, stored, layer.layout) / total) if total > 0 else 0.0


def _attempts(layer: LayerPlan, device: torch.device) -> list[tuple[str, torch.dtype]]:
    wide = layer.tensor.dtype == "F64" or layer.stored_dtype == "F64"
    first = (layer.solver, _work_dtype(device, torch.float64 if wide else torch.float32))
    later = _LADDER if layer.solver in ("randomized", WEIGHTED) else _LADDER[1:]
    ladder = [(solver, _work_dtype(device, torch.float64 if wide else dtype)) for solver, dtype in later]
    return list(dict.fromkeys([first, *ladder]))


def _work_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """mps has no float64."""
    return torch.float32 if device.type == "mps" else dtype


def _problem(layer: LayerPlan, solver: str, dtype: torch.dtype, factors: Factors, error: float, total: float) -> str:
    """What is wrong with a result, in a few words, or nothing."""
    if not math.isfinite(error):
        return "not finite"
    if solver == "gram" and factors.tail < _GRAM_FLOOR[dtype] * total and FACTORED_DTYPES[layer.stored_dtype] < 1e-6:
        return "tail below its precision"
    growth = 8 if layer.layout == "factored" else 256
    rounding = growth * FACTORED_DTYPES[layer.stored_dtype] ** 2
    noise = max(layer.tensor.shape) * torch.finfo(dtype).eps ** 2
    subnormal = growth * layer.tensor.parameters * _finest(layer.stored_dtype) ** 2
    if error > 1.001 * factors.tail + (rounding + noise + _tail_noise(solver, dtype)) * total + subnormal:
        return "missed its spectrum"
    return ""


def _finest(dtype: str) -> float:
    """The distance of the numbers nearest to zero: rounding is absolute there."""
    info = torch.finfo(TORCH_DTYPES[dtype])
    return info.tiny * info.eps


def _tail_noise(solver: str, dtype: torch.dtype) -> float:
    """How far a promised tail itself may be off, as a share of the energy: differences of sums lose digits."""
    eps = torch.finfo(dtype).eps
    return 0.0 if solver == "svd" else 64 * eps


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
    """Do every unit that the journal does not have; (results of factored layers, failed layers with the reasons)."""
    results: dict[str, Result] = {}
    failed: dict[str, str] = {}
    _salvage(units, writer, workspace)
    costs = {unit.name: _seconds(unit, layers.get(unit.name)) for unit in units}
    largest_first = sorted(units, key=lambda unit: costs[unit.name], reverse=True)  # both workers then end together
    total, done = math.fsum(costs.values()), 0.0

    def do(unit: Unit) -> tuple[Unit, dict[str, Any]]:
        line = workspace.done.get(unit.name)
        if line is None or not _still_there(unit, line, writer):
            try:
                line = _do_unit(checkpoint, unit, layers.get(unit.name), writer, seed, device, calibration, ready)
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
    return {"files": [writer.relative(path) for path, _ in places], "at": [offset for _, offset in places]}


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
        stored, result = solve_layer(w, layer, seed, device, moments) if ready is None else ready.take(w, layer)
        if layer.bias is not None and ready is None:
            stored = (*stored, _refitted(checkpoint, w, stored, layer, moments))
        chunks = [iter([bytes_of(tensor)]) for tensor in stored]
        line |= {"error": result.relative_error, "solver": result.solver, "fell_back": list(result.fell_back)}
    elif unit.kind == "expand" and layer is not None:
        chunks = [_expanded(checkpoint, layer, unit.writes[0])]
    elif unit.kind == "warn":
        chunks = [iter(())]
    else:
        chunks = [checkpoint.chunks(unit.name)]
    sums = [writer.write(t.name, part) for t, part in zip(unit.writes, chunks, strict=True)]
    return line | {"crc": sums} | _places(unit, writer)


def _expanded(checkpoint: Checkpoint, layer: LayerPlan, target: TensorInfo) -> Iterator[bytes | bytearray | memoryview]:
    """The dense weight of a factored layer in its original dtype, a block of rows at a time."""
    stored = tuple(checkpoint.read_tensor(tensor.name) for tensor in layer.stored())
    compute = torch.float64 if "F64" in (layer.stored_dtype, target.dtype) else torch.float32
    step = max(1, 2**22 // max(1, target.shape[1]))
    for start in range(0, target.shape[0], step):
        rows = dense_rows(stored, layer.layout, compute, slice(start, start + step))
        yield bytes_of(rows.to(TORCH_DTYPES[target.dtype]))


def _still_there(unit: Unit, line: dict[str, Any], writer: WeightWriter) -> bool:
    """Does the file still hold what the journal says: a power cut may have kept the line and lost the data."""
    if any(line.get(key) != value for key, value in _places(unit, writer).items()):
        return False
    written = zip(unit.writes, line["crc"], strict=True)
    return all(checksum_at(*writer.place(tensor.name), tensor.nbytes) == crc for tensor, crc in written)


def guess_seconds(tensor: TensorInfo, *, share: float) -> float:
    """A guess at how long the mathematics on a matrix takes on a few cores; share is how much of an SVD is done."""
    small, large = sorted(tensor.shape)
    return 1e-4 + tensor.nbytes / 1e9 + share * small * small * large / 1e10


def _seconds(unit: Unit, layer: LayerPlan | None) -> float:
    if unit.kind == "factor" and layer is not None:
        return guess_seconds(layer.tensor, share=1.0)
    return 1e-4 + unit.nbytes / 1e9


def check_finite(bad: Sequence[str]) -> None:
    """Raises SvdcliError that names the weights that no solver takes."""
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise SvdcliError(
            f"{UNSOUND} in {', '.join(bad[:3])}{more}", "leave such layers dense with --nonfinite skip, or --exclude them"
        )
