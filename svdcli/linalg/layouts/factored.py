"""W ~ up @ down, stored as up (m, r) and down (r, n)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from svdcli.linalg.layouts.base import Codec, slices
from svdcli.linalg.products import minus_product, product
from svdcli.linalg.scratch import scratch
from svdcli.linalg.solvers import Factors, squared_norm


class FactoredCodec(Codec):
    """stored is (up, down)."""

    def encode(self, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return factors.up.to(dtype).contiguous(), factors.down.to(dtype).contiguous()

    def rows(self, stored: tuple[Tensor, ...], compute: torch.dtype, at: slice) -> Tensor:
        up, down = stored
        return product(up[at].to(compute), down.to(compute))

    def residual(self, w: Tensor, stored: tuple[Tensor, ...]) -> float:
        up, down = stored
        if w.T.is_contiguous():
            w, up, down = w.T, down.T, up.T
        # oneDNN is quicker where the second factor has its columns in memory order
        columns = scratch("down", tuple(down.T.shape), w).T.copy_(down)
        return math.fsum(_errors(w, up, columns))


def _errors(w: Tensor, up: Tensor, down: Tensor) -> Iterator[float]:
    """||w - up @ down||_F^2 of one slice of rows after the other, all in the same memory."""
    places = slices(w)
    buffer = scratch("passing", tuple(w[places[0]].shape), w)
    for at in places:
        rest = buffer[: w[at].shape[0]]
        yield squared_norm(minus_product(w[at], up[at].to(w.dtype), down, rest))
