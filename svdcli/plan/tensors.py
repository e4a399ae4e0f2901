"""What a checkpoint holds, in words and numbers: names, dtypes, shapes, bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Bits an element, for every dtype of the safetensors format (0.8).
DTYPE_BITS = {
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}

# Dtypes whose weights are factored, with the unit roundoff of the dtype.
FACTORED_DTYPES = {"BF16": 2.0**-9, "F16": 2.0**-12, "F32": 2.0**-25, "F64": 2.0**-54}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor: its name, its safetensors dtype and its shape."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.parameters * DTYPE_BITS[self.dtype] // 8

    @property
    def module(self) -> str:
        """The name without its `.weight`: what people call the layer."""
        return module_of(self.name)


def module_of(name: str) -> str:
    """A tensor's name without its `.weight`."""
    return name.removesuffix(".weight")
