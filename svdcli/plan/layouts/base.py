"""What a layout has to say: its tensors, what they cost, and how much rounding them may add."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from svdcli.plan.packing import PLAIN, Packing
from svdcli.plan.tensors import TensorInfo, module_of

# Names of parts below a layer's own name. The dense weight keeps the name that it had.
UP, DOWN, ROWS, WEIGHT = "svd_up.weight", "svd_down.weight", "svd_rows", "weight"
# Row numbers are counted in bytes, not as parameters.
ROW_NUMBERS = "I32"


class Layout(ABC):
    """How one layer (m, n) of rank r is stored.

    keeps_factors says whether factors, rather than their product, are in the file and in memory.
    is_asked_for says whether a person may choose it; others come of other choices.
    ends_in_rows says whether the last tensor is an order of rows. usual_rounding and most_rounding
    are by how many squared units of the stored dtype the relative squared error grows when factors
    are rounded to it: an upper estimate for choosing ranks, and what no sound result exceeds.
    """

    name: ClassVar[str]
    keeps_factors: ClassVar[bool] = True
    is_asked_for: ClassVar[bool] = True
    ends_in_rows: ClassVar[bool] = False
    usual_rounding: ClassVar[float]
    most_rounding: ClassVar[float]

    @abstractmethod
    def parts(self, m: int, n: int, rank: int) -> Mapping[str, tuple[int, ...]]:
        """The shape of every stored part, in the order in which they are written."""

    @abstractmethod
    def parameters(self, shape: tuple[int, ...], rank: int) -> int:
        """Parameters of a layer of this shape at `rank`."""

    def largest_rank(self, shape: tuple[int, ...]) -> int:
        """The largest rank that can be stored."""
        return min(shape)

    def tensors(
        self, layer: TensorInfo, rank: int, dtype: str, packing: Packing = PLAIN
    ) -> tuple[TensorInfo, ...]:
        """The tensors that stand for `layer` at `rank`, in the order in which they are written."""
        m, n = layer.shape
        stored: list[TensorInfo] = []
        for part, shape in self.parts(m, n, rank).items():
            name = _part_name(layer.name, part)
            if part == ROWS:
                stored.append(TensorInfo(name, ROW_NUMBERS, shape))
            else:
                stored += packing.tensors(name, (shape[0], shape[1]), dtype)
        return tuple(stored)

    def nbytes(self, layer: TensorInfo, rank: int, dtype: str, packing: Packing = PLAIN) -> int:
        """Bytes of the stored tensors at `rank`."""
        return sum(tensor.nbytes for tensor in self.tensors(layer, rank, dtype, packing))

    def largest_saving_rank(self, layer: TensorInfo, dtype: str, packing: Packing = PLAIN) -> int:
        """The largest rank whose stored bytes are below those of the dense weight, and, where
        numbers stay at 16 bits or more, whose parameters are too; 0 if there is none."""
        # By bisection: what saves at one rank saves at every smaller one.
        low, high = 0, self.largest_rank(layer.shape)
        while low < high:
            rank = (low + high + 1) // 2
            fewer_bytes = self.nbytes(layer, rank, dtype, packing) < layer.nbytes
            fewer_numbers = self.parameters(layer.shape, rank) < layer.parameters
            if fewer_bytes and (fewer_numbers or packing != PLAIN):
                low = rank
            else:
                high = rank - 1
        return low


def _part_name(name: str, part: str) -> str:
    """The name under which one part of the layer `name` is stored."""
    module = module_of(name)
    return part if module == name else f"{module}.{part}"
