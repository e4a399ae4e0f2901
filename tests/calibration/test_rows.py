"""Running sums of moments, against the products of all rows at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from svdcli.calibration.rows import MomentSums, padding_mask, without_padding


def pieces(width: int, seed: int = 0) -> list[Tensor]:
    """Rows that are added one after the other."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, width, generator=generator) for count in (5, 1, 40)]


@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_sums_are_the_moments_of_all_rows_together(dtype: torch.dtype | None) -> None:
    sums = MomentSums(dtype=dtype)
    for x, y in zip(pieces(70), pieces(20, seed=1), strict=True):
        sums.add("x x", x)
        sums.add_cross("y x", y, x)
        sums.add_mean("x", x)
    taken = sums.take()
    x, y = torch.cat(pieces(70)).double(), torch.cat(pieces(20, seed=1)).double()
    for key, expected in {"x x": x.T @ x, "y x": y.T @ x, "x": x.sum(0)}.items():
        assert taken[key].dtype == (dtype or torch.float32)
        torch.testing.assert_close(taken[key].double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(taken["x x"], taken["x x"].T)


def test_wide_rows_sum_to_a_diagonal_unless_the_whole_is_asked_for() -> None:
    sums, rows = MomentSums(full=8), pieces(9)[2]
    sums.add("diagonal", rows)
    sums.add("whole", rows, always_full=True)
    sums.add("narrow", rows[:, :8])
    taken = sums.take()
    torch.testing.assert_close(taken["whole"], rows.T @ rows)
    torch.testing.assert_close(taken["diagonal"], taken["whole"].diagonal())
    torch.testing.assert_close(taken["narrow"], taken["whole"][:8, :8])


def test_sums_that_were_taken_start_from_zero() -> None:
    sums, rows = MomentSums(), pieces(6)[0]
    sums.add("x", rows)
    first = sums.take()["x"].clone()
    assert not sums.take()
    sums.add("x", rows)
    assert torch.equal(sums.take()["x"], first)


def test_padding_is_left_out_where_the_mask_fits() -> None:
    values = torch.arange(24.0).view(2, 3, 4)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert padding_mask({"input_ids": mask}) is None
    assert padding_mask({"attention_mask": torch.ones_like(mask)}) is None
    kept = padding_mask({"attention_mask": mask})
    assert torch.equal(
        without_padding(values, kept), torch.stack((values[0, 0], values[0, 1], values[1, 0]))
    )
    assert torch.equal(without_padding(values[:, :2], kept), values[:, :2].reshape(-1, 4))
