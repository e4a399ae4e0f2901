"""Stored codes against the library whose form they have, and back."""

from __future__ import annotations

import pytest
import torch

from svdcli.linalg.codes import pack_int4, stored_codes, stored_values, unpack_int4
from svdcli.linalg.rounding import Grid, rounded
from svdcli.plan.packing import Packing


def codes(m: int, n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.randint(-8, 8, (m, n), generator=generator).to(torch.int8)


@pytest.mark.parametrize("n", [1, 7, 8, 9, 64, 100])
def test_four_bits_there_and_back(n: int) -> None:
    packed = pack_int4(codes(5, n))
    assert (packed.dtype, tuple(packed.shape)) == (torch.int32, (5, -(-n // 8)))
    assert torch.equal(unpack_int4(packed, n), codes(5, n))


@pytest.mark.parametrize("n", [32, 64, 96])
def test_four_bits_as_compressed_tensors_packs_them(n: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    packed = pack_int4(codes(6, n))
    assert torch.equal(packed, helpers.pack_to_int32(codes(6, n), 4))
    assert torch.equal(helpers.unpack_from_int32(packed, 4, torch.Size((6, n))), codes(6, n))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("n", [30, 64])
def test_what_is_stored_is_what_the_plan_says(bits: int, n: int) -> None:
    w = torch.randn(10, n, generator=torch.Generator().manual_seed(0))
    grid = Grid(8) if bits == 8 else Grid(4, 32)
    matrix = rounded(w, grid, torch.bfloat16)
    stored = stored_codes(matrix)
    names = {torch.int8: "I8", torch.int32: "I32", torch.int64: "I64", torch.bfloat16: "BF16"}
    expected = Packing(bits, 32).tensors("x.weight", (10, n), "BF16")
    assert [(names[t.dtype], tuple(t.shape)) for t in stored] == [
        (info.dtype, info.shape) for info in expected
    ]
    assert sum(info.nbytes for info in expected) == sum(
        tensor.numel() * tensor.element_size() for tensor in stored
    )
    assert torch.equal(stored_values(stored, 32, torch.float32), matrix.values(torch.float32))
