"""Truncated SVD of one weight: the best rank-r factors, by three solvers that differ in cost.

By the theorem of Eckart and Young (1936) the matrix of rank r nearest to W in the Frobenius norm is
U_r S_r V_r^T, and its squared error is the sum of the squared singular values that were cut. Every
solver returns that promise with its factors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from svdcli.linalg.machine import (
    exact_squared_norm,
    gram_eigenvalues,
    gram_eigh,
    product,
)


@dataclass(frozen=True)
class Factors:
    """W ~ up @ down, with up (m, r) and down (r, n) of equal column and row norms sqrt(sigma).

    tail is the squared Frobenius error that the solver's own spectrum promises.
    """

    up: Tensor
    down: Tensor
    sigma: Tensor
    tail: float


def svd(w: Tensor, rank: int, seed: int = 0) -> Factors:
    """`torch.linalg.svd` of w (m, n), after a QR of the long side where w is far from square.

    Raises torch.linalg.LinAlgError where LAPACK does not converge.
    """
    if w.shape[0] < w.shape[1]:
        return transposed(svd(w.T, rank, seed))
    # the SVD of the triangle is that of w, turned by an orthonormal basis
    basis, square = None, w
    if 2 * w.shape[0] >= 3 * w.shape[1]:
        basis, square = torch.linalg.qr(w)
    u, s, vh = torch.linalg.svd(square, full_matrices=False)
    left = u[:, :rank]
    if basis is not None:
        left = product(basis, left)
    return _from_svd(left, s[:rank], vh[:rank], exact_squared_norm(s[rank:]))


def gram(w: Tensor, rank: int, seed: int = 0) -> Factors:
    """Eigenvectors Q of W W^T on the short side: up = Q_r and down = Q_r^T W, balanced as all
    factors are.

    Several times cheaper than an SVD, at the price of the squared condition number: singular values
    below sqrt(eps) of the largest drown in rounding, which the caller sees as a residual above the
    promised tail. Factors may be a `temporary`, void after the next call in this thread. Raises
    torch.linalg.LinAlgError where LAPACK does not converge.
    """
    if w.shape[0] > w.shape[1]:
        return transposed(gram(w.T, rank, seed))
    values, vectors = gram_eigh(w, rank)
    basis = vectors.flip(1)
    del vectors
    tail = values[: values.shape[0] - rank].clamp(min=0).sum(dtype=torch.float64).item()

    # the norms of the rows of down are the singular values: half of each goes to the basis
    down = product(basis.T, w, use="factor")
    sigma = torch.linalg.vector_norm(down, dim=1)
    root = sigma.sqrt()
    down.div_(root.clamp(min=torch.finfo(w.dtype).tiny)[:, None])
    return Factors(basis.mul_(root), down, sigma, tail)


def randomized(
    w: Tensor, rank: int, seed: int = 0, *, iterations: int = 2, oversampling: int = 16
) -> Factors:
    """Randomised subspace iteration: Halko, Martinsson and Tropp (2011), algorithms 4.4 and 5.1.

    Worth it for ranks below about 5 % of min(m, n). More iterations first, then more oversampling,
    where the error matters.
    """
    if w.shape[0] < w.shape[1]:
        return transposed(
            randomized(w.T, rank, seed, iterations=iterations, oversampling=oversampling)
        )
    # a random subspace, turned towards the leading singular vectors
    width = min(rank + oversampling, w.shape[1])
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(w.shape[1], width, generator=generator, dtype=torch.float32).to(w)
    basis = torch.linalg.qr(product(w, probe)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(product(w, torch.linalg.qr(product(w.T, basis)).Q)).Q

    # the SVD of w inside it
    u, s, vh = torch.linalg.svd(product(basis.T, w), full_matrices=False)
    tail = max(0.0, exact_squared_norm(w) - exact_squared_norm(s[:rank]))
    return _from_svd(basis @ u[:, :rank], s[:rank], vh[:rank], tail)


SOLVERS: dict[str, Callable[[Tensor, int, int], Factors]] = {
    "svd": svd,
    "gram": gram,
    "randomized": randomized,
}


def squared_singular_values(w: Tensor) -> Tensor:
    """All min(m, n) squared singular values of w (m, n), descending, in w's dtype."""
    short = w if w.shape[0] <= w.shape[1] else w.T
    return gram_eigenvalues(short).flip(0).clamp(min=0)


def transposed(factors: Factors) -> Factors:
    """The factors of W^T."""
    return Factors(factors.down.T, factors.up.T, factors.sigma, factors.tail)


def _from_svd(left: Tensor, sigma: Tensor, right: Tensor, tail: float) -> Factors:
    """Give each factor the square root of sigma, which keeps both inside the range of
    half-precision dtypes."""
    root = sigma.sqrt()
    return Factors(left * root, right * root[:, None], sigma, tail)
