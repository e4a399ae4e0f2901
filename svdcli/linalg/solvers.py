"""Truncated SVD of one weight: the best rank-r factors, by three solvers that differ in cost.

By the theorem of Eckart and Young (1936) the matrix of rank r nearest to W in the Frobenius norm is
U_r S_r V_r^T, and its squared error is the sum of the squared singular values that were cut. Every
solver returns that promise with its factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from svdcli.linalg.products import fill_gram, product
from svdcli.linalg.scratch import scratch

_EXTRA = 8


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
    q, square = None, w
    if 2 * w.shape[0] >= 3 * w.shape[1]:
        q, square = torch.linalg.qr(w)
    u, s, vh = torch.linalg.svd(square, full_matrices=False)
    left = u[:, :rank] if q is None else product(q, u[:, :rank])
    return _balanced(left, s[:rank], vh[:rank], _energy(s[rank:]))


def gram(w: Tensor, rank: int, seed: int = 0) -> Factors:
    """Eigenvectors Q of W W^T on the short side: up = Q_r, down = Q_r^T W.

    Several times cheaper than an SVD, at the price of the squared condition number: singular values
    below sqrt(eps) of the largest drown in rounding, which the caller sees as a residual above the
    promised tail. Raises torch.linalg.LinAlgError where LAPACK does not converge.
    """
    if w.shape[0] > w.shape[1]:
        return transposed(gram(w.T, rank, seed))
    values, vectors = eigh_lower(partial(fill_gram, w), w.shape[0], w)
    basis = vectors[:, -rank:].flip(1)
    del vectors
    cut = values[: values.shape[0] - rank].clamp(min=0).sum(dtype=torch.float64).item()
    down = product(basis.T, w)
    sigma = torch.linalg.vector_norm(down, dim=1)
    root = sigma.sqrt()
    down.div_(root.clamp(min=torch.finfo(w.dtype).tiny)[:, None])
    return Factors(basis.mul_(root), down, sigma, cut)


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
    width = min(rank + oversampling, w.shape[1])
    generator = torch.Generator().manual_seed(seed)
    probe = torch.randn(w.shape[1], width, generator=generator, dtype=torch.float32).to(w)
    basis = torch.linalg.qr(product(w, probe)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(product(w, torch.linalg.qr(product(w.T, basis)).Q)).Q
    u, s, vh = torch.linalg.svd(product(basis.T, w), full_matrices=False)
    tail = max(0.0, _energy(w) - _energy(s[:rank]))
    return _balanced(basis @ u[:, :rank], s[:rank], vh[:rank], tail)


SOLVERS: dict[str, Callable[[Tensor, int, int], Factors]] = {
    "svd": svd,
    "gram": gram,
    "randomized": randomized,
}


def eigh_lower(fill: Callable[[Tensor], object], m: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (m,), ascending, and eigenvectors (m, m) of a positive semidefinite matrix in
    `like`'s dtype.

    `fill` writes it, at least its lower triangle, into the tensor it is given. The eigenvectors are
    `scratch`: void after the next call in this thread. Raises torch.linalg.LinAlgError where LAPACK
    does not converge.
    """
    room = _filled(fill, m, like)
    extra = room.shape[0] - m
    out = like.new_empty(m + extra), scratch("eigenvectors", (m + extra, m + extra), like).mT
    # the upper triangle of the transpose is in LAPACK's order of columns already, and quicker to
    # reduce
    values, vectors = torch.linalg.eigh(room.mT, UPLO="U", out=out)
    return values[extra:], vectors[:m, extra:]


def eigvalsh_lower(fill: Callable[[Tensor], object], m: int, like: Tensor) -> Tensor:
    """The eigenvalues alone of `eigh_lower`."""
    room = _filled(fill, m, like)
    values: Tensor = torch.linalg.eigvalsh(room.mT, UPLO="U")
    return values[room.shape[0] - m :]


def _filled(fill: Callable[[Tensor], object], m: int, like: Tensor) -> Tensor:
    """The matrix, in rows whose length in bytes is no multiple of 4096: a few rows and columns are
    added where it would be.

    Neighbours at such a distance displace each other in a cache: LAPACK took 5 to 8 % longer for
    2048, and 13 % for 1024, than with 8 rows more. What is added is an eigenspace of its own, below
    every eigenvalue of the matrix.
    """
    extra = _EXTRA if like.device.type == "cpu" and m and m * like.element_size() % 4096 == 0 else 0
    room = scratch("symmetric", (m + extra, m + extra), like)
    fill(room[:m, :m])
    if extra:
        room[m:] = 0
        room.diagonal()[m:] = -room.diagonal()[:m].amax()
    return room


def squared_singular_values(w: Tensor) -> Tensor:
    """All min(m, n) squared singular values of w (m, n), descending, in w's dtype."""
    short = w if w.shape[0] <= w.shape[1] else w.T
    return eigvalsh_lower(partial(fill_gram, short), short.shape[0], short).flip(0).clamp(min=0)


def squared_norm(w: Tensor) -> float:
    """||w||_F^2, each row summed in w's dtype and the rows in float64: in float32 to about 1e-8 of
    itself."""
    w = w if w.is_contiguous() else w.T
    step = max(1, 2**20 // w.shape[1])
    return math.fsum(_few_rows(w[start : start + step]) for start in range(0, w.shape[0], step))


def _few_rows(w: Tensor) -> float:
    rows = torch.mul(w, w, out=scratch("squares", tuple(w.shape), w)).sum(1)
    if 1e-20 < float(rows.max()) < 1e30:
        return float(rows.sum(dtype=torch.float64))
    return _energy(w)  # squares outside the range of float32


def _energy(values: Tensor) -> float:
    return float(values.to(torch.float64).square().sum())


def transposed(factors: Factors) -> Factors:
    """The factors of W^T."""
    return Factors(factors.down.T, factors.up.T, factors.sigma, factors.tail)


def _balanced(left: Tensor, sigma: Tensor, right: Tensor, tail: float) -> Factors:
    """Give each factor the square root of sigma, which keeps both inside the range of
    half-precision dtypes."""
    root = sigma.sqrt()
    return Factors(left * root, right * root[:, None], sigma, tail)
