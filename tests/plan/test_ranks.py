"""Rank policies: what they promise in numbers, and brute force as the oracle of the global
allocation."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdcli.plan.knapsack import allocate_globally
from svdcli.plan.layers import break_even
from svdcli.plan.layouts import LAYOUTS
from svdcli.plan.ranks import (
    Options,
    by_tail,
    fixed_rank,
    options_of,
    tails_of,
    uniform,
    uniform_within,
)
from svdcli.plan.recipe import Recipe
from svdcli.plan.tensors import TensorInfo

sides = st.integers(8, 300)
layouts = st.sampled_from(["factored", "pivoted"])
dtypes = st.sampled_from(["F32", "BF16"])


def layer(m: int, n: int, name: str = "a.weight", dtype: str = "F32") -> TensorInfo:
    return TensorInfo(name, dtype, (m, n))


def options(m: int, n: int, **recipe: object) -> Options:
    values: dict[str, object] = {"target": "keep", "value": 0.5} | recipe
    return options_of(layer(m, n), Recipe(**values), unit="parameters")  # type: ignore[arg-type]


@given(sides, sides, layouts, dtypes)
def test_largest_saving_rank_is_the_edge(m: int, n: int, layout: str, dtype: str) -> None:
    tensor = layer(m, n, dtype=dtype)
    edge = LAYOUTS[layout].largest_saving_rank(tensor, dtype)

    def saves(rank: int) -> bool:
        fewer = LAYOUTS[layout].parameters((m, n), rank) < m * n
        return fewer and LAYOUTS[layout].nbytes(tensor, rank, dtype) < tensor.nbytes

    assert edge == max(
        (rank for rank in range(1, min(m, n) + (layout == "factored")) if saves(rank)), default=0
    )


@given(sides, sides, st.integers(1, 7), layouts)
def test_parameters_are_those_of_the_tensors(m: int, n: int, rank: int, layout: str) -> None:
    parts = [t for t in LAYOUTS[layout].tensors(layer(m, n), rank, "F32") if t.dtype == "F32"]
    assert sum(t.parameters for t in parts) == LAYOUTS[layout].parameters((m, n), rank)


@given(sides, sides)
def test_break_even_is_the_factored_edge_in_parameters(m: int, n: int) -> None:
    rank = break_even((m, n))
    assert rank * (m + n) < m * n <= (rank + 1) * (m + n)


@given(sides, sides, st.floats(0.05, 0.99), layouts, st.sampled_from([1, 4, 16]))
def test_uniform_takes_the_largest_rank_within_the_share(
    m: int, n: int, keep: float, layout: str, step: int
) -> None:
    option = options(m, n, layout=layout, multiple_of=step)
    choice = uniform([option], keep)[0]
    if not option.ranks:
        assert choice.rank is None
        assert choice.reason
        return
    assert choice.rank is not None
    assert choice.rank % step == 0
    smallest = choice.rank == step
    assert smallest or LAYOUTS[layout].parameters((m, n), choice.rank) <= keep * m * n
    following = choice.rank + step
    assert (
        following > option.largest or LAYOUTS[layout].parameters((m, n), following) > keep * m * n
    )


def test_a_rank_that_does_not_save_leaves_the_layer_dense_and_says_so() -> None:
    choice = fixed_rank(options(64, 64), 32)
    assert choice.rank is None
    assert "would not save" in choice.reason
    assert fixed_rank(options(64, 64), 31).rank == 31
    assert "clipped to 64" in fixed_rank(options(64, 64), 100).reason


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=5), st.floats(0.05, 0.95))
def test_uniform_within_a_budget_never_exceeds_it(
    shapes: list[tuple[int, int]], share: float
) -> None:
    each = [options(m, n) for m, n in shapes]
    budget = int(share * sum(o.dense_cost for o in each))
    choices = uniform_within(each, budget)
    spent = sum(o.cost(c.rank) for o, c in zip(each, choices, strict=True))
    smallest = sum(o.costs[0] if o.ranks else o.dense_cost for o in each)
    assert spent <= max(budget, smallest)
    if smallest <= budget and any(c.rank is not None for c in choices):
        gaps = [
            o.cost(c.rank + 1) - o.cost(c.rank)
            for o, c in zip(each, choices, strict=True)
            if c.rank and c.rank < o.ranks[-1]
        ]
        assert not gaps or budget - spent < min(gaps)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0.001, 0.9))
def test_by_tail_is_the_smallest_rank_that_keeps_the_bound(
    values: list[float], allowed: float
) -> None:
    energies = sorted(values, reverse=True)
    tails = tails_of(energies, math.fsum(energies))
    option = Options(
        layer(200, 200), range(1, 31), [rank * 400 for rank in range(1, 31)], 40_000, 30
    )
    rank = by_tail(option, tails, allowed, "--error").rank
    assert rank is not None
    assert tails[min(rank, len(energies))] <= allowed
    assert rank == 1 or tails[rank - 1] > allowed


def test_tails_run_from_everything_to_nothing() -> None:
    assert tails_of([3.0, 1.0], 4.0) == [1.0, 0.25, 0.0]
    assert tails_of([0.0, 0.0], 0.0) == [0.0, 0.0, 0.0]


# Global allocation --------------------------------------------------------------------------------

spectra = st.lists(st.lists(st.floats(1e-6, 1), min_size=6, max_size=9), min_size=1, max_size=3)


def small_problem(values: list[list[float]]) -> tuple[list[Options], list[list[float]]]:
    """Layers of (k, k + 3 i): a few ranks each, so that every combination can be tried."""
    each, tails = [], []
    for i, energies in enumerate(values):
        k = len(energies)
        each.append(
            options_of(layer(k, k + 3 * i, f"l{i}.weight"), Recipe("keep", 0.5), unit="parameters")
        )
        tails.append(tails_of(sorted(energies, reverse=True), math.fsum(energies)))
    return each, tails


def brute_force(
    each: list[Options], tails: list[list[float]], budget: int, floors: list[int]
) -> float:
    menus = [
        [(o.cost(rank), tails[i][rank]) for rank in o.ranks if rank >= min(floors[i], o.ranks[-1])]
        + [(o.dense_cost, 0.0)]
        for i, o in enumerate(each)
    ]
    fitting = (
        math.fsum(loss for _, loss in pick)
        for pick in itertools.product(*menus)
        if sum(c for c, _ in pick) <= budget
    )
    return min(fitting, default=math.inf)


@settings(max_examples=300, deadline=None)
@given(spectra, st.floats(0.3, 1.0), st.integers(1, 3))
def test_global_allocation_against_brute_force(
    values: list[list[float]], share: float, floor: int
) -> None:
    each, tails = small_problem(values)
    budget = int(share * sum(o.dense_cost for o in each))
    floors = [floor] * len(each)
    best = brute_force(each, tails, budget, floors)
    if math.isinf(best):
        return
    choices = allocate_globally(each, [t.__getitem__ for t in tails], budget, floors)
    assert sum(o.cost(c.rank) for o, c in zip(each, choices, strict=True)) <= budget
    loss = math.fsum(
        0.0 if c.rank is None else t[c.rank] for c, t in zip(choices, tails, strict=True)
    )
    assert loss <= best * 1.001 + 1e-12


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(20, 60), st.integers(20, 60), st.floats(0.1, 2)),
        min_size=2,
        max_size=6,
    ),
    st.floats(0.2, 0.9),
)
def test_global_is_never_worse_than_uniform(
    shapes: list[tuple[int, int, float]], keep: float
) -> None:
    each = [options(m, n) for m, n, _ in shapes]
    tails = []
    for m, n, power in shapes:
        energies = [(i + 1) ** -power for i in range(min(m, n))]
        tails.append(tails_of(energies, math.fsum(energies)))
    even = uniform(each, keep)
    budget = sum(o.cost(c.rank) for o, c in zip(each, even, strict=True))
    best = allocate_globally(each, [t.__getitem__ for t in tails], budget, [1] * len(each))
    assert sum(o.cost(c.rank) for o, c in zip(each, best, strict=True)) <= budget

    def total(choices: list) -> float:  # type: ignore[type-arg]
        return math.fsum(
            0.0 if c.rank is None else t[c.rank] for c, t in zip(choices, tails, strict=True)
        )

    assert total(best) <= total(even) + 1e-12


def test_floors_hold_where_they_fit() -> None:
    each = [options(40, 40), options(40, 40)]
    tails = [tails_of([1.0] + [1e-9] * 39, 1.0), tails_of([1.0] * 40, 40.0)]
    choices = allocate_globally(each, [t.__getitem__ for t in tails], 2 * 80 * 10, [6, 6])
    assert [c.rank for c in choices] == [6, 14]


@pytest.mark.parametrize("layout", ["factored", "pivoted"])
def test_pivoted_reaches_a_higher_rank_for_the_same_parameters(layout: str) -> None:
    rank = uniform([options(100, 100, layout=layout)], 0.5)[0].rank
    assert rank == {"factored": 25, "pivoted": 29}[layout]
