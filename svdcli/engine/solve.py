"""One layer: solve, check the residual against what the spectrum promised, fall back to a more
robust solver."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from svdcli.calibration.moments import LayerMoments, metric_of
from svdcli.engine.packing import parts_of, solve_packed
from svdcli.errors import SvdcliError
from svdcli.files.dtypes import TORCH_DTYPES
from svdcli.files.record import Result
from svdcli.files.source import Source
from svdcli.linalg.damping import rows_of_blocks
from svdcli.linalg.lapack import NoConvergence
from svdcli.linalg.layouts import CODECS
from svdcli.linalg.machine import converted, squared_norm
from svdcli.linalg.solvers import SOLVERS, Factors, transposed
from svdcli.linalg.whitening import refit_bias, weighted, weighted_error
from svdcli.models.modules import is_row_order
from svdcli.plan.decide import UNSOUND
from svdcli.plan.groups import spans_of
from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.packing import PLAIN
from svdcli.plan.plan import LayerPlan
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo
from svdcli.plan.words import WEIGHTED

# After a failure: each solver is more robust, and slower, than the one before.
_LADDER = (("gram", torch.float32), ("svd", torch.float32), ("svd", torch.float64))


# A float32 Gram matrix is rounded to about 1e-7 of its largest eigenvalue, in many places: a tail
# below this share of the energy may be noise, and is not trusted.
_GRAM_FLOOR = {torch.float32: 1e-4, torch.float64: 1e-11}


_TINY = 1e-140  # the squares of smaller numbers, or larger than one over it, leave float64


@dataclass(frozen=True)
class Ready:
    """Layers whose tensors exist already, all that are written, and which solver they came from."""

    tensors: Callable[[LayerPlan], tuple[Tensor, ...]]
    results: Mapping[str, Result]

    def take(self, w: Tensor, layer: LayerPlan) -> tuple[tuple[Tensor, ...], Result]:
        """The tensors of one layer, and their exact error against its weight."""
        tensors = self.tensors(layer)
        stored = tensors[: len(layer.stored())]
        result = self.results[layer.tensor.name]
        return tensors, replace(result, relative_error=_relative_error(w, stored, layer))


class LayerFailedError(Exception):
    """Every solver failed on a layer; str() says how each did."""


class UnsoundError(SvdcliError):
    """A weight that no solver takes."""


def largest_of(w: Tensor) -> float | None:
    """The largest magnitude in a weight; None where it holds NaN or infinity, or float64 numbers
    whose squares leave its range."""
    largest = max(abs(value) for value in map(float, w.aminmax()))
    squares = w.dtype != torch.float64 or largest == 0 or _TINY < largest < 1 / _TINY
    return largest if math.isfinite(largest) and squares else None


def check_finite(bad: Sequence[str], shown: str) -> None:
    """Raise UnsoundError that names the weights that no solver takes, of a source that is shown
    so."""
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UnsoundError(
            f"{shown}: {UNSOUND} in {', '.join(bad[:3])}{more}",
            "leave such layers dense with --nonfinite skip, or --exclude them",
        )


def bias_of(source: Source, tensor: TensorInfo, moments: LayerMoments | None) -> TensorInfo | None:
    """The bias that can be refitted when this weight is truncated; None where there is none, or
    nothing is known of the mean."""
    ref = source.tensors.get(f"{tensor.module}.bias")
    if moments is None or ref is None or ref.info.dtype not in FACTORED_DTYPES:
        return None
    outputs = tensor.shape[1 if moments.transposed else 0]
    return ref.info if ref.info.shape == (outputs,) else None


def solve_layer(
    w: Tensor,
    layer: LayerPlan,
    seed: int,
    device: torch.device,
    moments: LayerMoments | None = None,
) -> tuple[tuple[Tensor, ...], Result]:
    """The stored tensors of one layer and the exact error of what they stand for.

    A solver that does not converge, or whose result is worse than its spectrum promised, gives way
    to the next of gram, svd in float32, svd in float64. Raises LayerFailedError where all of them
    fail.
    """
    if layer.rank is None:
        raise ValueError(f"{layer.tensor.name} is dense")
    if layer.packing != PLAIN:
        return _solve_packed(w, layer, moments)
    codec, stored_dtype = CODECS[layer.layout], TORCH_DTYPES[layer.stored_dtype]
    attempts = _attempts(layer, device)
    fell_back: list[str] = []
    for solver, dtype in attempts:
        # solve, in the dtype of this attempt
        work = converted(w, device, dtype)
        label = solver
        if dtype != attempts[0][1]:
            label += f" {str(dtype).removeprefix('torch.')}"
        try:
            factors = _factor(work, layer, solver, seed, moments)
            stored = tuple(part.cpu() for part in codec.encode(factors, stored_dtype))
        except NoConvergence:
            fell_back.append(f"{label}: no convergence")
            continue

        # is what will be stored as near as the spectrum promised
        total = squared_norm(work)
        error = codec.residual(work, tuple(part.to(device) for part in stored))
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


def _solve_packed(
    w: Tensor, layer: LayerPlan, moments: LayerMoments | None
) -> tuple[tuple[Tensor, ...], Result]:
    try:
        stored, result = solve_packed(w, layer, moments)
    except NoConvergence as error:
        raise LayerFailedError(f"{layer.solver}: no convergence") from error
    if not math.isfinite(result.relative_error):
        raise LayerFailedError(f"{layer.solver}: not finite")
    return stored, result


def _factor(
    work: Tensor, layer: LayerPlan, solver: str, seed: int, moments: LayerMoments | None
) -> Factors:
    rank = int(layer.rank or 0)
    if solver != WEIGHTED or moments is None:
        return SOLVERS[solver](work, rank, seed)
    metric = metric_of(moments, work.device, centred=bool(layer.biases))
    if moments.transposed:
        return transposed(weighted(work.T, rank, metric))
    return weighted(work, rank, metric)


def _dense(
    stored: tuple[Tensor, ...], layer: LayerPlan, moments: LayerMoments, device: torch.device
) -> Tensor:
    """What the stored factors stand for, (out, in) in float64."""
    parts = tuple(part.to(device) for part in parts_of(layer, stored))
    dense = CODECS[layer.layout].rows(parts, torch.float64, slice(None))
    return dense.T if moments.transposed else dense


def _weighted_problem(
    work: Tensor,
    stored: tuple[Tensor, ...],
    layer: LayerPlan,
    factors: Factors,
    moments: LayerMoments,
) -> str:
    """Does the stored layer's error in the metric keep what the spectrum promised, rounding
    aside."""
    w = work.T if moments.transposed else work
    error = weighted_error(
        w,
        _dense(stored, layer, moments, work.device),
        metric_of(moments, work.device, centred=bool(layer.biases)),
    )
    if not math.isfinite(error):
        return "not finite"
    total = factors.tail + float(factors.sigma.square().sum())
    rounding = FACTORED_DTYPES[layer.stored_dtype] ** 2 * LAYOUTS[layer.layout].most_rounding
    promised = 1.01 * factors.tail + (rounding + 1e-9) * total
    return "missed its spectrum" if error > promised else ""


def refitted(
    source: Source,
    w: Tensor,
    stored: tuple[Tensor, ...],
    layer: LayerPlan,
    moments: LayerMoments | None,
) -> tuple[Tensor, ...]:
    """The biases that take up the mean of what the truncation loses; as they were where a plain
    solver had to step in."""
    biases = tuple(source.read_tensor(bias.name) for bias in layer.biases)
    if moments is None or not biases:
        return biases
    approx = _dense(stored, layer, moments, torch.device("cpu"))
    upright = w.T if moments.transposed else w
    places = rows_of_blocks(biases)
    return tuple(
        refit_bias(upright[at], approx[at], moments.mean, bias)
        for at, bias in zip(places, biases, strict=True)
    )


def span_values(layer: LayerPlan) -> tuple[Tensor, ...]:
    """The numbers of `LayerPlan.spans`."""
    return tuple(torch.tensor(span) for span in spans_of(layer.members))


def read_weight(source: Source, originals: Sequence[TensorInfo]) -> Tensor:
    """The weight of a layer, or those of a group, one below the other."""
    weights = [source.read_tensor(tensor.name) for tensor in originals]
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def has_row_order(compressed: Source, layer: LayerPlan) -> bool:
    """Is the stored order of a layer's rows one; not every layout has one."""
    if not LAYOUTS[layer.layout].ends_in_rows:
        return True
    return is_row_order(compressed.read_tensor(layer.stored()[-1].name))


def stored_error(original: Source, compressed: Source, layer: LayerPlan) -> float:
    """The relative Frobenius error of one stored layer against the original weight, from the
    files."""
    stored = tuple(compressed.read_tensor(tensor.name) for tensor in layer.stored())
    return _relative_error(read_weight(original, layer.originals), stored, layer)


def _relative_error(weight: Tensor, stored: tuple[Tensor, ...], layer: LayerPlan) -> float:
    wide = "F64" in (layer.tensor.dtype, layer.stored_dtype)
    dtype = torch.float64 if wide else torch.float32
    work = weight.to(dtype)
    total = squared_norm(work)
    if total == 0:
        return 0.0
    parts = parts_of(layer, stored)
    return math.sqrt(CODECS[layer.layout].residual(work, parts) / total)


def _attempts(layer: LayerPlan, device: torch.device) -> list[tuple[str, torch.dtype]]:
    """The planned solver, then the more robust ones, each with the dtype it computes in."""
    wide = "F64" in (layer.tensor.dtype, layer.stored_dtype)
    ladder = _LADDER if layer.solver in ("randomized", WEIGHTED) else _LADDER[1:]
    attempts = []
    for solver, narrowest in ((layer.solver, torch.float32), *ladder):
        dtype = torch.float64 if wide else narrowest
        attempts.append((solver, work_dtype(device, dtype)))
    # a float64 weight would have a solver tried twice in the same dtype
    return list(dict.fromkeys(attempts))


def work_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """mps has no float64."""
    return torch.float32 if device.type == "mps" else dtype


def _problem(
    layer: LayerPlan, solver: str, dtype: torch.dtype, factors: Factors, error: float, total: float
) -> str:
    """What is wrong with a result, in a few words, or nothing."""
    if not math.isfinite(error):
        return "not finite"
    info = torch.finfo(dtype)
    if solver == "gram" and 0 < total < info.tiny / info.eps:
        return "squares below its range"
    drowns = solver == "gram" and factors.tail < _GRAM_FLOOR[dtype] * total
    if drowns and FACTORED_DTYPES[layer.stored_dtype] < 1e-6:
        return "tail below its precision"

    # the tail, and what rounding can add: of the stored numbers, of the products that measure the
    # error, and of the tail itself
    growth = LAYOUTS[layer.layout].most_rounding
    stored = growth * FACTORED_DTYPES[layer.stored_dtype] ** 2
    products = max(layer.tensor.shape) * info.eps**2
    if dtype == torch.float64:
        # nothing is tried after it: the errors of LAPACK at worst, as of a constant weight
        products *= max(layer.tensor.shape)
    subnormal = growth * layer.tensor.parameters * _finest(layer.stored_dtype) ** 2
    relative = stored + products + _tail_noise(solver, dtype)
    promised = 1.001 * factors.tail + relative * total + subnormal
    return "missed its spectrum" if error > promised else ""


def _finest(dtype: str) -> float:
    """The distance of the numbers nearest to zero: rounding is absolute there."""
    info = torch.finfo(TORCH_DTYPES[dtype])
    return info.tiny * info.eps


def _tail_noise(solver: str, dtype: torch.dtype) -> float:
    """How far a promised tail itself may be off, as a share of the energy: differences of sums lose
    digits."""
    eps = torch.finfo(dtype).eps
    return 0.0 if solver == "svd" else 64 * eps
