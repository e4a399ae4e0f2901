"""Groups that share a basis: which there are, what they cost, and when they are chosen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import pytest

from svdcli.plan.decide import LayerSpectrum, decide
from svdcli.plan.groups import Group, groups_of, home_of, spans_of
from svdcli.plan.knapsack import Menu, Point, allocate_menus, price_of, priced_loss
from svdcli.plan.menus import Rounding, packed_menu, trials_of
from svdcli.plan.plan import Plan
from svdcli.plan.recipe import Recipe
from svdcli.plan.sharing import Allocation, share_where_it_pays
from svdcli.plan.tensors import TensorInfo

N = 256
NAMES = [f"b.{block}.{name}.weight" for block in range(2) for name in ("q", "k", "o")]


def tensors(dtype: str = "BF16") -> list[TensorInfo]:
    return [TensorInfo(name, dtype, (N, N)) for name in NAMES]


def groups() -> tuple[Group, ...]:
    inputs = {name: name.rpartition(".")[0][:-1] + "x" for name in NAMES if ".o." not in name}
    return groups_of(tensors(), inputs)


def spectrum(
    tensor: TensorInfo, recipe: Recipe, energies: Sequence[float], *, shared: bool
) -> LayerSpectrum:
    shares = {8: 1e-5, 4: 3e-3}
    trials = trials_of(tensor, recipe, shared=shared)
    roundings = tuple(Rounding(trial, shares[trial.packing.bits]) for trial in trials)
    return LayerSpectrum(True, tuple(energies), "full", roundings=roundings)


def measured(recipe: Recipe, apart: Sequence[float]) -> dict[str, LayerSpectrum]:
    """apart says of each group how much slower its spectrum falls than that of its layers: 1 where
    all have the same basis."""
    energies = {}
    found = {}
    for at, tensor in enumerate(tensors()):
        energies[tensor.name] = [math.exp(-(0.02 + 0.005 * at) * i) for i in range(N)]
        found[tensor.name] = spectrum(tensor, recipe, energies[tensor.name], shared=False)
    for group, slower in zip(groups(), apart, strict=True):
        both = [energies[member.name] for member in group.members]
        stretched = [sum(e[int(i / slower)] for e in both) for i in range(N)]
        scale = sum(map(math.fsum, both)) / math.fsum(stretched)
        values = [scale * value for value in stretched]
        found[group.stack.name] = spectrum(group.stack, recipe, values, shared=True)
    return found


def test_a_group_is_of_one_input_dtype_and_width() -> None:
    both = groups()
    assert [[m.name for m in group.members] for group in both] == [NAMES[:2], NAMES[3:5]]
    assert both[0].stack.shape == (2 * N, N)
    assert both[0].stack.name not in NAMES
    mixed = [TensorInfo("a", "F32", (8, 8)), TensorInfo("b", "BF16", (8, 8))]
    assert groups_of(mixed, {"a": "x", "b": "x"}) == ()
    assert groups_of(tensors(), {}) == ()


def test_spans_lie_one_after_the_other_and_tell_groups_apart() -> None:
    first, second = (spans_of(group.members) for group in groups())
    assert [span[1:] for span in first] == [(0, N), (N, 2 * N)]
    assert len({span[0] for span in (*first, *second)}) == 2
    assert all(0 <= span[0] < 2**63 for span in (*first, *second))
    assert home_of(groups()[0].members, "BF16").name == "b.0.q.svd_shared.weight"


def planned(recipe: Recipe, apart: Sequence[float] = (1.0, 1.0)) -> Plan:
    found = measured(recipe, apart)
    return decide(recipe, "f", tensors(), (), found, lambda plan: 0, "nats", groups())


RECIPES = [
    Recipe("keep", 0.5, allocate="global", floor=0.0, layout="pivoted"),
    Recipe("keep_bytes", 0.5, allocate="global", floor=0.0),
    Recipe("keep_bytes", 0.2, allocate="global", floor=0.0, bits="auto"),
    Recipe("rank", 20, allocate="global", floor=0.0),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.target}-{recipe.bits}")
def test_a_basis_is_shared_where_that_loses_less(recipe: Recipe) -> None:
    from dataclasses import replace

    def loss(plan: Plan) -> float:
        return math.fsum(layer.loss or 0.0 for layer in plan.layers)

    # The first group has one basis, the layers of the second have nothing in common
    chosen = planned(recipe, (1.0, 30.0))
    if recipe.bits == "16":
        assert [len(layer.members) for layer in chosen.layers if layer.members] == [2]
    for share in ("never", "always"):
        other = decide(
            replace(recipe, share=share),
            "f",
            tensors(),
            (),
            measured(recipe, (1.0, 30.0)),
            lambda plan: 0,
            "nats",
            groups() if share == "always" else (),
        )
        assert loss(chosen) <= loss(other)

    # Every layer is there once, and the budget is kept
    assert sorted(tensor.name for tensor in chosen.originals) == sorted(NAMES)
    again = Plan.from_json(chosen.to_json())
    assert again == chosen
    if recipe.target == "keep_bytes":
        stored = [t for layer in chosen.layers for t in (*layer.stored(), *layer.spans())]
        allowed = recipe.value * sum(tensor.nbytes for tensor in tensors())
        assert sum(tensor.nbytes for tensor in stored) <= allowed


def test_a_group_of_which_one_is_not_finite_stays_apart() -> None:
    recipe = RECIPES[0]
    found = measured(recipe, (1.0, 1.0)) | {NAMES[0]: LayerSpectrum(finite=False)}
    plan = decide(recipe, "f", tensors(), (), found, lambda plan: 0, "nats", groups())
    assert [layer.tensor.name for layer in plan.layers if layer.members] == [NAMES[3]]


def test_a_group_of_which_one_fails_stays_dense_altogether() -> None:
    plan = planned(RECIPES[0])
    assert len(plan.layers) == 4
    dense = plan.with_dense({NAMES[0]: "every solver failed: x"})
    reasons = {layer.tensor.name: layer.reason for layer in dense.layers if layer.rank is None}
    assert reasons[NAMES[0]] == "every solver failed: x"
    assert "shares a basis with b.0.q, which every solver failed" in reasons[NAMES[1]]
    assert reasons.keys() == {*NAMES[:2]}


@pytest.mark.parametrize("budget", [0.15, 0.2, 0.3])
def test_no_way_of_sharing_loses_less(budget: float) -> None:
    """Against every subset of the groups."""
    recipe = RECIPES[2]
    for apart in itertools.product((1.0, 1.3, 4.0), repeat=2):
        found = measured(recipe, apart)
        candidates = [*tensors(), *(group.stack for group in groups())]
        menus: dict[str, Menu] = {}
        for tensor in candidates:
            spectra = found[tensor.name]
            menus[tensor.name] = packed_menu(tensor, recipe, spectra.losses(), spectra.roundings)
        allowed = int(budget * sum(tensor.nbytes for tensor in tensors()))

        def allocate(present: Sequence[TensorInfo], menus: dict[str, Menu] = menus) -> Allocation:
            points = allocate_menus([menus[t.name] for t in present], allowed)  # noqa: B023
            choices = {t.name: p.choice for t, p in zip(present, points, strict=True) if p.choice}
            return Allocation(choices, math.fsum(point.loss for point in points))

        def way(count: Sequence[Group], allocate: Callable[..., Allocation] = allocate) -> float:
            return share_where_it_pays(tensors(), count, menus, allowed, allocate, "always").loss  # noqa: B023

        best = min(
            way(subset) for size in range(3) for subset in itertools.combinations(groups(), size)
        )
        chosen = share_where_it_pays(tensors(), groups(), menus, allowed, allocate, "auto")
        assert chosen.loss <= best * 1.001


def cheapest(menu: Menu, price: float) -> Point:
    return min([*menu.ranked, menu.dense], key=lambda point: point.loss + price * point.cost)


def test_the_price_is_what_the_budget_would_pay_for_more() -> None:
    recipe = RECIPES[2]
    found = measured(recipe, (1.0, 1.0))
    menus = [
        packed_menu(t, recipe, found[t.name].losses(), found[t.name].roundings) for t in tensors()
    ]
    total = sum(menu.dense.cost for menu in menus)
    assert price_of(menus, total) == 0.0
    prices = [price_of(menus, int(share * total)) for share in (0.15, 0.2, 0.3, 0.5)]
    assert prices == sorted(prices, reverse=True)

    # At that price the choices cost about the budget: less would be spent at a higher one
    for share, price in zip((0.15, 0.2, 0.3), prices, strict=False):
        for factor, sign in ((1.001, -1), (0.999, 1)):
            spent = sum(cheapest(menu, factor * price).cost for menu in menus)
            assert sign * (spent - int(share * total)) >= 0
    assert priced_loss(menus[0], 0.0) == 0.0
