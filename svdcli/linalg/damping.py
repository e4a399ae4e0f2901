"""Roots of second moments that were measured on few samples, and are damped for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Below this damping a Cholesky factor of H may meet a zero pivot, and eigenvectors, far dearer,
# have to do.
CHOLESKY_DAMPING = 1e-6


def damp(moment: Tensor, damping: float) -> Tensor:
    """H + damping * mean(diag H) * I in float64, for H (m, m) or its diagonal (m,)."""
    damped = moment.to(torch.float64, copy=True)
    diagonal = damped.diagonal() if damped.ndim == 2 else damped
    diagonal.add_(damping * diagonal.mean())
    return damped


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

    One of four: the identity where nothing is held, `scale` (m,) for a diagonal, an upper
    `triangle` (m, m), or `scale` with orthonormal `vectors` V (m, m) for K = diag(scale) V^T.
    """

    scale: Tensor | None = None
    triangle: Tensor | None = None
    vectors: Tensor | None = None

    @staticmethod
    def of(h: Tensor | None, damping: float) -> Root:
        """The root of H (m, m) or (m,), which has that damping in it; None is the identity. Raises
        torch.linalg.LinAlgError where H is found indefinite."""
        if h is None:
            return Root()
        if h.ndim == 1:
            return Root(scale=h.sqrt())
        if damping >= CHOLESKY_DAMPING:
            return Root(triangle=torch.linalg.cholesky(h, upper=True))
        values, vectors = torch.linalg.eigh(h)
        noise = values[-1] * h.shape[0] * torch.finfo(torch.float64).eps
        return Root(scale=torch.where(values > noise, values, 0.0).sqrt(), vectors=vectors)

    def times(self, x: Tensor) -> Tensor:
        """K x for x (m, n)."""
        if self.triangle is not None:
            return self.triangle @ x
        if self.scale is None:
            return x
        turned = x if self.vectors is None else self.vectors.T @ x
        return self.scale[:, None] * turned

    def undo(self, x: Tensor) -> Tensor:
        """K^+ x for x (m, n): directions that H gives no weight become zero."""
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
        if self.triangle is None:
            return self.undo(x)
        solution: Tensor = torch.linalg.solve_triangular(self.triangle.T, x, upper=False)
        return solution
