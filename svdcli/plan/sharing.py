"""Which groups of layers get one basis: those where that loses less at the price of the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from svdcli.plan.groups import Group
from svdcli.plan.knapsack import Menu, price_of, priced_loss
from svdcli.plan.ranks import Choice
from svdcli.plan.tensors import TensorInfo
from svdcli.plan.words import Share

# The price of the budget changes with what is shared, and with it what is worth sharing: so often
# it is looked at again. The best of all allocations counts, so that fewer would do, too.
_ROUNDS = 4


@dataclass(frozen=True)
class Allocation:
    """What every layer becomes, and every group that shares a basis, by name; and what all of them
    lose."""

    choices: Mapping[str, Choice]
    loss: float


def share_where_it_pays(
    layers: Sequence[TensorInfo],
    groups: Sequence[Group],
    menus: Mapping[str, Menu],
    budget: int,
    allocate: Callable[[Sequence[TensorInfo]], Allocation],
    share: Share,
) -> Allocation:
    """The allocation that loses least, of one without shared bases and a few with them.

    A group competes with its layers at a price: the least of loss + price * cost over all its
    ranks, against the sum of theirs. menus are of layers and of groups' stacks. With share "always"
    every group has one basis.
    """
    if share == "always":
        return allocate(_with(layers, groups))
    best = allocate(layers)
    shared: list[Group] = []
    tried = [shared]
    for _ in range(_ROUNDS if groups else 0):
        present = _with(layers, shared)
        price = price_of([menus[tensor.name] for tensor in present], budget)
        shared = [group for group in groups if _pays(group, menus, price)]
        if shared in tried:
            break
        tried.append(shared)
        allocation = allocate(_with(layers, shared))
        if allocation.loss < best.loss:
            best = allocation
    return best


def _pays(group: Group, menus: Mapping[str, Menu], price: float) -> bool:
    """Does one basis lose less than one for each layer, at this price of cost."""
    apart = sum(priced_loss(menus[member.name], price) for member in group.members)
    return priced_loss(menus[group.stack.name], price) < apart


def _with(layers: Sequence[TensorInfo], groups: Sequence[Group]) -> list[TensorInfo]:
    """The layers, those of each group as its stack."""
    stacks = {group.members[0].name: group.stack for group in groups}
    others = {member.name for group in groups for member in group.members[1:]}
    return [stacks.get(layer.name, layer) for layer in layers if layer.name not in others]
