"""What rounding is expected to add, against what it adds."""

from __future__ import annotations

import pytest
import torch
from helpers import decaying
from torch import Tensor

from svdcli.linalg.expected import ExpectedRounding
from svdcli.linalg.packed import packed_factors, packed_matrix
from svdcli.linalg.rounding import Grid, Rounded
from svdcli.linalg.whitening import Metric, weighted, weighted_energies, weighted_error

GRIDS = (Grid(8), Grid(4, 32))
SHAPES = [(160, 96), (64, 160)]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, seed: int, decay: float, samples: int = 0) -> Tensor:
    """A second moment (n, n) of correlated numbers, some of them larger than others, from so many
    samples."""
    mixing = torch.linalg.qr(normal(n, n, seed=seed)).Q * torch.exp(-decay * torch.arange(n))
    x = normal(samples or 8 * n, n, seed=seed + 1) @ mixing.T
    x *= torch.exp(0.5 * normal(n, seed=seed + 2))
    return x.T @ x / len(x)


def layer(shape: tuple[int, int], outputs: str, samples: int = 0) -> tuple[Tensor, Metric]:
    m, n = shape
    w = decaying(m, n, 0.7) * torch.exp(0.3 * normal(n, seed=5))
    h = moment(m, 9, 0.03)
    moments = {"none": None, "diagonal": h.diagonal(), "full": h}
    return w, Metric(moment(n, 1, 0.05, samples), moments[outputs])


def added(w: Tensor, metric: Metric, matrices: tuple[Rounded, ...], *, transposed: bool) -> float:
    values = [matrix.values(torch.float64) for matrix in matrices]
    approx = values[0] if len(values) == 1 else values[0] @ values[1]
    return weighted_error(w, approx.T if transposed else approx, metric)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outputs", ["none", "diagonal", "full"])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_whole_matrix(shape: tuple[int, int], outputs: str, transposed: bool) -> None:
    w, metric = layer(shape, outputs)
    expected = ExpectedRounding(w, metric, GRIDS, torch.float32, transposed=transposed)
    for grid in GRIDS:
        matrix = packed_matrix(w, grid, metric, torch.float32, transposed=transposed)
        lost = added(w, metric, (matrix,), transposed=transposed)
        assert 0.75 < expected.whole(grid) / lost < 1.1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outputs", ["none", "diagonal", "full"])
@pytest.mark.parametrize("transposed", [False, True])
def test_factors_of_every_rank(shape: tuple[int, int], outputs: str, transposed: bool) -> None:
    w, metric = layer(shape, outputs)
    expected = ExpectedRounding(w, metric, GRIDS, torch.float32, transposed=transposed)
    for grid in GRIDS:
        for rank in (16, 48):
            best = weighted(w, rank, metric)
            both = packed_factors(w, best, grid, metric, torch.float32, transposed=transposed)
            lost = added(w, metric, both, transposed=transposed) - best.tail
            assert 0.75 < expected.factored(rank, grid) / lost < (1.75 if transposed else 1.4)


@pytest.mark.parametrize("samples", [40, 90])
def test_inputs_that_were_seen_in_few_directions(samples: int) -> None:
    """Where the moment is singular, and damping is most of what is seen elsewhere."""
    w, metric = layer((64, 160), "full", samples)
    expected = ExpectedRounding(w, metric, GRIDS, torch.float32)
    for grid in GRIDS:
        matrix = packed_matrix(w, grid, metric, torch.float32)
        lost = added(w, metric, (matrix,), transposed=False)
        assert 0.5 < expected.whole(grid) / lost < 2
        assert 0 < expected.factored(32, grid) < float(expected.energies.sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_the_spectrum_is_found_on_the_way(shape: tuple[int, int]) -> None:
    w, metric = layer(shape, "full")
    expected = ExpectedRounding(w, metric, GRIDS, torch.float32)
    energies = weighted_energies(w, metric)
    torch.testing.assert_close(expected.energies, energies, rtol=1e-9, atol=1e-12 * energies[0])


def test_a_layer_of_zeros_loses_nothing() -> None:
    _, metric = layer((64, 160), "full")
    expected = ExpectedRounding(torch.zeros(64, 160), metric, GRIDS, torch.float32)
    assert expected.whole(GRIDS[1]) == 0
    assert not expected.energies.any()
