"""W ~ cat(down, up @ down)[rows]: a low-rank matrix without its r * r redundancy."""

from __future__ import annotations

import torch
from torch import Tensor

from svdcli.linalg.layouts.base import Codec
from svdcli.linalg.machine import product
from svdcli.linalg.solvers import Factors


class PivotedCodec(Codec):
    """stored is (down, up, rows)."""

    def encode(self, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, ...]:
        down, coefficients, rows = pivot(factors)
        return (
            down.to(dtype).contiguous(),
            coefficients.to(dtype).contiguous(),
            rows.to(torch.int32),
        )

    def rows(self, stored: tuple[Tensor, ...], compute: torch.dtype, at: slice) -> Tensor:
        down, coefficients, order = stored
        pick = order[at].long()
        kept = pick < down.shape[0]
        combined = coefficients[pick[~kept] - down.shape[0]]
        out = down.new_empty((pick.shape[0], down.shape[1]), dtype=compute)
        out[kept] = down[pick[kept]].to(compute)
        out[~kept] = product(combined.to(compute), down.to(compute))
        return out

    def residual(self, w: Tensor, stored: tuple[Tensor, ...]) -> float:
        # converted once, and not for every block of rows
        return super().residual(w, (stored[0].to(w.dtype), *stored[1:]))


def pivot(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """Store W_r = up @ down (m, n) of rank r without its r * r redundancy: (down, coefficients,
    rows).

    r rows of W_r are kept as they are, down (r, n); every other row is a combination of them,
    coefficients (m - r, r); W_r = cat(down, coefficients @ down)[rows]. Partial pivoting on an
    orthonormal basis of the columns picks rows that keep the coefficients small (rows as in PIFA,
    2025; the growth of L is that of LU with partial pivoting).
    """
    # which rows to keep: the pivots of an orthonormal basis
    basis, triangle = torch.linalg.qr(factors.up)
    rank = basis.shape[1]
    lu, pivots = torch.linalg.lu_factor(basis)
    order = _row_order(pivots, basis.shape[0])

    # the others from them: lu[rank:] = L2 and top = L1, and rows are (L2 L1^-1) times the pivots
    top = lu[:rank].tril(-1)
    top.diagonal().fill_(1)
    coefficients = torch.linalg.solve_triangular(
        top, lu[rank:], upper=False, unitriangular=True, left=False
    )
    down = basis[order[:rank]] @ (triangle @ factors.down)

    # where each row of W_r is found in cat(down, coefficients @ down)
    rows = torch.empty_like(order)
    rows[order] = torch.arange(order.shape[0], device=order.device)
    return down, coefficients, rows


def _row_order(pivots: Tensor, rows: int) -> Tensor:
    """LAPACK's interchanges as a permutation: order[k] is the row that ends in place k."""
    order = list(range(rows))
    for place, other in enumerate(pivots.tolist()):
        order[place], order[other - 1] = order[other - 1], order[place]
    return torch.tensor(order, device=pivots.device)
