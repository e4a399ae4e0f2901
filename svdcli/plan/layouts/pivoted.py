"""The pivoted layout: the same matrix without its r * r redundancy, r (m + n - r) parameters."""

from __future__ import annotations

from svdcli.plan.layouts.base import DOWN, ROWS, UP, Layout


class Pivoted(Layout):
    """W ~ cat(down, up @ down)[rows]: r rows of the low-rank matrix, and all others from them.

    Coefficients combine rows that cancel, so that rounding costs more: up to 46 squared units were
    measured.
    """

    name = "pivoted"
    ends_in_rows = True
    usual_rounding = 64.0
    most_rounding = 256.0

    def parts(self, m: int, n: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {DOWN: (rank, n), UP: (m - rank, rank), ROWS: (m,)}

    def parameters(self, shape: tuple[int, ...], rank: int) -> int:
        m, n = shape
        return rank * (m + n - rank)

    def largest_rank(self, shape: tuple[int, ...]) -> int:
        return min(shape) - 1
