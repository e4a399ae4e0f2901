"""Weights on few-bit grids: the matrix itself, or two factors that are rounded for each other."""

from __future__ import annotations

import torch
from torch import Tensor

from svdcli.linalg.damping import damp, is_any, times_damped
from svdcli.linalg.rounding import Grid, Rounded, rounded
from svdcli.linalg.solvers import Factors
from svdcli.linalg.whitening import Metric

# Of the mean diagonal of the inputs' moment: in directions that were not seen, for want of text, up
# stays near W.
_DAMPING_UNSEEN = 1e-4


def packed_factors(
    w: Tensor,
    factors: Factors,
    grid: Grid,
    metric: Metric,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
) -> tuple[Rounded, Rounded]:
    """Factors up (m, r) and down (r, n) of w (m, n) on a grid, for a small error tr(H_d D G D^T).
    transposed gives those of w^T, down^T (n, r) and up^T (r, m).

    factors are the best ones in the metric, those of `weighted` in float64. down is rounded first.
    up is then the least squares solution against W itself with the rounded down, so that it makes
    up for what down has lost, and is rounded in its turn. Both are rounded in a basis turned by a
    random rotation Q, W_r = (up Q)(Q^T down): in that of the singular vectors every direction would
    be as coarse as it is large, and no rounding error could be made up for by another direction,
    since the metric of the factors is diagonal there. Turned, four bits lost 2 to 20 times less.
    Raises torch.linalg.LinAlgError where a moment is indefinite.
    """
    # the best factors, turned
    rotation = random_rotation(factors.up.shape[1]).to(factors.up.device)
    up = factors.up @ rotation
    down = rotation.T @ factors.down

    # An error of down counts as up passes it on, and one of up by what down makes of the inputs.
    inputs = metric.inputs.to(torch.float64)
    if not inputs.any():
        inputs = torch.eye(w.shape[1], dtype=torch.float64, device=w.device)
    passed_on = _passed_on(up, metric)
    down_rounded = rounded(down, grid, dtype, inputs, passed_on, transposed=transposed)
    stored = down_rounded.values(torch.float64)
    if transposed:
        stored = stored.T
    up, seen = _least_squares(w.to(torch.float64), stored, inputs)
    up_rounded = rounded(up, grid, dtype, seen, metric.outputs, transposed=transposed)
    return (down_rounded, up_rounded) if transposed else (up_rounded, down_rounded)


def packed_matrix(
    w: Tensor, grid: Grid, metric: Metric, dtype: torch.dtype, *, transposed: bool = False
) -> Rounded:
    """w (m, n) itself on a grid, or transposed w^T, for a small error tr(H D G D^T)."""
    matrix = w.to(torch.float64)
    return rounded(matrix, grid, dtype, metric.inputs, metric.outputs, transposed=transposed)


def random_rotation(size: int) -> Tensor:
    """An orthogonal matrix (size, size) in float64, the same for the same size."""
    generator = torch.Generator().manual_seed(size)
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(gaussian).Q
    return rotation


def _passed_on(up: Tensor, metric: Metric) -> Tensor:
    """up^T H_d up (r, r)."""
    if metric.outputs is None or not is_any(metric.outputs):
        return up.T @ up
    return up.T @ times_damped(metric.outputs, metric.damping, up)


def _least_squares(w: Tensor, down: Tensor, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """(up, down G down^T): the up (m, r) with the least error of w - up @ down in the metric of
    the inputs, whatever H is."""
    side = damp(inputs, _DAMPING_UNSEEN) @ down.T
    seen = down @ side
    root = torch.linalg.cholesky(seen)
    up: Tensor = torch.cholesky_solve((w @ side).T, root).T
    return up, seen
