"""Matrices of few-bit integers with scales, rounded for the error that counts.

Rounding each number to the nearest code is the best choice where errors count one by one. In the
metric tr(H D G D^T) of `linalg.whitening` they do not: what one number loses, others can make up
for. Column after column is rounded, and the error of one is spread over those to come, by the
inverse of G (GPTQ: Frantar et al., 2022, which is Babai's nearest plane on the lattice of G). Rows
are coupled by H in the same way (YAQA, 2025): block after block of rows is rounded, and the blocks
to come take up what the ones before have lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from svdcli.linalg.damping import Moment, damp, diagonal_of, is_any, rows_of_blocks, upper_root

# Largest magnitudes that are tried for a group, as a share of its own: clipping a few numbers makes
# the steps of all others finer.
_SHRINKAGES = tuple(1.0 - 0.04 * i for i in range(12))

# Columns whose errors are spread one by one before the rest gets them all at once.
_COLUMNS_AT_ONCE = 128

# Rows are rounded in so many blocks. More gained nothing: 8 took a third off the error of an
# attention layer, 16 no more.
ROW_BLOCKS = 8

# Of the mean diagonal: what keeps directions that were hardly seen from taking up every error.
DAMPING_COLUMNS = 0.01
DAMPING_ROWS = 0.1


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits, times a scale for each `group` columns of a row; one scale a row
    where group is None. Zero is a code."""

    bits: int
    group: int | None = None

    @property
    def lowest(self) -> int:
        return -(1 << self.bits - 1)

    @property
    def highest(self) -> int:
        return (1 << self.bits - 1) - 1

    def width(self, columns: int) -> int:
        """Columns that share a scale, in a matrix of so many."""
        return columns if self.group is None else self.group


@dataclass(frozen=True)
class Rounded:
    """codes (m, n) int8 and scales (m, groups): the matrix codes * scales, each scale for the
    columns of its group."""

    codes: Tensor
    scales: Tensor
    grid: Grid

    def values(self, dtype: torch.dtype) -> Tensor:
        """The matrix (m, n) that they stand for."""
        return self.codes.to(dtype) * by_column(self.scales.to(dtype), self.grid, self.codes)


def to_nearest(w: Tensor, grid: Grid, scales: Tensor) -> Rounded:
    """Every number of w (m, n) by itself, to the nearest code."""
    codes = (w / by_column(scales.to(w.dtype), grid, w)).round_()
    return Rounded(codes.clamp_(grid.lowest, grid.highest).to(torch.int8), scales, grid)


def searched_scales(
    w: Tensor, grid: Grid, dtype: torch.dtype, importance: Tensor | None = None
) -> Tensor:
    """Scales (m, groups) in `dtype` with the least squared error of rounding w (m, n) to nearest,
    of a few shrinkages of the largest magnitude in each group.

    importance (n,) weighs the columns; None weighs them alike. A group of zeros has scale 1.
    """
    m, n = w.shape
    width = grid.width(n)
    padding = (0, -n % width)
    groups = torch.nn.functional.pad(w.to(torch.float32), padding).view(m, -1, width)
    if importance is None:
        importance = w.new_ones(n)
    weights = torch.nn.functional.pad(importance.to(torch.float32), padding).view(-1, width)

    largest = groups.abs().amax(2)
    least = torch.full_like(largest, torch.inf)
    scales = torch.ones_like(largest)
    for shrinkage in _SHRINKAGES:
        # the scale as it will be stored
        trial = (largest * (shrinkage / (grid.highest + 0.5))).to(dtype).to(torch.float32)
        trial = torch.where(trial > 0, trial, 1.0)
        steps = trial[:, :, None]
        codes = (groups / steps).round_().clamp_(grid.lowest, grid.highest)
        error = (codes.mul_(steps).sub_(groups).square_() * weights).sum(2)
        better = error < least
        least = torch.where(better, error, least)
        scales = torch.where(better, trial, scales)
    return scales.to(dtype)


def rounded(
    w: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    columns: Tensor | None = None,
    rows: Moment | None = None,
    *,
    transposed: bool = False,
) -> Rounded:
    """w (m, n) on the grid, with scales in `dtype`, for a small error tr(H D G D^T).

    columns is G (n, n), rows H (m, m), its diagonal (m,) or blocks of it, whose rows are rounded
    by themselves; both are damped here. Without columns every number is rounded by itself.
    transposed gives the codes and scales of w^T (n, m): its groups are of rows of w, and there are
    no blocks. Raises torch.linalg.LinAlgError where a moment is indefinite.
    """
    if isinstance(rows, tuple):
        parts = []
        for block, at in zip(rows, rows_of_blocks(rows), strict=True):
            parts.append(rounded(w[at], grid, dtype, columns, block))
        codes = torch.cat([part.codes for part in parts])
        return Rounded(codes, torch.cat([part.scales for part in parts]), grid)
    stored = w.T if transposed else w
    if columns is None or not columns.any():
        return to_nearest(stored, grid, searched_scales(stored, grid, dtype))
    if rows is not None and not is_any(rows):
        rows = None

    # what the numbers of a group weigh beside each other; rows that H hardly tells of count too
    weights: Tensor | None = columns.diagonal()
    if transposed:
        weights = None if rows is None else damp(diagonal_of(rows), DAMPING_ROWS)
    scales = searched_scales(stored, grid, dtype, weights)

    steps = by_column(scales.to(torch.float32), grid, stored)
    codes = _codes(w, steps.T if transposed else steps, grid, columns, rows)
    return Rounded(codes.T.contiguous() if transposed else codes, scales, grid)


def _codes(w: Tensor, steps: Tensor, grid: Grid, columns: Tensor, rows: Tensor | None) -> Tensor:
    """Codes (m, n) int8 for w (m, n) and the step of each of its numbers."""
    feedback = _Feedback(columns, grid)
    if rows is None or rows.ndim == 1:
        # a diagonal H weighs rows, and tells none of another
        return feedback.codes(w, steps)
    return _in_row_blocks(w, steps, rows, feedback)


class _Feedback:
    """Rounds column after column, those that count most first, each error spread over the rest."""

    def __init__(self, columns: Tensor, grid: Grid) -> None:
        self.grid = grid
        self.order = columns.diagonal().argsort(descending=True)
        self.spread = inverse_root(columns, DAMPING_COLUMNS, self.order).to(torch.float32)

    def codes(self, w: Tensor, steps: Tensor) -> Tensor:
        """Codes (m, n) int8 for w (m, n) and the step of each of its numbers."""
        # columns as rows: what is worked on then lies together in memory
        rest = w.to(torch.float32)[:, self.order].T.contiguous()
        steps = steps[:, self.order].T.contiguous()

        codes = torch.empty_like(rest, dtype=torch.int8)
        for start in range(0, rest.shape[0], _COLUMNS_AT_ONCE):
            block = slice(start, min(start + _COLUMNS_AT_ONCE, rest.shape[0]))
            spread = self.spread[block, block]
            errors = self._round_block(rest[block], steps[block], spread, codes[block])
            rest[block.stop :] -= self.spread[block, block.stop :].T @ errors

        back = torch.empty_like(codes)
        back[self.order] = codes
        return back.T.contiguous()

    def _round_block(self, rest: Tensor, steps: Tensor, spread: Tensor, codes: Tensor) -> Tensor:
        """Fill the codes of a few columns; the error of each, in units of what it may spread."""
        errors = torch.empty_like(rest)
        for j in range(rest.shape[0]):
            code = (rest[j] / steps[j]).round_().clamp_(self.grid.lowest, self.grid.highest)
            codes[j] = code
            torch.sub(rest[j], code * steps[j], out=errors[j]).div_(spread[j, j])
            rest[j + 1 :].addr_(spread[j, j + 1 :], errors[j], alpha=-1)
        return errors


def _in_row_blocks(w: Tensor, steps: Tensor, rows: Tensor, feedback: _Feedback) -> Tensor:
    """Codes of w where H couples its rows."""
    blocks = interleaved(w.shape[0], ROW_BLOCKS)
    order = torch.cat(blocks)
    spread = inverse_root(rows, DAMPING_ROWS, order)
    rest = w.to(torch.float64)[order]

    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for block, place in zip(blocks, _consecutive(blocks), strict=True):
        codes[block] = feedback.codes(rest[place], steps[block])
        if place.stop < w.shape[0]:
            triangle = spread[place, place].T
            lost = rest[place] - codes[block] * steps[block].to(torch.float64)
            error = torch.linalg.solve_triangular(triangle, lost, upper=False)
            rest[place.stop :] -= spread[place, place.stop :].T @ error
    return codes


def interleaved(rows: int, blocks: int) -> list[Tensor]:
    """The rows of each block. Rows of one are told nothing of each other, so that neighbours, which
    are likely to be alike, come into different ones."""
    return [torch.arange(i, rows, blocks) for i in range(min(blocks, rows))]


def _consecutive(blocks: list[Tensor]) -> Iterator[slice]:
    """Where each block lies when all stand one after the other."""
    start = 0
    for block in blocks:
        yield slice(start, start + block.shape[0])
        start += block.shape[0]


def inverse_root(moment: Tensor, damping: float, order: Tensor) -> Tensor:
    """The upper triangular U (n, n) in float64 with U^T U the inverse of the damped moment, rows
    and columns in this order. Raises torch.linalg.LinAlgError where that is not positive
    definite."""
    # U = R^-1 for R R^T = the moment: no inverse is ever squared
    upper = upper_root(moment, damping, order)
    inverse = torch.zeros_like(upper).mT
    inverse.diagonal().fill_(1)
    torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
    return inverse


def by_column(scales: Tensor, grid: Grid, like: Tensor) -> Tensor:
    """The scale of every number of a matrix (m, n) such as `like`."""
    n = like.shape[1]
    if scales.shape[1] == 1:
        return scales.expand(-1, n)
    return scales.repeat_interleave(grid.width(n), dim=1)[:, :n]
