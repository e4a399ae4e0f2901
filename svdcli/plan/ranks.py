"""How many singular values each layer keeps.

A policy looks at shapes, at what a rank costs, and, where it must, at the spectra; it returns a rank for each layer or None
for "leave it dense". Cost is counted in the unit of the budget: parameters for --rank and --keep, bytes for --size.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from svdcli.plan.layout import largest_saving_rank, stored_bytes, stored_parameters
from svdcli.plan.recipe import Recipe
from svdcli.plan.tensors import FACTORED_DTYPES, TensorInfo


@dataclass(frozen=True)
class Options:
    """The ranks open to one layer and what each costs.

    ranks ascend; every one of them saves bytes. costs[i] belongs to ranks[i]; dense_cost to leaving the layer as it is.
    """

    tensor: TensorInfo
    ranks: Sequence[int]
    costs: Sequence[int]
    dense_cost: int
    largest: int

    def cost(self, rank: int | None) -> int:
        return self.dense_cost if rank is None else self.costs[self.ranks.index(rank)]

    def affordable(self, cost: float) -> int | None:
        """The largest rank that costs at most `cost`; None where that is dense or where no rank saves."""
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
    largest = largest_saving_rank(tensor, recipe.layout, dtype)
    ranks = range(recipe.multiple_of, largest + 1, recipe.multiple_of)
    costs: list[int]
    if unit == "bytes":
        costs = [stored_bytes(tensor, rank, recipe.layout, dtype) for rank in ranks]
        return Options(tensor, ranks, costs, tensor.nbytes, largest)
    costs = [stored_parameters(tensor.shape, rank, recipe.layout) for rank in ranks]
    return Options(tensor, ranks, costs, tensor.parameters, largest)


def fixed_rank(options: Options, rank: int) -> Choice:
    """The same rank for every layer, rounded down to the multiple, clipped where the layer is smaller."""
    if not options.ranks:
        return _no_rank(options)
    step = options.ranks[0]
    wanted = max(step, rank // step * step)
    if wanted > options.ranks[-1]:
        limit = options.largest
        clip = f" (clipped to {min(options.tensor.shape)})" if rank > min(options.tensor.shape) else ""
        return Choice(None, f"rank {rank}{clip} would not save bytes; at most {limit} does")
    return Choice(wanted)


def uniform(options: Sequence[Options], keep: float) -> list[Choice]:
    """Every layer keeps the same share of its own cost."""
    return [_choice(o, o.affordable(keep * o.dense_cost), f"keep {keep:g} leaves nothing to remove") for o in options]


def uniform_within(options: Sequence[Options], budget: int) -> list[Choice]:
    """The largest common share that fits the budget, then single ranks where they still fit."""
    low, high = 0.0, 1.0
    if sum(o.dense_cost for o in options) <= budget:
        return uniform(options, 1.0)
    for _ in range(60):
        middle = (low + high) / 2
        spent = sum(o.cost(c.rank) for o, c in zip(options, uniform(options, middle), strict=True))
        low, high = (middle, high) if spent <= budget else (low, middle)
    ranks = [c.rank for c in uniform(options, low)]
    left = budget - sum(o.cost(rank) for o, rank in zip(options, ranks, strict=True))
    _round_up(options, ranks, left)
    return [_choice(o, rank, "the budget allows the whole layer") for o, rank in zip(options, ranks, strict=True)]


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
        return Choice(None, f"{target} needs rank {rank}, which would not save bytes; at most {options.largest} does")
    return Choice(rank)


def rounding_energy(dtype: str) -> float:
    """An upper estimate of the relative squared error that storing the factors in `dtype` adds."""
    return 2.0 * FACTORED_DTYPES[dtype] ** 2


def tails_of(energies: Sequence[float], total: float) -> list[float]:
    """Share of `total` beyond each rank 0 .. len(energies), from squared singular values in descending order."""
    backwards = itertools.accumulate(reversed(energies), initial=0.0)
    tails = [min(1.0, max(0.0, tail / total)) if total > 0 else 0.0 for tail in backwards]
    return tails[::-1]


def _no_rank(options: Options) -> Choice:
    if options.largest:
        return Choice(None, f"no multiple of the rank step saves bytes; at most {options.largest} does")
    return Choice(None, "no rank saves bytes in this dtype and layout")


def _choice(options: Options, rank: int | None, reason: str) -> Choice:
    if not options.ranks:
        return _no_rank(options)
    return Choice(rank, "" if rank is not None else reason)


# Global allocation ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    cost: int
    loss: float
    rank: int | None


def allocate_globally(
    options: Sequence[Options],
    losses: Sequence[Callable[[int], float]],
    budget: int,
    floors: Sequence[int],
) -> list[Choice]:
    """Ranks that minimise the summed loss within `budget`, each layer at least at its floor or left dense.

    losses[i](rank) is layer i's loss at that rank; dense costs nothing. A multiple-choice knapsack: the lower convex hull of
    (cost, loss) of each layer, steepest segments first (Sinha and Zoltners, 1979), then what still fits, best gain first.
    Where even the floors do not fit, they give way, as little as needed.
    """
    points = [_points(o, loss, floor) for o, loss, floor in zip(options, losses, floors, strict=True)]
    if sum(p[0].cost for p in points) > budget:
        points = [_points(o, loss, 1) for o, loss in zip(options, losses, strict=True)]
    best = _climb(points, budget)
    for at in range(len(points)) if len(points) <= 400 else ():
        # A dense point far off the hull's end is an all-or-nothing step that the climb can miss.
        for forced in (points[at][-1:], points[at][:-1]):
            if (forced and forced[-1].rank is not points[at][-1].rank) or len(forced) == 1:
                trial = _climb([*points[:at], forced, *points[at + 1 :]], budget)
                if _fits(trial, budget) and _total(trial) < _total(best) - 1e-15:
                    best = trial
    return [
        _choice(o, point.rank, "worth more whole than the same bytes elsewhere") for o, point in zip(options, best, strict=True)
    ]


def _points(options: Options, loss: Callable[[int], float], floor: int) -> list[_Point]:
    """All choices of one layer by rising cost; a dense layer loses nothing."""
    at = bisect.bisect_left(options.ranks, floor) if options.ranks else 0
    at = min(at, max(0, len(options.ranks) - 1))
    ranked = [_Point(options.costs[i], loss(options.ranks[i]), options.ranks[i]) for i in range(at, len(options.ranks))]
    return [*ranked, _Point(options.dense_cost, 0.0, None)]


def _hull(points: Sequence[_Point]) -> list[_Point]:
    """The lower convex hull: segments of falling slope, none of which goes up."""
    hull: list[_Point] = []
    for point in points:
        while hull and point.loss <= hull[-1].loss and point.cost <= hull[-1].cost:
            hull.pop()
        if hull and point.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _gain(low: _Point, high: _Point) -> float:
    """Loss removed per unit of cost."""
    return (low.loss - high.loss) / (high.cost - low.cost)


def _climb(points: Sequence[Sequence[_Point]], budget: int) -> list[_Point]:
    hulls = [_hull(choices) for choices in points]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(point.cost for point in chosen)
    steps = sorted(
        (-_gain(low, high), at, i) for at, hull in enumerate(hulls) for i, (low, high) in enumerate(itertools.pairwise(hull))
    )
    blocked: set[int] = set()
    for _, at, i in steps:
        extra = hulls[at][i + 1].cost - hulls[at][i].cost
        if at in blocked or extra > left:
            blocked.add(at)
            continue
        chosen[at], left = hulls[at][i + 1], left - extra
    return _fill(points, chosen, left)


def _fill(points: Sequence[Sequence[_Point]], chosen: list[_Point], left: int) -> list[_Point]:
    """Spend what is left: again and again the single change that removes most loss and still fits."""
    costs = [[point.cost for point in choices] for choices in points]
    best_at_cost = [list(itertools.accumulate(choices, _better)) for choices in points]
    while left > 0:
        best, best_at = 0.0, -1
        for at, point in enumerate(chosen):
            last = bisect.bisect_right(costs[at], point.cost + left) - 1
            gain = point.loss - best_at_cost[at][last].loss if last >= 0 else 0.0
            if gain > best:
                best, best_at = gain, at
        if best_at < 0:
            break
        last = bisect.bisect_right(costs[best_at], chosen[best_at].cost + left) - 1
        left -= best_at_cost[best_at][last].cost - chosen[best_at].cost
        chosen[best_at] = best_at_cost[best_at][last]
    return chosen


def _better(one: _Point, other: _Point) -> _Point:
    return one if one.loss <= other.loss else other


def _fits(points: Sequence[_Point], budget: int) -> bool:
    return sum(point.cost for point in points) <= budget


def _total(points: Sequence[_Point]) -> float:
    return math.fsum(point.loss for point in points)
