"""A share that is asked for is kept by all selected layers together, or the refusal names one that
can be."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from svdcli.errors import UsageError
from svdcli.plan.budget import missed_target, ranks_within_share
from svdcli.plan.layers import choose_layers
from svdcli.plan.plan import LayerPlan, Plan
from svdcli.plan.ranks import cost_of, options_of, uniform
from svdcli.plan.recipe import Recipe
from svdcli.plan.tensors import TensorInfo

sides = st.integers(20, 200)
layers = st.lists(
    st.tuples(sides, sides, st.booleans()), min_size=1, max_size=6
)  # (rows, columns, stays dense)


def kept(recipe: Recipe, tensors: list[TensorInfo], left: dict[str, str]) -> float:
    """The share of parameters that remains, counted by hand from the ranks; what is left dense
    remains whole."""
    sound = [tensor for tensor in tensors if tensor.name not in left]
    each = [options_of(tensor, recipe, unit="parameters") for tensor in sound]
    choices, _ = ranks_within_share(recipe, tensors, each, left)
    after = sum(tensor.parameters for tensor in tensors if tensor.name in left)
    for tensor, choice in zip(sound, choices, strict=True):
        after += tensor.parameters if choice.rank is None else choice.rank * sum(tensor.shape)
    return after / sum(tensor.parameters for tensor in tensors)


def problem(shapes: list[tuple[int, int, bool]]) -> tuple[list[TensorInfo], dict[str, str]]:
    tensors = [TensorInfo(f"l.{i}.weight", "F32", (m, n)) for i, (m, n, _) in enumerate(shapes)]
    return tensors, {
        f"l.{i}.weight": "holds NaN" for i, (_, _, dense) in enumerate(shapes) if dense
    }


@given(layers, st.floats(0.05, 0.95), st.sampled_from([1, 4, 12]))
def test_a_share_is_kept_by_all_together_or_refused_with_one_that_is(
    shapes: list[tuple[int, int, bool]], keep: float, step: int
) -> None:
    tensors, left = problem(shapes)
    recipe = Recipe("keep", keep, multiple_of=step)
    if not any(
        options_of(t, recipe, unit="parameters").ranks for t in tensors if t.name not in left
    ):
        assert kept(recipe, tensors, left) == 1.0
        return
    try:
        assert kept(recipe, tensors, left) <= keep
    except UsageError as error:
        named = re.search(r"use --keep ([\d.]+) or more", str(error))
        assert named is not None
        assert keep < float(named[1])
        assert kept(Recipe("keep", float(named[1]), multiple_of=step), tensors, left) <= float(
            named[1]
        )
        with pytest.raises(UsageError):
            kept(Recipe("keep", 0.99 * float(named[1]), multiple_of=step), tensors, left)


@given(st.lists(st.tuples(sides, sides), min_size=1, max_size=5), st.floats(0.2, 0.95))
def test_nothing_changes_where_no_layer_stays_dense(
    shapes: list[tuple[int, int]], keep: float
) -> None:
    recipe = Recipe("keep", keep)
    tensors, _ = problem([(m, n, False) for m, n in shapes])
    each = [options_of(tensor, recipe, unit="parameters") for tensor in tensors]
    even = uniform(each, keep)
    if cost_of(each, even) <= keep * sum(tensor.parameters for tensor in tensors):
        assert ranks_within_share(recipe, tensors, each, {})[0] == even


def test_the_others_make_up_for_a_layer_that_stays_dense() -> None:
    tensors, left = problem([(100, 100, False)] * 3 + [(100, 100, True)])
    recipe = Recipe("keep", 0.5)
    choices, budget = ranks_within_share(
        recipe, tensors, [options_of(t, recipe, unit="parameters") for t in tensors[:3]], left
    )
    assert budget == 10_000
    assert [choice.rank for choice in choices] == [17, 17, 16]


def refusal(dense: dict[str, str], ranked: list[str], keep: float = 0.2, **more: int) -> str:
    tensors = [TensorInfo(f"{name}.weight", "F32", (64, 64)) for name in (*dense, *ranked)]
    recipe = Recipe("keep", keep, **more)  # type: ignore[arg-type]
    each = [options_of(tensor, recipe, unit="parameters") for tensor in tensors[len(dense) :]]
    with pytest.raises(UsageError) as caught:
        ranks_within_share(
            recipe, tensors, each, {f"{name}.weight": reason for name, reason in dense.items()}
        )
    return str(caught.value)


def test_a_refusal_says_which_layers_and_why_and_what_to_do() -> None:
    experts = {
        f"model.layers.0.mlp.experts.{i}.{kind}_proj": "no input"
        for i in range(3)
        for kind in ("up", "down")
    }
    assert refusal(
        experts | {"model.layers.0.mlp.experts.9.gate_proj": "holds NaN"},
        ["model.layers.0.self_attn.q_proj"],
    ) == (
        "--keep 0.2 is not reachable: 7 of 8 selected layers stay dense (6 of them: no input; "
        "such as "
        "model.layers.0.mlp.experts.0.up_proj), and with the least ranks elsewhere 0.879 remain; "
        "use --keep 0.879 or more, "
        "or leave the dense ones out of the count with --exclude '*.experts.*'"
    )
    assert refusal({"a.b": "no input"}, ["a.c"]).endswith("with --exclude a.b")
    assert "smaller --multiple-of" in refusal({}, ["a.b"], multiple_of=24)


@pytest.mark.parametrize(
    ("dense", "ranked"),
    [
        (["experts.0.up", "experts.1.up", "experts.2.down"], ["attn.up", "my_experts.1.up"]),
        (["m.0.mlp.up", "m.1.mlp.up", "m.2.mlp.up"], ["m.0.mlp.down", "m.3.attn.q"]),
        (["m.0.x.gate", "m.1.y.gate", "m.2.z.gate"], ["m.0.x.up"]),
    ],
)
def test_a_pattern_in_a_refusal_excludes_the_dense_layers_and_no_other(
    dense: list[str], ranked: list[str]
) -> None:
    found = re.search(r"--exclude '(.+)'$", refusal(dict.fromkeys(dense, "no input"), ranked))
    assert found is not None
    tensors = [TensorInfo(f"{name}.weight", "F32", (64, 64)) for name in (*dense, *ranked)]
    chosen, _ = choose_layers(tensors, exclude=[found[1]])
    assert [tensor.module for tensor in chosen] == ranked


def test_a_missed_target_is_seen() -> None:
    def plan(recipe: Recipe, rank: int | None) -> Plan:
        layer = LayerPlan(TensorInfo("a.weight", "F32", (100, 100)), rank, "factored", "F32", "svd")
        return Plan(recipe, "", (layer,), ())

    assert missed_target(plan(Recipe("keep", 0.5), 25), 10**9) == ""
    assert (
        missed_target(plan(Recipe("keep", 0.5), 26), 0)
        == "0.52 of the selected parameters remain where --keep 0.5 allows less"
    )
    assert missed_target(plan(Recipe("size", 1000), None), 1000) == ""
    assert (
        missed_target(plan(Recipe("size", 1000), None), 1001)
        == "the output is larger than --size 1000"
    )
    assert missed_target(plan(Recipe("error", 0.1), None), 10**9) == ""
