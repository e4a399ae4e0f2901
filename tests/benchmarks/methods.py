"""Other people's ways to a low-rank weight, written anew from their papers: what quality.py
compares svdcli with.

    plain SVD     the best W' for ||W - W'||_F (Eckart and Young, 1936)
    ASVD          Yuan et al., 2023, arXiv 2312.05821: inputs scaled by their mean
                  magnitude to the power alpha
    SVD-LLM(W)    Wang et al., 2024, arXiv 2403.07378: inputs whitened by the
                  Cholesky factor of their second moments

Each takes a weight W (m, n) of y = W x, a rank r and what is known of x, and gives up (m, r) and
down (r, n) in float64. All keep r = floor(keep m n / (m + n)) in every layer, so that up and down
together have the share `keep` of W's parameters. Left out: ASVD's search for a rank a layer, which
needs the model's loss for every layer and nine ranks, and the second step of SVD-LLM(U), which fits
one factor again. test_methods.py checks each against the optimality that its paper states.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor]
_SILENT = 1e-6  # a channel this much below the loudest one is scaled no further down


@dataclass
class Inputs:
    """What a layer's inputs X (n, count) have shown: the sums of |X| (n,) and X X^T (n, n) over
    `count` tokens, in float64."""

    count: int
    magnitude: Tensor
    moment: Tensor

    @staticmethod
    def none_of(n: int) -> Inputs:
        return Inputs(
            0, torch.zeros(n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        )

    def add(self, x: Tensor) -> None:
        """Take in tokens (..., n). One batch's products are in x's dtype, the sums over batches in
        float64."""
        rows = x.reshape(-1, x.shape[-1])
        self.count += rows.shape[0]
        self.magnitude += rows.abs().double().sum(0)
        self.moment += (rows.T @ rows).double()


@torch.no_grad()
def inputs_of(
    model: nn.Module, names: Sequence[str], batches: Sequence[Tensor]
) -> dict[str, Inputs]:
    """What every named linear layer of a language model gets to see while it reads batches of token
    ids (count, length)."""
    found: dict[str, Inputs] = {}

    def look(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        x = arguments[0]
        found.setdefault(name, Inputs.none_of(x.shape[-1])).add(x)

    handles = [
        model.get_submodule(name).register_forward_pre_hook(partial(look, name)) for name in names
    ]
    try:
        for ids in batches:
            model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def even_rank(shape: Sequence[int], keep: float) -> int:
    """The largest rank at which two factors have at most the share `keep` of the weight's
    parameters, and at least 1."""
    m, n = shape
    return max(1, math.floor(keep * m * n / (m + n) + 1e-9))


# The methods --------------------------------------------------------------------------------------


def plain_svd(w: Tensor, rank: int, inputs: Inputs | None = None) -> Factors:
    """The first singular triplets of W. Nothing is asked of the inputs."""
    return _truncated(w.double(), rank)


def asvd(w: Tensor, rank: int, inputs: Inputs, alpha: float = 0.5) -> Factors:
    """W S = U Sigma V^T cut at the rank, times S^-1, with S = diag(mean |x_i| ^ alpha): the best W'
    for ||(W - W') S||_F."""
    loudness = inputs.magnitude / inputs.count
    scale = loudness.clamp(min=_SILENT * float(loudness.max())) ** alpha
    up, down = _truncated(w.double() * scale, rank)
    return up, down / scale


def svd_llm(w: Tensor, rank: int, inputs: Inputs) -> Factors:
    """W S = U Sigma V^T cut at the rank, times S^-1, with S S^T = X X^T: the best W' for ||(W - W')
    X||_F.

    S^-1 X has orthonormal rows, so leaving sigma_i out costs sigma_i (theorem 3.2), and leaving
    several out the root of the sum of their squares.
    """
    s = cholesky_factor(inputs.moment)
    up, down = _truncated(w.double() @ s, rank)
    return up, torch.linalg.solve_triangular(s, down, upper=False, left=False)


METHODS: dict[str, Callable[[Tensor, int, Inputs], Factors]] = {
    "plain": plain_svd,
    "asvd": asvd,
    "svd-llm": svd_llm,
}


def cholesky_factor(moment: Tensor) -> Tensor:
    """The lower S with S S^T = moment; one that is not positive definite gets the least multiple of
    I that helps, by tens."""
    eye = torch.eye(moment.shape[0], dtype=moment.dtype)
    mean = float(moment.diagonal().mean()) or 1.0
    for damping in (0.0, *(10.0**exponent for exponent in range(-15, 0))):
        s, failed = torch.linalg.cholesky_ex(moment + damping * mean * eye)
        if not int(failed):
            return s
    raise ValueError("the moments of the inputs are not positive semidefinite")


def _truncated(a: Tensor, rank: int) -> Factors:
    """The first `rank` singular triplets of a, the root of the singular values on either side."""
    u, sigma, vh = torch.linalg.svd(a, full_matrices=False)
    root = sigma[:rank].sqrt()
    return u[:, :rank] * root, root[:, None] * vh[:rank]


# In a model ---------------------------------------------------------------------------------------


@torch.no_grad()
def with_factors(
    model: nn.Module, factors: Mapping[str, Factors], stored: torch.dtype
) -> nn.Module:
    """A copy of the model in which the named layers have the weights that their factors stand for
    once stored in that dtype."""
    changed = copy.deepcopy(model)
    for name, (up, down) in factors.items():
        weight = changed.get_submodule(name).get_parameter("weight")
        weight.copy_(up.to(stored).to(weight.dtype) @ down.to(stored).to(weight.dtype))
    return changed
