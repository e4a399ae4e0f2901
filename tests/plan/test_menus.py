"""Choices of bits and rank: what they cost, what they lose, and what a budget makes of them."""

from __future__ import annotations

import itertools
import math

import pytest

from svdcli.errors import UsageError
from svdcli.plan.decide import LayerSpectrum, decide
from svdcli.plan.knapsack import allocate_menus
from svdcli.plan.layouts import LAYOUTS, WHOLE
from svdcli.plan.menus import Rounding, packed_menu, trials_of
from svdcli.plan.packing import PLAIN, Packing
from svdcli.plan.plan import Plan
from svdcli.plan.recipe import Recipe, recipe_for
from svdcli.plan.tensors import TensorInfo

AUTO = Recipe("keep_bytes", 0.2, allocate="global", floor=0.0, bits="auto")


def layer(m: int, n: int, name: str = "a.weight") -> TensorInfo:
    return TensorInfo(name, "BF16", (m, n))


def spectrum(tensor: TensorInfo, recipe: Recipe, decay: float = 0.03) -> LayerSpectrum:
    """Energies that fall evenly, and a rounding that costs 1e-5 at 8 bits and 3e-3 at 4."""
    energies = tuple(math.exp(-decay * i) for i in range(min(tensor.shape)))
    roundings = []
    for trial in trials_of(tensor, recipe):
        share = 1e-5 if trial.packing.bits == 8 else 3e-3
        roundings.append(Rounding(trial, share))
    return LayerSpectrum(True, energies, "full", roundings=tuple(roundings))


@pytest.mark.parametrize("shape", [(256, 256), (672, 256), (100, 300)])
def test_every_choice_costs_what_is_stored_and_dearer_ones_lose_less(
    shape: tuple[int, int],
) -> None:
    tensor = layer(*shape)
    measured = spectrum(tensor, AUTO)
    menu = packed_menu(tensor, AUTO, measured.losses(), measured.roundings)
    assert menu.ranked
    for point in menu.ranked:
        choice = point.choice
        assert choice is not None
        assert choice.rank is not None
        layout = LAYOUTS[choice.layout]
        assert point.cost == layout.nbytes(tensor, choice.rank, "BF16", choice.packing)
        assert point.cost < tensor.nbytes
        assert choice.layout == WHOLE or choice.rank % 16 == 0
    for cheap, dear in itertools.pairwise(menu.ranked):
        assert cheap.cost < dear.cost
        assert cheap.loss > dear.loss


def test_a_choice_loses_its_tail_and_its_rounding() -> None:
    tensor = layer(256, 256)
    measured = spectrum(tensor, AUTO)
    losses = measured.losses()
    menu = packed_menu(tensor, AUTO, losses, measured.roundings)
    for point in menu.ranked:
        assert point.choice is not None
        assert point.choice.rank is not None
        share = 1e-5 if point.choice.packing.bits == 8 else 3e-3
        tail = 0.0 if point.choice.layout == WHOLE else losses[point.choice.rank]
        assert point.loss == pytest.approx(tail + share * losses[0], rel=1e-9)


@pytest.mark.parametrize("share", [0.2, 0.3, 0.5])
def test_no_choices_within_the_budget_lose_less(share: float) -> None:
    """Against all of them."""
    tensors = [layer(128, 96, f"{i}.weight") for i in range(3)]
    menus = []
    for i, tensor in enumerate(tensors):
        measured = spectrum(tensor, AUTO, decay=0.02 + 0.03 * i)
        menus.append(packed_menu(tensor, AUTO, measured.losses(), measured.roundings))
    budget = int(share * sum(tensor.nbytes for tensor in tensors))
    points = allocate_menus(menus, budget)
    assert sum(point.cost for point in points) <= budget
    best = math.inf
    for every in itertools.product(*([*menu.ranked, menu.dense] for menu in menus)):
        if sum(point.cost for point in every) <= budget:
            best = min(best, math.fsum(point.loss for point in every))
    assert math.fsum(point.loss for point in points) == pytest.approx(best)


def plan_for(recipe: Recipe, tensors: list[TensorInfo]) -> Plan:
    measured = {tensor.name: spectrum(tensor, recipe) for tensor in tensors}
    return decide(recipe, "f", tensors, (), measured, lambda plan: 0, "nats")


@pytest.mark.parametrize("share", [0.13, 0.2, 0.267, 0.5])
def test_the_share_of_bytes_is_kept(share: float) -> None:
    tensors = [layer(256, 256, f"{i}.weight") for i in range(4)]
    recipe = Recipe("keep_bytes", share, allocate="global", floor=0.0, bits="auto")
    plan = plan_for(recipe, tensors)
    stored = sum(part.nbytes for planned in plan.layers for part in planned.stored())
    before = sum(tensor.nbytes for tensor in tensors)
    assert 0.85 * share * before < stored <= share * before


def test_a_share_that_cannot_be_reached_says_which_can() -> None:
    with pytest.raises(UsageError, match=r"0.01 is not reachable.*use --keep-bytes 0.134"):
        plan_for(
            Recipe("keep_bytes", 0.01, allocate="global", floor=0.0, bits="auto"), [layer(128, 128)]
        )


@pytest.mark.parametrize("bits", ["8", "4"])
def test_fixed_bits_pack_the_ranks_that_are_asked_for(bits: str) -> None:
    recipe = recipe_for({"rank": 70, "bits": int(bits)}, calibrated=False)
    plan = plan_for(recipe, [layer(256, 256)])
    (planned,) = plan.layers
    assert planned.rank == 64  # what kernels can multiply
    assert planned.packing == Packing(int(bits), 64)
    assert Plan.from_json(plan.to_json()) == plan


def test_sixteen_bits_are_as_they_were() -> None:
    plan = plan_for(Recipe("rank", 70), [layer(256, 256)])
    assert plan.layers[0].packing == PLAIN
    data = plan.to_json()
    assert "bits" not in data["recipe"]
    assert "bits" not in data["layers"]["a.weight"]


@pytest.mark.parametrize("target", [{"size": 10**6}, {"keep_bytes": 0.3}])
def test_a_budget_in_bytes_is_spent_on_bits_too(target: dict[str, object]) -> None:
    """With a calibration, and unless something is asked for that only ranks have."""
    found = recipe_for(target, calibrated=True)
    assert (found.bits, found.allocate, found.layout) == ("auto", "global", "factored")
    plain = recipe_for(target | {"bits": 16}, calibrated=True)
    assert (plain.bits, plain.allocate, plain.layout) == ("16", "global", "pivoted")
    for asked in ({"layout": "pivoted"}, {"allocate": "uniform"}, {"floor": 0.5}):
        assert recipe_for(target | asked, calibrated=True).bits == "16"
    assert recipe_for(target, calibrated=False).bits == "16"


@pytest.mark.parametrize(
    ("wanted", "calibrated", "message"),
    [
        ({"keep_bytes": 0.2, "bits": "auto"}, False, "takes a calibration"),
        ({"keep": 0.2, "bits": "auto"}, True, "needs a budget in bytes"),
        ({"rank": 9, "bits": 4, "layout": "pivoted"}, False, "does not go with --layout pivoted"),
        ({"size": 9, "bits": "auto", "allocate": "uniform"}, True, "for all layers together"),
        ({"size": 9, "bits": "auto", "floor": 0.5}, True, "--floor bounds ranks"),
        ({"keep_bytes": 1.5}, False, "--keep-bytes 1.5 is outside"),
        ({"rank": 9, "bits": 3}, False, "--bits '3' is unknown"),
        ({"rank": 9, "bits": 4, "group_size": 48}, False, "--group-size 48"),
    ],
)
def test_bits_that_do_not_go_with_the_rest(
    wanted: dict[str, object], calibrated: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        recipe_for(wanted, calibrated=calibrated)
