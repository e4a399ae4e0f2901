"""One budget over all layers: the choice of a rank for each that loses least."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from svdcli.plan.ranks import Choice, Options, choice_of

# Branch and bound looks at so many layers at most: the closest calls at the price of the budget.
_CLOSE_CALLS = 16
_WORTH_MORE = "worth more whole than the same bytes elsewhere"
_ALL_FIT = "the budget holds every layer as it is"
# So many partial solutions go on from one layer to the next.
_PARTIAL_SOLUTIONS = 1000


@dataclass(frozen=True)
class Point:
    """One choice for a layer: its cost, its loss, and what it is, or None for staying dense."""

    cost: int
    loss: float
    choice: Choice | None


def allocate_globally(
    options: Sequence[Options],
    losses: Sequence[Callable[[int], float]],
    budget: int,
    floors: Sequence[int],
) -> list[Choice]:
    """Ranks that minimise the summed loss within `budget`, each layer at least at its floor or left
    dense.

    losses[i](rank) is layer i's loss at that rank; dense loses nothing. A multiple-choice knapsack:
    the lower convex hull of (cost, loss) of each layer, steepest segments first (Sinha and
    Zoltners, 1979), then branch and bound among the layers for which it is a close call. Where even
    the floors do not fit, they give way.
    """
    menus = [menu_of(*layer) for layer in zip(options, losses, floors, strict=True)]
    if sum(menu.smallest.cost for menu in menus) > budget:
        menus = [menu_of(*layer) for layer in zip(options, losses, strict=True)]
    choices = []
    for option, point in zip(options, _search(menus, budget), strict=True):
        rank = None if point.choice is None else point.choice.rank
        choices.append(choice_of(option, rank, _WORTH_MORE))
    return choices


def allocate_menus(menus: Sequence[Menu], budget: int) -> list[Point]:
    """The same for choices of any kind, without floors; staying dense, too, is a choice then."""
    if sum(menu.dense.cost for menu in menus) <= budget:
        return [replace(menu.dense, choice=Choice(None, _ALL_FIT)) for menu in menus]
    dense = Choice(None, _WORTH_MORE)
    return [replace(point, choice=point.choice or dense) for point in _search(menus, budget)]


def price_of(menus: Sequence[Menu], budget: int) -> float:
    """The loss removed per unit of cost where the budget runs out; 0 where it never does."""
    hulls = [_hull([*menu.ranked, menu.dense]) for menu in menus]
    left = budget - sum(hull[0].cost for hull in hulls)
    for step in _steps(hulls):
        left -= step.extra
        if left < 0:
            return step.gain
    return 0.0


def priced_loss(menu: Menu, price: float) -> float:
    """The least that a layer loses where cost has a price, that of its choice included."""
    return min(point.loss + price * point.cost for point in [*menu.ranked, menu.dense])


@dataclass(frozen=True)
class Menu:
    """All choices of one layer: those that save by rising cost and falling loss, and staying
    dense."""

    ranked: list[Point]
    dense: Point

    @property
    def smallest(self) -> Point:
        return self.ranked[0] if self.ranked else self.dense


def menu_of(options: Options, loss: Callable[[int], float], floor: int = 1) -> Menu:
    """The choices of one layer from its floor on; its largest rank where the floor is above it."""
    last = max(0, len(options.ranks) - 1)
    first = min(bisect.bisect_left(options.ranks, floor), last)
    ranks = options.ranks[first:]
    costs = options.costs[first:]
    ranked = [
        Point(cost, loss(rank), Choice(rank)) for rank, cost in zip(ranks, costs, strict=True)
    ]
    return Menu(ranked, Point(options.dense_cost, 0.0, None))


# The convex hulls, steepest segments first --------------------------------------------------------


def _hull(points: Sequence[Point]) -> list[Point]:
    """The lower convex hull: each segment flatter than the one before, none of which goes up."""
    hull: list[Point] = []
    for point in points:
        if hull and point.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) < _gain(hull[-2], point) * (1 - 1e-12):
            hull.pop()
        hull.append(point)
    return hull


def _gain(low: Point, high: Point) -> float:
    """Loss removed per unit of cost."""
    return (low.loss - high.loss) / (high.cost - low.cost)


@dataclass(frozen=True)
class _Step:
    """One segment of a layer's hull: the choice that it leads to, what that costs more, and the
    loss removed per unit of cost."""

    gain: float
    layer: int
    target: Point
    extra: int


def _steps(hulls: Sequence[Sequence[Point]]) -> list[_Step]:
    """Every segment of every hull, the one that removes most loss per cost first, each layer's in
    order."""
    steps = []
    for layer, hull in enumerate(hulls):
        gain = math.inf
        for low, high in itertools.pairwise(hull):
            gain = min(gain, _gain(low, high))  # rounding must not turn two equal segments round
            steps.append(_Step(gain, layer, high, high.cost - low.cost))
    return sorted(steps, key=lambda step: -step.gain)


def _climb(
    menus: Sequence[Menu], start: Sequence[Point], steps: Sequence[_Step], budget: int
) -> tuple[list[Point], float]:
    """Take steps while they fit; a layer whose next step does not fit stops as far on the way as it
    can.

    Also the price: the gain at which the budget ran out, 0 where it never did.
    """
    chosen = list(start)
    blocked: set[int] = set()
    price = math.inf
    left = budget - sum(point.cost for point in start)
    for step in steps:
        layer = step.layer
        if layer in blocked:
            continue
        target = step.target
        if step.extra > left:
            blocked.add(layer)
            price = min(price, step.gain)
            target = _affordable(menus[layer], chosen[layer], left)
        left -= target.cost - chosen[layer].cost
        chosen[layer] = target
    return chosen, 0.0 if math.isinf(price) else price


def _search(menus: Sequence[Menu], budget: int) -> list[Point]:
    """The best choices that are found for every layer: the hulls first, what is left over next,
    close calls last."""
    hulls = [_hull([*menu.ranked, menu.dense]) for menu in menus]
    cheapest = [hull[0] for hull in hulls]
    relaxed, price = _climb(menus, cheapest, _steps(hulls), budget)
    best = _fill(menus, relaxed, budget)
    if price == 0:  # the budget holds every layer at its best
        return best

    indifference = [_indifference(menu, price) for menu in menus]
    by_closeness = sorted(range(len(menus)), key=lambda layer: indifference[layer])
    better = _polish(menus, by_closeness[:_CLOSE_CALLS], best, price, budget)
    for layer, point in better.items():
        best[layer] = point
    return best


def _fill(menus: Sequence[Menu], chosen: Sequence[Point], budget: int) -> list[Point]:
    """Spend what is left: again and again the single change that removes most loss and still
    fits."""
    filled = list(chosen)
    left = budget - sum(point.cost for point in filled)
    while left > 0:
        best = None
        layer = -1
        for candidate, (menu, point) in enumerate(zip(menus, filled, strict=True)):
            change = _affordable(menu, point, left)
            removed = point.loss - change.loss
            if best is None or removed > filled[layer].loss - best.loss:
                best = change
                layer = candidate
        if best is None or best.loss >= filled[layer].loss:
            break
        left -= best.cost - filled[layer].cost
        filled[layer] = best
    return filled


def _affordable(menu: Menu, point: Point, left: int) -> Point:
    """The best choice that costs at most `left` more; loss falls with cost, so it is the dearest
    one."""
    most = point.cost + left
    if point.choice is None or menu.dense.cost <= most:
        return menu.dense
    above = bisect.bisect_right(menu.ranked, most, key=lambda ranked: ranked.cost)
    return menu.ranked[max(0, above - 1)]


# Branch and bound among the close calls -----------------------------------------------------------


@dataclass(frozen=True)
class _Reduced:
    """A choice, and what it loses against its layer's best one when cost has a price."""

    loss: float
    point: Point


def _reduced(menu: Menu, price: float) -> list[_Reduced]:
    """Every choice of a layer with its reduced loss at this price of cost, least first."""
    points = [*menu.ranked, menu.dense]
    priced = [point.loss + price * point.cost for point in points]
    least = min(priced)
    reduced = [
        _Reduced(priced_loss - least, point)
        for priced_loss, point in zip(priced, points, strict=True)
    ]
    return sorted(reduced, key=lambda choice: choice.loss)


def _indifference(menu: Menu, price: float) -> float:
    """How little the second best choice loses against the best one."""
    return _reduced(menu, price)[1].loss if menu.ranked else math.inf


class _Partial(NamedTuple):  # there are many, and dataclasses are slower to make
    """Choices for the first of the layers in question, with their sums: cost, loss, and what they
    lose against the layers' best choices at the price of the budget."""

    cost: int
    loss: float
    reduced: float
    points: tuple[Point, ...]


def _polish(
    menus: Sequence[Menu], close: Sequence[int], best: Sequence[Point], price: float, budget: int
) -> dict[int, Point]:
    """The best choices for the layers in `close` while the others stay: branch and bound with the
    Lagrangian bound.

    Exact where never more than _PARTIAL_SOLUTIONS partial solutions are undominated; else the most
    promising go on. Empty where nothing better than `best` is found.
    """
    # What the layers in question may cost together, once the others have theirs.
    fixed = set(range(len(menus))) - set(close)
    allowed = budget - sum(best[layer].cost for layer in fixed)

    # No solution loses less than the bound. Choices whose reduced losses add up to more than the
    # gap between the bound and the solution at hand cannot be in a better one.
    loss_at_hand = math.fsum(best[layer].loss for layer in close)
    reduced = [_reduced(menus[layer], price) for layer in close]
    best_at_price = [choices[0].point for choices in reduced]
    priced_loss = math.fsum(point.loss + price * point.cost for point in best_at_price)
    bound = priced_loss - price * allowed
    gap = loss_at_hand - bound

    # Grow partial solutions layer by layer. Each must leave the cheapest choice to every layer that
    # is still to come.
    cheapest = [min(choice.point.cost for choice in choices) for choices in reduced]
    partials = [_Partial(0, 0.0, 0.0, ())]
    for i, choices in enumerate(reduced):
        most = allowed - sum(cheapest[i + 1 :])
        grown = _grown(partials, choices, gap, most)
        partials = _undominated(grown)

    solution = min(partials, key=lambda partial: partial.loss, default=None)
    if solution is None or solution.loss >= loss_at_hand:
        return {}
    return dict(zip(close, solution.points, strict=True))


def _grown(
    partials: Sequence[_Partial], choices: Sequence[_Reduced], gap: float, most: int
) -> list[_Partial]:
    """Every partial solution with every choice for one more layer, within the gap and at a cost of
    at most `most`."""
    grown = []
    for partial in partials:
        for choice in choices:
            reduced = partial.reduced + choice.loss
            if reduced > gap:
                break  # choices come by rising loss
            cost = partial.cost + choice.point.cost
            if cost <= most:
                loss = partial.loss + choice.point.loss
                grown.append(_Partial(cost, loss, reduced, (*partial.points, choice.point)))
    return grown


def _undominated(partials: Sequence[_Partial]) -> list[_Partial]:
    """Partial solutions that no other beats in both cost and loss, the _PARTIAL_SOLUTIONS most
    promising of them."""
    kept: list[_Partial] = []
    by_cost = sorted(partials, key=lambda partial: (partial.cost, partial.loss))
    for partial in by_cost:
        if not kept or partial.loss < kept[-1].loss:
            kept.append(partial)
    most_promising = sorted(kept, key=lambda partial: partial.reduced)
    return most_promising[:_PARTIAL_SOLUTIONS]
