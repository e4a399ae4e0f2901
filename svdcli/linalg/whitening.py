"""Truncation of one weight where the error that counts is the layer's output on data, or the loss
that follows from it.

For y = W x with inputs of second moment G = E[x x^T] and loss gradients at y of second moment H =
E[g g^T], the error of D = W - W' is tr(H D G D^T) = ||H^(1/2) D G^(1/2)||_F^2: the
Kronecker-factored metric of K-FAC (Martens and Grosse, 2015). H = I leaves the output error E||D
x||^2 of DRONE (2021) and SVD-LLM (2024). By Eckart and Young in that metric, with any K such that
K^T K = H and K W G W^T K^T = U S^2 U^T, the best W' of rank r is K^-1 U_r U_r^T K W, and its error
is the tail of S^2.

Nothing here takes a root, an inverse or an eigenvector of G: it may be singular, and layers that
share it have nothing to cache. The factors are within 1e-6 of the optimum as long as the tail is
above 1e-13 of the total energy. Their promised and measured errors are rounded to about 1e-17 of
it, 1e-6 of a tail at 1e-11: as much as G, already a square, can tell in float64. A root of G with
an SVD was measured to be no sharper, and is dearer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from svdcli.linalg.products import fill_gram
from svdcli.linalg.solvers import Factors, eigh_lower, eigvalsh_lower

# Below this damping a Cholesky factor of H may meet a zero pivot, and eigenvectors, far dearer,
# have to do.
CHOLESKY_DAMPING = 1e-6


@dataclass(frozen=True)
class Metric:
    """How the error of a weight (m, n) is weighed: tr(H_d D G D^T).

    inputs is G (n, n). outputs is H, None for the identity, (m,) for a diagonal or (m, m). Both are
    symmetric and positive semidefinite, and one that is zero throughout says nothing and counts as
    the identity. H_d = H + damping * mean(diag H) * I. The unit is that of the loss squared, or of
    the output squared without H; scaling G or H scales every error alike.
    """

    inputs: Tensor
    outputs: Tensor | None = None
    damping: float = 0.1


def weighted(w: Tensor, rank: int, metric: Metric) -> Factors:
    """The best factors of w (m, n) in the metric: up (m, r) and down (r, n) of equal column and row
    norms, in w's dtype.

    sigma (r,), in float64, are the largest singular values of H_d^(1/2) W G^(1/2); tail is tr(H_d D
    G D^T) before the factors are rounded to w's dtype. Without damping, directions of the output
    that H gives no weight become zero. Raises ValueError for a rank outside 1 .. min(m, n), for
    shapes that do not fit and for a negative damping; torch.linalg.LinAlgError where H_d is found
    indefinite or LAPACK does not converge.
    """
    if not 1 <= rank <= min(w.shape):
        raise ValueError(f"rank {rank} is not in 1 .. {min(w.shape)}")
    inputs, outputs = _moments(w, metric)
    apply, undo = _root(outputs, metric.damping)
    del outputs
    basis, short = None, apply(w.to(torch.float64))
    if w.shape[0] > w.shape[1]:
        basis, short = torch.linalg.qr(short)
    values, vectors = eigh_lower(_short_side(short, inputs), short.shape[0], short)
    values, left = values.flip(0).clamp(min=0), vectors[:, -rank:].flip(1)
    del vectors
    up, down = undo(left if basis is None else basis @ left), left.T @ short
    up, down = _balanced(up, down)
    return Factors(
        up.to(w.dtype), down.to(w.dtype), values[:rank].sqrt(), float(values[rank:].sum())
    )


def weighted_energies(w: Tensor, metric: Metric) -> Tensor:
    """All min(m, n) squared singular values of H_d^(1/2) W G^(1/2) for w (m, n), descending, in
    float64.

    The sum from place r on is the error of `weighted` at rank r. Raises as `weighted` does.
    """
    inputs, outputs = _moments(w, metric)
    short = _root(outputs, metric.damping)[0](w.to(torch.float64))
    if w.shape[0] > w.shape[1]:
        short = torch.linalg.qr(short, mode="r").R
    return eigvalsh_lower(_short_side(short, inputs), short.shape[0], short).flip(0).clamp(min=0)


def weighted_error(w: Tensor, approx: Tensor, metric: Metric) -> float:
    """tr(H_d D G D^T) in float64 for D = w - approx, both (m, n).

    Raises ValueError for shapes that do not fit and for a negative damping.
    """
    if w.shape != approx.shape:
        raise ValueError(
            f"approx {tuple(approx.shape)} has not the shape of the weight {tuple(w.shape)}"
        )
    inputs, outputs = _moments(w, metric)
    difference = w.to(torch.float64) - approx.to(torch.float64)
    right = difference if inputs is None else difference @ inputs
    if outputs is not None:
        difference = outputs @ difference if outputs.ndim == 2 else outputs[:, None] * difference
    return max(0.0, float((right * difference).sum()))


def refit_bias(w: Tensor, approx: Tensor, mean: Tensor, bias: Tensor | None) -> Tensor:
    """The bias b' = b + (W - W') mean (m,), which takes the mean error out of the output, for mean
    = E[x] (n,).

    What error is left is that of the centred inputs: a W' that will have this bias is best found
    with the covariance G - mean mean^T as `Metric.inputs`. The result is in the dtype of bias, or
    of w where there is none.
    """
    moved = (w.to(torch.float64) - approx.to(torch.float64)) @ mean.to(torch.float64)
    return moved.to(w.dtype) if bias is None else (moved + bias.to(torch.float64)).to(bias.dtype)


def _moments(w: Tensor, metric: Metric) -> tuple[Tensor | None, Tensor | None]:
    """G and H_d in float64, None where the identity stands for them."""
    m, n = w.shape
    g, h = metric.inputs, metric.outputs
    if g.shape != (n, n) or (h is not None and h.shape not in ((m,), (m, m))):
        sizes = tuple(g.shape), None if h is None else tuple(h.shape)
        raise ValueError(f"second moments {sizes} do not fit a weight of {(m, n)}")
    if not metric.damping >= 0:
        raise ValueError(f"damping {metric.damping} is negative")
    inputs = g.to(torch.float64) if g.any() else None
    if h is None or not h.any():
        return inputs, None
    outputs = h.to(torch.float64, copy=True)
    diagonal = outputs.diagonal() if h.ndim == 2 else outputs
    diagonal.add_(metric.damping * diagonal.mean())
    return inputs, outputs


def _root(
    h: Tensor | None, damping: float
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """x -> K x and x -> K^+ x for some K with K^T K = h."""
    if h is None:
        return (lambda x: x), (lambda x: x)
    if h.ndim == 1:
        column = h.sqrt()[:, None]
        return (lambda x: column * x), (lambda x: torch.where(column > 0, x / column, 0.0))
    if damping >= CHOLESKY_DAMPING:
        upper = torch.linalg.cholesky(h, upper=True)
        return (lambda x: upper @ x), (
            lambda x: torch.linalg.solve_triangular(upper, x, upper=True)
        )
    values, vectors = torch.linalg.eigh(h)
    kept = values > values[-1] * h.shape[0] * torch.finfo(torch.float64).eps
    root, inverse = (
        torch.where(kept, values, 0.0).sqrt(),
        torch.where(kept, values, torch.inf).rsqrt(),
    )
    return (lambda x: root[:, None] * (vectors.T @ x)), (lambda x: vectors @ (inverse[:, None] * x))


def _short_side(a: Tensor, g: Tensor | None) -> Callable[[Tensor], object]:
    """Writes a G a^T, or its lower triangle, into a tensor."""
    return partial(fill_gram, a) if g is None else lambda out: torch.mm(a @ g, a.T, out=out)


def _balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product with equal column and row norms, which keeps both inside the range of
    half-precision dtypes."""
    tall, wide = torch.linalg.vector_norm(up, dim=0), torch.linalg.vector_norm(down, dim=1)
    root = (tall * wide).sqrt()
    tiny = torch.finfo(torch.float64).tiny
    return up * (root / tall.clamp(min=tiny)), down * (root / wide.clamp(min=tiny))[:, None]
