"""The whole layout: the matrix itself, of full rank, in fewer bits."""

from __future__ import annotations

from svdcli.plan.layouts.base import WEIGHT, Layout


class Whole(Layout):
    """W, (m, n), packed. Its rank is always min(m, n); modules of svdcli hold it as they hold
    factors."""

    name = "whole"
    is_asked_for = False
    usual_rounding = 1.0
    most_rounding = 1.0

    def parts(self, m: int, n: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {WEIGHT: (m, n)}

    def parameters(self, shape: tuple[int, ...], rank: int) -> int:
        m, n = shape
        return m * n
