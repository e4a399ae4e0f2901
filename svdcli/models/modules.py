"""Modules that stand where a dense layer stood: the same call, the same bias, a weight of rank r in
two factors.

Torch only, and of svdcli the file beside it: `compress --self-contained` ships both with the
weights.
"""

from __future__ import annotations

import copy
import itertools
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from svdcli.models.kernels import (
    ALIGNMENT,
    NUMBERS_AT_ONCE,
    KernelCodes,
    Lazy,
    Numbered,
    can_be_ordered,
    few_rows,
    four_bits,
    give_way_back,
    leave_in_file,
    multiplies,
    operator,
)

UP, DOWN, ROWS, WEIGHT = "svd_up.weight", "svd_down.weight", "svd_rows", "weight"

# Of layers that share a basis: the module below the first of them that holds it, and, of each, the
# number of their group, its first output in that and the one after its last.
SHARED, SPAN = "svd_shared", "svd_span"

# Behind the name of a matrix of few-bit integers: those of four bits, scales, and its shape.
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"
UNPACKED = 16  # bits of a matrix that is stored as it is

# The layout of a layer that is packed without being factored.
WHOLE = "whole"


class _WithDenseWeight(nn.Module):
    """The base of the low-rank modules. factory, in their constructors, is torch's: device and
    dtype."""

    @property
    def weight(self) -> Tensor:
        """The dense weight as the layer stores it, multiplied out only when something is computed
        with it."""
        return lazy_weight(self)


class LowRankLinear(_WithDenseWeight):
    """y = x W^T + b with W (out, in) = up @ down: two plain nn.Linear children, known to PEFT,
    torchao and exporters, or two PackedLinear."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, **factory: Any
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.svd_down: nn.Module = nn.Linear(in_features, rank, bias=False, **factory)
        self.svd_up: nn.Module = nn.Linear(rank, out_features, bias=False, **factory)
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.svd_up(self.svd_down(x))
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PivotedLinear(_WithDenseWeight):
    """y = x W^T + b with W (out, in) = cat(down, up @ down)[rows]: r outputs are computed, the
    others combined from them."""

    svd_rows: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, **factory: Any
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.svd_down = nn.Linear(in_features, rank, bias=False, **factory)
        self.svd_up = nn.Linear(rank, out_features - rank, bias=False, **factory)
        self.register_buffer("svd_rows", _empty_rows(out_features, factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        kept = self.svd_down(x)
        combined = self.svd_up(kept)
        y = torch.cat((kept, combined), -1).index_select(-1, self.svd_rows)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


class PackedLinear(_WithDenseWeight):
    """y = x W^T + b with W (out, in) of integers of `bits` bits, 8 or 4, times scales: one a row
    for 8 bits, one for each `group` columns of a row for 4.

    Integers and scales are buffers: casts leave the integers as they are, and nothing trains them.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group: int | None,
        *,
        bias: bool,
        **factory: Any,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.bits = bits
        self.group = group if bits == 4 else None

        # Not by `register_buffer`, which refuses `weight`, a property of this class
        device = factory.get("device")
        shapes = packed_shapes((out_features, in_features), bits, group)
        for part, (shape, dtype) in shapes.items():
            kind = factory.get("dtype") if dtype is None else dtype
            self._buffers[WEIGHT + part] = torch.empty(shape, dtype=kind, device=device)
        self._handle = _LAYERS.handle(self)
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None

    def expect_words(self) -> None:
        """Hold, until `take_words`, integers of eight bits as the words of a file."""
        device, dtype = self.scales.device, self.scales.dtype
        shape = (self.out_features, self.in_features)
        del self._buffers[WEIGHT]
        for part, (size, kind) in packed_shapes(shape, self.bits, None, in_words=True).items():
            self._buffers[WEIGHT + part] = torch.empty(size, dtype=kind or dtype, device=device)

    @property
    def holds_words(self) -> bool:
        return self.bits == 8 and WEIGHT + PACKED in self._buffers

    def take_words(self) -> None:
        """Make int8 of the words that were read, unless that is done."""
        if not self.holds_words:
            return
        words = cast(Tensor, self._buffers.pop(WEIGHT + PACKED))
        del self._buffers[WEIGHT + SHAPE]
        self._buffers[WEIGHT] = bytes_of_words(words, self.in_features)

    @property
    def codes(self) -> Tensor:
        """The integers as they are stored: int8 (out, in), or eight to a word of int32."""
        held = self.held
        return held.numbers() if isinstance(held, KernelCodes) else held

    @property
    def held(self) -> Tensor:
        """What holds the integers: a tensor of them as they are stored, or KernelCodes."""
        self._take_back()
        return cast(Tensor, self._buffers[self._name_of_codes])

    @property
    def _name_of_codes(self) -> str:
        return WEIGHT if self.group is None else WEIGHT + PACKED

    def _take_back(self) -> None:
        """Put the integers in the place of a lazy weight: accelerate moves a module tensor by
        tensor, reads `weight`, and puts back what it has read."""
        held = self._buffers.get(WEIGHT)
        if isinstance(held, LazyWeight):
            self._buffers[WEIGHT] = cast(PackedLinear, held._module).codes

    @property
    def scales(self) -> Tensor:
        return cast(Tensor, self._buffers[WEIGHT + SCALE])

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            y = self._compiled(x)
        elif torch.is_grad_enabled() and x.requires_grad:
            y = _WithWayBack.apply(x, self)  # type: ignore[no-untyped-call]
        else:
            y = self.product(x)
        return y if self.bias is None else y + self.bias

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T: by torch's products with integers for few rows of x, else with a strip of
        rows of W unpacked at a time."""
        if self._integers_are_quick(x):
            few = x.reshape(-1, self.in_features)
            y = self._multiplied(few, self.held)
            if y is not None:
                return y.view(*x.shape[:-1], self.out_features)

        # Where the CPU does not multiply 16-bit numbers itself, in float32
        dtype = self.scales.dtype
        if x.device.type == "cpu" and x.dtype == dtype and not multiplies(dtype):
            x = x.float()
            dtype = x.dtype
        rows = max(1, NUMBERS_AT_ONCE // self.in_features)
        strips: list[Tensor] = []
        for start in range(0, self.out_features, rows):
            strip = self._strip(start, min(start + rows, self.out_features), dtype)
            strips.append(functional.linear(x, strip).to(self.scales.dtype))
        return strips[0] if len(strips) == 1 else torch.cat(strips, -1)

    def product_back(self, y: Tensor) -> Tensor:
        """Return y W: the gradient for x, from that for x W^T."""
        x = y.new_zeros((*y.shape[:-1], self.in_features))
        rows = max(1, NUMBERS_AT_ONCE // self.in_features)
        for start in range(0, self.out_features, rows):
            stop = min(start + rows, self.out_features)
            x += y[..., start:stop] @ self._strip(start, stop, y.dtype)
        return x

    def _compiled(self, x: Tensor) -> Tensor:
        """Return x W^T in a compiler's graph: on a CPU by an operator of its own, which decides
        when it runs; else unpacked, where the compiler makes its own strips."""
        if torch.compiler.is_exporting() or x.device.type != "cpu":
            return functional.linear(x, self.rows(0, self.out_features))
        needs_way_back = torch.is_grad_enabled() and x.requires_grad
        product = _PRODUCT_WITH_WAY_BACK if needs_way_back else _PRODUCT
        y: Tensor = product(x, self._handle, self.out_features)
        return y

    def rows(self, start: int, stop: int) -> Tensor:
        """Return these rows of W in the dtype of the scales."""
        return self._strip(start, stop, self.scales.dtype).contiguous()

    def _strip(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Return these rows of W; they may be transposed in memory."""
        held = self._current()
        if isinstance(held, KernelCodes):
            return held.strip(start, stop, dtype)
        strip = slice(start, stop)
        return unpacked(held[strip], self.scales[strip], self.in_features, self.group, dtype)

    def _integers_are_quick(self, x: Tensor) -> bool:
        """Tell whether torch's products with integers are faster for these inputs: bfloat16 on a
        CPU, of few rows, and without a way back."""
        if x.dtype != torch.bfloat16 or x.device.type != "cpu":
            return False
        if torch.is_grad_enabled() and x.requires_grad:
            return False
        return 1 <= x.numel() // self.in_features <= few_rows()

    def _multiplied(self, x: Tensor, held: Tensor) -> Tensor | None:
        """Return x W^T for x (rows, in) by a product with integers, None where none takes these
        integers: it must never end the process."""
        scales = self.scales
        if self.group is not None:
            held = self._current()
            if not isinstance(held, KernelCodes):
                if not can_be_ordered(held, scales, self.group) or not _was_here(held):
                    return None
                held = self._in_kernel_order(held, scales, self.group)
            return held.product(x)

        # Eight bits, with aligned loads of sixteen columns at a time
        if held.dtype != torch.int8 or scales.dtype != x.dtype or self.in_features % ALIGNMENT:
            return None
        if not _is_aligned(held):
            if not _was_here(held):
                return None
            held = self._aligned(held)
        if not _is_aligned(x):
            x = x.clone(memory_format=torch.contiguous_format)
        y: Tensor = torch.ops.aten._weight_int8pack_mm(x, held, scales.flatten())
        return y

    @torch.inference_mode(False)
    @torch.no_grad()
    def _in_kernel_order(self, words: Tensor, scales: Tensor, group: int) -> KernelCodes:
        """Order four bits as torch's product wants them, for good."""
        held = KernelCodes(words, scales, self.in_features, group)
        self._buffers[WEIGHT + SCALE] = held.scales
        self._buffers[self._name_of_codes] = held
        leave_in_file(words)
        return held

    @torch.inference_mode(False)
    @torch.no_grad()
    def _aligned(self, codes: Tensor) -> Tensor:
        """Move int8 to where torch's product can read them, for good."""
        held = codes.clone(memory_format=torch.contiguous_format)
        self._buffers[WEIGHT] = held
        leave_in_file(codes)
        return held

    def _current(self) -> Tensor:
        """Return what holds the integers; as they are stored where other scales have come."""
        held = self.held
        if isinstance(held, KernelCodes) and not held.has(self.scales):
            held = self._buffers[self._name_of_codes] = held.numbers()
        return held

    def _as_stored(self) -> dict[str, Tensor | None]:
        """Return the buffers as they are in a file."""
        if self.holds_words:
            return dict(self._buffers)
        self._take_back()
        buffers = dict(self._buffers)
        if isinstance(self.held, KernelCodes):
            buffers[self._name_of_codes] = self.codes
            buffers[WEIGHT + SCALE] = self.scales.contiguous()
        return buffers

    def moved(self, device: torch.device) -> PackedLinear:
        """Return a copy whose integers and scales are on a device."""
        other = copy.copy(self)
        buffers: dict[str, Tensor | None] = {}
        for name, tensor in self._as_stored().items():
            buffers[name] = None if tensor is None else tensor.to(device)
        other._buffers = buffers
        return other

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        self._buffers.update(self._as_stored())
        return super()._apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._buffers.update(self._as_stored())
        super()._load_from_state_dict(*args, **kwargs)

    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool, **kwargs: Any
    ) -> None:
        held, self._buffers = self._buffers, self._as_stored()
        try:
            super()._save_to_state_dict(destination, prefix, keep_vars, **kwargs)
        finally:
            self._buffers = held

    def __getstate__(self) -> dict[str, Any]:
        """Copies, and pickled ones, hold integers as they are stored; what shares them still
        does."""
        if not self.holds_words and isinstance(self.held, KernelCodes):
            return self.__dict__ | {"_buffers": self._as_stored()}
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._handle = _LAYERS.handle(self)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}"


class _WithWayBack(torch.autograd.Function):
    """x W^T with a gradient for x, for which W is unpacked again, and not kept meanwhile."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: PackedLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        [y] = gradients
        layer: PackedLinear = ctx.layer
        return layer.product_back(y), None


class PackedEmbedding(PackedLinear):
    """Rows of W (num, dim) of int8 times a scale a row, unpacked as they are looked up.

    A table is the same matrix as the head that is tied to it: `share` makes two modules hold one.
    """

    def __init__(self, num: int, dim: int, padding_idx: int | None = None, **factory: Any) -> None:
        super().__init__(dim, num, 8, None, bias=False, **factory)
        self.num_embeddings = num
        self.embedding_dim = dim
        self.padding_idx = padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        codes = functional.embedding(ids, self.codes)
        scales = functional.embedding(ids, self.scales)
        return codes.to(scales.dtype) * scales

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, bits={self.bits}"


class PackedMatrix(PackedLinear):
    """y = x W + b with W (in, out) of few-bit integers, for layers whose weight is stored that way
    round. What it calls out_features are the rows of W."""

    def __init__(
        self, rows: int, columns: int, bits: int, group: int | None, *, bias: bool, **factory: Any
    ) -> None:
        super().__init__(columns, rows, bits, group, bias=False, **factory)
        self.nx = rows
        self.nf = columns
        self.bias = nn.Parameter(torch.empty(columns, **factory)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        y = x @ self.rows(0, self.nx) if compiling else self.product_back(x)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"nx={self.nx}, nf={self.nf}, bits={self.bits}"


def share(first: PackedLinear, second: PackedLinear) -> None:
    """Have the second module hold the integers and scales of the first, also when these are moved
    or replaced."""
    second._buffers = first._buffers


# Tensors that a quick product would have had to copy: what comes anew for each call, such as layers
# that wait on a disk, is not worth it.
_SEEN = WeakTensorKeyDictionary()


def _was_here(tensor: Tensor) -> bool:
    """Tell whether this was asked of a tensor before."""
    seen = tensor in _SEEN
    _SEEN[tensor] = True
    return seen


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0


_LAYERS = Numbered()


def _product(x: Tensor, number: int) -> Tensor:
    y: Tensor = _LAYERS[number].product(x)
    return y


def _product_back(y: Tensor, number: int) -> Tensor:
    x: Tensor = _LAYERS[number].product_back(y)
    return x


# Calls of an operator with a way back take longer
_PRODUCT = operator("packed_product", _product)
_PRODUCT_WITH_WAY_BACK = operator("packed_product_with_way_back", _product)
give_way_back(_PRODUCT_WITH_WAY_BACK, operator("packed_product_back", _product_back))


class Matrix(nn.Module):
    """A weight that is multiplied from the right: y = x @ weight, as GPT-2 stores its layers."""

    def __init__(self, rows: int, columns: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class LowRankConv1D(_WithDenseWeight):
    """y = x W + b with the stored weight W (in, out) = up @ down, for transformers' Conv1D."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool = True, **factory: Any
    ) -> None:
        super().__init__()
        self.nx = in_features
        self.nf = out_features
        self.rank = rank
        self.svd_up: nn.Module = Matrix(in_features, rank, **factory)
        self.svd_down: nn.Module = Matrix(rank, out_features, **factory)
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.svd_down(self.svd_up(x))
        return y if self.bias is None else y + self.bias


class PivotedConv1D(_WithDenseWeight):
    """y = x W + b with the stored weight W (in, out) = cat(down, up @ down)[rows], for
    transformers' Conv1D."""

    svd_rows: Tensor

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool = True, **factory: Any
    ) -> None:
        super().__init__()
        self.nx = in_features
        self.nf = out_features
        self.rank = rank
        self.svd_up = Matrix(in_features - rank, rank, **factory)
        self.svd_down = Matrix(rank, out_features, **factory)
        self.register_buffer("svd_rows", _empty_rows(in_features, factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        # x W = (x in the order of the stored rows) (rows as they are stored)
        ordered = x.index_select(-1, self.svd_rows.argsort())
        kept, combined = ordered[..., : self.rank], ordered[..., self.rank :]
        y: Tensor = self.svd_down(kept + self.svd_up(combined))
        return y if self.bias is None else y + self.bias


class LowRankEmbedding(_WithDenseWeight):
    """Rows of W (num, dim) = up @ down."""

    def __init__(
        self, num: int, dim: int, rank: int, padding_idx: int | None = None, **factory: Any
    ) -> None:
        super().__init__()
        self.num_embeddings = num
        self.embedding_dim = dim
        self.rank = rank
        self.padding_idx = padding_idx
        self.svd_up = nn.Embedding(num, rank, padding_idx=padding_idx, **factory)
        self.svd_down = Matrix(rank, dim, **factory)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.svd_down(self.svd_up(ids))
        return y


class PivotedEmbedding(_WithDenseWeight):
    """Rows of W (num, dim) = cat(down, up @ down)[rows]."""

    svd_rows: Tensor

    def __init__(
        self, num: int, dim: int, rank: int, padding_idx: int | None = None, **factory: Any
    ) -> None:
        super().__init__()
        self.num_embeddings = num
        self.embedding_dim = dim
        self.rank = rank
        self.padding_idx = padding_idx
        self.svd_up = nn.Embedding(num - rank, rank, **factory)
        self.svd_down = Matrix(rank, dim, **factory)
        self.register_buffer("svd_rows", _empty_rows(num, factory))

    def forward(self, ids: Tensor) -> Tensor:
        # Both kinds of rows for every id, then the right one; an index of the other kind is clamped
        # to a row that exists
        place = self.svd_rows[ids]
        kept = self.svd_down.weight[place.clamp(max=self.rank - 1)]
        if self.num_embeddings == self.rank:
            return kept
        combined = self.svd_down(self.svd_up((place - self.rank).clamp(min=0)))
        return torch.where((place < self.rank)[..., None], kept, combined)


class SharedLinear(_WithDenseWeight):
    """One of several layers that read the same input x: its outputs of x W^T, plus b, where W is
    the weight of all of them, one below the other.

    The first of them holds W, in a low-rank module `svd_shared`; `join` makes the others ask it. It
    multiplies once for all that are called with the same x.
    """

    svd_span: Tensor
    svd_shared: nn.Module

    def __init__(
        self, in_features: int, span: tuple[int, int, int], *, bias: bool, **factory: Any
    ) -> None:
        super().__init__()
        _, self.start, self.stop = span
        self.in_features = in_features
        self.out_features = self.stop - self.start
        self.register_buffer("svd_span", torch.tensor(span))
        self.bias = nn.Parameter(torch.empty(self.out_features, **factory)) if bias else None
        # Of the first, what it multiplied last, until all have had it; not a child of the others,
        # so that a state dict has it once
        self.__dict__["_first"] = self
        self.__dict__["_last"] = None
        self.__dict__["_count"] = 1

    @staticmethod
    def join(layers: Sequence[SharedLinear], shared: nn.Module) -> None:
        """Give these layers, the first of them first, the module with the weight of all."""
        layers[0].svd_shared = shared
        layers[0].__dict__["_count"] = len(layers)
        for layer in layers:
            layer.__dict__["_first"] = layers[0]

    @property
    def first(self) -> SharedLinear:
        """The layer that holds the weight."""
        first: SharedLinear = self.__dict__["_first"]
        return first

    def forward(self, x: Tensor) -> Tensor:
        y = self.first._of_all(x, self.start)[..., self.start : self.stop]
        return y if self.bias is None else y + self.bias

    def _of_all(self, x: Tensor, start: int) -> Tensor:
        """Return x W^T for the layer whose outputs start there."""
        # What one layer has had is stale when it asks again: weights may have changed
        state = _state_of(x)
        last: _Product | None = self.__dict__["_last"]
        if last is None or last.x is not x or last.state != state or start in last.taken:
            last = _Product(x, state, self.svd_shared(x), frozenset())
        last = last._replace(taken=last.taken | {start})
        all_have_it = len(last.taken) == self.__dict__["_count"]
        self.__dict__["_last"] = None if all_have_it else last
        return last.y

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_last": None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Product(NamedTuple):
    """The last input of layers that share a basis, in which state it was, their outputs for it, and
    the layers that have had them."""

    x: Tensor
    state: tuple[int, bool, torch.dtype | None]
    y: Tensor
    taken: frozenset[int]


def _state_of(x: Tensor) -> tuple[int, bool, torch.dtype | None]:
    """Return what tells that a tensor was changed in place, or is to be computed with in another
    way. A compiler knows no versions; layers whose input a model changes between their calls are in
    no group."""
    version = 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
    cast = None
    if torch.is_autocast_enabled(x.device.type):
        cast = torch.get_autocast_dtype(x.device.type)
    return version, torch.is_grad_enabled(), cast


class StackedLinear(nn.Module):
    """y = x W^T where W is the weights of several linear layers, one below the other, which stay
    where they are: what a shared basis stands for."""

    def __init__(self, weights: Sequence[nn.Parameter]) -> None:
        super().__init__()
        self.in_features = weights[0].shape[1]
        self.out_features = sum(weight.shape[0] for weight in weights)
        self.parts = nn.ParameterList(weights)

    @property
    def weight(self) -> Tensor:
        """The dense weight, put together when it is asked for."""
        return torch.cat(list(self.parts))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([functional.linear(x, part) for part in self.parts], -1)


# Classes of transformers with a `forward` of their own that computes what nn.Linear does.
_ALIKE = frozenset({"FalconLinear"})


class Holders(NamedTuple):
    """The modules that hold the factors of one layout, by what they stand for, and the names of the
    tensors that they hold besides a bias."""

    linear: type[nn.Module]
    table: type[nn.Module]
    conv: type[nn.Module]
    parts: tuple[str, ...] = (UP, DOWN)

    @property
    def modules(self) -> tuple[type[nn.Module], ...]:
        """All of its modules, for isinstance."""
        return self.linear, self.table, self.conv


# The layouts of `plan.layouts` that keep factors.
HOLDERS = {
    "factored": Holders(LowRankLinear, LowRankEmbedding, LowRankConv1D),
    "pivoted": Holders(PivotedLinear, PivotedEmbedding, PivotedConv1D, (UP, DOWN, ROWS)),
}
LOW_RANK = tuple(itertools.chain.from_iterable(holders.modules for holders in HOLDERS.values()))


def layout_of(module: nn.Module) -> str:
    """Return the layout whose factors a low-rank module holds. Raises KeyError for any other
    module."""
    for layout, holders in HOLDERS.items():
        if isinstance(module, holders.modules):
            return layout
    raise KeyError(type(module).__name__)


def part_names(layout: str, bits: int, *, in_words: bool = False) -> tuple[str, ...]:
    """Return the names of a layer's tensors, after its own."""
    matrices = (WEIGHT,) if layout == WHOLE else HOLDERS[layout].parts
    names = [matrix_parts(matrix, bits, in_words=in_words) for matrix in matrices]
    return tuple(itertools.chain.from_iterable(names))


def matrix_parts(matrix: str, bits: int, *, in_words: bool = False) -> tuple[str, ...]:
    """Return the names of the tensors that hold one matrix, those of its numbers first."""
    if bits == UNPACKED:
        return (matrix,)
    if bits == 8 and not in_words:
        return matrix, matrix + SCALE
    return matrix + PACKED, matrix + SCALE, matrix + SHAPE


def packed_shapes(
    shape: tuple[int, int], bits: int, group: int | None, *, in_words: bool = False
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Return {what is behind a matrix's name: (shape, dtype)} of the tensors that hold a packed
    matrix; the dtype of scales, which is the model's, is None."""
    m, n = shape
    if bits == 8 and not in_words:
        return {"": ((m, n), torch.int8), SCALE: ((m, 1), None)}
    groups = 1 if bits == 8 else -(-n // (group or n))
    return {
        PACKED: ((m, -(-n * bits // 32)), torch.int32),
        SCALE: ((m, groups), None),
        SHAPE: ((2,), torch.int64),
    }


def unpacked(
    codes: Tensor, scales: Tensor, columns: int, group: int | None, dtype: torch.dtype
) -> Tensor:
    """Return the matrix (m, columns) that stored codes stand for: int8, or four to a word of int32,
    with scales (m, 1) where group is None, else of four bits, eight to a word, with scales (m,
    groups)."""
    scales = scales.to(dtype)
    if group is None:
        if codes.dtype == torch.int32:
            codes = bytes_of_words(codes, columns)
        return codes.to(dtype) * scales

    # The last group may be narrower
    values = four_bits(codes)[:, :columns].to(dtype)
    even = columns - columns % group
    values[:, :even].unflatten(1, (-1, group)).mul_(scales[:, : even // group, None])
    values[:, even:].mul_(scales[:, even // group :])
    return values


def bytes_of_words(words: Tensor, columns: int) -> Tensor:
    """Return the codes (m, columns) of int8 of words, which hold them as 0 to 255, the first in the
    lowest bits."""
    octets = words.contiguous().view(torch.uint8)
    if sys.byteorder == "big":
        octets = octets.view(*words.shape, 4).flip(-1).flatten(1)
    return (octets[:, :columns] ^ 128).view(torch.int8)


def low_rank_like(
    old: nn.Module, rank: int, *, layout: str, bits: int = UNPACKED, group: int | None = None
) -> nn.Module | None:
    """Return an empty low-rank module on the meta device that can stand for `old`, or None where no
    such module exists; a packed one where bits is not 16."""
    weight = getattr(old, "weight", None)
    factory: dict[str, Any] = {"device": "meta", "dtype": getattr(weight, "dtype", None)}
    if bits != UNPACKED:
        return _packed_like(old, rank, layout, bits, group, factory)
    holders = HOLDERS[layout]
    if isinstance(old, nn.Linear) and _computes_like(old, nn.Linear):
        sizes = (old.in_features, old.out_features, rank)
        return holders.linear(*sizes, bias=old.bias is not None, **factory)
    if isinstance(old, nn.Embedding) and _computes_like(old, nn.Embedding):
        sizes = (old.num_embeddings, old.embedding_dim, rank)
        return holders.table(*sizes, old.padding_idx, **factory)
    if is_conv(old) and isinstance(weight, Tensor):
        has_bias = getattr(old, "bias", None) is not None
        return holders.conv(*weight.shape, rank, bias=has_bias, **factory)
    return None


def shared_like(
    olds: Sequence[nn.Module],
    rank: int,
    number: int,
    *,
    layout: str,
    bits: int = UNPACKED,
    group: int | None = None,
) -> list[SharedLinear] | None:
    """Return empty modules on the meta device that can stand for these layers with one basis, or
    None where there are none."""
    layers: list[SharedLinear] = []
    stop = 0
    for old in olds:
        if not isinstance(old, nn.Linear) or not _computes_like(old, nn.Linear):
            return None
        factory = {"device": "meta", "dtype": old.weight.dtype}
        span = (number, stop, stop + old.out_features)
        layers.append(SharedLinear(old.in_features, span, bias=old.bias is not None, **factory))
        stop += old.out_features
    all_of_them = nn.Linear(layers[0].in_features, stop, bias=False, **factory)
    shared = low_rank_like(all_of_them, rank, layout=layout, bits=bits, group=group)
    assert shared is not None
    SharedLinear.join(layers, shared)
    return layers


def _packed_like(
    old: nn.Module, rank: int, layout: str, bits: int, group: int | None, factory: dict[str, Any]
) -> nn.Module | None:
    """Return what `low_rank_like` does, packed: there are such modules for linear layers, whichever
    way round they are stored, and for whole tables of eight bits."""
    is_table = isinstance(old, nn.Embedding) and _computes_like(old, nn.Embedding)
    if is_table and layout == WHOLE and bits == 8 and old.max_norm is None:
        sizes = (cast(int, old.num_embeddings), cast(int, old.embedding_dim))
        return PackedEmbedding(*sizes, cast("int | None", old.padding_idx), **factory)
    if is_conv(old):
        return _packed_conv(old, rank, layout, bits, group, factory)
    if not isinstance(old, nn.Linear) or not _computes_like(old, nn.Linear):
        return None
    n, m = old.in_features, old.out_features
    bias = old.bias is not None
    if layout == WHOLE:
        return PackedLinear(n, m, bits, group, bias=bias, **factory)
    new = LowRankLinear(n, m, rank, bias=bias, **factory)
    new.svd_down = PackedLinear(n, rank, bits, group, bias=False, **factory)
    new.svd_up = PackedLinear(rank, m, bits, group, bias=False, **factory)
    return new


def _packed_conv(
    old: nn.Module, rank: int, layout: str, bits: int, group: int | None, factory: dict[str, Any]
) -> nn.Module:
    """Return the packed module for a layer whose weight is stored as (in, out)."""
    rows, columns = cast(Tensor, old.weight).shape
    bias = getattr(old, "bias", None) is not None
    if layout == WHOLE:
        return PackedMatrix(rows, columns, bits, group, bias=bias, **factory)
    new = LowRankConv1D(rows, columns, rank, bias=bias, **factory)
    new.svd_up = PackedMatrix(rows, rank, bits, group, bias=False, **factory)
    new.svd_down = PackedMatrix(rank, columns, bits, group, bias=False, **factory)
    return new


def _computes_like(module: nn.Module, plain: type[nn.Module]) -> bool:
    """Tell whether the module computes what its plain class does. Subclasses of embeddings may
    scale or shift, those of linear layers work in groups."""
    return type(module).forward is plain.forward or type(module).__name__ in _ALIKE


def is_linear(module: nn.Module | None) -> bool:
    """Tell whether a module answers with x W^T (nn.Linear) or x W (transformers' Conv1D), and
    nothing else."""
    if isinstance(module, nn.Linear):
        return _computes_like(module, nn.Linear)
    return isinstance(module, StackedLinear) or is_conv(module)


def is_conv(module: nn.Module | None) -> bool:
    """Tell whether a module is one whose weight is stored as (in, out): transformers' Conv1D, which
    this file must not import, or its like without a bias."""
    return type(module).__name__ in ("Conv1D", "TransposedLinear")


def is_packed(module: nn.Module) -> bool:
    """Tell whether a low-rank or whole layer is of few-bit integers."""
    return any(isinstance(part, PackedLinear) for part in module.modules())


def is_packed_conv(module: nn.Module) -> bool:
    """Tell whether such a layer has its weight stored as (in, out)."""
    return any(isinstance(part, PackedMatrix) for part in module.modules())


def numbers_of(model: nn.Module) -> int:
    """Return how many numbers the weights of a model have, packed ones, which are no parameters,
    included."""
    count = sum(parameter.numel() for parameter in model.parameters())
    for module in model.modules():
        if isinstance(module, PackedLinear):
            count += module.in_features * module.out_features
    return count


def is_row_order(rows: Tensor) -> bool:
    """Tell whether `rows` (m,) names every row of m once."""
    return torch.equal(rows.long().sort().values, torch.arange(rows.shape[0], device=rows.device))


def dense_weight(up: Tensor, down: Tensor, rows: Tensor | None) -> Tensor:
    """Return the matrix that stored factors stand for: up @ down, or cat(down, up @ down)[rows]."""
    return up @ down if rows is None else torch.cat((down, up @ down))[rows.long()]


def weight_of(module: nn.Module) -> Tensor:
    """Return the dense weight of a low-rank or packed module, or of one that shares a basis."""
    if isinstance(module, SharedLinear):
        return weight_of(module.first.svd_shared)[module.start : module.stop]
    if isinstance(module, PackedLinear):
        return module.rows(0, module.out_features)
    return dense_weight(*factors_of(module))


def factors_of(module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the parts of a low-rank module: up, down, and the row order where it is pivoted.
    Packed factors are lazy weights."""
    up = cast(Tensor, module.get_submodule("svd_up").weight)
    down = cast(Tensor, module.get_submodule("svd_down").weight)
    rows = dict(module.named_buffers(recurse=False)).get(ROWS)
    return up, down, rows


def lazy_weight(module: nn.Module) -> Tensor:
    """Return what `.weight` answers: model code that only looks at its dtype or device must not pay
    for a product."""
    if torch.compiler.is_compiling():
        return weight_of(module)  # the compiler drops what is not used
    return LazyWeight(module)


class LazyWeight(Lazy):
    """A weight that is multiplied out, or unpacked, when something is computed with it."""

    _module: nn.Module

    @staticmethod
    def __new__(cls, module: nn.Module) -> LazyWeight:
        shape, like = _shape_and_kind(module)
        lazy: LazyWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device
        )
        lazy._module = module
        return lazy

    def numbers(self) -> Tensor:
        return weight_of(self._module)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lazy = args[0] if args else None
        if isinstance(lazy, LazyWeight) and isinstance(lazy._module, PackedLinear):
            # Those that move a module tensor by tensor read this one for the integers
            if func is Tensor.data_ptr:
                return lazy._module.codes.data_ptr()
            if func is Tensor.to:
                device, dtype, *_ = torch._C._nn._parse_to(*args[1:], **(kwargs or {}))
                if dtype is None:
                    return LazyWeight(lazy._module.moved(device))
        return super().__torch_function__(func, types, args, kwargs)


def _shape_and_kind(module: nn.Module) -> tuple[tuple[int, int], Tensor]:
    """Return the shape of a module's dense weight, and a tensor of its dtype on its device."""
    if isinstance(module, PackedLinear):
        return (module.out_features, module.in_features), module.scales
    if isinstance(module, SharedLinear):
        _, like = _shape_and_kind(module.first.svd_shared)
        return (module.out_features, module.in_features), like
    up, down, rows = factors_of(module)
    m = up.shape[0] if rows is None else rows.shape[0]
    return (m, down.shape[1]), up


def _empty_rows(count: int, factory: dict[str, Any]) -> Tensor:
    """Return an empty row order, which is of integers in every dtype."""
    return torch.empty(count, dtype=torch.int32, device=factory.get("device"))
