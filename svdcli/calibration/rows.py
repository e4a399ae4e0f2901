"""Rows of tokens without padding, and running sums of their moments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from svdcli.linalg.machine import fill_gram, mirror, moment
from svdcli.text.tokens import Batch


def padding_mask(batch: Batch) -> Tensor | None:
    """Return True for the tokens of a batch that count; None where all of them do."""
    mask = batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        return None
    return mask.bool()


def without_padding(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return (tokens, width) of values (..., width), those where mask is set. A mask of another
    shape says nothing about these values."""
    if mask is not None and mask.shape == values.shape[:-1]:
        values = values[mask.to(values.device)]
    return values.reshape(-1, values.shape[-1])


class MomentSums:
    """Sums over rows (count, width) by key: first moments, second moments and cross moments.

    Second moments of rows wider than `full` are summed as diagonals. Sums have the rows' dtype, or
    `dtype` where it is given: products are computed in the rows' dtype all the same. begin(key) is
    what a sum starts from, None for zero: sums that go on from each other are, to the bit, the one
    that nothing interrupted.
    """

    def __init__(
        self,
        full: int | None = None,
        dtype: torch.dtype | None = None,
        begin: Callable[[str], Tensor | None] = lambda key: None,
    ) -> None:
        self._full = full
        self._dtype = dtype
        self._begin = begin
        self._sums: dict[str, Tensor] = {}
        # Keys of sums of which only the lower triangle is up to date
        self._lower: set[str] = set()

    def add(self, key: str, rows: Tensor, *, always_full: bool = False) -> None:
        """Add rows^T rows (width, width), or its diagonal (width,) for wide rows; with
        always_full, never the diagonal alone."""
        width = rows.shape[1]
        if not always_full and self._full is not None and width > self._full:
            self._sum_of(key, rows, (width,)).add_(rows.square().sum(0))
            return
        total = self._sum_of(key, rows, (width, width))
        if total.dtype != rows.dtype:
            total.add_(moment(rows))
            return
        # Half of the product is enough: the upper triangle is filled in when the sums are taken
        self._lower.add(key)
        fill_gram(rows.T, total, add=True)

    def add_cross(self, key: str, y: Tensor, x: Tensor) -> None:
        """Add y^T x (m, n) for y (count, m) and x (count, n)."""
        self._sum_of(key, y, (y.shape[1], x.shape[1])).add_(y.T @ x)

    def add_mean(self, key: str, rows: Tensor) -> None:
        """Add the sum of the rows (width,)."""
        self._sum_of(key, rows, (rows.shape[1],)).add_(rows.sum(0))

    def take(self) -> dict[str, Tensor]:
        """Return all sums so far, matrices in full; the next ones start from zero."""
        sums, self._sums = self._sums, {}
        lower, self._lower = self._lower, set()
        return {key: mirror(total) if key in lower else total for key, total in sums.items()}

    def _sum_of(self, key: str, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        if key not in self._sums:
            begun = self._begin(key)
            if begun is None:
                self._sums[key] = rows.new_zeros(shape, dtype=self._dtype)
            else:
                self._sums[key] = begun.to(rows.device, self._dtype or rows.dtype)
        return self._sums[key]
