"""What rounding a layer to few bits will add to its error, without doing it.

Rounding with feedback (`linalg.rounding`) is Babai's nearest plane on the lattice of the metric:
its expected error is the sum of h_i g_j e_ij over all numbers. g and h are pivots, the squared
diagonal of Cholesky factors of G and H in the order of rounding, and e is the mean square of what
rounding a number to its step moves it by, step^2 / 12 where nothing is clipped.

A whole matrix is there to be looked at. Factors of every rank follow from the spectrum of the
layer: they are rounded in a randomly turned basis, where all rows of `down`, and all columns of
`up`, are alike. What it takes are the lengths of its singular vectors in a few quadratic forms.
They are not measured one by one, which would take the vectors, but as sums over windows of the
spectrum, sum of x^T (M + mu)^-1 x for random x: a Cholesky factor for each window.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from svdcli.linalg.damping import Moment, Root, damp, diagonal_of, upper_root
from svdcli.linalg.packed import random_rotation
from svdcli.linalg.rounding import (
    DAMPING_COLUMNS,
    DAMPING_ROWS,
    ROW_BLOCKS,
    Grid,
    by_column,
    interleaved,
    searched_scales,
)
from svdcli.linalg.whitening import Metric, counted_moments

# Random vectors for every sum. Their noise is a few percent of a window of few directions, and far
# less than that of the rounding itself.
_PROBES = 24

# Windows of the spectrum end at these shares of its length.
_WINDOWS_AT = (1 / 32, 1 / 8, 0.3, 0.55, 0.8)

# Iterations that fit a smooth function to the sums over windows, each by at most this factor.
_FITS = 16
_MOST_AT_ONCE = 10.0

# Turned metrics of higher rank are told by as many quantiles of their spectrum.
_QUANTILES = 96

# Random numbers that tell how coarse a grid is.
_NORMALS = 2**16

# Rows of a matrix that tell what clipping and feedback do to all; how often what the feedback adds
# is carried on.
_ROWS = 256
_CARRIED = 2


class ExpectedRounding:
    """The added error tr(H_d D G D^T) of rounding w (m, n), or its factors, as `linalg.packed` does
    with scales in `dtype`.

    energies (min(m, n),) are those of `weighted_energies`, found on the way. transposed says that
    w^T is what will be stored. Raises torch.linalg.LinAlgError where a moment is indefinite or
    LAPACK does not converge.
    """

    def __init__(
        self,
        w: Tensor,
        metric: Metric,
        grids: Sequence[Grid],
        dtype: torch.dtype,
        *,
        transposed: bool = False,
    ) -> None:
        inputs, outputs = counted_moments(w, metric)
        if inputs is None:
            inputs = torch.eye(w.shape[1], dtype=torch.float64, device=w.device)
        self.w, self.inputs, self.outputs = w.to(torch.float64), inputs, outputs
        self.damping, self.dtype, self.transposed = metric.damping, dtype, transposed
        self._coarse: dict[Grid, float] = {}

        # what an error of one column, or row, counts once all those to come have made up for it
        self.column_order = inputs.diagonal().argsort(descending=True)
        self.root = upper_root(inputs, DAMPING_COLUMNS, self.column_order)
        self.columns = _in_order(self._column_pivots(), self.column_order)
        self.rows = _row_pivots(outputs, metric.damping, w)

        # what rotated factors meet
        self._look_at_spectrum(grids, Root.of(outputs, metric.damping))

    def _column_pivots(self) -> Tensor:
        """Of G, in the order of rounding. Feedback goes by the damped G, errors count by G itself:
        the difference is delta |u|^2 for a row u of the inverse root, here from random vectors."""
        delta = DAMPING_COLUMNS * self.inputs.diagonal().mean()
        signs = _signs(len(self.root), _PROBES, self.w)
        lengths = torch.linalg.solve_triangular(self.root, signs, upper=True).square().mean(1)
        pivots: Tensor = self.root.diagonal().square() * (1 - delta * lengths).clamp(min=0)
        return pivots

    def _look_at_spectrum(self, grids: Sequence[Grid], root: Root) -> None:
        """Spectrum, and the lengths of what the factors' rows and columns will be."""
        # K W G W^T K^T on the short side of K W
        (m, n), basis = self.w.shape, None
        short = root.times(self.w)
        if m > n:
            basis, short = torch.linalg.qr(short)
        matrix = (short @ self.inputs) @ short.T
        values = torch.linalg.eigvalsh(matrix).flip(0)
        self.energies = values.clamp(min=0)

        # random vectors whose second moments are the forms, plain and weighed as each grid counts
        weights = [(torch.ones_like(self.columns), torch.ones_like(self.rows))]
        for grid in grids:
            along, across = _shared(self.columns, grid), self.rows
            if self.transposed:
                along, across = self.columns, _shared(self.rows, grid)
            weights.append((along, across))
        probes = []
        for columns, rows in weights:
            probes.append(short @ (columns.sqrt()[:, None] * _signs(n, _PROBES, self.w)))
            back = root.undo_transposed(rows.sqrt()[:, None] * _signs(m, _PROBES, self.w))
            probes.append(back if basis is None else basis.T @ back)
        lengths = _lengths(matrix, values, torch.stack(probes))
        self.down, self.up = lengths[0], lengths[1]
        self.weighed_down = dict(zip(grids, lengths[2::2], strict=True))
        self.weighed_up = dict(zip(grids, lengths[3::2], strict=True))

    def whole(self, grid: Grid) -> float:
        """Of the matrix itself."""
        # a few rows stand for all, by their size
        m = self.w.shape[0]
        chosen = _spread_out(m, _ROWS).to(self.w.device)
        sizes = self.rows * (self.w.square() @ self.columns)
        if not sizes[chosen].sum() > 0:
            return 0.0
        w, steps = self.w[chosen], self._steps(grid, chosen)

        # Every number carries what feedback adds to it before it is rounded, which may clip it.
        lost = w - _nearest(w, steps, grid)
        scale = self.root.diagonal()[:, None]
        for _ in range(_CARRIED):
            ordered = scale * lost[:, self.column_order].T
            fed = torch.linalg.solve_triangular(self.root.T, ordered, upper=False).T
            carried = w - lost + _in_order(fed.T, self.column_order).T
            lost = carried - _nearest(carried, steps, grid)
        added = self.rows[chosen] @ (lost.square() @ self.columns)
        return float(added * sizes.sum() / sizes[chosen].sum())

    def _steps(self, grid: Grid, chosen: Tensor) -> Tensor:
        """The step of every number of the chosen rows, in float64."""
        if self.transposed:
            stored, weights = self.w.T, self.outputs
            assert not isinstance(weights, tuple)  # layers of a group are not transposed
            if weights is not None:
                weights = damp(diagonal_of(weights), self.damping)
            scales = searched_scales(stored, grid, self.dtype, weights)
            return by_column(scales.to(torch.float64), grid, stored).T[chosen]
        some = self.w[chosen]
        weights = self.inputs.diagonal().clamp(min=0)
        scales = searched_scales(some, grid, self.dtype, weights)
        return by_column(scales.to(torch.float64), grid, some)

    def factored(self, rank: int, grid: Grid) -> float:
        """Of the factors of that rank."""
        # In the basis of the singular vectors up^T H up and down G down^T are diagonal.
        balance = (self.down[:rank] / self.up[:rank]).sqrt()
        for_down = _turned_pivot(balance, DAMPING_ROWS, ROW_BLOCKS)
        for_up = _turned_pivot(self.energies[:rank] / balance, DAMPING_COLUMNS, rank)

        # the steps of each; in the turned basis all directions are as long
        along_down, along_up = self._coarseness(grid), _even_coarseness(rank, grid)
        if self.transposed:
            along_down, along_up = along_up, along_down
        down_size = float((self.weighed_down[grid][:rank] / balance).sum())
        up_size = float((self.weighed_up[grid][:rank] * balance).sum())
        down_error = along_down * for_down * down_size
        up_error = along_up * for_up * up_size

        # up is solved anew with the rounded down: what lies in the space of its rows is made up for
        return down_error * (1 - rank / self.w.shape[1]) + up_error

    def _coarseness(self, grid: Grid) -> float:
        """Of the grid along the side of the layer that shares scales."""
        if grid not in self._coarse:
            sizes = self.w.square().sum(1 if self.transposed else 0)
            self._coarse[grid] = _coarseness(sizes.cpu(), grid)
        return self._coarse[grid]


def _in_order(ordered: Tensor, order: Tensor) -> Tensor:
    """What stands in an order, back in its places, along the first dimension."""
    back = torch.empty_like(ordered)
    back[order] = ordered
    return back


def _row_pivots(outputs: Moment | None, damping: float, w: Tensor) -> Tensor:
    """What an error of each row (m,) counts; outputs is H. Rows of one block make up for nothing of
    each other."""
    if outputs is None:
        return torch.ones(w.shape[0], dtype=torch.float64, device=w.device)
    if isinstance(outputs, tuple):
        return torch.cat([_row_pivots(block, damping, w) for block in outputs])
    if outputs.ndim == 1:
        return damp(outputs, damping)
    blocks = interleaved(len(outputs), ROW_BLOCKS)
    order = torch.cat(blocks)
    root = upper_root(outputs, DAMPING_ROWS, order)
    pivots = []
    start = 0
    for block in blocks:
        place = slice(start, start + len(block))
        pivots.append(root[place, place].square().sum(1))
        start = place.stop
    return _in_order(torch.cat(pivots), order)


def _turned_pivot(spectrum: Tensor, damping: float, blocks: int) -> float:
    """The mean of what an error counts in a metric of this spectrum, turned at random, that is
    rounded in so many blocks with feedback damped by that share of its mean."""
    delta = damping * float(spectrum.mean())
    values = spectrum[_spread_out(len(spectrum), _QUANTILES).to(spectrum.device)].cpu()
    size = len(values)
    rotation = random_rotation(size)
    turned = (rotation.T * values) @ rotation
    turned.diagonal().add_(delta)
    order = torch.arange(size)
    if blocks >= size:
        # columns one by one, those that count most first
        order = turned.diagonal().argsort(descending=True)

    # as for columns and rows of the layer, but damped less when errors are counted
    root = upper_root(turned, 0.0, order)
    eye = torch.eye(size, dtype=torch.float64)
    inverse = torch.linalg.solve_triangular(root, eye, upper=True)
    number = torch.arange(size) * min(blocks, size) // size
    same = number[:, None] == number
    moved = torch.linalg.solve_triangular(inverse * same, inverse, upper=True)
    counted = (root * same).square().sum() - delta * moved.square().sum()
    return max(0.0, float(counted)) / size


@functools.lru_cache(maxsize=1024)
def _even_coarseness(count: int, grid: Grid) -> float:
    return _coarseness(torch.ones(count, dtype=torch.float64), grid)


def _coarseness(variances: Tensor, grid: Grid) -> float:
    """The mean square error of rounding normal numbers of these variances (n,) to nearest, as a
    share of their mean square."""
    generator = torch.Generator().manual_seed(0)
    count = max(64, _NORMALS // len(variances))
    normal = torch.randn(count, len(variances), generator=generator)
    normal *= variances.to(torch.float32).sqrt()
    if not normal.any():
        return 0.0
    steps = by_column(searched_scales(normal, grid, torch.float32), grid, normal)
    error = (normal - _nearest(normal, steps, grid)).square().sum()
    return float(error / normal.square().sum())


def _nearest(w: Tensor, steps: Tensor, grid: Grid) -> Tensor:
    return (w / steps).round_().clamp_(grid.lowest, grid.highest).mul_(steps)


def _shared(pivots: Tensor, grid: Grid) -> Tensor:
    """The mean of those that share a scale, for each."""
    n = len(pivots)
    width = grid.width(n)
    padded = torch.nn.functional.pad(pivots, (0, -n % width)).view(-1, width)
    counts = torch.nn.functional.pad(torch.ones_like(pivots), (0, -n % width)).view(-1, width)
    return (padded.sum(1) / counts.sum(1)).repeat_interleave(width)[:n]


def _lengths(matrix: Tensor, values: Tensor, probes: Tensor) -> Tensor:
    """u_i^T E[x x^T] u_i (k, n) for the eigenvectors u_i of a matrix (n, n) and k sets of random
    vectors x, probes (k, n, p), as smooth functions of its eigenvalues, descending."""
    # tr(g(M) E[x x^T]) for g = 1, mu / (M + mu) for falling mu, and 0
    kinds, size, count = probes.shape
    x = probes.transpose(0, 1).reshape(size, -1)
    shifts, energies = _shifts(values), values.clamp(min=0)
    sums, parts = [x.square().sum(0)], [torch.ones_like(energies)]
    for mu in shifts:
        shifted = matrix.clone()
        shifted.diagonal().add_(mu)
        root = torch.linalg.cholesky(shifted)
        sums.append(mu * torch.linalg.solve_triangular(root, x, upper=False).square().sum(0))
        parts.append(mu / (energies + mu))
    totals = torch.stack(sums).view(len(sums), kinds, count).mean(2)

    # differences are sums over windows that together make one
    windows = torch.stack(parts).diff(dim=0, append=torch.zeros_like(energies)[None]).neg()
    wanted = totals.diff(dim=0, append=torch.zeros_like(totals[:1])).neg().T
    fitted = (totals[0] / size)[:, None].expand(-1, size)
    for _ in range(_FITS):
        ratios = wanted / (fitted @ windows.T).clamp(min=torch.finfo(torch.float64).tiny)
        ratios = ratios.clamp(1 / _MOST_AT_ONCE, _MOST_AT_ONCE)
        fitted = fitted * (ratios.log() @ windows).exp()
    return fitted


def _shifts(values: Tensor) -> list[float]:
    """Falling numbers between windows of the eigenvalues, none so small that rounding errors, those
    of the moments included, are larger."""
    size, eps = len(values), torch.finfo(torch.float64).eps
    least = max(100 * size * eps * float(values[0]), -4 * float(values[-1]))
    shifts: list[float] = []
    for share in _WINDOWS_AT:
        mu = max(float(values[int(share * size)]), least)
        if mu > 0 and (not shifts or mu < 0.7 * shifts[-1]):
            shifts.append(mu)
    return shifts


def _signs(size: int, count: int, like: Tensor) -> Tensor:
    """Random signs (size, count), the same for the same size."""
    generator = torch.Generator().manual_seed(size)
    signs = torch.randint(0, 2, (size, count), generator=generator, dtype=torch.int8)
    return signs.to(like.device, torch.float64).mul_(2).sub_(1)


def _spread_out(size: int, count: int) -> Tensor:
    """Places of at most `count` of so many, evenly spread."""
    if size <= count:
        return torch.arange(size)
    return ((torch.arange(count, dtype=torch.float64) + 0.5) * size / count).long()
