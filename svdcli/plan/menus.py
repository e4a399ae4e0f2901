"""What a layer may become where its numbers may take fewer bits: itself or factors, packed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from svdcli.plan.knapsack import Menu, Point
from svdcli.plan.layouts import DENSE, FACTORED, LAYOUTS, WHOLE
from svdcli.plan.packing import Packing
from svdcli.plan.ranks import Choice, rank_step
from svdcli.plan.recipe import Recipe
from svdcli.plan.tensors import TensorInfo

# Shares of the full rank at which rounding is predicted; what lies between is interpolated.
_PREDICTED_AT = (1 / 16, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75)


@dataclass(frozen=True)
class Trial:
    """One way of packing a layer, whose rounding is to be predicted."""

    layout: str
    rank: int
    packing: Packing


@dataclass(frozen=True)
class Rounding:
    """What the rounding of a trial adds to a layer's squared error, as a share of its energy."""

    trial: Trial
    share: float


def trials_of(tensor: TensorInfo, recipe: Recipe, *, shared: bool = False) -> list[Trial]:
    """The ways of packing a layer that tell what all others will lose. shared says that it is a
    group's: whole matrices have no basis to share."""
    full = min(tensor.shape)
    trials = []
    for packing in recipe.packings:
        if recipe.packs_whole:
            if not packing.misfit(tensor.shape[1]):
                trials.append(Trial(DENSE, full, packing))
            continue
        if not shared:
            trials.append(Trial(WHOLE, full, packing))
        step = rank_step(recipe, packing)
        ranks = {step * round(share * full / step) for share in _PREDICTED_AT}
        trials += [Trial(FACTORED, rank, packing) for rank in sorted(ranks) if 0 < rank <= full]
    return trials


def packed_menu(
    tensor: TensorInfo,
    recipe: Recipe,
    losses: Sequence[float],
    roundings: Sequence[Rounding],
    extra_bytes: int = 0,
) -> Menu:
    """Every choice for a layer, with its bytes and what it loses: at its rank (losses[r]), and by
    rounding. losses[0] is that of the layer's whole energy; extra_bytes are those of what is
    stored besides its matrices."""
    dtype = recipe.dtype or tensor.dtype
    points = []
    for packing in recipe.packings:
        alike = [rounding for rounding in roundings if rounding.trial.packing == packing]
        whole = [rounding for rounding in alike if rounding.trial.layout in (WHOLE, DENSE)]
        factored = [rounding for rounding in alike if rounding.trial.layout == FACTORED]

        # the matrix itself
        most = LAYOUTS[WHOLE].nbytes(tensor, min(tensor.shape), dtype, packing)
        for rounding in whole:
            layout = rounding.trial.layout
            most = LAYOUTS[layout].nbytes(tensor, rounding.trial.rank, dtype, packing)
            choice = Choice(rounding.trial.rank, "", layout, packing)
            points.append(Point(most, losses[0] * rounding.share, choice))

        # factors that take fewer bytes than that
        step = rank_step(recipe, packing)
        for rank in range(step, min(tensor.shape) + 1, step) if factored else ():
            nbytes = extra_bytes + LAYOUTS[FACTORED].nbytes(tensor, rank, dtype, packing)
            if nbytes >= most:
                break
            loss = losses[rank] + losses[0] * _interpolated(factored, rank)
            points.append(Point(nbytes, loss, Choice(rank, "", FACTORED, packing)))
    dense = Point(tensor.nbytes, 0.0, None)
    return Menu(_undominated(points, tensor.nbytes), dense)


def rounding_share(roundings: Sequence[Rounding], choice: Choice) -> float:
    """What the rounding of a choice adds, as a share of the layer's energy."""
    alike = [
        rounding
        for rounding in roundings
        if (rounding.trial.layout, rounding.trial.packing) == (choice.layout, choice.packing)
    ]
    return _interpolated(alike, int(choice.rank or 0)) if alike else 0.0


def _undominated(points: Sequence[Point], below: int) -> list[Point]:
    """By rising cost, those that lose less than every cheaper one."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.cost, point.loss)):
        if point.cost < below and (not kept or point.loss < kept[-1].loss):
            kept.append(point)
    return kept


def _interpolated(known: Sequence[Rounding], rank: int) -> float:
    """The share of the energy that rounding adds at a rank: along straight lines in its logarithm
    between the ranks at which it is known, and level beyond."""
    points = []
    for rounding in known:
        points.append((rounding.trial.rank, math.log(max(rounding.share, 1e-300))))
    if rank <= points[0][0]:
        return math.exp(points[0][1])
    for (low, low_log), (high, high_log) in itertools.pairwise(points):
        if rank <= high:
            share = (rank - low) / (high - low)
            return math.exp(low_log + share * (high_log - low_log))
    return math.exp(points[-1][1])
