"""The root of a second moment that was measured on few samples."""

from __future__ import annotations

import torch
from torch import Tensor


def damped_root(moment: Tensor, damping: float) -> Tensor:
    """L with L L^T = H + damping * mean(diag H) * I, lower triangular (m, m) in float64; for a
    diagonal H (m,), the diagonal of L. The identity for a full H that is zero."""
    h = moment.to(torch.float64)
    if h.ndim == 1:
        return (h + damping * h.mean()).clamp(min=torch.finfo(h.dtype).tiny).sqrt()
    eye = torch.eye(h.shape[0], dtype=h.dtype, device=h.device)
    mean = h.diagonal().mean()
    if not mean > 0:
        return eye
    root: Tensor = torch.linalg.cholesky(h + damping * mean * eye)
    return root
