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

from dataclasses import dataclass

import torch
from torch import Tensor

from svdcli.linalg.balance import equal_norms
from svdcli.linalg.damping import Moment, Root, blocks_of, height, is_any, times_damped
from svdcli.linalg.machine import gram_eigenvalues, gram_eigh
from svdcli.linalg.solvers import Factors


@dataclass(frozen=True)
class Metric:
    """How the error of a weight (m, n) is weighed: tr(H_d D G D^T).

    inputs is G (n, n). outputs is H, None for the identity, (m,) for a diagonal or (m, m), or a
    tuple of such blocks along the diagonal, for layers that read the same input and stand one below
    the other. Both are symmetric and positive semidefinite, and one that is zero throughout says
    nothing and counts as the identity. H_d = H + damping * mean(diag H) * I, of each block by
    itself. The unit is that of the loss squared, or of the output squared without H; scaling G or H
    scales every error alike.
    """

    inputs: Tensor
    outputs: Moment | None = None
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
    inputs, outputs = counted_moments(w, metric)
    root = Root.of(outputs, metric.damping)

    # U and S^2 of K W G W^T K^T, on the short side of K W
    basis, short = None, root.times(w.to(torch.float64))
    if w.shape[0] > w.shape[1]:
        basis, short = torch.linalg.qr(short)
    values, vectors = gram_eigh(short, rank, inputs)
    values, left = values.flip(0).clamp(min=0), vectors.flip(1)
    del vectors

    # K^-1 U_r and U_r^T K W
    down = left.T @ short
    if basis is not None:
        left = basis @ left
    up, down = equal_norms(root.undo(left), down)
    tail = float(values[rank:].sum())
    return Factors(up.to(w.dtype), down.to(w.dtype), values[:rank].sqrt(), tail)


def weighted_energies(w: Tensor, metric: Metric) -> Tensor:
    """All min(m, n) squared singular values of H_d^(1/2) W G^(1/2) for w (m, n), descending, in
    float64.

    The sum from place r on is the error of `weighted` at rank r. Raises as `weighted` does.
    """
    inputs, outputs = counted_moments(w, metric)
    short = Root.of(outputs, metric.damping).times(w.to(torch.float64))
    if w.shape[0] > w.shape[1]:
        short = torch.linalg.qr(short, mode="r").R
    return gram_eigenvalues(short, inputs).flip(0).clamp(min=0)


def weighted_error(w: Tensor, approx: Tensor, metric: Metric) -> float:
    """tr(H_d D G D^T) in float64 for D = w - approx, both (m, n).

    Raises ValueError for shapes that do not fit and for a negative damping.
    """
    if w.shape != approx.shape:
        raise ValueError(
            f"approx {tuple(approx.shape)} has not the shape of the weight {tuple(w.shape)}"
        )
    inputs, outputs = counted_moments(w, metric)
    difference = w.to(torch.float64) - approx.to(torch.float64)
    right = difference if inputs is None else difference @ inputs
    if outputs is not None:
        difference = times_damped(outputs, metric.damping, difference)
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


def counted_moments(w: Tensor, metric: Metric) -> tuple[Tensor | None, Moment | None]:
    """G in float64 and H as it is, None where the identity stands for them."""
    m, n = w.shape
    g, h = metric.inputs, metric.outputs
    sizes = [] if h is None else [tuple(block.shape) for block in blocks_of(h)]
    square = all(size in (size[:1], size[:1] * 2) for size in sizes)
    if g.shape != (n, n) or not square or (h is not None and height(h) != m):
        raise ValueError(
            f"second moments {tuple(g.shape)} and {sizes} do not fit a weight of {(m, n)}"
        )
    if not metric.damping >= 0:
        raise ValueError(f"damping {metric.damping} is negative")
    inputs = g.to(torch.float64) if g.any() else None
    return inputs, None if h is None or not is_any(h) else h
