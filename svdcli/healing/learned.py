"""Stand-ins for packed layers while they are trained: integers and scales that can be learned.

An integer is trained as a number in units of its grid's steps that is rounded whenever it is used;
its gradient passes through the rounding as if it were not there (Bengio, Leonard and Courville,
2013, section 4), so that small steps add up until the number is rounded to a neighbour (AutoRound:
Cheng et al., 2023). Each begins in the middle of its cell: nothing changes before a neighbour is
better.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from svdcli.healing.training import Trained, by_size
from svdcli.linalg.codes import stored_codes, stored_integers
from svdcli.linalg.rounding import Grid, Rounded, by_column
from svdcli.models.modules import PackedLinear

# Largest step of a scale, as a share of its size, for each step of an integer.
_STEP_OF_SCALES = 0.02


class LearnedRounding(nn.Module):
    """y = x W^T + b with W = rounded numbers times scales, both trained in float32.

    Scales are used as they will be stored, in scale_dtype.
    """

    def __init__(self, module: PackedLinear, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.grid = grid_of(module)
        self.scale_dtype = scale_dtype
        self.bias = module.bias
        integers = stored_integers(module.codes, module.in_features)
        self.numbers = nn.Parameter(integers.float(), requires_grad=False)
        self.scales = nn.Parameter(module.scales.detach().float(), requires_grad=False)

    def rounded(self) -> Rounded:
        """Return what is stored."""
        codes = self.numbers.detach().round().clamp(self.grid.lowest, self.grid.highest)
        # What ranks share is gone after a while: nothing may lie where it does
        scales = self.scales.detach().to(self.scale_dtype, copy=True)
        return Rounded(codes.to(torch.int8), scales, self.grid)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What is trained."""
        return [self.numbers, self.scales]

    @property
    def weight(self) -> Tensor:
        """The dense weight (out, in)."""
        codes: Tensor = _Straight.apply(self.numbers, self.grid)  # type: ignore[no-untyped-call]
        scales: Tensor = _Cast.apply(self.scales, self.scale_dtype)  # type: ignore[no-untyped-call]
        return codes * by_column(scales, self.grid, self.numbers)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def weights(self, step: float) -> list[Trained]:
        """Return what is trained, where integers move by at most so many steps of their grid at a
        time."""
        scales = by_size([self.scales], step * _STEP_OF_SCALES)
        return [Trained(self.numbers, step), *scales]

    def store(self, module: nn.Module) -> None:
        """Set the packed layer's integers and scales to what was learned."""
        put_rounded(cast(PackedLinear, module), self.rounded())


def grid_of(module: PackedLinear) -> Grid:
    """Return the grid of a packed layer."""
    return Grid(module.bits, module.group)


def put_rounded(module: PackedLinear, rounded: Rounded) -> None:
    """Set the integers and scales of a packed layer; scales keep the dtype in which they are
    now."""
    codes, scales, *_ = stored_codes(rounded)
    module.codes.data = codes.to(module.codes.device)
    module.scales.data = scales.to(module.scales)


class _Straight(torch.autograd.Function):
    """The nearest integers of a grid; their gradient is that of the numbers, but of those that lie
    outside of the grid."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, grid: Grid) -> Tensor:
        ctx.save_for_backward((numbers > grid.lowest - 0.5) & (numbers < grid.highest + 0.5))
        return numbers.round().clamp_(grid.lowest, grid.highest)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None


class _Cast(torch.autograd.Function):
    """Numbers as a narrower dtype has them; their gradient is that of the numbers."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        return numbers.to(dtype).to(numbers.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
