"""One budget over all layers: the choice of a rank for each that loses least."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from svdcli.plan.ranks import Choice, Options, choice_of

# Branch and bound looks at so many layers at most: the closest calls at the price of the budget.
_CLOSE_CALLS = 16
_WORTH_MORE = "worth more whole than the same bytes elsewhere"
_ALL_FIT = "the budget holds every layer as it is"
# So many partial solutions go on from one layer to the next, in one search after the other.
_PARTIAL_SOLUTIONS = (30, 1000)
# So many times as many are looked at for them at first, within a loss that is found by halving.
_LOOKED_AT, _HALVINGS = 4, 20


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


@dataclass(frozen=True)
class _Partial:
    """Choices for the first of the layers in question, with their sums: cost, loss, and what they
    lose against the layers' best choices at the price of the budget. point is the choice for the
    last of these layers, before has those for the others."""

    cost: int
    loss: float
    reduced: float
    point: Point | None = None
    before: _Partial | None = None

    def points(self) -> list[Point]:
        """The choices, in the order of the layers."""
        earlier = [] if self.before is None else self.before.points()
        return earlier if self.point is None else [*earlier, self.point]


# A partial solution to be: cost, loss, a number of its own, reduced loss, and what it is made of.
# There are many, and tuples are the quickest to make and to sort.
_Row = tuple[int, float, int, float, _Partial, Point]


def _polish(
    menus: Sequence[Menu], close: Sequence[int], best: Sequence[Point], price: float, budget: int
) -> dict[int, Point]:
    """The best choices for the layers in `close` while the others stay: branch and bound with the
    Lagrangian bound.

    Exact where never more than the last of _PARTIAL_SOLUTIONS are undominated; else the most
    promising go on. Those of `best` where nothing better is found.
    """
    # What the layers in question may cost together, once the others have theirs.
    fixed = set(range(len(menus))) - set(close)
    allowed = budget - sum(best[layer].cost for layer in fixed)

    # No solution loses less than the bound.
    at_hand = [best[layer] for layer in close]
    reduced = [_reduced(menus[layer], price) for layer in close]
    best_at_price = [choices[0].point for choices in reduced]
    priced_loss = math.fsum(point.loss + price * point.cost for point in best_at_price)
    bound = priced_loss - price * allowed

    # A narrow search first: the better the solution at hand, the less is left to search.
    for width in _PARTIAL_SOLUTIONS:
        loss = math.fsum(point.loss for point in at_hand)
        solution = _searched(reduced, loss - bound, allowed, width)
        if solution is not None and solution.loss < loss:
            at_hand = solution.points()
    return dict(zip(close, at_hand, strict=True))


def _searched(
    reduced: Sequence[Sequence[_Reduced]], gap: float, allowed: int, width: int
) -> _Partial | None:
    """Grow partial solutions layer by layer, `width` of them at most, and return the one that loses
    least, None where none is within the gap.

    Choices whose reduced losses add up to more than the gap between the bound and the solution at
    hand cannot be in a better one. Each must leave the cheapest choice to every layer that is still
    to come.
    """
    cheapest = [min(choice.point.cost for choice in choices) for choices in reduced]
    partials = [_Partial(0, 0.0, 0.0)]
    for i, choices in enumerate(reduced):
        most = allowed - sum(cheapest[i + 1 :])
        partials = _grown(partials, choices, gap, most, width)
    return min(partials, key=lambda partial: partial.loss, default=None)


def _grown(
    partials: Sequence[_Partial],
    choices: Sequence[_Reduced],
    gap: float,
    most: int,
    width: int,
) -> list[_Partial]:
    """The partial solutions with one more layer, within the gap and at a cost of at most `most`,
    that no other beats in both cost and loss: the `width` most promising of them.

    What beats another has less reduced loss, too. So those with little of it tell which of them are
    beaten, and few of the millions have to be looked at.
    """
    wanted = _LOOKED_AT * width
    while True:
        near = _reach(partials, choices, gap, wanted)
        kept = _undominated(_rows(partials, choices, near, most))
        if near >= gap or len(kept) >= width:
            break
        wanted *= _LOOKED_AT
    kept.sort(key=lambda row: row[3])
    return [
        _Partial(cost, loss, reduced, point, before)
        for cost, loss, _, reduced, before, point in kept[:width]
    ]


def _reach(
    partials: Sequence[_Partial], choices: Sequence[_Reduced], gap: float, wanted: int
) -> float:
    """About the least reduced loss within which there are `wanted` partial solutions with one more
    layer; the gap where it has fewer."""
    losses = [choice.loss for choice in choices]  # rising

    def count(reach: float) -> int:
        return sum(bisect.bisect_right(losses, reach - each.reduced) for each in partials)

    if count(gap) <= wanted:
        return gap
    low, high = 0.0, gap
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if count(middle) < wanted:
            low = middle
        else:
            high = middle
    return high


def _rows(
    partials: Sequence[_Partial], choices: Sequence[_Reduced], reach: float, most: int
) -> list[_Row]:
    """Every partial solution with every choice for one more layer, within a reduced loss and at a
    cost of at most `most`."""
    table = [(each.point.cost, each.point.loss, each.loss, each.point) for each in choices]
    reduced = [each.loss for each in choices]  # rising
    rows: list[_Row] = []
    for place, partial in enumerate(partials):
        first = place * len(table)
        cost, loss, lost = partial.cost, partial.loss, partial.reduced
        within = bisect.bisect_right(reduced, reach - lost)
        rows += [
            (cost + cost_of, loss + loss_of, number, lost + more, partial, point)
            for number, (cost_of, loss_of, more, point) in enumerate(table[:within], first)
            if cost + cost_of <= most
        ]
    return rows


def _undominated(rows: list[_Row]) -> list[_Row]:
    """Those that no other beats in both cost and loss."""
    kept: list[_Row] = []
    least = math.inf
    rows.sort()
    for row in rows:
        if row[1] < least:
            kept.append(row)
            least = row[1]
    return kept
