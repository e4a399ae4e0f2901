"""The methods that the quality benchmark compares with, against what their papers prove of them, by
torch.linalg in float64."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import svdcli
from svdcli.linalg.whitening import Metric, weighted

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
from methods import (
    METHODS,
    Inputs,
    asvd,
    cholesky_factor,
    even_rank,
    inputs_of,
    plain_svd,
    svd_llm,
    with_factors,
)

SAMPLE = Path(__file__).parents[2] / "sample_models" / "tiny-llama"
SHAPES = [(40, 24), (24, 40), (32, 32), (9, 64)]
TOKENS = 300
Norm = Callable[[Tensor], float]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(n: int, count: int = TOKENS) -> Tensor:
    """Inputs X (n, count) whose channels lean on each other and differ in size up to a hundred
    times, with a mean."""
    loudness = torch.logspace(-1, 1, n, dtype=torch.float64)[
        torch.randperm(n, generator=torch.Generator().manual_seed(7))
    ]
    return loudness[:, None] * (normal(n, n, seed=8) @ normal(n, count, seed=9) / n**0.5 + 0.5)


def seen(x: Tensor) -> Inputs:
    """The same inputs, taken in two batches of tokens."""
    inputs = Inputs.none_of(x.shape[0])
    for part in x.T.split(TOKENS // 2 + 1):
        inputs.add(part)
    return inputs


def tail(a: Tensor, rank: int) -> float:
    """The least Frobenius distance between a and a matrix of that rank (Eckart and Young)."""
    return float(torch.linalg.svdvals(a)[rank:].square().sum().sqrt())


def ranks_of(shape: tuple[int, int]) -> list[int]:
    return sorted({1, min(shape) // 3, min(shape) - 1})


def check_that_nothing_near_is_better(up: Tensor, down: Tensor, error: Norm) -> None:
    """No random matrix of the same rank, near or far, has a smaller error."""
    best = error(up @ down)
    for seed in range(8):
        for size in (1e-6, 1e-4, 1e-2, 1.0):
            other_up = up + size * up.abs().mean() * normal(*up.shape, seed=seed)
            other_down = down + size * down.abs().mean(dim=0) * normal(*down.shape, seed=seed + 100)
            for product in (other_up @ other_down, other_up @ down, up @ other_down):
                assert error(product) >= best * (1 - 1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_plain_svd_is_the_nearest_in_the_frobenius_norm(shape: tuple[int, int]) -> None:
    w = normal(*shape)
    for rank in ranks_of(shape):
        up, down = plain_svd(w, rank)
        assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
        assert float((w - up @ down).norm()) == pytest.approx(tail(w, rank), rel=1e-10)
        check_that_nothing_near_is_better(up, down, lambda product: float((w - product).norm()))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_asvd_is_the_nearest_with_its_channels_scaled(shape: tuple[int, int], alpha: float) -> None:
    w, x = normal(*shape), tokens(shape[1])
    scale = x.abs().mean(dim=1) ** alpha
    for rank in ranks_of(shape):
        up, down = asvd(w, rank, seen(x), alpha)
        assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
        assert float(((w - up @ down) * scale).norm()) == pytest.approx(
            tail(w * scale, rank), rel=1e-10
        )
        check_that_nothing_near_is_better(
            up, down, lambda product: float(((w - product) * scale).norm())
        )


def test_asvd_without_an_exponent_is_plain_svd() -> None:
    w, x = normal(24, 40), tokens(40)
    up, down = asvd(w, 7, seen(x), alpha=0.0)
    plain_up, plain_down = plain_svd(w, 7)
    torch.testing.assert_close(up @ down, plain_up @ plain_down, rtol=0, atol=1e-12)


def test_a_channel_that_is_never_heard_does_no_harm_to_asvd() -> None:
    x = tokens(40)
    x[5] = 0
    up, down = asvd(normal(24, 40), 7, seen(x))
    assert bool(torch.isfinite(up @ down).all())


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_llm_loses_on_data_what_it_cuts_off(shape: tuple[int, int]) -> None:
    w, x = normal(*shape), tokens(shape[1])
    s = cholesky_factor(seen(x).moment)
    sigma = torch.linalg.svdvals(w @ s)
    torch.testing.assert_close(sigma, torch.linalg.svdvals(w @ x)[: min(shape)], rtol=1e-8, atol=0)
    for rank in ranks_of(shape):
        up, down = svd_llm(w, rank, seen(x))
        assert (up.shape, down.shape) == ((shape[0], rank), (rank, shape[1]))
        error = float(((w - up @ down) @ x).norm())
        assert error == pytest.approx(float(sigma[rank:].square().sum().sqrt()), rel=1e-8)
        assert error == pytest.approx(tail(w @ x, rank), rel=1e-8)
        check_that_nothing_near_is_better(
            up, down, lambda product: float(((w - product) @ x).norm())
        )


def test_each_singular_value_that_svd_llm_leaves_out_costs_itself() -> None:
    """Theorem 3.2, for every one of them, not only for the last."""
    w, x = normal(24, 40), tokens(40)
    up, down = svd_llm(w, 24, seen(x))
    sigma = torch.linalg.svdvals(w @ x)
    for i in range(24):
        others = [j for j in range(24) if j != i]
        assert float(((w - up[:, others] @ down[others]) @ x).norm()) == pytest.approx(
            float(sigma[i]), rel=1e-7
        )


@pytest.mark.parametrize("shape", SHAPES)
def test_svd_llm_is_the_one_sided_optimum_of_svdcli(shape: tuple[int, int]) -> None:
    w, x = normal(*shape), tokens(shape[1])
    inputs, rank = seen(x), min(shape) // 3
    up, down = svd_llm(w, rank, inputs)
    ours = weighted(w, rank, Metric(inputs.moment / inputs.count))
    torch.testing.assert_close(up @ down, ours.up @ ours.down, rtol=0, atol=1e-8)


def test_svd_llm_stands_inputs_of_too_few_tokens() -> None:
    w, x = normal(24, 40), tokens(40, count=10)
    up, down = svd_llm(w, 10, seen(x))
    assert float(((w - up @ down) @ x).norm()) <= 1e-5 * float((w @ x).norm())


@pytest.mark.parametrize("method", METHODS)
def test_the_whole_rank_is_the_weight(method: str) -> None:
    w = normal(24, 40)
    up, down = METHODS[method](w, 24, seen(tokens(40)))
    torch.testing.assert_close(up @ down, w, rtol=0, atol=1e-9)


# In a model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes)).eval()


def test_the_hooks_see_what_the_layers_see(llama: LlamaForCausalLM) -> None:
    """The first block's queries read the normed embedding, which is computed here by hand."""
    ids = torch.randint(64, (6, 10), generator=torch.Generator().manual_seed(1))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]
    found = inputs_of(llama, names, ids.split(4))
    with torch.no_grad():
        x = (
            llama.model.layers[0]
            .input_layernorm(llama.model.embed_tokens(ids))
            .reshape(60, 32)
            .double()
        )
    first = found[names[0]]
    assert first.count == found[names[1]].count == 60
    torch.testing.assert_close(first.magnitude, x.abs().sum(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(first.moment, x.T @ x, rtol=1e-5, atol=1e-6)
    assert found[names[1]].moment.shape == (48, 48)
    assert not llama.model.layers[0].self_attn.q_proj._forward_pre_hooks


def test_a_copy_of_the_model_gets_the_rounded_factors(llama: LlamaForCausalLM) -> None:
    name = "model.layers.0.mlp.up_proj"
    before = llama.get_submodule(name).weight.detach().clone()
    up, down = plain_svd(before, 5)
    changed = with_factors(llama, {name: (up, down)}, torch.bfloat16)
    assert torch.equal(
        changed.get_submodule(name).weight, up.bfloat16().float() @ down.bfloat16().float()
    )
    assert torch.equal(llama.get_submodule(name).weight, before)
    other = "model.layers.1.mlp.up_proj"
    assert torch.equal(changed.get_submodule(other).weight, llama.get_submodule(other).weight)


@pytest.mark.parametrize("keep", [0.8, 0.6, 0.4])
def test_the_ranks_are_those_that_svdcli_gives_its_factored_layout(keep: float) -> None:
    plan = svdcli.compress(SAMPLE, recipe=svdcli.Recipe("keep", keep), dry_run=True).plan
    assert len(plan.factored) == len(plan.layers) == 42
    assert {layer.tensor.name: layer.rank for layer in plan.layers} == {
        layer.tensor.name: even_rank(layer.tensor.shape, keep) for layer in plan.layers
    }
