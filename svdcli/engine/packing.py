"""Layers in fewer bits: how they are solved, what they lose, and what their stored tensors stand
for."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from svdcli.calibration.moments import LayerMoments, metric_of
from svdcli.errors import BadCheckpointError
from svdcli.files.dtypes import TORCH_DTYPES
from svdcli.files.record import Result
from svdcli.linalg.codes import stored_codes, stored_values
from svdcli.linalg.expected import ExpectedRounding
from svdcli.linalg.machine import row_blocks, squared_norm
from svdcli.linalg.packed import packed_factors, packed_matrix
from svdcli.linalg.rounding import Grid, Rounded, searched_scales, to_nearest
from svdcli.linalg.whitening import Metric, weighted, weighted_error
from svdcli.plan.layouts import DENSE, LAYOUTS, WHOLE
from svdcli.plan.menus import Rounding, Trial
from svdcli.plan.packing import PLAIN, Packing
from svdcli.plan.plan import EMBEDDING, LayerPlan


def grid_of(packing: Packing) -> Grid:
    """The codes and scales of a packing."""
    return Grid(8) if packing.bits == 8 else Grid(packing.bits, packing.group)


def solve_packed(
    w: Tensor, layer: LayerPlan, moments: LayerMoments | None
) -> tuple[tuple[Tensor, ...], Result]:
    """The stored tensors of a packed layer, and the error of what they stand for.

    Raises torch.linalg.LinAlgError where LAPACK does not converge.
    """
    if layer.role == EMBEDDING:
        return _solve_table(w, layer)
    # (out, in) in float64; where nothing was measured all errors count alike
    transposed = moments is not None and moments.transposed
    work = (w.T if transposed else w).to(torch.float64)
    if moments is None:
        metric = Metric(torch.zeros(work.shape[1], work.shape[1], dtype=torch.float64))
    else:
        metric = metric_of(moments, torch.device("cpu"), centred=bool(layer.biases))

    matrices, tail = _packed(work, layer, metric, transposed=transposed)
    stored: list[Tensor] = []
    for matrix in matrices:
        stored += stored_codes(matrix, in_words=layer.packing.in_words)

    # how far that is, and how much of it is due to rounding
    approx = _product(matrices)
    if transposed:
        approx = approx.T
    error = weighted_error(work, approx, metric)
    share = max(0.0, 1 - tail / error) if error > 0 else 0.0
    total = squared_norm(work)
    relative = math.sqrt(squared_norm(work - approx) / total) if total > 0 else 0.0
    return tuple(stored), Result(relative, layer.solver, (), share)


def _solve_table(w: Tensor, layer: LayerPlan) -> tuple[tuple[Tensor, ...], Result]:
    """The stored tensors of a table, a few rows at a time: each of its numbers is rounded by
    itself."""
    dtype = TORCH_DTYPES[layer.stored_dtype]
    grid = grid_of(layer.packing)
    strips = []
    lost = []
    energy = []
    for at in row_blocks(w):
        rows = w[at].to(torch.float32)
        strip = to_nearest(rows, grid, searched_scales(rows, grid, dtype))
        strips.append(stored_codes(strip))
        lost.append(squared_norm(rows - strip.values(torch.float32)))
        energy.append(squared_norm(rows))
    total = math.fsum(energy)
    relative = 0.0 if total == 0 else math.sqrt(math.fsum(lost) / total)  # NaN stays NaN
    stored = tuple(torch.cat(parts) for parts in zip(*strips, strict=True))
    return stored, Result(relative, layer.solver, (), 1.0)


def expected_roundings(
    w: Tensor,
    metric: Metric,
    trials: Sequence[Trial],
    dtype: torch.dtype,
    *,
    transposed: bool = False,
) -> tuple[Tensor, list[Rounding]]:
    """(the spectrum of w (out, in) in the metric, what rounding adds in each trial as a share of
    the spectrum's sum). transposed says that w is stored the other way round.

    Raises torch.linalg.LinAlgError where LAPACK does not converge.
    """
    grids = {trial.packing: grid_of(trial.packing) for trial in trials}
    expected = ExpectedRounding(w, metric, tuple(grids.values()), dtype, transposed=transposed)
    energy = float(expected.energies.sum())
    roundings = []
    for trial in trials:
        grid, added = grids[trial.packing], 0.0
        if energy > 0 and trial.layout in (WHOLE, DENSE):
            added = expected.whole(grid)
        elif energy > 0:
            added = expected.factored(trial.rank, grid)
        roundings.append(Rounding(trial, added / energy if energy > 0 else 0.0))
    return expected.energies, roundings


def parts_of(layer: LayerPlan, stored: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The matrices that the stored tensors of a layer stand for, in the order of its layout.

    Raises BadCheckpointError where a stored shape is not that of its matrix.
    """
    if layer.packing == PLAIN:
        return tuple(stored)
    dtype = torch.float64 if layer.stored_dtype == "F64" else torch.float32
    m, n = layer.tensor.shape
    shapes = LAYOUTS[layer.layout].parts(m, n, int(layer.rank or 0)).values()
    count = len(stored) // len(shapes)
    parts = []
    for i, shape in enumerate(shapes):
        tensors = tuple(stored[i * count : (i + 1) * count])
        if len(tensors) == 3 and tuple(tensors[-1].tolist()) != shape:
            raise BadCheckpointError(
                f"a stored shape of {layer.tensor.name} is {tensors[-1].tolist()} where its matrix "
                f"is {list(shape)}",
                "write the output again",
            )
        parts.append(stored_values(tensors, layer.packing.group, dtype, layer.packing.bits))
    return tuple(parts)


def _packed(
    w: Tensor, layer: LayerPlan, metric: Metric, *, transposed: bool
) -> tuple[tuple[Rounded, ...], float]:
    """(the packed matrices, the error in the metric that the rank alone makes)."""
    grid, dtype = grid_of(layer.packing), TORCH_DTYPES[layer.stored_dtype]
    if layer.layout in (WHOLE, DENSE):
        return (packed_matrix(w, grid, metric, dtype, transposed=transposed),), 0.0
    factors = weighted(w, int(layer.rank or 0), metric)
    both = packed_factors(w, factors, grid, metric, dtype, transposed=transposed)
    return both, factors.tail


def _product(matrices: Sequence[Rounded]) -> Tensor:
    values = [matrix.values(torch.float64) for matrix in matrices]
    return values[0] if len(values) == 1 else values[0] @ values[1]
