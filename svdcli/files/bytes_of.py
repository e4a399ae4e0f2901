"""Between torch tensors and bytes, without NumPy."""

from __future__ import annotations

import torch

TORCH_DTYPES = {
    name: getattr(torch, attribute)
    for name, attribute in {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "I32": "int32",
        "I16": "int16",
        "I8": "int8",
        "U64": "uint64",
        "U32": "uint32",
        "U16": "uint16",
        "U8": "uint8",
        "BOOL": "bool",
        "C64": "complex64",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "F8_E8M0": "float8_e8m0fnu",
    }.items()
    if hasattr(torch, attribute)
}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def bytes_of(tensor: torch.Tensor) -> bytearray:
    """The bytes of a tensor, row by row, little-endian as torch holds them."""
    data = bytearray(tensor.numel() * tensor.element_size())
    if data:
        torch.frombuffer(data, dtype=tensor.dtype).copy_(tensor.detach().reshape(-1))
    return data


def tensor_from(data: bytearray, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over `data`, which it shares."""
    if not data:
        return torch.empty(shape, dtype=TORCH_DTYPES[dtype])
    return torch.frombuffer(data, dtype=TORCH_DTYPES[dtype]).reshape(shape)
