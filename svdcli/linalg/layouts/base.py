"""What every layout can do with its tensors."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from svdcli.linalg.machine import row_blocks, squared_norm
from svdcli.linalg.solvers import Factors


class Codec(ABC):
    """From factors to the tensors of one layout and back. `stored` are those of
    `plan.layouts.Layout.tensors`, in their order."""

    @abstractmethod
    def encode(self, factors: Factors, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The tensors that are stored, contiguous and rounded to `dtype`."""

    @abstractmethod
    def rows(self, stored: tuple[Tensor, ...], compute: torch.dtype, at: slice) -> Tensor:
        """Rows `at` of the matrix (m, n) that is stored, computed in `compute`."""

    def residual(self, w: Tensor, stored: tuple[Tensor, ...]) -> float:
        """||W - W_stored||_F^2 of what is stored, rounding included; products in w's dtype, sums
        as in `squared_norm`."""
        errors = (squared_norm(w[at] - self.rows(stored, w.dtype, at)) for at in row_blocks(w))
        return math.fsum(errors)
