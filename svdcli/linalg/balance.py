"""Factors of equal scale."""

from __future__ import annotations

import torch
from torch import Tensor


def equal_norms(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product up @ down, (m, r) and (r, n) in float64, with equal norms of column k of up
    and row k of down, which keeps both inside the range of half-precision dtypes."""
    columns = torch.linalg.vector_norm(up, dim=0)
    rows = torch.linalg.vector_norm(down, dim=1)
    root = (columns * rows).sqrt()
    tiny = torch.finfo(torch.float64).tiny
    return up * (root / columns.clamp(min=tiny)), down * (root / rows.clamp(min=tiny))[:, None]


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product up @ down, (m, r) and (r, n), as U S^(1/2) and S^(1/2) V^T of its own SVD,
    in float64 on the way.

    Both factors then have the same scale in every direction, as suits a training that steps by the
    size of its tensors.
    """
    left, upper = torch.linalg.qr(up.to(torch.float64))
    right, lower = torch.linalg.qr(down.to(torch.float64).T)
    u, s, vh = torch.linalg.svd(upper @ lower.T)
    root = s.sqrt()
    return (left @ (u * root)).to(up.dtype), ((root[:, None] * vh) @ right.T).to(down.dtype)
