"""Products with few-bit integers on a CPU: which of torch's are quick and safe here, and integers
of four bits in the order that they want.

Torch only, and nothing of svdcli: `compress --self-contained` ships this file beside the weights.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# Numbers that are unpacked at once: few enough to stay in a cache.
NUMBERS_AT_ONCE = 1 << 22

ALIGNMENT = 16  # bytes and columns; without it the product with int8 ends the process
_GROUPS = (32, 64, 128, 256)  # columns that share a scale in the product with four bits
_ROWS = 16  # rows of its matrix come in multiples of this

# Up to so many rows of x the products with integers are faster than unpacking and multiplying,
# measured where the CPU multiplies bfloat16 itself, and where it does not.
_FEW_ROWS, _FEW_ROWS_OF_FLOAT = 8, 32


@functools.cache
def multiplies(dtype: torch.dtype) -> bool:
    """Tell whether the CPU has instructions for this dtype; without them a product of 16-bit
    numbers takes several times as long as one of float32."""
    names = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    if dtype not in names:
        return True
    with suppress(AttributeError, RuntimeError):
        return bool(getattr(torch.ops.mkldnn, names[dtype])())
    return True


def few_rows() -> int:
    """Return up to how many rows of x a product with integers is the faster one."""
    return _FEW_ROWS if multiplies(torch.bfloat16) else _FEW_ROWS_OF_FLOAT


def four_bits(words: Tensor) -> Tensor:
    """Return the codes (m, 8 k) from -8 to 7 of words (m, k), which hold them as 0 to 15, the first
    in the lowest bits."""
    # By shifts where a compiler fuses them, and an exporter knows nothing of bytes in a word
    if torch.compiler.is_compiling():
        shifts = torch.arange(0, 32, 4, dtype=words.dtype, device=words.device)
        codes = torch.bitwise_right_shift(words[..., None], shifts) & 15
        return codes.flatten(1) - 8

    # By bytes, which takes a third less time
    octets = words.contiguous().view(torch.uint8)
    if sys.byteorder == "big":
        octets = octets.view(*words.shape, 4).flip(-1).flatten(1)
    nibbles = torch.stack((octets & 15, octets >> 4), -1).view(torch.int8)
    return nibbles.flatten(1).sub_(8)


def _words(codes: Tensor) -> Tensor:
    """Return the words (m, k) that hold codes (m, 8 k) from 0 to 15, of uint8."""
    octets = codes[:, ::2] | codes[:, 1::2] << 4
    if sys.byteorder == "big":
        octets = octets.unflatten(1, (-1, 4)).flip(-1).flatten(1)
    return octets.flatten().view(torch.int32).view(codes.shape[0], -1)


# What stands for numbers --------------------------------------------------------------------------


class Lazy(Tensor):
    """A tensor without numbers that knows its shape, dtype and device; it is filled in when
    something is computed with it."""

    def numbers(self) -> Tensor:
        """Return the tensor that it stands for."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about its kind at once, everything else by its numbers."""
        if func not in _METADATA:
            args = _filled_in(args)
            kwargs = _filled_in(kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Fill in for what reaches below autograd, such as printing."""
        return func(*_filled_in(args), **_filled_in(kwargs or {}))


# What may be asked without the numbers: methods, and the getters of attributes.
_METADATA = {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.element_size,
    Tensor.is_floating_point,
    *(
        getattr(Tensor, name).__get__
        for name in (
            *("shape", "dtype", "device", "ndim", "layout", "is_meta", "is_cuda", "nbytes"),
            *("requires_grad", "is_sparse"),
        )
    ),
}


def _filled_in(value: Any) -> Any:
    """Return arguments with every lazy tensor, at any depth, filled in."""
    if isinstance(value, Lazy):
        return value.numbers()
    if isinstance(value, (list, tuple)):
        return type(value)([_filled_in(element) for element in value])
    if isinstance(value, dict):
        return {key: _filled_in(element) for key, element in value.items()}
    return value


# Four bits in the order of torch's product --------------------------------------------------------


class Order(NamedTuple):
    """How torch orders codes of four bits on this CPU: by blocks of `block` rows, in them by
    columns, and two rows to a byte. These are neighbours, or, with halves, a row of the first half
    of a full block and its counterpart in the second."""

    block: int
    halves: bool


@functools.cache
def kernel_order() -> Order | None:
    """Return the order that this torch uses on this CPU; None where it has no product with four
    bits, or uses an order that is not known here.

    The orders are those of aten/src/ATen/native/cpu/int4mm_kernel.cpp; which it is comes out by
    packing known codes.
    """
    for block, halves in ((64, True), (32, True), (64, False), (32, False), (16, False)):
        order = Order(block, halves)
        with suppress(AttributeError, RuntimeError):
            if all(_is_order(order, rows) for rows in (16, 32, 48, 64, 96, 240)):
                return order
    return None


def _is_order(order: Order, rows: int) -> bool:
    """Tell whether torch packs so many rows in this order."""
    numbers = torch.arange(rows * 32, device="cpu")
    codes = ((numbers * 2654435761) >> 7) % 16
    packed = _packed(codes.view(rows, 32).to(torch.uint8))
    return torch.equal(unordered(packed, order, 0, rows), codes.view(rows, 32).T)


def _packed(codes: Tensor) -> Tensor:
    """Return codes (m, n) from 0 to 15 in the order of torch's product, (m, n / 2) of uint8."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    return packed


def unordered(packed: Tensor, order: Order, start: int, stop: int) -> Tensor:
    """Return the codes from 0 to 15 of rows from `start`, where a block begins, to `stop`, where
    one ends, transposed: (n, stop - start)."""
    columns = 2 * packed.shape[1]
    full = stop - (stop - start) % order.block
    parts: list[Tensor] = []
    if full > start:
        octets = packed[start:full].view(-1, columns, order.block // 2)
        parts.append(_rows_of_blocks(octets, order.halves))
    if stop > full:
        octets = packed[full:stop].view(1, columns, (stop - full) // 2)
        parts.append(_rows_of_blocks(octets, halves=False))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _rows_of_blocks(octets: Tensor, halves: bool) -> Tensor:
    """Return the codes (n, rows) of blocks (count, n, rows of one / 2)."""
    count, n, pairs = octets.shape
    order = (n, count, 2, pairs) if halves else (n, count, pairs, 2)
    codes = torch.empty(order, dtype=torch.uint8)
    low, high = codes.unbind(2 if halves else 3)
    torch.bitwise_and(octets, 15, out=low.transpose(0, 1))
    torch.bitwise_right_shift(octets, 4, out=high.transpose(0, 1))
    return codes.view(n, -1)


class KernelCodes(Lazy):
    """Stands for words (m, k) of codes of four bits, and holds these in the order of torch's
    product, with their scales: one copy serves for both."""

    packed: Tensor
    scales_and_zeros: Tensor
    order: Order
    columns: int
    group: int

    @staticmethod
    def __new__(cls, words: Tensor, scales: Tensor, columns: int, group: int) -> KernelCodes:
        """Order words (m, k) with scales (m, groups)."""
        order = kernel_order()
        assert order is not None
        lazy: KernelCodes = torch.Tensor._make_wrapper_subclass(
            cls, words.shape, dtype=words.dtype, device=words.device
        )
        lazy.order = order
        lazy.columns = columns
        lazy.group = group

        # Rows and columns as many as the product wants, a strip at a time
        groups = -(-columns // group)
        width = groups * group
        m = -(-words.shape[0] // _ROWS) * _ROWS
        lazy.packed = torch.empty(m, width // 2, dtype=torch.uint8)
        for start, stop in _strips(m, width, order.block):
            codes = four_bits(words[start:stop]) + 8
            room = (0, width - codes.shape[1], 0, stop - start - codes.shape[0])
            lazy.packed[start:stop] = _packed(functional.pad(codes, room))

        # value = (code - 8) scale + zero
        lazy.scales_and_zeros = torch.zeros(groups, m, 2, dtype=scales.dtype)
        lazy.scales_and_zeros[:, : words.shape[0], 0] = scales.T
        return lazy

    @property
    def scales(self) -> Tensor:
        """The scales (m, groups), a view."""
        return self.scales_and_zeros[:, : self.shape[0], 0].T

    def has(self, scales: Tensor) -> bool:
        """Tell whether these are its scales."""
        return scales.data_ptr() == self.scales_and_zeros.data_ptr()

    def numbers(self) -> Tensor:
        """Return the words."""
        m, k = self.shape
        words = torch.empty(m, k, dtype=torch.int32)
        for start, stop in _strips(m, 8 * k, self.order.block):
            codes = self._codes(start, stop)
            words[start:stop] = _words(codes[: 8 * k, : stop - start].T)
        return words

    def strip(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return rows of the matrix: a transposed view."""
        first = start - start % self.order.block
        codes = self._codes(first, stop)
        values = codes.view(torch.int8).sub_(8).to(dtype)
        scales = self.scales_and_zeros[:, first : first + codes.shape[1], 0].to(dtype).contiguous()
        values.unflatten(0, (-1, self.group)).mul_(scales[:, None])
        return values[: self.columns, start - first : stop - first].T

    def _codes(self, start: int, stop: int) -> Tensor:
        """Return codes from 0 to 15, transposed, of rows from `start`, where a block begins, to the
        end of the block before `stop`."""
        block = self.order.block
        stop = min(-(-stop // block) * block, self.packed.shape[0])
        return unordered(self.packed, self.order, start, stop)

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T for x (rows, n) of bfloat16."""
        missing = 2 * self.packed.shape[1] - self.columns
        x = functional.pad(x, (0, missing)) if missing else x.contiguous()
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, self.group, self.scales_and_zeros
        )
        return y[:, : self.shape[0]]


def _strips(rows: int, columns: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of strips of so many blocks of rows as are unpacked at once."""
    step = max(1, NUMBERS_AT_ONCE // (columns * block)) * block
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def can_be_ordered(words: Tensor, scales: Tensor, group: int) -> bool:
    """Tell whether torch's product takes these codes of four bits, once they are in its order."""
    if words.dtype != torch.int32 or scales.dtype != torch.bfloat16 or words.numel() == 0:
        return False
    return words.device.type == "cpu" and group in _GROUPS and kernel_order() is not None


# Memory -------------------------------------------------------------------------------------------

_PAGE_OUT = 21  # MADV_PAGEOUT of Linux's madvise, which changes no content


def leave_in_file(tensor: Tensor) -> None:
    """Have the system take a tensor that is mapped from a file, and not needed for now, out of
    memory; nothing where it is not mapped, or the system is not Linux."""
    if sys.platform != "linux":
        return
    page = 4096
    begin = -(-tensor.data_ptr() // page) * page
    end = (tensor.data_ptr() + tensor.nbytes) // page * page
    with suppress(OSError, AttributeError):
        if begin < end and _is_mapped(begin):
            ctypes.CDLL(None).madvise(
                ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _PAGE_OUT
            )


def _is_mapped(address: int) -> bool:
    """Tell whether a file is mapped at an address."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            place, _, _, _, inode, *_ = line.split()
            begin, end = (int(number, 16) for number in place.split("-"))
            if begin <= address < end:
                return inode != "0"
    return False


# For compilers ------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("svdcli", "FRAGMENT")


class Numbered:
    """Modules by number, for operators that stand for them in compiled graphs."""

    def __init__(self) -> None:
        self._modules: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()

    def handle(self, module: Any) -> Tensor:
        """Return a new number for a module, as a tensor."""
        number = next(self._numbers)
        self._modules[number] = module
        return torch.tensor(number, device="cpu")

    def __getitem__(self, number: int) -> Any:
        return self._modules[number]


def operator(name: str, compute: Callable[[Tensor, int], Tensor]) -> Any:
    """Return an operator (x, handle, columns) that compilers leave alone: compute(x, number), of
    as many columns, where handle is a tensor of that number.

    A number for a layer, and not its tensors: these may change their form between two calls. A
    tensor, since compilers make code of its own for each integer.
    """

    def on_cpu(x: Tensor, handle: Tensor, columns: int) -> Tensor:
        return compute(x, int(handle))

    def shape_alone(x: Tensor, handle: Tensor, columns: int) -> Tensor:
        return x.new_empty((*x.shape[:-1], columns))

    arguments = "Tensor x, Tensor handle, SymInt columns"
    return _registered(name, arguments, on_cpu, shape_alone, "CPU")


def router_operator(name: str, compute: Callable[[Tensor, Tensor, Tensor, int], Tensor]) -> Any:
    """Return an operator (x, chosen, weights, handle) that compilers leave alone, on any device:
    compute(x, chosen, weights, number), of the shape of x."""

    def anywhere(x: Tensor, chosen: Tensor, weights: Tensor, handle: Tensor) -> Tensor:
        return compute(x, chosen, weights, int(handle))

    def shape_alone(x: Tensor, chosen: Tensor, weights: Tensor, handle: Tensor) -> Tensor:
        return torch.empty_like(x)

    arguments = "Tensor x, Tensor chosen, Tensor weights, Tensor handle"
    return _registered(name, arguments, anywhere, shape_alone, "CompositeExplicitAutograd")


def _registered(
    name: str,
    arguments: str,
    compute: Callable[..., Tensor],
    shape_alone: Callable[..., Tensor],
    devices: str,
) -> Any:
    """Return a new operator that answers with one tensor."""
    # This file may be loaded twice: installed, and shipped with a model
    copies = 0
    while hasattr(torch.ops.svdcli, f"{name}_{copies}"):
        copies += 1
    name = f"{name}_{copies}"
    _LIBRARY.define(f"{name}({arguments}) -> Tensor")
    _LIBRARY.impl(name, compute, devices)
    torch.library.register_fake(f"svdcli::{name}", shape_alone, lib=_LIBRARY)
    return getattr(torch.ops.svdcli, name).default


def give_way_back(forward: Any, back: Any) -> None:
    """Have an operator's gradient for x computed by another operator."""

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        x, ctx.handle, _ = inputs
        ctx.columns = x.shape[-1]

    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return back(gradient, ctx.handle, ctx.columns), None, None

    torch.library.register_autograd(forward.name(), backward, setup_context=keep, lib=_LIBRARY)
