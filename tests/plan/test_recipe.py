"""Recipes refuse what cannot be met; recipes and plans survive JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdcli.errors import UsageError
from svdcli.plan.plan import LayerPlan, Plan, Skipped
from svdcli.plan.recipe import Recipe, recipe_for, recipe_from_json, recipe_to_json
from svdcli.plan.tensors import TensorInfo

BAD = [
    {"target": "rank", "value": 0},
    {"target": "rank", "value": -3},
    {"target": "rank", "value": 1.5},
    {"target": "keep", "value": 0},
    {"target": "keep", "value": 1.01},
    {"target": "keep", "value": float("nan")},
    {"target": "energy", "value": -0.1},
    {"target": "error", "value": 1},
    {"target": "size", "value": 0},
    {"target": "bits", "value": 3},
    {"target": "keep", "value": 0.5, "floor": 1.5},
    {"target": "keep", "value": 0.5, "multiple_of": 0},
    {"target": "keep", "value": 0.5, "layout": "sparse"},
    {"target": "keep", "value": 0.5, "dtype": "I8"},
    {"target": "keep", "value": 0.5, "solver": "lanczos"},
    {"target": "keep", "value": 0.5, "allocate": "magic"},
    {"target": "keep", "value": 0.5, "max_shard_size": 0},
    {"target": "error", "value": 0.5, "allocate": "global"},
    {"target": "size", "value": 100, "layout": "dense"},
]


def test_of_two_complaints_the_one_that_no_text_mends_comes_first() -> None:
    with pytest.raises(UsageError, match="needs a budget in bytes, and --rank is none"):
        recipe_for({"rank": 12, "bits": "auto"}, calibrated=False)


@pytest.mark.parametrize("values", BAD, ids=str)
def test_a_recipe_that_cannot_be_met(values: dict[str, object]) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe(**values)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert caught.value.hint


recipes = st.builds(
    Recipe,
    target=st.just("keep"),
    value=st.floats(0.01, 1),
    allocate=st.sampled_from(["uniform", "global"]),
    include=st.lists(st.text(max_size=5), max_size=3).map(tuple),
    layers=st.none() | st.lists(st.text(max_size=5), max_size=3).map(tuple),
    layout=st.sampled_from(["factored", "pivoted", "dense"]),
    dtype=st.none() | st.sampled_from(["F32", "BF16"]),
    seed=st.integers(0, 2**31),
)


@given(recipes)
def test_recipe_round_trip(recipe: Recipe) -> None:
    assert recipe_from_json(json.loads(json.dumps(recipe_to_json(recipe)))) == recipe


@given(recipes, st.integers(1, 8), st.floats(0, 1))
def test_plan_round_trip(recipe: Recipe, rank: int, loss: float) -> None:
    first = LayerPlan(
        TensorInfo("a.weight", "BF16", (10, 20)), rank, recipe.layout, "F32", "gram", loss=loss
    )
    second = LayerPlan(
        TensorInfo("b.weight", "F32", (8, 8)), None, recipe.layout, "F32", "svd", reason="too dear"
    )
    skipped = (Skipped(TensorInfo("n.weight", "F32", (8,)), "1-D"),)
    plan = Plan(recipe, "abc", (first, second), skipped, ("a note",))
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d.pop("layers"),
        lambda d: d["layers"]["a.weight"].update(rank=11),
        lambda d: d.update(format=99),
        lambda d: d.update(recipe=3),
    ],
)
def test_a_damaged_plan_is_refused(damage: object) -> None:
    layer = LayerPlan(TensorInfo("a.weight", "F32", (10, 20)), 4, "factored", "F32", "svd")
    data = Plan(Recipe("rank", 4), "abc", (layer,), ()).to_json()
    damage(data)  # type: ignore[operator]
    with pytest.raises(UsageError):
        Plan.from_json(data)
