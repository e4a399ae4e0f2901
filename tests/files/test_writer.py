"""Where tensors begin in a file: few-bit integers at multiples of 64 bytes, everything at those of
its own element, and nothing else moves."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from svdcli.files.writer import OutFile, Unit, lay_out
from svdcli.plan.packing import Packing
from svdcli.plan.tensors import DTYPE_BITS, TensorInfo

PLAIN = [
    TensorInfo("a.weight", "BF16", (3, 5)),
    TensorInfo("mask", "I8", (64, 64)),
    TensorInfo("b.weight", "F32", (7,)),
    TensorInfo("steps", "I64", (1,)),
]


def laid_out(tensors: Sequence[TensorInfo]) -> OutFile:
    return lay_out("m", [Unit("u", "copy", (), tuple(tensors), "m")], {"format": "pt"})


def packed(bits: int, rows: int) -> tuple[TensorInfo, ...]:
    return Packing(bits, 64).tensors(f"p{bits}.{rows}.weight", (rows, 96), "BF16")


@pytest.mark.parametrize("odd", [False, True])
def test_integers_begin_at_multiples_of_64_bytes(odd: bool) -> None:
    tensors = [*PLAIN, *packed(8, 2), *packed(4, 64), *packed(8, 32), *packed(4, 4)]
    if odd:  # one whose size is no multiple of 64
        tensors += packed(8, 33)
    file = laid_out(tensors)
    offsets = file.offsets()
    for tensor in file.tensors:
        assert offsets[tensor.name] % (DTYPE_BITS[tensor.dtype] // 8) == 0
        is_code = tensor.name.endswith("_packed") or tensor.name.startswith("p8.")
        if is_code and not tensor.name.endswith("_scale") and tensor.nbytes % 64 == 0:
            assert offsets[tensor.name] % 64 == 0
    assert len(file.tensors) == len(tensors)


def test_files_without_packed_layers_are_as_they_were() -> None:
    file = laid_out(PLAIN)
    assert [tensor.name for tensor in file.tensors] == ["steps", "b.weight", "a.weight", "mask"]
    assert file.header_bytes % 64
