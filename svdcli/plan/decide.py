"""From what was asked and what was measured to a rank for every layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from svdcli.errors import UsageError
from svdcli.plan.budget import (
    NOT_CALIBRATED,
    note_of_missed_share,
    ranks_within_share,
    staying_dense,
)
from svdcli.plan.groups import Group
from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.menus import Rounding, rounding_share
from svdcli.plan.packing import PLAIN
from svdcli.plan.plan import LayerPlan, Plan, Skipped
from svdcli.plan.ranks import (
    Choice,
    Options,
    by_tail,
    cost_of,
    fixed_rank,
    rounding_energy,
    tails_of,
)
from svdcli.plan.recipe import Recipe
from svdcli.plan.spending import Budgets, RankBudgets, budgets_of, by_name
from svdcli.plan.tensors import TensorInfo
from svdcli.plan.words import WEIGHTED, option_of

# Up to this short side LAPACK's SVD takes milliseconds, and there is nothing to win with a Gram
# matrix.
_SVD_IS_CHEAP = 128
# So many budgets are tried for `--size`; a plan less than this part of the size below it (a 5000th)
# ends the search early.
_SIZE_ROUNDS = 12
_CLOSE_ENOUGH = 5000
UNSOUND = "NaN or infinity, or float64 numbers whose squares leave its range"


@dataclass(frozen=True)
class LayerSpectrum:
    """What the numbers of one layer say.

    energies are its squared singular values in descending order, in the metric of the calibration
    where there is one; None where no policy needs them. metric says which that is ("" plain).
    biases are the layer's own, where they will be refitted. loss_scale is the loss of the model
    that its whole energy stands for, where that was measured. roundings are what packing it will
    cost, where packings are to be chosen. misfit is why it cannot be packed, where it cannot.
    """

    finite: bool
    energies: tuple[float, ...] | None = None
    metric: str = ""
    biases: tuple[TensorInfo, ...] = ()
    loss_scale: float | None = None
    roundings: tuple[Rounding, ...] = ()
    misfit: str = ""

    def tails(self) -> list[float]:
        """Share of the energy beyond each rank 0 .. min(m, n)."""
        energies = self.energies or ()
        return tails_of(energies, math.fsum(energies))

    def losses(self) -> list[float]:
        """What each rank gives up: the predicted rise of the model's loss where it was measured
        (its share of loss_scale) or follows from gradients (half the tail); else tails()."""
        scale = 1.0
        if self.loss_scale is not None:
            scale = self.loss_scale
        elif self.metric in ("diagonal", "full"):
            scale = 0.5 * math.fsum(self.energies or ())
        return [scale * tail for tail in self.tails()]


def needs_spectra(recipe: Recipe) -> bool:
    """Do the ranks of this recipe go by singular values, rather than by shapes alone."""
    if recipe.packs_whole and recipe.target == "keep":
        return False
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
    groups: Sequence[Group] = (),
) -> Plan:
    """A rank, or dense with a reason, for every selected layer.

    predict gives the bytes of the whole output under a plan; only --size asks for it. groups are
    those that may share a basis; the spectrum of each is under the name of its stack.
    Raises UsageError where --size or --keep is below what can be reached.
    """
    # Layers for which no rank can be chosen stay dense, whatever the target; the others get a loss
    # for every rank.
    unsound = _unsound_layers(recipe, selected, measured)
    sound = [tensor for tensor in selected if tensor.name not in unsound]
    groups = [group for group in groups if _can_share(group, unsound, measured)]
    candidates = [*sound, *(group.stack for group in groups)]
    losses: dict[str, Sequence[float]] = {}
    if needs_spectra(recipe):
        losses = {tensor.name: measured[tensor.name].losses() for tensor in candidates}

    def plan_with(choices: Mapping[str, Choice]) -> Plan:
        """The plan where every sound layer, alone or in its group, has its choice of these."""
        chosen = {name: Choice(None, reason) for name, reason in unsound.items()}
        chosen |= choices
        layers = _layer_plans(recipe, selected, groups, chosen, losses, measured)
        unit = loss_unit if losses else ""  # of what was predicted
        return Plan(recipe, fingerprint, layers, tuple(skipped), loss_unit=unit)

    if recipe.packs_whole and recipe.target == "keep":
        return plan_with({tensor.name: _as_a_whole(tensor, recipe) for tensor in sound})

    # Costs are counted in what the budget is given in.
    roundings = {tensor.name: measured[tensor.name].roundings for tensor in candidates}
    budgets = budgets_of(recipe, sound, groups, losses, roundings)

    # A size is met by trying whole plans; a bound holds for each layer by itself.
    if recipe.target == "size":
        return _within_size(recipe, sound, budgets, plan_with, predict)
    if recipe.target == "keep_bytes":
        return _within_share(recipe, selected, sound, budgets, plan_with)
    assert isinstance(budgets, RankBudgets)
    own = [budgets.options[tensor.name] for tensor in sound]
    if recipe.target in ("energy", "error"):
        bounded = [_bounded(option, recipe, measured[option.tensor.name]) for option in own]
        return plan_with(by_name(sound, bounded))

    # A share or a rank gives each layer its even part; global allocation spends their sum anew.
    if recipe.target == "keep":
        even, budget = ranks_within_share(recipe, selected, own, unsound)
    else:
        even = [fixed_rank(option, int(recipe.value)) for option in own]
        budget = cost_of(own, even)
    choices = budgets.spend(budget, even)
    plan = plan_with(choices)
    if recipe.target != "keep":
        return plan
    present = [option for name, option in budgets.options.items() if name in choices]
    chosen = [choices[option.tensor.name] for option in present]
    return replace(plan, notes=note_of_missed_share(recipe, selected, present, chosen))


def _layer_plans(
    recipe: Recipe,
    selected: Sequence[TensorInfo],
    groups: Sequence[Group],
    chosen: Mapping[str, Choice],
    losses: Mapping[str, Sequence[float]],
    measured: Mapping[str, LayerSpectrum],
) -> tuple[LayerPlan, ...]:
    """The plans of all layers, each by itself or in its group, whichever has a choice."""
    first_of = {group.members[0].name: group for group in groups if group.stack.name in chosen}
    layers: list[LayerPlan] = []
    for tensor in selected:
        group = first_of.get(tensor.name)
        whole = tensor if group is None else group.stack
        name = whole.name
        if name not in chosen:
            continue  # its group has the place of its first layer
        layer = _layer_plan(whole, chosen[name], recipe, losses.get(name), measured[name])
        layers += [layer] if group is None else _grouped(layer, group)
    return tuple(layers)


def _can_share(
    group: Group, unsound: Mapping[str, str], measured: Mapping[str, LayerSpectrum]
) -> bool:
    """Are there losses of the group, and of each of its layers."""
    spectra = [measured[name] for name in group.names - unsound.keys()]
    counts = all(math.fsum(spectrum.energies or ()) > 0 for spectrum in spectra)
    return len(spectra) == len(group.members) and counts and measured[group.stack.name].finite


def _grouped(layer: LayerPlan, group: Group) -> tuple[LayerPlan, ...]:
    """The plan of a group from that of its stack: one layer, or all of its own where no basis
    is worth having."""
    first = replace(layer.tensor, name=group.members[0].name)
    layer = replace(layer, tensor=first, members=group.members)
    return (layer,) if layer.rank is not None else layer.left_dense(layer.reason)


def _as_a_whole(tensor: TensorInfo, recipe: Recipe) -> Choice:
    """The whole matrix packed, where that fits its columns and saves bytes."""
    [packing] = recipe.packings
    misfit = packing.misfit(tensor.shape[1])
    if misfit:
        return Choice(None, misfit)
    dtype = recipe.dtype or tensor.dtype
    if LAYOUTS[recipe.layout].nbytes(tensor, 0, dtype, packing) >= tensor.nbytes:
        return Choice(None, f"{packing.bits} bits would not save bytes")
    return Choice(min(tensor.shape))


def _unsound_layers(
    recipe: Recipe, selected: Sequence[TensorInfo], measured: Mapping[str, LayerSpectrum]
) -> dict[str, str]:
    """Layers for which no rank can be chosen, with the reason: their numbers are not finite, the
    calibration has nothing on them, or no loader takes them packed."""
    reasons = {}
    for tensor in selected:
        spectrum = measured[tensor.name]
        if not spectrum.finite:
            reasons[tensor.name] = f"holds {UNSOUND}"
    for tensor in selected:
        spectrum = measured[tensor.name]
        if recipe.calibration is not None and spectrum.finite and not spectrum.metric:
            reasons[tensor.name] = f"{NOT_CALIBRATED}: no input reached it, or no gradient"
        if spectrum.misfit:
            reasons[tensor.name] = spectrum.misfit
    return reasons


def _layer_plan(
    tensor: TensorInfo,
    choice: Choice,
    recipe: Recipe,
    losses: Sequence[float] | None,
    spectrum: LayerSpectrum,
) -> LayerPlan:
    solver = WEIGHTED if spectrum.metric else recipe.solver
    if solver == "auto":
        solver = "svd" if min(tensor.shape) <= _SVD_IS_CHEAP else "gram"

    # A choice among bits says its own; a rank alone takes those that were asked for.
    packing = choice.packing
    if choice.rank is not None and not choice.layout and recipe.packings:
        packing = recipe.packings[0]

    loss = None
    biases = () if choice.rank is None else spectrum.biases
    if losses is not None and choice.rank is not None:
        lost = losses[choice.rank]
        if choice.packing != PLAIN and spectrum.roundings:
            lost += losses[0] * rounding_share(spectrum.roundings, choice)
        loss = float(f"{lost:.6e}")  # as many digits as the record keeps
    return LayerPlan(
        tensor=tensor,
        rank=choice.rank,
        layout=choice.layout or recipe.layout,
        stored_dtype=recipe.dtype or tensor.dtype,
        solver=solver,
        reason=choice.reason,
        loss=loss,
        metric=spectrum.metric,
        biases=biases,
        packing=packing,
    )


def _bounded(options: Options, recipe: Recipe, spectrum: LayerSpectrum) -> Choice:
    """The smallest rank that keeps the bound after the factors were rounded to their dtype."""
    target = f"{option_of(recipe.target)} {recipe.value:g}"
    allowed = recipe.value**2 if recipe.target == "error" else 1 - recipe.value
    if recipe.target == "error":
        dtype = recipe.dtype or options.tensor.dtype
        allowed -= rounding_energy(dtype, recipe.layout)
        if allowed <= 0:
            return Choice(None, f"{target} is below what rounding to {dtype} alone may cost")
    return by_tail(options, spectrum.tails(), allowed, target)


def _within_share(
    recipe: Recipe,
    selected: Sequence[TensorInfo],
    sound: Sequence[TensorInfo],
    budgets: Budgets,
    plan_with: Callable[[Mapping[str, Choice]], Plan],
) -> Plan:
    """At most this share of the bytes of all selected layers; those that stay dense count in full.
    Raises UsageError where it cannot be reached."""
    total = sum(tensor.nbytes for tensor in selected)
    fixed = total - sum(tensor.nbytes for tensor in sound)
    smallest = plan_with(budgets.least())
    reachable = fixed + _stored_bytes(smallest, sound)
    if reachable > recipe.value * total:
        share = math.ceil(1000 * reachable / total) / 1000
        dense = {layer.tensor.name: layer.reason for layer in smallest.layers if layer.rank is None}
        why = f", since {staying_dense(dense, len(smallest.layers))}" if dense else ""
        fewer = ", or fewer --bits" if recipe.bits in ("16", "8") else ""
        raise UsageError(
            f"--keep-bytes {recipe.value:g} is not reachable: the smallest layers take {share:g} "
            f"of the bytes{why}",
            f"use --keep-bytes {share:g} or more{fewer}",
        )
    return plan_with(budgets.choose(math.floor(recipe.value * total + 1e-9) - fixed))


def _stored_bytes(plan: Plan, layers: Sequence[TensorInfo]) -> int:
    """Bytes of all tensors that stand for these layers under a plan."""
    names = {tensor.name for tensor in layers}
    total = 0
    for layer in plan.layers:
        if layer.tensor.name in names:
            total += sum(tensor.nbytes for tensor in (*layer.stored(), *layer.spans()))
    return total


def _within_size(
    recipe: Recipe,
    sound: Sequence[TensorInfo],
    budgets: Budgets,
    plan_with: Callable[[Mapping[str, Choice]], Plan],
    predict: Callable[[Plan], int],
) -> Plan:
    """Never above the size, as close below as whole ranks allow. Headers grow with the plan, so its
    bytes are predicted again and again."""
    size = int(recipe.value)
    smallest = plan_with(budgets.least())
    reachable = predict(smallest)
    if reachable > size:
        raise _size_unreachable(recipe, smallest, reachable, predict)

    # The layers may spend what all else in the output leaves: other tensors, carried files,
    # headers, the record. The last two differ from plan to plan, so that each corrects the budget.
    best, best_bytes = smallest, reachable
    budget = size - (reachable - _stored_bytes(smallest, sound))
    for _ in range(_SIZE_ROUNDS):
        plan = plan_with(budgets.choose(budget))
        total = predict(plan)
        if best_bytes < total <= size:
            best, best_bytes = plan, total
        if total <= size and size - total < max(1, size // _CLOSE_ENOUGH):
            break

        # A budget whose plan fits shrinks by half the difference: a better one may lie between.
        following = size - (total - _stored_bytes(plan, sound))
        if following == budget:
            break
        if total > size or following > budget:
            budget = following
        else:
            budget -= max(1, (budget - following) // 2)
    return best


def _size_unreachable(
    recipe: Recipe, smallest: Plan, reachable: int, predict: Callable[[Plan], int]
) -> UsageError:
    """The error of a size below the `reachable` bytes of the smallest plan, with the size that can
    be reached."""
    for _ in range(3):  # the record holds the size that was asked for, so its digits count too
        reachable = predict(replace(smallest, recipe=replace(recipe, value=reachable)))
    dense = {layer.tensor.name: layer.reason for layer in smallest.layers if layer.rank is None}
    why = f", since {staying_dense(dense, len(smallest.layers))}" if dense else ""
    return UsageError(
        f"--size {int(recipe.value)} is not reachable: the smallest output has {reachable} "
        f"bytes{why}",
        f"use --size {reachable} or more",
    )


def rerun(plan: Plan, tensors: Mapping[str, TensorInfo], fingerprint: str) -> Plan:
    """A saved plan for another run on a checkpoint that has the same tensors. Raises UsageError
    where it does not."""
    # The checkpoint may be another one, as long as every layer of the plan is in it as it was.
    for planned in plan.originals:
        stored = tensors.get(planned.name)
        if stored is None:
            raise UsageError(
                f"the plan names {planned.name!r}, which the checkpoint lacks",
                "use the model it was made for",
            )
        if (stored.shape, stored.dtype) != (planned.shape, planned.dtype):
            raise UsageError(
                f"the plan has {planned.name!r} as {planned.dtype} {list(planned.shape)}, the "
                f"checkpoint as {stored.dtype} {list(stored.shape)}",
                "use the model it was made for",
            )

    # Tensors that the plan skips keep their reasons; what it does not name is skipped too.
    planned_names = {tensor.name for tensor in plan.originals}
    reasons = {entry.tensor.name: entry.reason for entry in plan.skipped}
    skipped = tuple(
        Skipped(tensor, reasons.get(tensor.name, "not in the plan"))
        for tensor in tensors.values()
        if tensor.name not in planned_names
    )
    return replace(plan, fingerprint=fingerprint, skipped=skipped, healing=None, calibration=None)
