"""Rounding with feedback against its definition, brute force, and rounding to nearest."""

from __future__ import annotations

import itertools

import pytest
import torch
from helpers import decaying
from torch import Tensor

from svdcli.linalg.damping import damp
from svdcli.linalg.packed import packed_factors, packed_matrix, random_rotation
from svdcli.linalg.rounding import (
    Grid,
    Rounded,
    inverse_root,
    rounded,
    searched_scales,
    to_nearest,
)
from svdcli.linalg.whitening import Metric, weighted, weighted_error

INT8, INT4 = Grid(8), Grid(4, 16)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, seed: int = 1, decay: float = 0.15) -> Tensor:
    """A second moment (n, n) of inputs that are correlated, as those of trained layers are."""
    x = normal(8 * n, n, seed=seed) * torch.exp(-decay * torch.arange(n, dtype=torch.float64))
    return x.T @ x / x.shape[0] if decay == 0 else _turned(x.T @ x / x.shape[0], seed)


def _turned(g: Tensor, seed: int) -> Tensor:
    q = torch.linalg.qr(normal(*g.shape, seed=seed + 50)).Q
    return q @ g @ q.T


def error(w: Tensor, stored: Rounded | Tensor, g: Tensor, h: Tensor | None = None) -> float:
    values = stored.values(torch.float64) if isinstance(stored, Rounded) else stored
    return weighted_error(w, values, Metric(g, h))


def by_definition(w: Tensor, scales: Tensor, grid: Grid, g: Tensor) -> Tensor:
    """Column after column: those that are still free take the values that make up for all errors so
    far as well as real numbers can, then the next one is rounded."""
    g = damp(g, 0.01)
    order = g.diagonal().argsort(descending=True)
    lost = torch.zeros_like(w)
    codes = torch.zeros_like(w)
    for place, column in enumerate(order):
        done, free = order[:place], order[place:]
        best = torch.linalg.solve(g[free][:, free], -g[free][:, done] @ lost[:, done].T).T
        target = w[:, column] - best[:, 0]
        step = scales[:, column // (grid.group or w.shape[1])].double()
        codes[:, column] = (target / step).round().clamp(grid.lowest, grid.highest)
        lost[:, column] = w[:, column] - codes[:, column] * step
    return codes


@pytest.mark.parametrize("grid", [INT8, INT4, Grid(3, 8)])
@pytest.mark.parametrize("n", [16, 40])
def test_every_column_makes_up_for_the_errors_before(grid: Grid, n: int) -> None:
    w, g = normal(12, n), moment(n)
    found = rounded(w, grid, torch.float32, g)
    expected = by_definition(w, found.scales, grid, g)
    # in float32 a number in the middle of two codes may fall to either side
    assert (found.codes != expected).double().mean() < 0.01


@pytest.mark.parametrize("grid", [INT8, INT4])
def test_where_inputs_are_independent_nearest_is_best(grid: Grid) -> None:
    w = normal(20, 48).float()  # the largest numbers lie between two codes
    g = torch.diag(torch.rand(48, dtype=torch.float64) + 0.1)
    found = rounded(w, grid, torch.float32, g)
    assert torch.equal(found.codes, to_nearest(w, grid, found.scales).codes)
    plain = rounded(w, grid, torch.float32)
    assert torch.equal(plain.codes, to_nearest(w, grid, plain.scales).codes)


@pytest.mark.parametrize("seed", range(5))
def test_no_choice_of_codes_is_much_better(seed: int) -> None:
    """Against all of them, for rows of four numbers at two bits."""
    w, g, grid = normal(30, 4, seed=seed), damp(moment(4, seed), 0.01), Grid(2)
    found = rounded(w, grid, torch.float64, g)
    codes = torch.tensor(list(itertools.product(range(-2, 2), repeat=4)), dtype=torch.float64)
    best = 0.0
    for row, scale in zip(w, found.scales, strict=True):
        difference = row - codes * scale
        best += float(torch.einsum("ki,ij,kj->k", difference, g, difference).min())
    assert best <= error(w, found, g) <= 1.3 * best


@pytest.mark.parametrize("grid", [INT8, INT4])
def test_feedback_loses_less_than_rounding_to_nearest(grid: Grid) -> None:
    w, g, h = normal(64, 96), moment(96, decay=0.05), moment(64, 7, decay=0.05)
    nearest = to_nearest(w, grid, searched_scales(w, grid, torch.float32))
    columns = rounded(w, grid, torch.float32, g)
    both = rounded(w, grid, torch.float32, g, h)
    assert error(w, columns, g, h) < 0.8 * error(w, nearest, g, h)
    assert error(w, both, g, h) < 0.8 * error(w, columns, g, h)


def test_scales_are_no_worse_than_the_largest_magnitude() -> None:
    w = normal(40, 64) ** 3  # a few large numbers
    grid = Grid(4, 32)
    largest = w.view(40, 2, 32).abs().amax(2) / 7.5
    plain = to_nearest(w, grid, largest).values(torch.float64)
    searched = to_nearest(w, grid, searched_scales(w, grid, torch.float64)).values(torch.float64)
    assert (w - searched).square().sum() < 0.9 * (w - plain).square().sum()


@pytest.mark.parametrize("n", [1, 15, 16, 33])
def test_the_last_group_may_be_shorter(n: int) -> None:
    w = normal(5, n)
    found = rounded(w, INT4, torch.float32, moment(n))
    assert found.scales.shape == (5, -(-n // 16))
    assert found.codes.shape == w.shape
    assert (w - found.values(torch.float64)).abs().max() < 2.5


def test_zeros_stay_zeros() -> None:
    w = normal(6, 32)
    w[2] = 0
    w[:, 16:] = 0
    found = rounded(w, INT4, torch.bfloat16, torch.diag(torch.ones(32)))
    assert not found.values(torch.float64)[w == 0].any()
    assert found.scales[2, 0] == 1


def test_the_inverse_root() -> None:
    g, order = moment(30), torch.randperm(30, generator=torch.Generator().manual_seed(3))
    before = g.clone()
    root = inverse_root(g, 0.01, order)
    assert not root.tril(-1).any()
    damped = damp(g, 0.01)[order][:, order]
    torch.testing.assert_close(root.T @ root, torch.linalg.inv(damped), rtol=1e-8, atol=1e-8)
    assert torch.equal(g, before)


def test_a_rotation_is_orthogonal_and_always_the_same() -> None:
    rotation = random_rotation(40)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(40, dtype=torch.float64))
    assert torch.equal(rotation, random_rotation(40))


@pytest.mark.parametrize("shape", [(48, 64), (64, 48)])
@pytest.mark.parametrize("outputs", ["none", "diagonal", "full"])
def test_packed_factors_are_near_the_best_of_their_rank(
    shape: tuple[int, int], outputs: str
) -> None:
    m, n = shape
    w, g, h = decaying(m, n, 0.7), moment(n, decay=0.03), moment(m, 9, decay=0.03)
    metric = Metric(g, {"none": None, "diagonal": h.diagonal(), "full": h}[outputs])
    tail = weighted(w, 16, metric).tail
    errors = {}
    for grid in (Grid(8), Grid(4, 16)):
        up, down = packed_factors(w, weighted(w, 16, metric), grid, metric, torch.float32)
        assert up.codes.shape == (m, 16)
        assert down.codes.shape == (16, n)
        product = up.values(torch.float64) @ down.values(torch.float64)
        errors[grid.bits] = weighted_error(w, product, metric)
    assert tail < errors[8] < 1.01 * tail
    assert errors[8] < errors[4] < 1.5 * tail


def test_turned_factors_lose_less_than_singular_vectors() -> None:
    w, grid = decaying(96, 96, 1.5), Grid(4, 32)
    metric = Metric(torch.eye(96, dtype=torch.float64))
    up, down = packed_factors(w, weighted(w, 64, metric), grid, metric, torch.float32)
    turned = weighted_error(w, up.values(torch.float64) @ down.values(torch.float64), metric)
    factors = weighted(w, 64, metric)
    plain = [
        to_nearest(part, grid, searched_scales(part, grid, torch.float32)).values(torch.float64)
        for part in (factors.up, factors.down)
    ]
    assert turned < 0.5 * weighted_error(w, plain[0] @ plain[1], metric)


def test_a_calibration_that_saw_nothing_rounds_to_nearest() -> None:
    w = normal(10, 32)
    blind = Metric(torch.zeros(32, 32), torch.zeros(10, 10))
    found = packed_matrix(w, INT4, blind, torch.float32)
    assert torch.equal(found.codes, to_nearest(w, INT4, found.scales).codes)
    w = decaying(10, 32, 0.5)
    up, down = packed_factors(w, weighted(w, 5, blind), INT8, blind, torch.float32)
    product = up.values(torch.float64) @ down.values(torch.float64)
    assert float((w - product).square().sum()) == pytest.approx(
        weighted(w, 5, blind).tail, rel=0.02
    )


def test_inputs_that_were_seen_in_few_directions() -> None:
    """Fewer than the rank: the factors stay near the matrix where nothing was seen."""
    w = decaying(40, 48, 0.5)
    x = normal(10, 48, seed=4)
    metric = Metric(x.T @ x / 10)
    up, down = packed_factors(w, weighted(w, 24, metric), INT8, metric, torch.float32)
    product = up.values(torch.float64) @ down.values(torch.float64)
    energy = weighted_error(w, torch.zeros_like(w), metric)
    assert weighted_error(w, product, metric) < 1e-4 * energy
    assert float((w - product).norm()) < 2 * float(w.norm())


@pytest.mark.parametrize("shape", [(96, 64), (64, 96)])
@pytest.mark.parametrize("outputs", ["none", "diagonal", "full"])
def test_a_weight_stored_the_other_way_round_loses_no_more(
    shape: tuple[int, int], outputs: str
) -> None:
    """The same layer, with scales along its other side."""
    m, n = shape
    w, g, h = decaying(m, n, 0.7), moment(n, decay=0.03), moment(m, 9, decay=0.03)
    metric = Metric(g, {"none": None, "diagonal": h.diagonal(), "full": h}[outputs])
    best = weighted(w, 32, metric)
    for grid in (INT8, INT4):
        upright = packed_matrix(w, grid, metric, torch.float32)
        turned = packed_matrix(w, grid, metric, torch.float32, transposed=True)
        assert turned.codes.shape == (n, m)
        lost = weighted_error(w, turned.values(torch.float64).T, metric)
        # a scale of 8 bits is for a whole side, which may be the longer one
        assert lost < 1.3 * error(w, upright, g, metric.outputs)
        nearest = to_nearest(w.T, grid, searched_scales(w.T, grid, torch.float32))
        assert lost < 0.8 * weighted_error(w, nearest.values(torch.float64).T, metric)

        added = []
        for transposed in (False, True):
            factors = packed_factors(w, best, grid, metric, torch.float32, transposed=transposed)
            first, second = (part.values(torch.float64) for part in factors)
            product = first @ second
            assert product.shape == ((n, m) if transposed else (m, n))
            product = product.T if transposed else product
            added.append(weighted_error(w, product, metric) - best.tail)
        assert added[1] < 1.2 * added[0]
