"""W ~ the low-rank matrix itself, multiplied out."""

from __future__ import annotations

import torch
from torch import Tensor

from svdcli.linalg.layouts.base import Codec
from svdcli.linalg.machine import product
from svdcli.linalg.solvers import Factors


class DenseCodec(Codec):
    """stored is (weight,)."""

    def encode(self, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (product(factors.up, factors.down).to(dtype).contiguous(),)

    def rows(self, stored: tuple[Tensor, ...], compute: torch.dtype, at: slice) -> Tensor:
        return stored[0][at].to(compute)
