"""The layouts in which a layer's factors are stored, by name. `linalg.layouts` has their numbers.

For a stored weight `P.weight` of shape (m, n) at rank r:

    factored   P.svd_up.weight (m, r), P.svd_down.weight (r, n)
               W ~ up @ down
    pivoted    P.svd_down.weight (r, n), P.svd_up.weight (m - r, r), P.svd_rows (m,)
               W ~ cat(down, up @ down)[rows]
    dense      P.weight (m, n), of rank r; packed, r = min(m, n)
               W ~ the low-rank matrix itself
    whole      P.weight (m, n), packed, r = min(m, n)
               W itself

Each matrix is stored as its `plan.packing` says.
"""

from __future__ import annotations

from svdcli.plan.layouts.base import Layout
from svdcli.plan.layouts.dense import Dense
from svdcli.plan.layouts.factored import Factored
from svdcli.plan.layouts.pivoted import Pivoted
from svdcli.plan.layouts.whole import Whole

__all__ = ["DENSE", "FACTORED", "LAYOUTS", "WHOLE", "Layout"]

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (Factored(), Pivoted(), Dense(), Whole())
}
DENSE, FACTORED, WHOLE = Dense.name, Factored.name, Whole.name
