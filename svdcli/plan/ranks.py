"""How many singular values each layer keeps.

A policy looks at shapes, at what a rank costs, and, where it must, at the spectra; it returns a
rank for each layer or None for "leave it dense". Cost is counted in the unit of the budget:
parameters for --rank and --keep, bytes for --size.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.packing import PLAIN, Packing
from svdcli.plan.recipe import Recipe
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo

# What the inner dimension of a packed product must be a multiple of: torch's int8 kernel steps
# through it by 16, its int4 kernel by a group, the smallest of which has 32.
_KERNEL_STEPS = {16: 1, 8: 16, 4: 32}


@dataclass(frozen=True)
class Options:
    """The ranks open to one layer and what each costs.

    ranks ascend; every one of them saves bytes. costs[i] belongs to ranks[i]; dense_cost to leaving
    the layer as it is. largest is the largest rank that saves, a multiple of the rank step or not;
    0 where none does.
    """

    tensor: TensorInfo
    ranks: Sequence[int]
    costs: Sequence[int]
    dense_cost: int
    largest: int

    @property
    def least_cost(self) -> int:
        """Of the least rank, or of staying dense where no rank saves."""
        return self.costs[0] if self.ranks else self.dense_cost

    def cost(self, rank: int | None) -> int:
        """Of one of `ranks`, or of staying dense for None."""
        return self.dense_cost if rank is None else self.costs[self.ranks.index(rank)]

    def affordable(self, cost: float) -> int | None:
        """The largest rank that costs at most `cost`; None where that is dense or where no rank
        saves."""
        if not self.ranks or cost >= self.dense_cost:
            return None
        above = bisect.bisect_right(self.costs, cost)
        return self.ranks[max(0, above - 1)]


@dataclass(frozen=True)
class Choice:
    """A rank, or None with the reason why the layer stays dense. layout is another one than the
    recipe's, where it is; packing how each matrix is stored."""

    rank: int | None
    reason: str = ""
    layout: str = ""
    packing: Packing = PLAIN


def options_of(tensor: TensorInfo, recipe: Recipe, *, unit: str, extra_bytes: int = 0) -> Options:
    """Every rank of this layer that saves, with its cost in `unit` ("parameters" or "bytes").
    extra_bytes are the bytes of what is stored besides its matrices."""
    dtype = recipe.dtype or tensor.dtype
    packing = recipe.packings[0] if recipe.packings else PLAIN
    dense_cost = tensor.nbytes if unit == "bytes" else tensor.parameters
    any_name = replace(tensor, name="")
    step = rank_step(recipe, packing)
    ranks, costs, largest = _ranks(any_name, recipe.layout, dtype, packing, step, unit)
    if unit == "bytes" and extra_bytes:
        costs = [extra_bytes + cost for cost in costs]
    return Options(tensor, ranks, costs, dense_cost, largest)


@lru_cache(maxsize=32)
def _ranks(
    tensor: TensorInfo, layout: str, dtype: str, packing: Packing, step: int, unit: str
) -> tuple[Sequence[int], Sequence[int], int]:
    """(ranks that save, the cost of each, the largest rank that saves), which hundreds of layers of
    one shape have in common."""
    of = LAYOUTS[layout]
    largest = of.largest_saving_rank(tensor, dtype, packing)
    ranks = range(step, largest + 1, step)
    if unit == "bytes":
        return ranks, tuple(of.nbytes(tensor, rank, dtype, packing) for rank in ranks), largest
    return ranks, tuple(of.parameters(tensor.shape, rank) for rank in ranks), largest


def rank_step(recipe: Recipe, packing: Packing) -> int:
    """Ranks are multiples of this: of what the recipe says, and of what kernels for packed matrices
    want."""
    return math.lcm(recipe.multiple_of, _KERNEL_STEPS[packing.bits])


def fixed_rank(options: Options, rank: int) -> Choice:
    """The same rank for every layer, rounded down to the multiple, clipped where the layer is
    smaller."""
    if not options.ranks:
        return _no_rank(options)
    step = options.ranks[0]
    rounded = max(step, rank // step * step)
    if rounded <= options.ranks[-1]:
        return Choice(rounded)
    full_rank = min(options.tensor.shape)
    clip = f" (clipped to {full_rank})" if rank > full_rank else ""
    return Choice(None, f"rank {rank}{clip} would not save bytes; at most {options.largest} does")


def uniform(options: Sequence[Options], keep: float) -> list[Choice]:
    """Every layer keeps the same share of its own cost."""
    reason = f"keep {keep:g} leaves nothing to remove"
    return [choice_of(o, o.affordable(keep * o.dense_cost), reason) for o in options]


def uniform_within(options: Sequence[Options], budget: int) -> list[Choice]:
    """The largest common share that fits the budget, then single ranks where they still fit."""
    reason = "the size holds it whole"
    if sum(option.dense_cost for option in options) <= budget:
        return [choice_of(option, None, reason) for option in options]

    # The common share, by bisection: as many halvings as a float has digits, and some more.
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if cost_of(options, uniform(options, middle)) <= budget:
            low = middle
        else:
            high = middle

    # Whole ranks leave a rest, which single layers can use.
    even = uniform(options, low)
    ranks = [choice.rank for choice in even]
    _round_up(options, ranks, budget - cost_of(options, even))
    return [choice_of(option, rank, reason) for option, rank in zip(options, ranks, strict=True)]


def cost_of(options: Sequence[Options], choices: Sequence[Choice]) -> int:
    """What these choices cost in all."""
    return sum(option.cost(choice.rank) for option, choice in zip(options, choices, strict=True))


def _round_up(options: Sequence[Options], ranks: list[int | None], left: int) -> None:
    """Spend what a common share leaves over: one more step of rank, layer after layer."""
    grew = True
    while grew:
        grew = False
        for layer, option in enumerate(options):
            rank = ranks[layer]
            if rank is None or rank == option.ranks[-1]:
                continue
            following = rank + option.ranks[0]  # the first rank is the step
            extra = option.cost(following) - option.cost(rank)
            if extra <= left:
                ranks[layer] = following
                left -= extra
                grew = True


def by_tail(options: Options, tails: Sequence[float], allowed: float, target: str) -> Choice:
    """The smallest rank whose tail (share of energy given up) is at most `allowed`.

    tails[r] is the tail at rank r, for r = 0 .. min(m, n); it does not ascend.
    """
    if not options.ranks:
        return _no_rank(options)
    needed = bisect.bisect_left(tails, -allowed, key=lambda tail: -tail)
    step = options.ranks[0]
    rank = max(step, math.ceil(needed / step) * step)
    if rank <= options.ranks[-1]:
        return Choice(rank)
    return Choice(
        None,
        f"{target} needs rank {rank}, which would not save bytes; at most {options.largest} does",
    )


def rounding_energy(dtype: str, layout: str) -> float:
    """An upper estimate of the relative squared error that storing a layer in `dtype` adds."""
    return LAYOUTS[layout].usual_rounding * FACTORED_DTYPES[dtype] ** 2


def tails_of(energies: Sequence[float], total: float) -> list[float]:
    """Share of `total` beyond each rank 0 .. len(energies), from squared singular values in
    descending order."""
    if total <= 0:
        return [0.0] * (len(energies) + 1)
    # Summed from the smallest value on, so that none is lost extra_bytes a large one.
    from_the_end = itertools.accumulate(reversed(energies), initial=0.0)
    tails = [min(1.0, max(0.0, tail / total)) for tail in from_the_end]
    return tails[::-1]


def _no_rank(options: Options) -> Choice:
    if options.largest:
        return Choice(
            None, f"no multiple of the rank step saves bytes; at most {options.largest} does"
        )
    return Choice(None, "no rank saves bytes in this dtype and layout")


def choice_of(options: Options, rank: int | None, reason: str) -> Choice:
    """This rank, or dense for `reason`; for a layer without ranks, dense for that."""
    if not options.ranks:
        return _no_rank(options)
    if rank is None:
        return Choice(None, reason)
    return Choice(rank)
