"""Every solver against Eckart and Young: no rank-r matrix is nearer, and theirs is as near, by a
float64 SVD."""

from __future__ import annotations

import pytest
import torch
from helpers import best_error, decaying

from svdcli.linalg.machine import squared_norm
from svdcli.linalg.solvers import SOLVERS, squared_singular_values

SHAPES = [(60, 40), (40, 60), (50, 50), (300, 20), (20, 300), (33, 1)]
EXACT = ["svd", "gram"]


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("power", [0.3, 1.5])
def test_eckart_young(solver: str, shape: tuple[int, int], power: float) -> None:
    w = decaying(*shape, power)
    for rank in sorted({1, min(shape) // 2 or 1, min(shape)}):
        factors = SOLVERS[solver](w, rank, 0)
        assert factors.up.shape == (shape[0], rank)
        assert factors.down.shape == (rank, shape[1])
        error = squared_norm(w - factors.up @ factors.down)
        assert error == pytest.approx(best_error(w, rank), rel=1e-9, abs=1e-14)
        assert factors.tail == pytest.approx(best_error(w, rank), rel=1e-6, abs=1e-13)


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("shape", [(200, 128), (128, 200), (160, 160)])
def test_float32_is_within_a_millionth_of_the_optimum(solver: str, shape: tuple[int, int]) -> None:
    w = decaying(*shape, 0.6).float()
    factors = SOLVERS[solver](w, 40, 0)
    error = squared_norm(w.double() - factors.up.double() @ factors.down.double())
    assert error <= best_error(w, 40) * (1 + 1e-6)


@pytest.mark.parametrize("solver", EXACT)
def test_sigma_are_the_singular_values_and_are_shared_evenly(solver: str) -> None:
    w = decaying(70, 50, 0.8)
    factors = SOLVERS[solver](w, 20, 0)
    sigma = torch.linalg.svdvals(w)[:20]
    torch.testing.assert_close(factors.sigma, sigma, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(factors.up.norm(dim=0), sigma.sqrt(), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(factors.down.norm(dim=1), sigma.sqrt(), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [(200, 128), (128, 200)])
def test_randomized_is_near_the_optimum_and_follows_its_seed(shape: tuple[int, int]) -> None:
    w = decaying(*shape, 1.0)
    one, same, other = (SOLVERS["randomized"](w, 10, seed) for seed in (1, 1, 2))
    error = squared_norm(w - one.up @ one.down)
    assert best_error(w, 10) * (1 - 1e-9) <= error <= best_error(w, 10) * 1.05
    assert one.tail == pytest.approx(error, rel=1e-6)
    assert torch.equal(one.up, same.up)
    assert not torch.equal(one.up, other.up)


@pytest.mark.parametrize("solver", sorted(SOLVERS))
def test_a_zero_matrix_has_zero_factors(solver: str) -> None:
    factors = SOLVERS[solver](torch.zeros(30, 20), 5, 0)
    product = factors.up @ factors.down
    assert torch.equal(product, torch.zeros(30, 20))
    assert factors.tail == 0


@pytest.mark.parametrize("solver", EXACT)
def test_an_exactly_low_rank_matrix_is_reproduced(solver: str) -> None:
    w = decaying(80, 60, 0.1)[:, :7] @ decaying(7, 50, 0.1)
    factors = SOLVERS[solver](w, 7, 0)
    torch.testing.assert_close(factors.up @ factors.down, w, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_squared_singular_values(shape: tuple[int, int]) -> None:
    w = decaying(*shape, 0.5)
    torch.testing.assert_close(
        squared_singular_values(w), torch.linalg.svdvals(w).square(), rtol=1e-9, atol=1e-12
    )
