"""Low-rank modules against the dense weight they stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from svdcli.models.modules import LOW_RANK, LazyWeight, low_rank_like, weight_of

LAYERS = {
    "tall": lambda: nn.Linear(12, 30),
    "wide": lambda: nn.Linear(30, 12, bias=False),
    "conv1d": lambda: Conv1D(30, 12),
    "embedding": lambda: nn.Embedding(40, 12),
}


def filled(kind: str, rank: int, pivoted: bool) -> tuple[nn.Module, nn.Module]:
    """(a low-rank module with random factors, the dense layer of the same weight)."""
    torch.manual_seed(0)
    old = LAYERS[kind]()
    new = low_rank_like(old, rank, layout="pivoted" if pivoted else "factored")
    assert isinstance(new, LOW_RANK)
    new = new.to_empty(device="cpu")
    for parameter in new.parameters():
        nn.init.normal_(parameter)
    if pivoted:
        new.svd_rows.copy_(torch.randperm(len(new.svd_rows)))
    old.weight.data = weight_of(new).detach()
    if getattr(old, "bias", None) is not None:
        old.bias.data = new.bias.detach()
    return new, old


@pytest.mark.parametrize("pivoted", [False, True])
@pytest.mark.parametrize("rank", [1, 5, 11])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_is_that_of_the_dense_layer(kind: str, rank: int, pivoted: bool) -> None:
    new, old = filled(kind, rank, pivoted)
    x = (
        torch.randint(40, (3, 7))
        if kind == "embedding"
        else torch.randn(3, 7, 30 if kind == "wide" else 12)
    )
    assert torch.allclose(new(x), old(x), atol=1e-4)
    assert torch.linalg.matrix_rank(weight_of(new), rtol=1e-5) <= rank
    assert sum(p.numel() for p in new.parameters()) - (
        0 if getattr(new, "bias", None) is None else len(new.bias)
    ) == (rank * (sum(old.weight.shape) - (rank if pivoted else 0)))


@pytest.mark.parametrize("pivoted", [False, True])
def test_a_weight_that_is_only_looked_at_costs_no_product(
    pivoted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    new, old = filled("tall", 5, pivoted)
    with monkeypatch.context() as patch:
        patch.setattr("svdcli.models.modules.weight_of", lambda _: pytest.fail("multiplied out"))
        weight = new.weight
        assert isinstance(weight, torch.Tensor)
        assert (weight.shape, weight.dtype, weight.device) == (
            old.weight.shape,
            old.weight.dtype,
            old.weight.device,
        )
        assert (weight.size(0), weight.dim(), weight.ndim) == (30, 2, 2)
    assert isinstance(new.weight, LazyWeight)


@pytest.mark.parametrize("pivoted", [False, True])
def test_a_weight_that_is_used_is_the_dense_one(pivoted: bool) -> None:
    new, old = filled("tall", 5, pivoted)
    x = torch.randn(4, 12)
    assert torch.allclose(functional.linear(x, new.weight, new.bias), old(x), atol=1e-5)
    assert torch.equal(torch.stack([new.weight, new.weight])[0], old.weight)
    assert torch.allclose(new.weight.float().T @ torch.eye(30), old.weight.T)
    assert "tensor" in repr(new.weight + 0)
    functional.linear(x, new.weight).sum().backward()
    assert new.svd_up.weight.grad is not None
    assert new.svd_up.weight.grad.abs().sum() > 0


def test_other_layers_are_left_to_their_owners() -> None:
    assert low_rank_like(nn.Conv2d(3, 4, 1), 2, layout="factored") is None
    assert low_rank_like(nn.LayerNorm(4), 2, layout="pivoted") is None
