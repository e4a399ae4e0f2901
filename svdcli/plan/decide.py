"""From what was asked and what was measured to a rank for every layer."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
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
from svdcli.plan.knapsack import Menu, allocate_globally, allocate_menus, menu_of
from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.menus import Rounding, packed_menu, rounding_share
from svdcli.plan.packing import PLAIN
from svdcli.plan.plan import LayerPlan, Plan, Skipped
from svdcli.plan.ranks import (
    Choice,
    Options,
    by_tail,
    cost_of,
    fixed_rank,
    options_of,
    rounding_energy,
    tails_of,
    uniform_within,
)
from svdcli.plan.recipe import Recipe
from svdcli.plan.sharing import Allocation, share_where_it_pays
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


def chooses_packings(recipe: Recipe) -> bool:
    """Does every layer get its own bits and rank, of one budget in bytes."""
    in_bytes = recipe.target in ("size", "keep_bytes")
    return bool(recipe.packings) and in_bytes and recipe.allocate == "global"


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
        by_name = {name: Choice(None, reason) for name, reason in unsound.items()}
        by_name |= choices
        sharing = [group for group in groups if group.stack.name in choices]
        first_of = {group.members[0].name: group for group in sharing}
        layers: list[LayerPlan] = []
        for tensor in selected:
            group = first_of.get(tensor.name)
            stands_for = tensor if group is None else group.stack
            choice = by_name.get(stands_for.name)
            if choice is None:
                continue  # its group has the place of its first layer
            loss = losses.get(stands_for.name)
            spectrum = measured[stands_for.name]
            layer = _layer_plan(stands_for, choice, recipe, loss, spectrum)
            layers += [layer] if group is None else _grouped(layer, group)
        unit = loss_unit if losses else ""  # of what was predicted
        return Plan(recipe, fingerprint, tuple(layers), tuple(skipped), loss_unit=unit)

    if recipe.packs_whole and recipe.target == "keep":
        return plan_with({tensor.name: _as_a_whole(tensor, recipe) for tensor in sound})

    # Costs are counted in what the budget is given in.
    in_bytes = recipe.target in ("size", "keep_bytes")
    beside = {group.stack.name: group.beside for group in groups}
    budgets: _Budgets
    if in_bytes and chooses_packings(recipe):
        menus = _packed_menus(recipe, candidates, losses, measured, beside)
        budgets = _PackedBudgets(recipe, sound, groups, menus)
    else:
        unit = "bytes" if in_bytes else "parameters"
        options = _options(candidates, recipe, unit, beside)
        budgets = _RankBudgets(recipe, sound, groups, options, losses)

    # A size is met by trying whole plans; a bound holds for each layer by itself.
    if recipe.target == "size":
        return _within_size(recipe, sound, budgets, plan_with, predict)
    if recipe.target == "keep_bytes":
        return _within_share(recipe, selected, sound, budgets, plan_with)
    assert isinstance(budgets, _RankBudgets)
    own = [budgets.options[tensor.name] for tensor in sound]
    if recipe.target in ("energy", "error"):
        bounded = [_bounded(option, recipe, measured[option.tensor.name]) for option in own]
        return plan_with(_by_name(sound, bounded))

    # A share or a rank gives each layer its even part; global allocation spends their sum anew.
    if recipe.target == "keep":
        even, budget = ranks_within_share(recipe, selected, own, unsound)
    else:
        even = [fixed_rank(option, int(recipe.value)) for option in own]
        budget = cost_of(own, even)
    choices = budgets.spend(budget, even)
    notes: tuple[str, ...] = ()
    if recipe.target == "keep":
        present = [option for name, option in budgets.options.items() if name in choices]
        chosen = [choices[option.tensor.name] for option in present]
        notes = note_of_missed_share(recipe, selected, present, chosen)
    return replace(plan_with(choices), notes=notes)


def _can_share(
    group: Group, unsound: Mapping[str, str], measured: Mapping[str, LayerSpectrum]
) -> bool:
    """Are there losses of the group, and of each of its layers."""
    spectra = [measured[name] for name in group.names - unsound.keys()]
    counts = all(math.fsum(spectrum.energies or ()) > 0 for spectrum in spectra)
    return len(spectra) == len(group.members) and counts and measured[group.stack.name].finite


def _by_name(layers: Sequence[TensorInfo], choices: Sequence[Choice]) -> dict[str, Choice]:
    return {tensor.name: choice for tensor, choice in zip(layers, choices, strict=True)}


def _grouped(layer: LayerPlan, group: Group) -> tuple[LayerPlan, ...]:
    """The plan of a group from that of its stack: one layer, or all of its own where no basis
    is worth having."""
    first = replace(layer.tensor, name=group.members[0].name)
    layer = replace(layer, tensor=first, members=group.members)
    return (layer,) if layer.rank is not None else layer.left_dense(layer.reason)


def _options(
    tensors: Sequence[TensorInfo], recipe: Recipe, unit: str, beside: Mapping[str, int]
) -> dict[str, Options]:
    options = {}
    for tensor in tensors:
        more = beside.get(tensor.name, 0)
        options[tensor.name] = options_of(tensor, recipe, unit=unit, beside=more)
    return options


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


def _packed_menus(
    recipe: Recipe,
    layers: Sequence[TensorInfo],
    losses: Mapping[str, Sequence[float]],
    measured: Mapping[str, LayerSpectrum],
    beside: Mapping[str, int],
) -> dict[str, Menu]:
    menus = {}
    for tensor in layers:
        name = tensor.name
        roundings = measured[name].roundings
        menus[name] = packed_menu(tensor, recipe, losses[name], roundings, beside.get(name, 0))
    return menus


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


class _Budgets(ABC):
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


class _RankBudgets(_Budgets):
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
            return _by_name(self.layers, even)
        menus = {}
        if self.groups:
            menus = {name: menu_of(o, self._loss_at(name)) for name, o in self.options.items()}

        def allocate(present: Sequence[TensorInfo]) -> Allocation:
            options = [self.options[tensor.name] for tensor in present]
            losses = [self._loss_at(tensor.name) for tensor in present]
            alike = even if present == self.layers else uniform_within(options, budget)
            choices = _globally(self.recipe, options, losses, alike, budget)
            return Allocation(_by_name(present, choices), _total_loss(choices, losses))

        shared = share_where_it_pays(
            self.layers, self.groups, menus, budget, allocate, self.recipe.share
        )
        return shared.choices

    def _loss_at(self, name: str) -> Callable[[int], float]:
        return self.losses.get(name, ()).__getitem__


class _PackedBudgets(_Budgets):
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
        return _by_name(self.layers, [point.choice or none for point in smallest])

    def choose(self, budget: int) -> Mapping[str, Choice]:
        def allocate(present: Sequence[TensorInfo]) -> Allocation:
            points = allocate_menus([self.menus[tensor.name] for tensor in present], budget)
            choices = [point.choice or Choice(None) for point in points]
            loss = math.fsum(point.loss for point in points)
            return Allocation(_by_name(present, choices), loss)

        shared = share_where_it_pays(
            self.layers, self.groups, self.menus, budget, allocate, self.recipe.share
        )
        return shared.choices


def _within_share(
    recipe: Recipe,
    selected: Sequence[TensorInfo],
    sound: Sequence[TensorInfo],
    budgets: _Budgets,
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
    budgets: _Budgets,
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


def _least(option: Options) -> Choice:
    """The smallest choice for a layer."""
    if not option.ranks:
        return Choice(None, "no rank saves bytes")
    return Choice(option.ranks[0])


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
