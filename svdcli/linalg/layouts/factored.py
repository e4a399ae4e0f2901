"""W ~ up @ down, stored as up (m, r) and down (r, n)."""

from __future__ import annotations

import torch
from torch import Tensor

from svdcli.linalg.layouts.base import Codec
from svdcli.linalg.machine import product, squared_distance
from svdcli.linalg.solvers import Factors


class FactoredCodec(Codec):
    """stored is (up, down)."""

    def encode(self, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return factors.up.to(dtype).contiguous(), factors.down.to(dtype).contiguous()

    def rows(self, stored: tuple[Tensor, ...], compute: torch.dtype, at: slice) -> Tensor:
        up, down = stored
        return product(up[at].to(compute), down.to(compute))

    def residual(self, w: Tensor, stored: tuple[Tensor, ...]) -> float:
        up, down = stored
        return squared_distance(w, up, down)
