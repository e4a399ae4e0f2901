"""Roots of second moments that were measured on few samples, and are damped for it.

The moment of a group of layers is block diagonal, a block for each of them: a tuple of moments.
Each block is damped by its own mean, as it is for the layer alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

# Below this damping a Cholesky factor of H may meet a zero pivot, and eigenvectors, far dearer,
# have to do.
CHOLESKY_DAMPING = 1e-6

# H of a layer (m, m) or (m,), or the blocks of it along the diagonal.
Moment = Tensor | tuple[Tensor, ...]
_Kind = TypeVar("_Kind", bound=Moment)


def height(moment: Moment) -> int:
    """Rows of a moment, of all blocks together."""
    if isinstance(moment, tuple):
        return sum(map(len, moment))
    return len(moment)


def rows_of_blocks(moment: tuple[Tensor, ...]) -> list[slice]:
    """The rows of each block."""
    places = []
    start = 0
    for block in moment:
        places.append(slice(start, start + len(block)))
        start += len(block)
    return places


def blocks_of(moment: Moment) -> tuple[Tensor, ...]:
    """The blocks of a moment: itself, where it is in one piece."""
    return moment if isinstance(moment, tuple) else (moment,)


def each(moment: _Kind, change: Callable[[Tensor], Tensor]) -> _Kind:
    """The same change of a moment, or of each of its blocks."""
    if isinstance(moment, tuple):
        return tuple(map(change, moment))  # type: ignore[return-value]
    return change(moment)  # type: ignore[return-value]


def diagonal_of(moment: Tensor) -> Tensor:
    """The diagonal (m,) of H (m, m), or of one that is given by it."""
    return moment.diagonal() if moment.ndim == 2 else moment


def is_any(moment: Moment) -> bool:
    """Does a moment say anything: one that is zero throughout does not."""
    if isinstance(moment, tuple):
        return any(map(is_any, moment))
    return bool(moment.any())


def times_damped(moment: Moment, damping: float, x: Tensor) -> Tensor:
    """H_d x for x (m, n) and H_d = `damp(H)`, of which one block at a time is in memory."""
    if isinstance(moment, tuple):
        parts = zip(moment, rows_of_blocks(moment), strict=True)
        return torch.cat([times_damped(block, damping, x[at]) for block, at in parts])
    damped = damp(moment, damping)
    return damped @ x if damped.ndim == 2 else damped[:, None] * x


def damp(moment: _Kind, damping: float) -> _Kind:
    """H + damping * mean(diag H) * I in float64, for H (m, m) or its diagonal (m,), and for each
    block of one in blocks."""

    def damped(block: Tensor) -> Tensor:
        wide = block.to(torch.float64, copy=True)
        diagonal = wide.diagonal() if wide.ndim == 2 else wide
        diagonal.add_(damping * diagonal.mean())
        return wide

    return each(moment, damped)


def upper_root(moment: Tensor, damping: float, order: Tensor) -> Tensor:
    """The upper triangular R (m, m) in float64 with R R^T = `damp(H)` for a full H (m, m), rows and
    columns in this order. Raises torch.linalg.LinAlgError where that is not positive definite.

    H of wide layers takes gigabytes: besides it there are at most two matrices of its size.
    """
    # R is the lower Cholesky factor of the reversed matrix, reversed
    backwards = order.flip(0)
    reverse = moment[backwards[:, None], backwards].to(torch.float64)
    reverse.diagonal().add_(damping * moment.diagonal().to(torch.float64).mean())
    # the transpose, equal to it, is in LAPACK's order: the factor takes its place
    torch.linalg.cholesky(reverse.mT, out=reverse.mT)
    return reverse.mT.flip(0, 1)


def damped_root(moment: Tensor, damping: float) -> Tensor:
    """L with L L^T = `damp(H)`, lower triangular (m, m) in float64; for a diagonal H (m,), the
    diagonal of L. The identity for a full H that is zero."""
    damped = damp(moment, damping)
    if damped.ndim == 1:
        return damped.clamp(min=torch.finfo(damped.dtype).tiny).sqrt()
    if not damped.diagonal().mean() > 0:
        return torch.eye(damped.shape[0], dtype=damped.dtype, device=damped.device)
    root: Tensor = torch.linalg.cholesky(damped)
    return root


@dataclass(frozen=True)
class Root:
    """A matrix K with K^T K = H, as what multiplies by it from the left and what undoes that.

    One of five: the identity where nothing is held, `scale` (m,) for a diagonal, an upper
    `triangle` (m, m), `scale` with orthonormal `vectors` V (m, m) for K = diag(scale) V^T, or one
    of these for each of the `blocks` along the diagonal, with its rows.
    """

    scale: Tensor | None = None
    triangle: Tensor | None = None
    vectors: Tensor | None = None
    blocks: tuple[tuple[slice, Root], ...] = ()

    @staticmethod
    def of(moment: Moment | None, damping: float) -> Root:
        """The root of `damp(H)` for H (m, m) or (m,), or in blocks; None is the identity. Raises
        torch.linalg.LinAlgError where H is found indefinite."""
        if moment is None:
            return Root()
        if isinstance(moment, tuple):
            roots = [Root.of(block, damping) for block in moment]
            return Root(blocks=tuple(zip(rows_of_blocks(moment), roots, strict=True)))
        h = damp(moment, damping)
        if h.ndim == 1:
            return Root(scale=h.sqrt())
        if damping >= CHOLESKY_DAMPING:
            # the transpose, equal to it, is in LAPACK's order: the factor takes its place
            torch.linalg.cholesky(h.mT, upper=True, out=h.mT)
            return Root(triangle=h.mT)
        values, vectors = torch.linalg.eigh(h)
        noise = values[-1] * h.shape[0] * torch.finfo(torch.float64).eps
        return Root(scale=torch.where(values > noise, values, 0.0).sqrt(), vectors=vectors)

    def times(self, x: Tensor) -> Tensor:
        """K x for x (m, n)."""
        if self.blocks:
            return torch.cat([root.times(x[at]) for at, root in self.blocks])
        if self.triangle is not None:
            return self.triangle @ x
        if self.scale is None:
            return x
        turned = x if self.vectors is None else self.vectors.T @ x
        return self.scale[:, None] * turned

    def undo(self, x: Tensor) -> Tensor:
        """K^+ x for x (m, n): directions that H gives no weight become zero."""
        if self.blocks:
            return torch.cat([root.undo(x[at]) for at, root in self.blocks])
        if self.triangle is not None:
            solution: Tensor = torch.linalg.solve_triangular(self.triangle, x, upper=True)
            return solution
        if self.scale is None:
            return x
        column = self.scale[:, None]
        turned = torch.where(column > 0, x / column, 0.0)
        return turned if self.vectors is None else self.vectors @ turned

    def undo_transposed(self, x: Tensor) -> Tensor:
        """K^-T x for x (m, n), where K can be inverted or is diagonal."""
        if self.blocks:
            return torch.cat([root.undo_transposed(x[at]) for at, root in self.blocks])
        if self.triangle is None:
            return self.undo(x)
        solution: Tensor = torch.linalg.solve_triangular(self.triangle.T, x, upper=False)
        return solution
