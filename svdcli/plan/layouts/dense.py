"""The dense layout: the matrix itself, for loaders that know nothing of svdcli."""

from __future__ import annotations

import math

from svdcli.plan.layouts.base import WEIGHT, Layout
from svdcli.plan.layouts.factored import Factored
from svdcli.plan.packing import PLAIN, Packing
from svdcli.plan.tensors import TensorInfo


class Dense(Layout):
    """W ~ the matrix of rank r, (m, n). It saves nothing, and is weighed as its factors would be:
    ranks are chosen by what they could save. Packed it is of full rank and does save, in the form
    of the compressed-tensors library."""

    name = "dense"
    keeps_factors = False
    usual_rounding = 2.0
    most_rounding = 256.0

    def parts(self, m: int, n: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {WEIGHT: (m, n)}

    def parameters(self, shape: tuple[int, ...], rank: int) -> int:
        if rank == min(shape):
            return math.prod(shape)
        return Factored().parameters(shape, rank)

    def nbytes(self, layer: TensorInfo, rank: int, dtype: str, packing: Packing = PLAIN) -> int:
        if packing != PLAIN:
            return super().nbytes(layer, rank, dtype, packing)
        return Factored().nbytes(layer, rank, dtype, packing)
