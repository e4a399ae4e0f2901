"""Few-bit codes as tensors that a file holds, in the form of the compressed-tensors library."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from svdcli.linalg.rounding import Grid, Rounded

_OFFSET = 8  # codes of four bits are stored as 0 .. 15
_OFFSET_OF_BYTES = 128  # and those of eight, where they lie in words, as 0 .. 255


def stored_codes(rounded: Rounded, *, in_words: bool = False) -> tuple[Tensor, ...]:
    """The tensors that are stored: int8 codes and scales (m, 1); or, for four bits and in words,
    codes in int32 words, scales (m, groups) and the shape."""
    if rounded.grid.bits == 8 and not in_words:
        return rounded.codes, rounded.scales
    pack = pack_int8 if rounded.grid.bits == 8 else pack_int4
    shape = torch.tensor(rounded.codes.shape, dtype=torch.int64)
    return pack(rounded.codes), rounded.scales, shape


def stored_values(
    stored: tuple[Tensor, ...], group: int, dtype: torch.dtype, bits: int = 4
) -> Tensor:
    """The matrix (m, n) that stored codes stand for; group is the columns of a scale at four
    bits, bits those of codes in words."""
    if len(stored) == 2:
        codes, scales = stored
        return Rounded(codes, scales, Grid(8)).values(dtype)
    packed, scales, shape = stored
    if bits == 8:
        return Rounded(unpack_int8(packed, int(shape[1])), scales, Grid(8)).values(dtype)
    codes = unpack_int4(packed, int(shape[1]))
    return Rounded(codes, scales, Grid(4, group)).values(dtype)


def stored_integers(codes: Tensor, columns: int) -> Tensor:
    """The codes (m, columns), int8, of the first of the tensors that are stored."""
    return codes if codes.dtype == torch.int8 else unpack_int4(codes, columns)


def pack_int8(codes: Tensor) -> Tensor:
    """Codes (m, n) int8, four to an int32 word (m, ceil(n / 4)), the first in the lowest bits. A
    last word that is not full ends in zero bits."""
    octets = (codes.to(torch.int16) + _OFFSET_OF_BYTES).to(torch.uint8)
    padded = torch.nn.functional.pad(octets, (0, -codes.shape[1] % 4))
    return _in_words(padded).view(torch.int32)


def unpack_int8(packed: Tensor, columns: int) -> Tensor:
    """The codes (m, columns) of `pack_int8`."""
    octets = _in_words(packed.contiguous().view(torch.uint8))[:, :columns]
    return (octets.to(torch.int16) - _OFFSET_OF_BYTES).to(torch.int8)


def pack_int4(codes: Tensor) -> Tensor:
    """Codes (m, n) from -8 to 7, int8, eight to an int32 word (m, ceil(n / 8)), the first in the
    lowest bits. A last word that is not full ends in zero bits."""
    padded = torch.nn.functional.pad(codes.to(torch.int32) + _OFFSET, (0, -codes.shape[1] % 8))
    nibbles = padded.to(torch.uint8).view(codes.shape[0], -1, 2)
    octets = nibbles[..., 0] | nibbles[..., 1] << 4
    return _in_words(octets).view(torch.int32)


def unpack_int4(packed: Tensor, columns: int) -> Tensor:
    """The codes (m, columns) of `pack_int4`."""
    octets = _in_words(packed.contiguous().view(torch.uint8))
    nibbles = torch.stack((octets & 15, octets >> 4), -1).view(packed.shape[0], -1)
    return nibbles[:, :columns].to(torch.int8) - _OFFSET


def _in_words(octets: Tensor) -> Tensor:
    """Bytes (m, k) in the order in which this machine keeps them in a word."""
    if sys.byteorder == "little":
        return octets.contiguous()
    return octets.view(octets.shape[0], -1, 4).flip(-1).reshape(octets.shape)
