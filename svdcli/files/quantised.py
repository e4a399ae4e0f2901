"""Weights that are stored as codes of few bits, read as the numbers that they stand for.

Which tensors belong together is told by their names, as the tools that write them have it; of
config.json's `quantization_config` only what no tensor tells is asked. Torch is imported where a
tensor is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from svdcli.errors import BadCheckpointError
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

# The methods of transformers' `quantization_config` that are read: DeepSeek's blocks, FBGEMM's
# rows, GPT-OSS' four bits, and, of what NVIDIA and compressed-tensors have, what these formats and
# algorithms store.
_METHODS = ("fp8", "fbgemm_fp8", "mxfp4", "modelopt", "compressed-tensors")
_FORMATS = {"float-quantized", "int-quantized", "naive-quantized", "pack-quantized", "dense"}
_MIXED = "mixed-precision"  # then each group has its own
_ALGORITHMS = {"FP8"}

# How codes and what belongs to them are called behind the name of a weight.
_INVERSE, _SCALE, _ZEROS = "_scale_inv", "_scale", "_zero_point"
_PACKED, _SHAPE, _ORDER = "_packed", "_shape", "_g_idx"
_MX_BLOCKS, _MX_SCALES = "_blocks", "_scales"  # of a stack of experts, in float4

# Of the activations, which this project leaves in full precision.
_OF_ACTIVATIONS = (
    ".input_scale",
    ".input_scale_ub",
    ".input_zero_point",
    ".input_global_scale",
    ".output_scale",
    ".output_zero_point",
    ".activation_scale",
    ".k_scale",
    ".v_scale",
    ".q_scale",
)
_CODES = ("F8_E4M3", "F8_E5M2", "I8")
# Rows and columns that share a scale, where config.json does not say: any grid of more than one
# block is that of one of these alone.
_BLOCKS = (128, 64, 32, 16, 256, 512, 1024, 8, 4, 2)
_BIAS = 127  # of an exponent that is stored as a byte
_WORD = 32  # bits of a word of packed codes

# Float4 of one sign, two bits of exponent and one of mantissa, by its code; a block of them shares
# an exponent (Open Compute Project, Microscaling Formats 1.0, 2023, section 5.3.3).
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MX_BLOCK = 32


@dataclass(frozen=True)
class Quantised:
    """One weight: the names of its codes, its scales and what else it may have, and how they go
    together.

    info is what the weight is read as. block is how many rows and columns share a scale; bits are
    those of a packed code, 0 for codes that are stored one by one. float4 says that codes are MX
    blocks of float4, of a weight that is read as their transpose.
    """

    info: TensorInfo
    codes: str
    scale: str
    block: tuple[int, int]
    bits: int = 0
    zeros: str | None = None
    order: str | None = None
    float4: bool = False

    @property
    def parts(self) -> Iterator[str]:
        """The names of all that it is made of."""
        for name in (self.codes, self.scale, self.zeros, self.order):
            if name is not None:
                yield name

    def numbers(self, read: Callable[[str], Tensor]) -> Tensor:
        """The weight in its dtype; read(name) gives a stored tensor."""
        import torch

        from svdcli.files.dtypes import TORCH_DTYPES

        codes, scale = read(self.codes), read(self.scale)
        if self.float4:
            return _of_float4(codes, scale).to(TORCH_DTYPES[self.info.dtype])
        if self.bits:
            codes = _unpacked(codes, self.bits, self.info.shape[1], dim=1)
        values = codes.to(torch.float32)

        # What each number is shifted and multiplied by
        columns = None if self.order is None else self._groups(read(self.order), scale)
        if self.zeros is not None:
            zeros = read(self.zeros)
            if self.bits:
                zeros = _unpacked(zeros, self.bits, scale.shape[0], dim=0)
            values -= self._spread(zeros.to(torch.float32), columns)
        if scale.dtype == torch.uint8:  # an exponent, as MX formats store it
            scale = (scale.to(torch.float32) - _BIAS).exp2()
        values *= self._spread(scale.to(torch.float32), columns)
        return values.to(TORCH_DTYPES[self.info.dtype])

    def _groups(self, order: Tensor, scale: Tensor) -> Tensor:
        """The group of each column. Raises BadCheckpointError for groups that have no scales."""
        groups = order.long()
        if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < scale.shape[-1]:
            raise BadCheckpointError(
                f"{self.order} names groups that {self.scale} has no scales for",
                "get the checkpoint again",
            )
        return groups

    def _spread(self, scale: Tensor, columns: Tensor | None) -> Tensor:
        """One value for every number, or for every row, or for all, from one for each block.
        columns gives the group of each column where they are not in order."""
        if scale.numel() == 1:
            return scale.flatten()[0]
        m, n = self.info.shape[-2:]
        if scale.ndim < 2:
            scale = scale[:, None]
        if scale.shape[-2] != m:
            scale = scale.repeat_interleave(self.block[0], -2)[..., :m, :]
        if columns is not None:
            return scale[..., columns]
        if scale.shape[-1] > 1:
            scale = scale.repeat_interleave(self.block[1], -1)[..., :n]
        return scale


def _of_float4(blocks: Tensor, exponents: Tensor) -> Tensor:
    """Numbers (..., n, m) of float4 codes (..., m, n / 32, 16), two to a byte, the first in the
    lower bits, and the exponents (..., m, n / 32) of their blocks."""
    import torch

    values = torch.tensor([*_FLOAT4, *(-value for value in _FLOAT4)])
    codes = torch.stack((blocks & 15, blocks >> 4), -1).flatten(-2)
    numbers = values[codes.int()]
    numbers *= (exponents.to(torch.float32) - _BIAS).exp2()[..., None]
    return numbers.flatten(-2).transpose(-1, -2).contiguous()


def _unpacked(words: Tensor, bits: int, count: int, dim: int) -> Tensor:
    """Codes from -2^(bits - 1) on, `count` of them along one dimension, of int32 words that hold
    them from 0 on, the first in the lowest bits."""
    import torch

    shifts = torch.arange(0, _WORD // bits * bits, bits, dtype=torch.int32)
    moved = words.movedim(dim, -1)
    codes = torch.bitwise_right_shift(moved[..., None], shifts) & (1 << bits) - 1
    return codes.flatten(-2)[..., :count].movedim(-1, dim) - (1 << bits - 1)


def is_read(details: Mapping[str, Any]) -> bool:
    """Tell whether weights of this `quantization_config` can be read as numbers."""
    method = details.get("quant_method")
    if method == "compressed-tensors":
        formats = {details.get("format")}
        for scheme in _schemes(details):
            formats.add(scheme.get("format"))
        return formats <= _FORMATS | {_MIXED, None}
    if method == "modelopt":
        return details.get("quant_algo") in _ALGORITHMS
    return method in _METHODS


def _schemes(details: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The schemes of compressed-tensors, for layers that are stored in different ways."""
    groups = details.get("config_groups")
    if not isinstance(groups, dict):
        return []
    return [scheme for scheme in groups.values() if isinstance(scheme, dict)]


def quantised_weights(
    details: Mapping[str, Any],
    dtype: str,
    infos: Mapping[str, TensorInfo],
    integers: Callable[[str], tuple[int, ...]],
    shown: str,
) -> tuple[dict[str, Quantised], set[str], list[str]]:
    """({name of a weight: what it is made of}, names that say something of activations alone, notes
    of what was assumed).

    details are the `quantization_config`, dtype is what weights are read in; integers gives what a
    stored tensor of integers holds, here shapes. Raises BadCheckpointError for a weight whose parts
    are missing, or do not fit.
    """
    reader = _Reader(details, dtype, infos, integers, shown)
    found: dict[str, Quantised] = {}
    for name, info in infos.items():
        weight = reader.weight_of(name, info)
        if weight is not None:
            found[weight.info.name] = weight
    activations = {name for name in infos if name.endswith(_OF_ACTIVATIONS)} if found else set()
    return found, activations, [_note_of(*blocks) for blocks in reader.assumed.items()]


def _note_of(block: tuple[int, int], names: Sequence[str]) -> str:
    """What is said of blocks that were assumed."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"a scale is taken to stand for {block[0]} x {block[1]} numbers of {names[0]}{others}, by "
        f"the shapes: no config.json says what fits"
    )


def _grid(m: int, n: int, block: tuple[int, int]) -> tuple[int, int]:
    """How many blocks a matrix has, in rows and columns."""
    return math.ceil(m / block[0]), math.ceil(n / block[1])


def dtype_of(config: Mapping[str, Any]) -> str:
    """What a model of this config computes in; bfloat16 where it does not say."""
    said = str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch.")
    return {"float16": "F16", "float32": "F32"}.get(said, "BF16")


@dataclass(frozen=True)
class _Reader:
    """What is known of all weights. assumed are blocks that nothing says, with the weights that are
    taken to have them."""

    details: Mapping[str, Any]
    dtype: str
    infos: Mapping[str, TensorInfo]
    integers: Callable[[str], tuple[int, ...]]
    shown: str
    assumed: dict[tuple[int, int], list[str]] = field(default_factory=dict)

    def weight_of(self, name: str, info: TensorInfo) -> Quantised | None:
        """The weight whose codes a tensor holds, or None."""
        if name.endswith(_PACKED) and info.dtype == "I32":
            return self._packed(name.removesuffix(_PACKED), info)
        if name.endswith(_MX_BLOCKS) and info.dtype == "U8" and len(info.shape) == 4:
            return self._in_float4(name.removesuffix(_MX_BLOCKS), info)
        if info.dtype not in _CODES or len(info.shape) < 2:
            return None
        scale = next((name + end for end in (_INVERSE, _SCALE) if name + end in self.infos), None)
        is_plain = scale is None and not self.details  # float8 that was cast, and not scaled
        if is_plain or (info.dtype == "I8" and not self._is_real(scale)):
            return None
        if scale is None:
            raise BadCheckpointError(
                f"{self.shown} holds {name} in {info.dtype} without its scales",
                "get the checkpoint again, with all its files",
            )
        weight = TensorInfo(name, self.dtype, info.shape)
        zeros = name + _ZEROS if name + _ZEROS in self.infos else None
        found = Quantised(weight, name, scale, self._block(weight, scale), zeros=zeros)
        self._check(found)
        return found

    def _is_real(self, scale: str | None) -> bool:
        """Tell whether these are scales of integers. Bytes with exponents belong to codes of other
        kinds, two to a byte."""
        return scale is not None and self.infos[scale].dtype in FACTORED_DTYPES

    def _packed(self, name: str, info: TensorInfo) -> Quantised:
        """A weight whose codes lie in words."""
        for end in (_SCALE, _SHAPE):
            if name + end not in self.infos:
                raise BadCheckpointError(
                    f"{self.shown} holds {info.name} without {name + end}",
                    "get the checkpoint again, with all its files",
                )
        shape = self.integers(name + _SHAPE)
        bits = self._bits(info, shape)
        weight = TensorInfo(name, self.dtype, shape)
        found = Quantised(
            weight,
            info.name,
            name + _SCALE,
            self._block(weight, name + _SCALE),
            bits,
            name + _ZEROS if name + _ZEROS in self.infos else None,
            name + _ORDER if name + _ORDER in self.infos else None,
        )
        self._check(found)
        return found

    def _in_float4(self, name: str, info: TensorInfo) -> Quantised:
        """A stack of experts (experts, in, out) whose transposes are stored in blocks of float4."""
        scale = name + _MX_SCALES
        experts, m, blocks, octets = info.shape
        fits = scale in self.infos and self.infos[scale].shape == (experts, m, blocks)
        if not fits or octets != _MX_BLOCK // 2:
            raise BadCheckpointError(
                f"{self.shown} holds {info.name} without {scale} of its shape",
                "get the checkpoint again, with all its files",
            )
        weight = TensorInfo(name, self.dtype, (experts, blocks * _MX_BLOCK, m))
        return Quantised(weight, info.name, scale, (1, _MX_BLOCK), float4=True)

    def _bits(self, info: TensorInfo, shape: tuple[int, ...]) -> int:
        """Of a packed code."""
        for bits in (4, 8):
            if len(shape) == 2 and info.shape == (shape[0], math.ceil(shape[1] * bits / _WORD)):
                return bits
        raise BadCheckpointError(
            f"{info.name} in {self.shown} is {list(info.shape)}, which is no matrix {list(shape)} "
            f"in 4 or 8 bits",
            "start from the unquantised model",
        )

    def _block(self, weight: TensorInfo, scale: str) -> tuple[int, int]:
        """How many rows and columns of a weight share a scale. Blocks that neither config.json nor
        the shapes tell are noted; what fits none is left to `_check`."""
        m, n = weight.shape[-2:]
        shape = self.infos[scale].shape
        rows = shape[-2] if len(shape) > 1 else (shape[0] if shape else 1)
        columns = shape[-1] if len(shape) > 1 else 1

        # As config.json says, where that fits, or as there is no other way
        said = self._said_block() if rows != m else (1, self._said_group(n))
        if said is not None and _grid(m, n, said) == (rows, columns):
            return said
        if rows in (1, m) and columns in (1, n):
            return max(1, m // max(1, rows)), max(1, n // max(1, columns))

        # Square blocks, or groups in each row
        for size in _BLOCKS:
            block = (1 if rows == m else size, size)
            if _grid(m, n, block) == (rows, columns):
                self.assumed.setdefault(block, []).append(weight.name)
                return block
        return said or (_BLOCKS[0], _BLOCKS[0])

    def _said_block(self) -> tuple[int, int] | None:
        """The block of config.json, None where it has none, or one that is none."""
        said = self.details.get("weight_block_size") or self._said("block_structure")
        if not isinstance(said, list) or len(said) != 2:
            return None
        sizes = [size for size in said if isinstance(size, int) and size > 0]
        return (sizes[0], sizes[1]) if len(sizes) == 2 else None

    def _said_group(self, n: int) -> int:
        """How many columns of a row share a scale by config.json; all where it does not say."""
        block = self.details.get("weight_block_size") or self._said("block_structure")
        said = self._said("group_size") or (block[-1] if isinstance(block, list) and block else n)
        return said if isinstance(said, int) and said > 0 else n

    def _said(self, key: str) -> Any:
        """What the first scheme of config.json says of weights."""
        for scheme in _schemes(self.details):
            weights = scheme.get("weights")
            if isinstance(weights, dict) and weights.get(key):
                return weights[key]
        return None

    def _check(self, weight: Quantised) -> None:
        """Raises BadCheckpointError where scales, or what else there is, do not fit their
        weight."""
        shape = self.infos[weight.scale].shape
        m, n = weight.info.shape[-2:]
        rows, columns = _grid(m, n, weight.block)
        fitting = {(m, 1), (m, columns), (rows, columns)}
        self._check_part(weight, weight.order, (n,))
        zeros = shape
        if weight.bits and shape:
            zeros = (math.ceil(shape[0] * weight.bits / _WORD), *shape[1:])
        self._check_part(weight, weight.zeros, zeros)
        of_matrices = len(shape) == len(weight.info.shape) and shape[-2:] in fitting
        if math.prod(shape) == 1 or shape == (m,) or of_matrices:
            return
        raise BadCheckpointError(
            f"{weight.scale} in {self.shown} is {list(shape)}, which are no scales of a weight "
            f"{list(weight.info.shape)} that is known",
            "get the checkpoint again, with a config.json that says its blocks",
        )

    def _check_part(self, weight: Quantised, part: str | None, shape: tuple[int, ...]) -> None:
        """Raises BadCheckpointError where a part is there, and is of another shape."""
        if part is not None and self.infos[part].shape != shape:
            raise BadCheckpointError(
                f"{part} in {self.shown} is {list(self.infos[part].shape)}, and the weight "
                f"{list(weight.info.shape)} has one of {list(shape)}",
                "get the checkpoint again",
            )
