"""A budget over all layers: what each becomes, by itself or in a group that shares a basis."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

from svdcli.plan.groups import Group
from svdcli.plan.knapsack import Menu, allocate_globally, allocate_menus, menu_of
from svdcli.plan.menus import Rounding, packed_menu
from svdcli.plan.ranks import Choice, Options, cost_of, options_of, uniform_within
from svdcli.plan.recipe import Recipe
from svdcli.plan.sharing import Allocation, share_where_it_pays
from svdcli.plan.tensors import TensorInfo


def chooses_packings(recipe: Recipe) -> bool:
    """Does every layer get its own bits and rank, of one budget in bytes."""
    in_bytes = recipe.target in ("size", "keep_bytes")
    return bool(recipe.packings) and in_bytes and recipe.allocate == "global"


def budgets_of(
    recipe: Recipe,
    layers: Sequence[TensorInfo],
    groups: Sequence[Group],
    losses: Mapping[str, Sequence[float]],
    roundings: Mapping[str, Sequence[Rounding]],
) -> Budgets:
    """What the layers and groups may become, with costs in what the budget is given in."""
    candidates = [*layers, *(group.stack for group in groups)]
    extra_bytes = {group.stack.name: group.extra_bytes for group in groups}
    if chooses_packings(recipe):
        menus = _packed_menus(recipe, candidates, losses, roundings, extra_bytes)
        return PackedBudgets(recipe, layers, groups, menus)
    unit = "bytes" if recipe.target in ("size", "keep_bytes") else "parameters"
    options = {}
    for tensor in candidates:
        more = extra_bytes.get(tensor.name, 0)
        options[tensor.name] = options_of(tensor, recipe, unit=unit, extra_bytes=more)
    return RankBudgets(recipe, layers, groups, options, losses)


def _packed_menus(
    recipe: Recipe,
    layers: Sequence[TensorInfo],
    losses: Mapping[str, Sequence[float]],
    roundings: Mapping[str, Sequence[Rounding]],
    extra_bytes: Mapping[str, int],
) -> dict[str, Menu]:
    menus = {}
    for tensor in layers:
        name = tensor.name
        more = extra_bytes.get(name, 0)
        menus[name] = packed_menu(tensor, recipe, losses[name], roundings[name], more)
    return menus


def _globally(
    recipe: Recipe,
    options: Sequence[Options],
    losses: Sequence[Callable[[int], float]],
    even: Sequence[Choice],
    budget: int,
) -> list[Choice]:
    """Global allocation with its floor taken from the uniform ranks; the uniform one where that is
    no worse."""
    floors = [
        _floor(option, choice, recipe.floor) for option, choice in zip(options, even, strict=True)
    ]
    best = allocate_globally(options, losses, budget, floors)
    even_fits = cost_of(options, even) <= budget
    if even_fits and _total_loss(even, losses) <= _total_loss(best, losses):
        return list(even)
    return best


def _floor(option: Options, even: Choice, share: float) -> int:
    """The least rank that global allocation may give a layer: a share of its uniform rank, or
    of its largest one where uniform ranks leave it dense."""
    if not option.ranks:
        return 1
    rank = option.ranks[-1] if even.rank is None else even.rank
    return math.ceil(share * rank)


def _total_loss(choices: Sequence[Choice], losses: Sequence[Callable[[int], float]]) -> float:
    lost = []
    for choice, loss in zip(choices, losses, strict=True):
        if choice.rank is not None:
            lost.append(loss(choice.rank))
    return math.fsum(lost)


class Budgets(ABC):
    """What the layers become within a budget, each by itself or in a group that shares a basis."""

    def __init__(
        self, recipe: Recipe, layers: Sequence[TensorInfo], groups: Sequence[Group]
    ) -> None:
        self.recipe, self.layers, self.groups = recipe, layers, groups

    @abstractmethod
    def least(self) -> dict[str, Choice]:
        """The smallest choice for every layer."""

    @abstractmethod
    def choose(self, budget: int) -> Mapping[str, Choice]:
        """The best choices that take at most `budget`, or else the smallest."""


class RankBudgets(Budgets):
    """By ranks alone. options and losses are of layers and of groups' stacks, by name."""

    def __init__(
        self,
        recipe: Recipe,
        layers: Sequence[TensorInfo],
        groups: Sequence[Group],
        options: Mapping[str, Options],
        losses: Mapping[str, Sequence[float]],
    ) -> None:
        super().__init__(recipe, layers, groups)
        self.options = options
        self.losses = losses

    def least(self) -> dict[str, Choice]:
        return {tensor.name: _least(self.options[tensor.name]) for tensor in self.layers}

    def choose(self, budget: int) -> Mapping[str, Choice]:
        even = uniform_within([self.options[tensor.name] for tensor in self.layers], budget)
        return self.spend(budget, even)

    def spend(self, budget: int, even: Sequence[Choice]) -> Mapping[str, Choice]:
        """The best choices within `budget`; even are those without groups that are all alike."""
        if self.recipe.allocate != "global":
            return by_name(self.layers, even)
        menus = {}
        if self.groups:
            menus = {name: menu_of(o, self._loss_at(name)) for name, o in self.options.items()}

        def allocate(present: Sequence[TensorInfo]) -> Allocation:
            options = [self.options[tensor.name] for tensor in present]
            losses = [self._loss_at(tensor.name) for tensor in present]
            alike = even if present == self.layers else uniform_within(options, budget)
            choices = _globally(self.recipe, options, losses, alike, budget)
            return Allocation(by_name(present, choices), _total_loss(choices, losses))

        shared = share_where_it_pays(
            self.layers, self.groups, menus, budget, allocate, self.recipe.share
        )
        return shared.choices

    def _loss_at(self, name: str) -> Callable[[int], float]:
        return self.losses.get(name, ()).__getitem__


class PackedBudgets(Budgets):
    """By ranks and bits. menus are of layers and of groups' stacks, by name."""

    def __init__(
        self,
        recipe: Recipe,
        layers: Sequence[TensorInfo],
        groups: Sequence[Group],
        menus: Mapping[str, Menu],
    ) -> None:
        super().__init__(recipe, layers, groups)
        self.menus = menus

    def least(self) -> dict[str, Choice]:
        none = Choice(None, "no packing saves")
        smallest = [self.menus[tensor.name].smallest for tensor in self.layers]
        return by_name(self.layers, [point.choice or none for point in smallest])

    def choose(self, budget: int) -> Mapping[str, Choice]:
        def allocate(present: Sequence[TensorInfo]) -> Allocation:
            points = allocate_menus([self.menus[tensor.name] for tensor in present], budget)
            choices = [point.choice or Choice(None) for point in points]
            loss = math.fsum(point.loss for point in points)
            return Allocation(by_name(present, choices), loss)

        shared = share_where_it_pays(
            self.layers, self.groups, self.menus, budget, allocate, self.recipe.share
        )
        return shared.choices


def _least(option: Options) -> Choice:
    """The smallest choice for a layer."""
    if not option.ranks:
        return Choice(None, "no rank saves bytes")
    return Choice(option.ranks[0])


def by_name(layers: Sequence[TensorInfo], choices: Sequence[Choice]) -> dict[str, Choice]:
    """The choice of each layer under its name."""
    return {tensor.name: choice for tensor, choice in zip(layers, choices, strict=True)}
