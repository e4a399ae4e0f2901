"""Between torch tensors and bytes, without NumPy."""

from __future__ import annotations

import ctypes

import torch

# torch's dtypes by their names in safetensors; not every version of torch has all of them.
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


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, row by row, little-endian as torch holds them; its own memory where it
    is contiguous on the CPU."""
    flat = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    size = flat.numel() * flat.element_size()
    if not size:
        return memoryview(bytearray())
    memory = (ctypes.c_ubyte * size).from_address(flat.data_ptr())
    memory.owner = flat  # type: ignore[attr-defined]  # lives as long as the view
    return memoryview(memory).cast("B")
