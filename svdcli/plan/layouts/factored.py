"""The factored layout: both factors as they are, r (m + n) parameters."""

from __future__ import annotations

from svdcli.plan.layouts.base import DOWN, UP, Layout


class Factored(Layout):
    """W ~ up @ down."""

    name = "factored"
    usual_rounding = 2.0
    most_rounding = 8.0

    def parts(self, m: int, n: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {UP: (m, rank), DOWN: (rank, n)}

    def parameters(self, shape: tuple[int, ...], rank: int) -> int:
        m, n = shape
        return rank * (m + n)
