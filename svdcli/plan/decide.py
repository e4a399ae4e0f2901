"""From what was asked and what was measured to a rank for every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from svdcli.errors import UsageError
from svdcli.plan.budget import (
    NOT_CALIBRATED,
    cost_of,
    note_of_missed_share,
    ranks_within_share,
    staying_dense,
)
from svdcli.plan.knapsack import allocate_globally
from svdcli.plan.plan import LayerPlan, Plan, Skipped
from svdcli.plan.ranks import (
    Choice,
    Options,
    by_tail,
    fixed_rank,
    options_of,
    rounding_energy,
    tails_of,
    uniform_within,
)
from svdcli.plan.recipe import Recipe
from svdcli.plan.tensors import TensorInfo
from svdcli.plan.words import WEIGHTED

# Up to this short side LAPACK's SVD takes milliseconds, and there is nothing to win with a Gram
# matrix.
_SVD_IS_CHEAP = 128
_SIZE_ROUNDS = 12
UNSOUND = "NaN or infinity, or float64 numbers whose squares leave its range"


@dataclass(frozen=True)
class LayerSpectrum:
    """What a look at one layer's numbers found.

    energies are its squared singular values in descending order, in the metric of the calibration
    where there is one; None where no policy needs them. metric says which that is ("" plain). bias
    is the layer's own, where it will be refitted. weight is the loss of the model that its whole
    energy stands for, where that was measured.
    """

    finite: bool
    energies: tuple[float, ...] | None = None
    metric: str = ""
    bias: TensorInfo | None = None
    loss_scale: float | None = None

    def tails(self) -> list[float]:
        """Share of the energy beyond each rank 0 .. min(m, n)."""
        return tails_of(self.energies or (), math.fsum(self.energies or ()))

    def losses(self) -> list[float]:
        """What each rank gives up: the predicted rise of the model's loss where it was measured
        (its share of weight) or follows from gradients (half the tail); else tails()."""
        scale = self.loss_scale if self.loss_scale is not None else 1.0
        if self.loss_scale is None and self.metric in ("diagonal", "full"):
            scale = 0.5 * math.fsum(self.energies or ())
        return [scale * tail for tail in self.tails()]


def needs_spectra(recipe: Recipe) -> bool:
    return (
        recipe.allocate == "global"
        or recipe.target in ("energy", "error")
        or recipe.calibration is not None
    )


def decide(
    recipe: Recipe,
    fingerprint: str,
    selected: Sequence[TensorInfo],
    skipped: Sequence[Skipped],
    measured: Mapping[str, LayerSpectrum],
    predict: Callable[[Plan], int],
    loss_unit: str = "",
) -> Plan:
    """A rank, or dense with a reason, for every selected layer.

    predict gives the bytes of the whole output under a plan; only --size asks for it.
    Raises UsageError where --size or --keep is below what can be reached.
    """
    out = {t.name: f"holds {UNSOUND}" for t in selected if not measured[t.name].finite}
    if recipe.calibration is not None:
        out |= {
            t.name: f"{NOT_CALIBRATED}: no input reached it, or no gradient"
            for t in selected
            if not measured[t.name].metric and t.name not in out
        }
    sound = [tensor for tensor in selected if tensor.name not in out]
    tails = {t.name: measured[t.name].tails() for t in sound} if needs_spectra(recipe) else {}
    lost = {t.name: measured[t.name].losses() for t in sound} if needs_spectra(recipe) else {}

    def plan_with(choices: Sequence[Choice]) -> Plan:
        by_name = {tensor.name: choice for tensor, choice in zip(sound, choices, strict=True)}
        by_name |= {name: Choice(None, reason) for name, reason in out.items()}
        layers = tuple(
            _layer_plan(t, by_name[t.name], recipe, lost.get(t.name), measured[t.name])
            for t in selected
        )
        return Plan(recipe, fingerprint, layers, tuple(skipped), loss_unit=loss_unit)

    unit = "bytes" if recipe.target == "size" else "parameters"
    options = [options_of(tensor, recipe, unit=unit) for tensor in sound]
    losses = [lost.get(tensor.name, []).__getitem__ for tensor in sound]
    if recipe.target == "size":
        return _within_size(recipe, options, losses, plan_with, predict)
    if recipe.target in ("energy", "error"):
        return plan_with([_bounded(o, recipe, tails[o.tensor.name]) for o in options])
    if recipe.target == "keep":
        choices, budget = ranks_within_share(recipe, selected, options, out)
    else:
        choices = [fixed_rank(option, int(recipe.value)) for option in options]
        budget = cost_of(options, choices)
    if recipe.allocate == "global":
        choices = _globally(recipe, options, losses, choices, budget)
    notes = (
        note_of_missed_share(recipe, selected, options, choices) if recipe.target == "keep" else ()
    )
    return replace(plan_with(choices), notes=notes)


def _layer_plan(
    tensor: TensorInfo,
    choice: Choice,
    recipe: Recipe,
    losses: Sequence[float] | None,
    measured: LayerSpectrum,
) -> LayerPlan:
    solver = WEIGHTED if measured.metric else recipe.solver
    if solver == "auto":
        solver = "svd" if min(tensor.shape) <= _SVD_IS_CHEAP else "gram"
    return LayerPlan(
        tensor=tensor,
        rank=choice.rank,
        layout=recipe.layout,
        stored_dtype=recipe.dtype or tensor.dtype,
        solver=solver,
        reason=choice.reason,
        loss=None if losses is None or choice.rank is None else float(f"{losses[choice.rank]:.6e}"),
        metric=measured.metric,
        bias=None if choice.rank is None else measured.bias,
    )


def _bounded(options: Options, recipe: Recipe, tails: Sequence[float]) -> Choice:
    """The smallest rank that keeps the bound after the factors were rounded to their dtype."""
    target = f"--{recipe.target} {recipe.value:g}"
    allowed = recipe.value**2 if recipe.target == "error" else 1 - recipe.value
    if recipe.target == "error":
        dtype = recipe.dtype or options.tensor.dtype
        allowed -= rounding_energy(dtype, recipe.layout)
        if allowed <= 0:
            return Choice(None, f"{target} is below what rounding to {dtype} alone may cost")
    return by_tail(options, tails, allowed, target)


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
        math.ceil(recipe.floor * (option.ranks[-1] if choice.rank is None else choice.rank))
        if option.ranks
        else 1
        for option, choice in zip(options, even, strict=True)
    ]
    best = allocate_globally(options, losses, budget, floors)

    def total(choices: Sequence[Choice]) -> float:
        return math.fsum(
            0.0 if c.rank is None else loss(c.rank) for c, loss in zip(choices, losses, strict=True)
        )

    return list(even) if cost_of(options, even) <= budget and total(even) <= total(best) else best


def _within_size(
    recipe: Recipe,
    options: Sequence[Options],
    losses: Sequence[Callable[[int], float]],
    plan_with: Callable[[Sequence[Choice]], Plan],
    predict: Callable[[Plan], int],
) -> Plan:
    """Never above the size, as close below as whole ranks allow. Headers grow with the plan, so it
    is asked again and again."""
    size = int(recipe.value)
    smallest = plan_with(
        [Choice(o.ranks[0]) if o.ranks else Choice(None, "no rank saves bytes") for o in options]
    )
    reachable = predict(smallest)
    if reachable > size:
        for _ in range(3):  # the record holds the size that was asked for, so its digits count too
            reachable = predict(replace(smallest, recipe=replace(recipe, value=reachable)))
        dense = {layer.tensor.name: layer.reason for layer in smallest.layers if layer.rank is None}
        why = f", since {staying_dense(dense, len(smallest.layers))}" if dense else ""
        raise UsageError(
            f"--size {size} is not reachable: the smallest output has {reachable} bytes{why}",
            f"use --size {reachable} or more",
        )
    best, best_bytes = smallest, reachable
    overhead = reachable - sum(
        option.cost(layer.rank) for option, layer in _paired(options, smallest)
    )
    budget = size - overhead
    for _ in range(_SIZE_ROUNDS):
        choices = uniform_within(options, budget)
        if recipe.allocate == "global":
            choices = _globally(recipe, options, losses, choices, budget)
        plan = plan_with(choices)
        total = predict(plan)
        if best_bytes < total <= size:
            best, best_bytes = plan, total
        if total <= size and size - total < max(1, size // 5000):
            break
        spent = sum(option.cost(layer.rank) for option, layer in _paired(options, plan))
        following = size - (total - spent)
        if following == budget:
            break
        budget = (
            following
            if total > size or following > budget
            else budget - max(1, (budget - following) // 2)
        )
    return best


def _paired(options: Sequence[Options], plan: Plan) -> list[tuple[Options, LayerPlan]]:
    layers = {layer.tensor.name: layer for layer in plan.layers}
    return [(option, layers[option.tensor.name]) for option in options]


def rerun(plan: Plan, tensors: Mapping[str, TensorInfo], fingerprint: str) -> Plan:
    """A saved plan for another look at a checkpoint that has the same tensors. Raises UsageError
    where it does not."""
    for layer in plan.layers:
        there = tensors.get(layer.tensor.name)
        if there is None:
            raise UsageError(
                f"the plan names {layer.tensor.name!r}, which the checkpoint lacks",
                "use the model it was made for",
            )
        if (there.shape, there.dtype) != (layer.tensor.shape, layer.tensor.dtype):
            raise UsageError(
                f"the plan has {layer.tensor.name!r} as {layer.tensor.dtype} "
                f"{list(layer.tensor.shape)}, the checkpoint as "
                f"{there.dtype} {list(there.shape)}",
                "use the model it was made for",
            )
    known = {layer.tensor.name for layer in plan.layers}
    old = {item.tensor.name: item.reason for item in plan.skipped}
    skipped = tuple(
        Skipped(t, old.get(t.name, "not in the plan"))
        for t in tensors.values()
        if t.name not in known
    )
    return replace(plan, fingerprint=fingerprint, skipped=skipped, healing=None, calibration=None)
