"""One budget over all layers: the choice of a rank for each that loses least."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from svdcli.plan.ranks import Choice, Options, choice_of

# Global allocation --------------------------------------------------------------------------------


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
    """Ranks that minimise the summed loss within `budget`, each layer at least at its floor or left
    dense.

    losses[i](rank) is layer i's loss at that rank; dense loses nothing. A multiple-choice knapsack:
    the lower convex hull of (cost, loss) of each layer, steepest segments first (Sinha and
    Zoltners, 1979), then branch and bound among the layers for which it is a close call. Where even
    the floors do not fit, they give way.
    """
    menus = [_menu(o, loss, floor) for o, loss, floor in zip(options, losses, floors, strict=True)]
    if sum(menu.smallest.cost for menu in menus) > budget:
        menus = [_menu(o, loss, 1) for o, loss in zip(options, losses, strict=True)]
    best = _search(menus, budget)
    reason = "worth more whole than the same bytes elsewhere"
    return [choice_of(o, point.rank, reason) for o, point in zip(options, best, strict=True)]


@dataclass(frozen=True)
class _Menu:
    """All choices of one layer: ranked ones by rising cost, and staying dense."""

    ranked: list[_Point]
    dense: _Point

    @property
    def smallest(self) -> _Point:
        return self.ranked[0] if self.ranked else self.dense


def _menu(options: Options, loss: Callable[[int], float], floor: int) -> _Menu:
    at = min(bisect.bisect_left(options.ranks, floor), max(0, len(options.ranks) - 1))
    ranked = [
        _Point(options.costs[i], loss(options.ranks[i]), options.ranks[i])
        for i in range(at, len(options.ranks))
    ]
    return _Menu(ranked, _Point(options.dense_cost, 0.0, None))


def _hull(points: Sequence[_Point]) -> list[_Point]:
    """The lower convex hull: each segment flatter than the one before, none of which goes up."""
    hull: list[_Point] = []
    for point in points:
        if hull and point.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) < _gain(hull[-2], point) * (1 - 1e-12):
            hull.pop()
        hull.append(point)
    return hull


def _gain(low: _Point, high: _Point) -> float:
    """Loss removed per unit of cost."""
    return (low.loss - high.loss) / (high.cost - low.cost)


@dataclass(frozen=True)
class _Step:
    gain: float
    at: int
    target: _Point
    extra: int


def _steps(hulls: Sequence[Sequence[_Point]]) -> list[_Step]:
    """Every segment of every hull, the one that removes most loss per cost first, each layer's in
    order."""
    steps = []
    for at, hull in enumerate(hulls):
        gain = math.inf
        for low, high in itertools.pairwise(hull):
            gain = min(gain, _gain(low, high))  # rounding must not turn two equal segments round
            steps.append(_Step(gain, at, high, high.cost - low.cost))
    return sorted(steps, key=lambda step: -step.gain)


def _climb(
    menus: Sequence[_Menu], start: Sequence[_Point], steps: Sequence[_Step], budget: int
) -> tuple[list[_Point], float]:
    """Take steps while they fit; a layer whose next step does not fit stops as far on the way as it
    can. Also the gain at which the budget ran out."""
    chosen, blocked, price = list(start), set[int](), math.inf
    left = budget - sum(point.cost for point in start)
    for step in steps:
        if step.at in blocked:
            continue
        if step.extra > left:
            blocked.add(step.at)
            price = min(price, step.gain)
            partial = _affordable(menus[step.at], chosen[step.at], left)
            chosen[step.at], left = partial, left - (partial.cost - chosen[step.at].cost)
        else:
            chosen[step.at], left = step.target, left - step.extra
    return chosen, 0.0 if math.isinf(price) else price


_CLOSE_CALLS = 16


_LABELS = 1000


def _search(menus: Sequence[_Menu], budget: int) -> list[_Point]:
    hulls = [_hull([*menu.ranked, menu.dense]) for menu in menus]
    relaxed, price = _climb(menus, [hull[0] for hull in hulls], _steps(hulls), budget)
    best = _fill(menus, relaxed, budget)
    if price == 0:
        return best
    close = sorted(range(len(menus)), key=lambda at: _indifference(menus[at], price))[:_CLOSE_CALLS]
    for at, point in _polish(menus, close, best, price, budget).items():
        best[at] = point
    return best


def _reduced(menu: _Menu, price: float) -> list[tuple[float, _Point]]:
    """What each choice loses against the layer's best one when cost has this price, least first."""
    prices = [(point.loss + price * point.cost, point) for point in (*menu.ranked, menu.dense)]
    least = min(value for value, _ in prices)
    return sorted(((value - least, point) for value, point in prices), key=lambda item: item[0])


def _indifference(menu: _Menu, price: float) -> float:
    """How little the second best choice loses against the best one."""
    return _reduced(menu, price)[1][0] if menu.ranked else math.inf


def _polish(
    menus: Sequence[_Menu], close: Sequence[int], best: Sequence[_Point], price: float, budget: int
) -> dict[int, _Point]:
    """The best choices for the layers in `close` while the others stay: branch and bound with the
    Lagrangian bound.

    A choice whose reduced losses add up to more than the gap between what is known and the bound
    cannot be in a better solution. Exact where never more than _LABELS partial solutions are
    undominated; else the most promising go on.
    """
    room = budget - sum(point.cost for at, point in enumerate(best) if at not in set(close))
    known = math.fsum(best[at].loss for at in close)
    reduced = [_reduced(menus[at], price) for at in close]
    bound = (
        math.fsum(items[0][1].loss + price * items[0][1].cost for items in reduced) - price * room
    )
    gap = known - bound
    cheapest = [min(point.cost for _, point in items) for items in reduced]
    labels: list[tuple[int, float, float, tuple[_Point, ...]]] = [(0, 0.0, 0.0, ())]
    for i, items in enumerate(reduced):
        rest = room - sum(cheapest[i + 1 :])
        grown = [
            (cost + point.cost, loss + point.loss, spent + extra, (*path, point))
            for cost, loss, spent, path in labels
            for extra, point in itertools.takewhile(lambda item: item[0] <= gap, items)
            if spent + extra <= gap and cost + point.cost <= rest
        ]
        labels = _undominated(grown)
    better = min(labels, key=lambda label: label[1], default=None)
    if better is None or better[1] >= known:
        return {}
    return dict(zip(close, better[3], strict=True))


def _undominated(
    labels: list[tuple[int, float, float, tuple[_Point, ...]]],
) -> list[tuple[int, float, float, tuple[_Point, ...]]]:
    """Partial solutions that no other beats in both cost and loss, the _LABELS most promising of
    them."""
    kept: list[tuple[int, float, float, tuple[_Point, ...]]] = []
    for label in sorted(labels, key=lambda label: label[:2]):
        if not kept or label[1] < kept[-1][1]:
            kept.append(label)
    return sorted(kept, key=lambda label: label[2])[:_LABELS]


def _fill(menus: Sequence[_Menu], chosen: Sequence[_Point], budget: int) -> list[_Point]:
    """Spend what is left: again and again the single change that removes most loss and still
    fits."""
    filled = list(chosen)
    left = budget - sum(point.cost for point in filled)
    while left > 0:
        found = [
            (_affordable(menu, point, left), at)
            for at, (menu, point) in enumerate(zip(menus, filled, strict=True))
        ]
        best, at = max(
            found, key=lambda item: filled[item[1]].loss - item[0].loss, default=(None, -1)
        )
        if best is None or best.loss >= filled[at].loss:
            break
        left -= best.cost - filled[at].cost
        filled[at] = best
    return filled


def _affordable(menu: _Menu, point: _Point, left: int) -> _Point:
    """The best choice that costs at most `left` more; loss falls with cost, so it is the dearest
    one."""
    if point.rank is None or menu.dense.cost <= point.cost + left:
        return menu.dense
    at = bisect.bisect_right(menu.ranked, point.cost + left, key=lambda p: p.cost)
    return menu.ranked[max(0, at - 1)]
