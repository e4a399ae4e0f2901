"""From factors to the tensors of a layout and back, and the exact error of what is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from svdcli.linalg.products import minus_product, product
from svdcli.linalg.scratch import scratch
from svdcli.linalg.solvers import Factors, squared_norm


def pivot(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Store W_r = up @ down (m, n) of rank r without its r * r redundancy: (down, coefficients,
    rows).

    r rows of W_r are kept as they are, down (r, n); every other row is a combination of them,
    coefficients (m - r, r); W_r = cat(down, coefficients @ down)[rows]. Partial pivoting on an
    orthonormal basis of the columns picks rows that keep the coefficients small (rows as in PIFA,
    2025; the growth of L is that of LU with partial pivoting).
    """
    basis, triangle = torch.linalg.qr(factors.up)
    rank = basis.shape[1]
    lu, pivots = torch.linalg.lu_factor(basis)
    order = _row_order(pivots, basis.shape[0])
    top = lu[:rank].tril(-1)
    top.diagonal().fill_(1)
    # lu[rank:] = L2 and top = L1: rows beyond the pivots are (L2 L1^-1) times the pivot rows.
    coefficients = torch.linalg.solve_triangular(
        top, lu[rank:], upper=False, unitriangular=True, left=False
    )
    down = basis[order[:rank]] @ (triangle @ factors.down)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.shape[0], device=order.device)
    return down, coefficients, rows


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product up @ down, (m, r) and (r, n), as U S^(1/2) and S^(1/2) V^T of its own SVD,
    in float64 on the way.

    Both factors then have the same scale in every direction, as suits a training that steps by the
    size of its tensors.
    """
    left, top = torch.linalg.qr(up.to(torch.float64))
    right, side = torch.linalg.qr(down.to(torch.float64).T)
    u, s, vh = torch.linalg.svd(top @ side.T)
    root = s.sqrt()
    return (left @ (u * root)).to(up.dtype), ((root[:, None] * vh) @ right.T).to(down.dtype)


def _row_order(pivots: Tensor, rows: int) -> Tensor:
    """LAPACK's interchanges as a permutation: order[k] is the row that ends in place k."""
    order = list(range(rows))
    for place, other in enumerate(pivots.tolist()):
        order[place], order[other - 1] = order[other - 1], order[place]
    return torch.tensor(order, device=pivots.device)


def to_stored(factors: Factors, layout: str, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors of `layout` in the order of `plan.layout.stored_tensors`, rounded to `dtype`."""
    if layout == "factored":
        return factors.up.to(dtype).contiguous(), factors.down.to(dtype).contiguous()
    if layout == "pivoted":
        down, coefficients, rows = pivot(factors)
        return (
            down.to(dtype).contiguous(),
            coefficients.to(dtype).contiguous(),
            rows.to(torch.int32),
        )
    return (product(factors.up, factors.down).to(dtype).contiguous(),)


def dense_rows(stored: tuple[Tensor, ...], layout: str, compute: torch.dtype, at: slice) -> Tensor:
    """Rows `at` of the matrix that the stored tensors stand for, computed in `compute`."""
    if layout == "factored":
        return product(stored[0][at].to(compute), stored[1].to(compute))
    if layout == "pivoted":
        down, coefficients, rows = stored
        pick = rows[at].long()
        out = down.new_empty((pick.shape[0], down.shape[1]), dtype=compute)
        kept = pick < down.shape[0]
        out[kept] = down[pick[kept]].to(compute)
        out[~kept] = product(
            coefficients[pick[~kept] - down.shape[0]].to(compute), down.to(compute)
        )
        return out
    return stored[0][at].to(compute)


def residual_energy(w: Tensor, stored: tuple[Tensor, ...], layout: str) -> float:
    """||W - W_stored||_F^2 of what is stored, rounding included; products in w's dtype, sums as in
    `squared_norm`."""
    if layout == "factored":
        if w.T.is_contiguous():
            w, stored = w.T, (stored[1].T, stored[0].T)
        down = scratch("down", tuple(stored[1].T.shape), w).T.copy_(
            stored[1]
        )  # oneDNN is quicker with its columns
        return math.fsum(_minus_product(w, stored[0], down))
    if layout == "pivoted":
        stored = (stored[0].to(w.dtype), *stored[1:])
    return math.fsum(
        squared_norm(w[at] - dense_rows(stored, layout, w.dtype, at)) for at in _slices(w)
    )


def _minus_product(w: Tensor, up: Tensor, down: Tensor) -> Iterator[float]:
    """||w - up @ down||_F^2 of one slice of rows after the other, all in the same memory."""
    slices = _slices(w)
    buffer = scratch("passing", tuple(w[slices[0]].shape), w)
    for at in slices:
        rest = buffer[: w[at].shape[0]]
        yield squared_norm(minus_product(w[at], up[at].to(w.dtype), down, rest))


def _slices(w: Tensor) -> list[slice]:
    """Rows of w in blocks of at most a few million numbers."""
    step = max(1, 2**22 // w.shape[1])
    return [slice(start, start + step) for start in range(0, w.shape[0], step)]
