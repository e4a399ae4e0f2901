"""Factors of equal scale."""

from __future__ import annotations

import torch
from torch import Tensor


def balanced(up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The same product up @ down, (m, r) and (r, n), as U S^(1/2) and S^(1/2) V^T of its own SVD,
    in float64 on the way.

    Both factors then have the same scale in every direction, as suits a training that steps by the
    size of its tensors.
    """
    left, top = torch.linalg.qr(up.to(torch.float64))
    right, side = torch.linalg.qr(down.to(torch.float64).T)
    u, s, vh = torch.linalg.svd(top @ side.T)
    root = s.sqrt()
    return (left @ (u * root)).to(up.dtype), ((root[:, None] * vh) @ right.T).to(down.dtype)
