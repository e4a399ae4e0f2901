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
from dataclasses import dataclass

from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.recipe import Recipe
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo


@dataclass(frozen=True)
class Options:
    """The ranks open to one layer and what each costs.

    ranks ascend; every one of them saves bytes. costs[i] belongs to ranks[i]; dense_cost to leaving
    the layer as it is.
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
        return self.dense_cost if rank is None else self.costs[self.ranks.index(rank)]

    def affordable(self, cost: float) -> int | None:
        """The largest rank that costs at most `cost`; None where that is dense or where no rank
        saves."""
        if not self.ranks or cost >= self.dense_cost:
            return None
        at = bisect.bisect_right(self.costs, cost)
        return self.ranks[max(0, at - 1)]


@dataclass(frozen=True)
class Choice:
    """A rank, or None with the reason why the layer stays dense."""

    rank: int | None
    reason: str = ""


def options_of(tensor: TensorInfo, recipe: Recipe, *, unit: str) -> Options:
    """Every rank of this layer that saves, with its cost in `unit` ("parameters" or "bytes")."""
    dtype = recipe.dtype or tensor.dtype
    layout = LAYOUTS[recipe.layout]
    largest = layout.largest_saving_rank(tensor, dtype)
    ranks = range(recipe.multiple_of, largest + 1, recipe.multiple_of)
    costs: list[int]
    if unit == "bytes":
        costs = [layout.nbytes(tensor, rank, dtype) for rank in ranks]
        return Options(tensor, ranks, costs, tensor.nbytes, largest)
    costs = [layout.parameters(tensor.shape, rank) for rank in ranks]
    return Options(tensor, ranks, costs, tensor.parameters, largest)


def fixed_rank(options: Options, rank: int) -> Choice:
    """The same rank for every layer, rounded down to the multiple, clipped where the layer is
    smaller."""
    if not options.ranks:
        return _no_rank(options)
    step = options.ranks[0]
    wanted = max(step, rank // step * step)
    if wanted > options.ranks[-1]:
        limit = options.largest
        clip = (
            f" (clipped to {min(options.tensor.shape)})" if rank > min(options.tensor.shape) else ""
        )
        return Choice(None, f"rank {rank}{clip} would not save bytes; at most {limit} does")
    return Choice(wanted)


def uniform(options: Sequence[Options], keep: float) -> list[Choice]:
    """Every layer keeps the same share of its own cost."""
    return [
        choice_of(o, o.affordable(keep * o.dense_cost), f"keep {keep:g} leaves nothing to remove")
        for o in options
    ]


def uniform_within(options: Sequence[Options], budget: int) -> list[Choice]:
    """The largest common share that fits the budget, then single ranks where they still fit."""
    low, high = 0.0, 1.0
    if sum(o.dense_cost for o in options) <= budget:
        return [choice_of(option, None, "the size holds it whole") for option in options]
    for _ in range(60):
        middle = (low + high) / 2
        spent = sum(o.cost(c.rank) for o, c in zip(options, uniform(options, middle), strict=True))
        low, high = (middle, high) if spent <= budget else (low, middle)
    ranks = [c.rank for c in uniform(options, low)]
    left = budget - sum(o.cost(rank) for o, rank in zip(options, ranks, strict=True))
    _round_up(options, ranks, left)
    return [
        choice_of(o, rank, "the size holds it whole")
        for o, rank in zip(options, ranks, strict=True)
    ]


def _round_up(options: Sequence[Options], ranks: list[int | None], left: int) -> None:
    """Spend what a common share leaves over: one more step of rank, layer after layer."""
    grew = True
    while grew:
        grew = False
        for at, option in enumerate(options):
            rank = ranks[at]
            following = None if rank is None else rank + option.ranks[0]
            if rank is None or following is None or following > option.ranks[-1]:
                continue
            extra = option.cost(following) - option.cost(rank)
            if extra <= left:
                ranks[at], left, grew = following, left - extra, True


def by_tail(options: Options, tails: Sequence[float], allowed: float, target: str) -> Choice:
    """The smallest rank whose tail (share of energy given up) is at most `allowed`.

    tails[r] is the tail at rank r, for r = 0 .. min(m, n); it does not ascend.
    """
    if not options.ranks:
        return _no_rank(options)
    needed = bisect.bisect_left(tails, -allowed, key=lambda tail: -tail)
    step = options.ranks[0]
    rank = max(step, math.ceil(needed / step) * step)
    if rank > options.ranks[-1]:
        return Choice(
            None,
            f"{target} needs rank {rank}, which would not save bytes; at most "
            f"{options.largest} does",
        )
    return Choice(rank)


def rounding_energy(dtype: str, layout: str) -> float:
    """An upper estimate of the relative squared error that storing a layer in `dtype` adds."""
    return LAYOUTS[layout].usual_rounding * FACTORED_DTYPES[dtype] ** 2


def tails_of(energies: Sequence[float], total: float) -> list[float]:
    """Share of `total` beyond each rank 0 .. len(energies), from squared singular values in
    descending order."""
    backwards = itertools.accumulate(reversed(energies), initial=0.0)
    tails = [min(1.0, max(0.0, tail / total)) if total > 0 else 0.0 for tail in backwards]
    return tails[::-1]


def _no_rank(options: Options) -> Choice:
    if options.largest:
        return Choice(
            None, f"no multiple of the rank step saves bytes; at most {options.largest} does"
        )
    return Choice(None, "no rank saves bytes in this dtype and layout")


def choice_of(options: Options, rank: int | None, reason: str) -> Choice:
    if not options.ranks:
        return _no_rank(options)
    return Choice(rank, "" if rank is not None else reason)
