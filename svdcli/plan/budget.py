"""Budgets: all selected layers together meet them, or the error says what would."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from svdcli.errors import UsageError
from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.plan import Plan
from svdcli.plan.ranks import Choice, Options, cost_of, uniform, uniform_within
from svdcli.plan.recipe import Recipe
from svdcli.plan.tensors import TensorInfo, module_of

NOT_CALIBRATED = "was not calibrated"  # so begins the reason of a layer that no text reached
# Below this part of the share that was asked for, a person is told why more was removed.
_WELL_BELOW = 0.97


def ranks_within_share(
    recipe: Recipe,
    selected: Sequence[TensorInfo],
    options: Sequence[Options],
    without_options: Mapping[str, str],
) -> tuple[list[Choice], int]:
    """Uniform ranks for `--keep`, and the parameters that the layers of `options` may keep in all.

    without_options names the other selected layers, with the reason: they stay dense and count in
    full, as do layers without a rank that saves, and the others make up for them. Raises UsageError
    where even the least ranks are above the budget.
    """
    # The share counts every selected layer; those that stay dense take theirs first.
    selected_parameters = sum(tensor.parameters for tensor in selected)
    fixed = selected_parameters - sum(option.dense_cost for option in options)
    # What is added keeps a product such as 0.29 * 100 from falling below its whole number.
    budget = math.floor(recipe.value * selected_parameters + 1e-9) - fixed

    # The same share for every layer is right where all of them have a rank for it.
    even = uniform(options, recipe.value)
    spent = cost_of(options, even)
    within = spent <= budget or (spent + fixed) / selected_parameters <= recipe.value
    if within or not any(option.ranks for option in options):
        return even, budget

    # Elsewhere the layers with ranks make up for the others, as far as they can.
    least = sum(option.least_cost for option in options)
    if least > budget:
        least_share = (least + fixed) / selected_parameters
        raise _unreachable(recipe, least_share, options, without_options)
    return uniform_within(options, budget), budget


def note_of_missed_share(
    recipe: Recipe,
    selected: Sequence[TensorInfo],
    options: Sequence[Options],
    choices: Sequence[Choice],
) -> tuple[str, ...]:
    """A note where the largest ranks there are keep much less than the share of parameters that was
    asked for."""
    at_largest = [
        option
        for option, choice in zip(options, choices, strict=True)
        if choice.rank is not None and choice.rank == option.ranks[-1]
    ]
    before = sum(tensor.parameters for tensor in selected)
    after = before - sum(option.dense_cost for option in options) + cost_of(options, choices)
    if not at_largest or after >= _WELL_BELOW * recipe.value * before:
        return ()
    dtypes = " and ".join(sorted({option.tensor.dtype for option in at_largest}))
    cast = f", in {recipe.dtype} where the weights are {dtypes}" if recipe.dtype else ""
    return (
        f"{after / before:.2f} of the parameters remain where {recipe.value:g} may: "
        f"{len(at_largest)} layers have the largest rank that saves bytes{cast}",
    )


def missed_target(plan: Plan, total: int) -> str:
    """By what a plan misses the budget of its recipe, in a few words; empty where it does not.
    total is the output's bytes."""
    recipe = plan.recipe
    if recipe.target == "size" and total > recipe.value:
        return f"the output is larger than --size {int(recipe.value)}"
    share = _share_of(plan)
    if recipe.target == "keep" and share > recipe.value:
        return (
            f"{share:.3g} of the selected parameters remain where --keep "
            f"{recipe.value:g} allows less"
        )
    return ""


def _share_of(plan: Plan) -> float:
    """Parameters that remain of those of the selected layers, counted as for the budget."""
    before = after = 0
    for layer in plan.layers:
        if layer.role:
            continue
        before += layer.tensor.parameters
        if layer.rank is None:
            after += layer.tensor.parameters
        else:
            after += LAYOUTS[layer.layout].parameters(layer.tensor.shape, layer.rank)
    return after / before if before else 1.0


# What would reach the budget ----------------------------------------------------------------------


def _unreachable(
    recipe: Recipe,
    least: float,
    options: Sequence[Options],
    without_options: Mapping[str, str],
) -> UsageError:
    """The error of a share below `least`, which the least ranks keep."""
    # Layers that stay dense whatever the share: they have no options, or no rank that saves.
    dense = dict(without_options)
    ranked = []
    for option in options:
        if option.ranks:
            ranked.append(option.tensor.name)
        else:
            dense[option.tensor.name] = uniform([option], recipe.value)[0].reason

    # Why, and what helps: a larger share, or fewer layers that count in full.
    why = f"with the least rank in every layer {least:.3g} of the selected parameters remain"
    hints = [f"use --keep {_rounded_up(least)} or more"]
    if dense:
        stay = staying_dense(dense, len(dense) + len(ranked))
        why = f"{stay}, and with the least ranks elsewhere {least:.3g} remain"
        exclude = _excluding(list(dense), ranked)
        hints.append(f"leave the dense ones out of the count with {exclude}")
    if any(reason.startswith(NOT_CALIBRATED) for reason in without_options.values()):
        hints.append("calibrate with more text")
    if recipe.multiple_of > 1:
        hints.append("give a smaller --multiple-of")
    return UsageError(f"--keep {recipe.value:g} is not reachable: {why}", ", or ".join(hints))


def staying_dense(dense: Mapping[str, str], count: int) -> str:
    """How many of `count` selected layers stay dense, the main reason and an example. dense maps
    layers to their reasons."""
    reasons = list(dense.values())
    main = max(dict.fromkeys(reasons), key=reasons.count)  # the first one where counts are equal
    with_it = [module_of(name) for name, reason in dense.items() if reason == main]
    example = with_it[0]
    share = f"{len(with_it)} of them: " if len(with_it) < len(dense) else ""
    return f"{len(dense)} of {count} selected layers stay dense ({share}{main}; such as {example})"


def _rounded_up(share: float) -> str:
    """A share that is reached, in three digits where they do; more where three would be all of
    it."""
    three = 3 - math.ceil(math.log10(share))  # decimals that show three digits
    for digits in range(three, 12):
        above = math.ceil(share * 10**digits) / 10**digits
        if above < 1:
            return f"{above:.{digits}f}".rstrip("0")
    return "1"


def _excluding(dense: Sequence[str], others: Sequence[str]) -> str:
    """Options that exclude these layers and no other: their names where they are few, or a pattern
    that tells them apart."""
    if len(dense) <= 2:
        return " ".join(f"--exclude {module_of(name)}" for name in dense)
    parts = [set(module_of(name).split(".")) for name in dense]
    shared = set.intersection(*parts)
    for part in reversed(module_of(dense[0]).split(".")):  # the most telling ones come last
        for pattern in (f"*.{part}.*", f"{part}.*", f"*.{part}"):
            matches_all = all(fnmatchcase(module_of(name), pattern) for name in dense)
            if part in shared and matches_all and not _matches_any(pattern, others):
                return f"--exclude '{pattern}'"
    return "--exclude"


def _matches_any(pattern: str, names: Sequence[str]) -> bool:
    """Does the pattern match one of the names, with or without `.weight`, as --exclude does."""
    spellings = [*names, *map(module_of, names)]
    return any(fnmatchcase(name, pattern) for name in spellings)
