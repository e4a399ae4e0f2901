"""How the numbers of one matrix are stored: as they are, or as few-bit integers with scales.

Names and forms are those of the compressed-tensors library (0.20): int8 as `weight` and
`weight_scale`, int4 as `weight_packed`, `weight_scale` and `weight_shape`.
"""

from __future__ import annotations

from dataclasses import dataclass

from svdcli.plan.tensors import TensorInfo

# Behind the name of the matrix, which ends in `weight`.
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"

# Codes of four bits in a word of 32.
CODES_IN_A_WORD = 8


@dataclass(frozen=True)
class Packing:
    """bits is 16 for numbers as they are, in the dtype of the layer, 8 for one scale a row, or 4
    for one scale for each `group` columns of a row."""

    bits: int = 16
    group: int = 64

    def tensors(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[TensorInfo, ...]:
        """The tensors that stand for a matrix, in the order in which they are written. dtype is
        that of the numbers as they are, and of scales."""
        m, n = shape
        if self.bits == 16:
            return (TensorInfo(name, dtype, shape),)
        if self.bits == 8:
            return TensorInfo(name, "I8", shape), TensorInfo(name + SCALE, dtype, (m, 1))
        return (
            TensorInfo(name + PACKED, "I32", (m, -(-n // CODES_IN_A_WORD))),
            TensorInfo(name + SCALE, dtype, (m, -(-n // self.group))),
            TensorInfo(name + SHAPE, "I64", (2,)),
        )


# As they are.
PLAIN = Packing()
