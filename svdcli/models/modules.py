"""Modules that stand where a dense layer stood: the same call, the same bias, a weight of rank r in
two factors.

Torch only, and nothing of svdcli: `compress --self-contained` ships this file beside the weights.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

UP, DOWN, ROWS = "svd_up.weight", "svd_down.weight", "svd_rows"


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
    torchao and exporters."""

    def __init__(
        self, in_features: int, out_features: int, rank: int, *, bias: bool, **factory: Any
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.svd_down = nn.Linear(in_features, rank, bias=False, **factory)
        self.svd_up = nn.Linear(rank, out_features, bias=False, **factory)
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


class Matrix(nn.Module):
    """A weight that is multiplied from the right: y = x @ weight, as GPT-2 stores its layers."""

    def __init__(self, rows: int, columns: int, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, columns, **factory))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class LowRankConv1D(_WithDenseWeight):
    """y = x W + b with the stored weight W (in, out) = up @ down, for transformers' Conv1D."""

    def __init__(self, in_features: int, out_features: int, rank: int, **factory: Any) -> None:
        super().__init__()
        self.nx = in_features
        self.nf = out_features
        self.rank = rank
        self.svd_up = Matrix(in_features, rank, **factory)
        self.svd_down = Matrix(rank, out_features, **factory)
        self.bias = nn.Parameter(torch.empty(out_features, **factory))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.svd_down(self.svd_up(x))
        return y + self.bias


class PivotedConv1D(_WithDenseWeight):
    """y = x W + b with the stored weight W (in, out) = cat(down, up @ down)[rows], for
    transformers' Conv1D."""

    svd_rows: Tensor

    def __init__(self, in_features: int, out_features: int, rank: int, **factory: Any) -> None:
        super().__init__()
        self.nx = in_features
        self.nf = out_features
        self.rank = rank
        self.svd_up = Matrix(in_features - rank, rank, **factory)
        self.svd_down = Matrix(rank, out_features, **factory)
        self.register_buffer("svd_rows", _empty_rows(in_features, factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory))

    def forward(self, x: Tensor) -> Tensor:
        # x W = (x in the order of the stored rows) (rows as they are stored)
        ordered = x.index_select(-1, self.svd_rows.argsort())
        kept, combined = ordered[..., : self.rank], ordered[..., self.rank :]
        y: Tensor = self.svd_down(kept + self.svd_up(combined))
        return y + self.bias


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


def low_rank_like(old: nn.Module, rank: int, *, layout: str) -> nn.Module | None:
    """Return an empty low-rank module on the meta device that can stand for `old`, or None where no
    such module exists."""
    holders = HOLDERS[layout]
    weight = getattr(old, "weight", None)
    factory: dict[str, Any] = {"device": "meta", "dtype": getattr(weight, "dtype", None)}
    if isinstance(old, nn.Linear) and _computes_like(old, nn.Linear):
        sizes = (old.in_features, old.out_features, rank)
        return holders.linear(*sizes, bias=old.bias is not None, **factory)
    if isinstance(old, nn.Embedding) and _computes_like(old, nn.Embedding):
        sizes = (old.num_embeddings, old.embedding_dim, rank)
        return holders.table(*sizes, old.padding_idx, **factory)
    # of transformers, which this file must not import
    if type(old).__name__ == "Conv1D" and isinstance(weight, Tensor):
        return holders.conv(*weight.shape, rank, **factory)
    return None


def _computes_like(module: nn.Module, plain: type[nn.Module]) -> bool:
    """Tell whether the module computes what its plain class does. Subclasses of embeddings may
    scale or shift, those of linear layers work in groups."""
    return type(module).forward is plain.forward or type(module).__name__ in _ALIKE


def is_linear(module: nn.Module | None) -> bool:
    """Tell whether a module answers with x W^T (nn.Linear) or x W (transformers' Conv1D), and
    nothing else."""
    if isinstance(module, nn.Linear):
        return _computes_like(module, nn.Linear)
    return type(module).__name__ == "Conv1D"


def is_row_order(rows: Tensor) -> bool:
    """Tell whether `rows` (m,) names every row of m once."""
    return torch.equal(rows.long().sort().values, torch.arange(rows.shape[0], device=rows.device))


def dense_weight(up: Tensor, down: Tensor, rows: Tensor | None) -> Tensor:
    """Return the matrix that stored factors stand for: up @ down, or cat(down, up @ down)[rows]."""
    return up @ down if rows is None else torch.cat((down, up @ down))[rows.long()]


def weight_of(module: nn.Module) -> Tensor:
    """Return the dense weight of a low-rank module."""
    return dense_weight(*factors_of(module))


def factors_of(module: nn.Module) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the parts of a low-rank module as they are stored: up, down, and the row order where
    it is pivoted."""
    up = module.get_parameter(UP)
    down = module.get_parameter(DOWN)
    rows = dict(module.named_buffers(recurse=False)).get(ROWS)
    return up, down, rows


def lazy_weight(module: nn.Module) -> Tensor:
    """Return what `.weight` answers: model code that only looks at its dtype or device must not pay
    for a product."""
    if torch.compiler.is_compiling():
        return weight_of(module)  # the compiler drops what is not used
    return LazyWeight(module)


class LazyWeight(Tensor):
    """A tensor without numbers that knows its shape, dtype and device; it is multiplied out when
    something is computed with it."""

    _module: nn.Module

    @staticmethod
    def __new__(cls, module: nn.Module) -> LazyWeight:
        up, down, rows = factors_of(module)
        m = up.shape[0] if rows is None else rows.shape[0]
        shape = (m, down.shape[1])
        lazy: LazyWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=up.dtype, device=up.device
        )
        lazy._module = module
        return lazy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Answer questions about its kind at once, everything else by the dense weight."""
        if func not in _METADATA:
            args = _filled_in(args)
            kwargs = _filled_in(kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Multiply out for what reaches below autograd, such as printing."""
        return func(*_filled_in(args), **_filled_in(kwargs or {}))


# What may be asked without the numbers: methods, and the getters of attributes.
_METADATA = {
    Tensor.size,
    Tensor.dim,
    Tensor.is_floating_point,
    *(
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "device", "ndim", "layout", "is_meta", "is_cuda")
    ),
}


def _filled_in(value: Any) -> Any:
    """Return arguments with every lazy weight, at any depth, multiplied out."""
    if isinstance(value, LazyWeight):
        return weight_of(value._module)
    if isinstance(value, (list, tuple)):
        return type(value)([_filled_in(element) for element in value])
    if isinstance(value, dict):
        return {key: _filled_in(element) for key, element in value.items()}
    return value


def _empty_rows(count: int, factory: dict[str, Any]) -> Tensor:
    """Return an empty row order, which is of integers in every dtype."""
    return torch.empty(count, dtype=torch.int32, device=factory.get("device"))
