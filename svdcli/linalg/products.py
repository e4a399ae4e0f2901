"""Matrix products by the quicker of torch's two libraries.

`torch.mm` calls MKL on x86, which on an AMD processor with AVX-512 (Zen 5) was no quicker than
oneDNN held to AVX2. oneDNN, which torch calls for linear layers in its own layout, uses AVX-512
wherever there is one: it was 1.7 to 2.2 times as fast there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from svdcli.linalg.scratch import scratch

_PROCESSORS = Path("/proc/cpuinfo")
_SMALL = 64  # below it the change of layout costs what the product gains
_STRIP = 256  # rows of a Gram matrix at a time


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for a (m, k) and b (k, n)."""
    return _onednn(a, b) if _suits_onednn(a, b) else torch.mm(a, b)


def minus_product(c: Tensor, a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """out = c - a @ b for a (m, k) and b (k, n), c and out (m, n)."""
    if not _suits_onednn(a, b):
        return torch.addmm(c, a, b, alpha=-1, out=out)
    return torch.sub(c, _onednn(a, b), out=out)


def fill_gram(w: Tensor, out: Tensor, *, add: bool = False) -> None:
    """The lower triangle of W W^T (m, m) for w (m, n), written to `out` or added to it; what lies
    above it is void."""
    if _suits_onednn(w, w):
        _by_strips(w, out, add)
        return
    on_cpu = w.device.type == "cpu"
    _by_halves(w, out, int(add), 128 * torch.get_num_threads() if on_cpu else 2048)


def moment(rows: Tensor, full: int | None = None) -> Tensor:
    """rows^T rows (n, n) for rows (k, n), or its diagonal (n,) where n is above `full`."""
    if full is not None and rows.shape[1] > full:
        return rows.square().sum(0)
    out = rows.new_empty((rows.shape[1], rows.shape[1]))
    fill_gram(rows.T, out)
    return mirror(out)


def mirror(lower: Tensor) -> Tensor:
    """The symmetric matrix (m, m) whose lower triangle this is, in the same memory."""
    for start in range(0, lower.shape[0], _STRIP):
        stop = start + _STRIP
        lower[start:stop, stop:] = lower[stop:, start:stop].T
        corner = lower[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
    return lower


def _by_halves(w: Tensor, out: Tensor, beta: int, whole: int) -> None:
    half = w.shape[0] // 2
    if w.shape[0] <= whole:
        out.addmm_(w, w.T, beta=beta)
        return
    out[half:, :half].addmm_(w[half:], w[:half].T, beta=beta)
    _by_halves(w[:half], out[:half, :half], beta, whole)
    _by_halves(w[half:], out[half:, half:], beta, whole)


def _by_strips(w: Tensor, out: Tensor, add: bool) -> None:
    if not w.is_contiguous():
        w = scratch("passing", tuple(w.shape), w).copy_(
            w
        )  # slices of columns take oneDNN longer than the product
    for start in range(0, w.shape[0], _STRIP):
        strip = slice(start, start + _STRIP)
        found, place = product(w[strip], w[: strip.stop].T), out[strip, : strip.stop]
        place.add_(found) if add else place.copy_(found)


def _suits_onednn(a: Tensor, b: Tensor) -> bool:
    fits = a.dtype == torch.float32 and a.device.type == "cpu" and min(*a.shape, *b.shape) >= _SMALL
    return fits and _onednn_is_quicker()


def _onednn(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.linear(a.to_mkldnn(), b.T).to_dense()


@cache
def _onednn_is_quicker() -> bool:
    """Has the processor AVX-512, and another maker than Intel?"""
    if (
        torch.backends.cpu.get_cpu_capability() != "AVX512"
        or not torch.backends.mkldnn.is_available()
    ):
        return False
    try:
        return "GenuineIntel" not in _PROCESSORS.read_text()
    except OSError:  # not Linux
        return False
