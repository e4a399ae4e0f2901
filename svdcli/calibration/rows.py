"""Rows of tokens without padding, and running sums of their second moments."""

from __future__ import annotations

from torch import Tensor

from svdcli.linalg.machine import fill_gram, mirror
from svdcli.text.tokens import Batch


def padding_mask(batch: Batch) -> Tensor | None:
    """True for the tokens of a batch that count; None where all of them do."""
    mask = batch.get("attention_mask")
    if mask is None or bool(mask.all()):
        return None
    return mask.bool()


def without_padding(values: Tensor, mask: Tensor | None) -> Tensor:
    """(tokens, width) of values (..., width), those where mask is set. A mask of another shape says
    nothing about these values."""
    if mask is not None and mask.shape == values.shape[:-1]:
        values = values[mask.to(values.device)]
    return values.reshape(-1, values.shape[-1])


class MomentSums:
    """Second moments by key, summed over all rows that are added; for rows wider than `full`, their
    diagonals."""

    def __init__(self, full: int | None = None) -> None:
        self._full = full
        self._sums: dict[str, Tensor] = {}

    def add(self, key: str, rows: Tensor, *, whole: bool = False) -> None:
        """Rows (count, width) in float32; with whole, never the diagonal alone."""
        width = rows.shape[1]
        if not whole and self._full is not None and width > self._full:
            self._sum_of(key, rows, (width,)).add_(rows.square().sum(0))
        else:
            # The lower triangle only: the other one is filled in when the sums are taken
            fill_gram(rows.T, self._sum_of(key, rows, (width, width)), add=True)

    def add_mean(self, key: str, rows: Tensor) -> None:
        """The first moment (width,) of rows (count, width)."""
        self._sum_of(key, rows, (rows.shape[1],)).add_(rows.sum(0))

    def take(self) -> dict[str, Tensor]:
        """All sums so far, whole matrices; the next ones start from zero."""
        sums, self._sums = self._sums, {}
        return {key: mirror(value) if value.ndim == 2 else value for key, value in sums.items()}

    def _sum_of(self, key: str, rows: Tensor, shape: tuple[int, ...]) -> Tensor:
        if key not in self._sums:
            self._sums[key] = rows.new_zeros(shape)
        return self._sums[key]
