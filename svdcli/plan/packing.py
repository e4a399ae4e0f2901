"""How the numbers of one matrix are stored: as they are, or as few-bit integers with scales.

Names and forms are those of the compressed-tensors library (0.20): int8 as `weight` and
`weight_scale` (its int-quantized form), or as words, `weight_packed`, `weight_scale` and
`weight_shape`, as int4 always is (its pack-quantized form, the one in which it and vLLM take
weights whose inputs are not rounded).
"""

from __future__ import annotations

from dataclasses import dataclass

from svdcli.plan.tensors import TensorInfo

# Behind the name of the matrix, which ends in `weight`.
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"

_WORD = 32  # bits


@dataclass(frozen=True)
class Packing:
    """bits is 16 for numbers as they are, in the dtype of the layer, 8 for one scale a row, or 4
    for one scale for each `group` columns of a row. in_words says whether codes of 8 bits, too, are
    stored as words of 32."""

    bits: int = 16
    group: int = 64
    in_words: bool = False

    @property
    def codes_in_a_word(self) -> int:
        return _WORD // self.bits

    def misfit(self, columns: int) -> str:
        """Why a matrix of so many columns is not packed in words, for kernels that want whole words
        and groups; an empty string where it can be."""
        if self.bits == 8 and columns % self.codes_in_a_word:
            return f"{columns} columns, no multiple of the {self.codes_in_a_word} codes of a word"
        if self.bits == 8 or columns % self.group == 0:
            return ""
        finer = next((size for size in (64, 32) if columns % size == 0), None)
        hint = "" if finer is None else f": --group-size {finer} fits"
        return f"{columns} columns, no multiple of the group of {self.group}{hint}"

    def tensors(self, name: str, shape: tuple[int, int], dtype: str) -> tuple[TensorInfo, ...]:
        """The tensors that stand for a matrix, in the order in which they are written. dtype is
        that of the numbers as they are, and of scales."""
        m, n = shape
        if self.bits == 16:
            return (TensorInfo(name, dtype, shape),)
        if self.bits == 8 and not self.in_words:
            return TensorInfo(name, "I8", shape), TensorInfo(name + SCALE, dtype, (m, 1))
        groups = 1 if self.bits == 8 else -(-n // self.group)
        return (
            TensorInfo(name + PACKED, "I32", (m, -(-n // self.codes_in_a_word))),
            TensorInfo(name + SCALE, dtype, (m, groups)),
            TensorInfo(name + SHAPE, "I64", (2,)),
        )


# As they are.
PLAIN = Packing()
