"""Layouts hold the same matrix, and the recorded error is the error of what is stored."""

from __future__ import annotations

import pytest
import torch
from helpers import best_error, decaying

from svdcli.linalg.layouts import CODECS
from svdcli.linalg.layouts.pivoted import pivot
from svdcli.linalg.solvers import svd
from svdcli.plan.layouts import LAYOUTS

FULL_BITS = [name for name, layout in LAYOUTS.items() if layout.is_asked_for]

SHAPES = [(60, 40), (40, 60), (50, 50)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 13, 39])
def test_pivoted_is_the_same_matrix_as_factored(shape: tuple[int, int], rank: int) -> None:
    factors = svd(decaying(*shape, 0.7), rank)
    down, coefficients, rows = pivot(factors)
    assert down.shape == (rank, shape[1])
    assert coefficients.shape == (shape[0] - rank, rank)
    assert sorted(rows.tolist()) == list(range(shape[0]))
    rebuilt = torch.cat([down, coefficients @ down])[rows]
    torch.testing.assert_close(rebuilt, factors.up @ factors.down, rtol=0, atol=1e-10)


def test_pivoting_keeps_rows_as_they_are_and_coefficients_small() -> None:
    factors = svd(decaying(200, 150, 0.5), 60)
    down, coefficients, rows = pivot(factors)
    kept = torch.argsort(rows)[:60]
    torch.testing.assert_close(down, (factors.up @ factors.down)[kept], rtol=0, atol=1e-10)
    assert coefficients.abs().max() < 8


@pytest.mark.parametrize("layout", FULL_BITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_layout_reaches_the_optimum(layout: str, shape: tuple[int, int]) -> None:
    w = decaying(*shape, 0.7)
    stored = CODECS[layout].encode(svd(w, 17), torch.float64)
    assert CODECS[layout].residual(w, stored) == pytest.approx(best_error(w, 17), rel=1e-9)


@pytest.mark.parametrize("layout", FULL_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_residual_is_that_of_the_rounded_tensors(layout: str, dtype: torch.dtype) -> None:
    w = decaying(90, 70, 0.7)
    stored = CODECS[layout].encode(svd(w, 20), dtype)
    assert all(t.dtype == dtype for t in stored if t.dtype.is_floating_point)
    rebuilt = CODECS[layout].rows(stored, torch.float64, slice(None))
    oracle = float((w - rebuilt).square().sum())
    assert CODECS[layout].residual(w, stored) == pytest.approx(oracle, rel=1e-12)
    assert CODECS[layout].residual(w.T.contiguous().T, stored) == pytest.approx(oracle, rel=1e-12)
    if layout != "dense":  # a rounded dense matrix has full rank again
        assert oracle >= best_error(w, 20) * (1 - 1e-12)


@pytest.mark.parametrize("layout", FULL_BITS)
def test_rows_can_be_rebuilt_in_pieces(layout: str) -> None:
    stored = CODECS[layout].encode(svd(decaying(50, 30, 0.7), 9), torch.float32)
    whole = CODECS[layout].rows(stored, torch.float32, slice(None))
    pieces = [
        CODECS[layout].rows(stored, torch.float32, slice(at, at + 7)) for at in range(0, 50, 7)
    ]
    torch.testing.assert_close(torch.cat(pieces), whole, rtol=1e-6, atol=1e-7)
