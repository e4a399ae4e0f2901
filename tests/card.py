"""A device that is no CPU, on a CPU: tensors that say they are on "card", may only meet others that
are there, and are computed as on the CPU. What a GPU's tests would find of tensors on the wrong
device is found here without one.

`install` registers the device for the whole process, which should be one of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "card"
# What moves tensors, or takes indices that are on the CPU, on a GPU, too
_MIXING = (
    torch.ops.aten._to_copy.default,
    torch.ops.aten.copy_.default,
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put_.default,
)
_LIBRARY = torch.library.Library("aten", "IMPL")


class Card(Tensor):
    """A tensor on the card; held is the one on the CPU that it stands for."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Card:
        how = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made: Card = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), dtype=held.dtype, device=torch.device(NAME, 0), **how
        )
        made.held = held
        return made

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Card) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held

    def tolist(self) -> Any:
        return self.held.tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _MIXING:
            for leaf in tree_leaves((args, kwargs)):
                if isinstance(leaf, Tensor) and leaf.ndim and not isinstance(leaf, Card):
                    raise RuntimeError(f"{func} meets tensors on the card and on the CPU")

        # as on the CPU
        device = kwargs.get("device")
        there = kwargs if device is None else kwargs | {"device": torch.device("cpu")}
        held_args, held_kwargs = tree_map_only(Card, lambda card: card.held, (args, there))
        out = func(*held_args, **held_kwargs)
        if func is torch.ops.aten.copy_.default:
            return args[0]
        if device is not None and torch.device(device).type == "cpu":
            return out
        return return_and_correct_aliasing(func, args, kwargs, tree_map_only(Tensor, Card, out))


def install() -> torch.device:
    """Register the device, with what makes tensors there."""
    _setup_privateuseone_for_python_backend(NAME)

    def empty(size: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return Card(torch.empty(size, dtype=dtype))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        return Card(torch.empty_strided(size, stride, dtype=dtype))

    def copy_from(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        held = source.held if isinstance(source, Card) else source
        (target.held if isinstance(target, Card) else target).copy_(held)
        return target

    _LIBRARY.impl("_copy_from", copy_from, "PrivateUse1")
    _LIBRARY.impl("empty.memory_format", empty, "PrivateUse1")
    _LIBRARY.impl("empty_strided", empty_strided, "PrivateUse1")
    return torch.device(NAME, 0)


def swap(tensors: Sequence[Tensor], device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Put parameters and buffers on the card, if that is the device: (each, what it was). `tensor.
    data =` cannot put a tensor of another class there."""
    pairs = []
    for tensor in tensors if device.type == NAME else ():
        card: Tensor = Card(tensor.detach().clone())
        if isinstance(tensor, nn.Parameter):
            card = nn.Parameter(card, requires_grad=False)
        torch.utils.swap_tensors(tensor, card)
        pairs.append((tensor, card))
    return pairs


@contextmanager
def placed(tensors: Sequence[Tensor], device: torch.device) -> Iterator[None]:
    """The same for a while."""
    pairs = swap(tensors, device)
    try:
        yield
    finally:
        for tensor, before in pairs:
            torch.utils.swap_tensors(tensor, before)
